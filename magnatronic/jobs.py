"""Long work in a running system's process, begun over the control socket and asked about until it is over.

In: a name and a function that tells how far it has come. Out: :class:`Job`, whose state anybody may ask for. There is
one of each name at a time: who asks for it again while it runs is told of the one that does.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Any, Final

__all__ = ["Job", "JobState", "Jobs", "Tell"]

_LOGGER: Final = logging.getLogger(__name__)
_STOP_S: Final = 30.0

Tell = Callable[[str, int, int], None]
"""Called with what is being done, and how much of it: done, of all."""

Work = Callable[[Tell, threading.Event], Mapping[str, Any]]
"""Does it, in a thread of its own; ends soon after the event is set. Its result is what JSON can hold."""


class JobState(StrEnum):
    """How it stands with a job."""

    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"


class Job:
    """One piece of work. ``arguments`` are those that it was asked for with."""

    def __init__(self, name: str, number: int, arguments: Mapping[str, Any]) -> None:
        self.name = name
        self.number = number
        self.arguments = dict(arguments)
        self.state = JobState.RUNNING
        self._began = time.monotonic()
        self._ended: float | None = None
        self._progress: tuple[str, int, int] = ("starting", 0, 0)
        self._result: Mapping[str, Any] | None = None
        self._error = ""

    def as_dict(self) -> dict[str, Any]:
        """As JSON can hold it. ``phase``, ``done`` and ``of`` say how far it is, ``result`` what came of it."""
        phase, done, of = self._progress
        return {
            "job": self.name,
            "number": self.number,
            "arguments": self.arguments,
            "state": self.state.value,
            "phase": phase,
            "done": done,
            "of": of,
            "seconds": round((self._ended or time.monotonic()) - self._began, 1),
            "result": self._result,
            "error": self._error,
        }

    def tell(self, phase: str, done: int, of: int) -> None:
        """Note how far it is; on the job's thread."""
        self._progress = (str(phase), done, of)

    def end(self, result: Mapping[str, Any] | None, error: str) -> None:
        """Note what came of it; on the job's thread."""
        self._result, self._error = result, error
        self._ended = time.monotonic()
        self.state = JobState.FAILED if error else JobState.DONE


class Jobs:
    """The jobs of a process."""

    def __init__(self) -> None:
        self._jobs: dict[str, Job] = {}
        self._threads: list[threading.Thread] = []
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._numbers = 0

    def begin(self, name: str, arguments: Mapping[str, Any], work: Work) -> Job:
        """Begin ``work`` as ``name``, unless a job of that name is running: that one is returned."""
        with self._lock:
            before = self._jobs.get(name)
            if before is not None and before.state is JobState.RUNNING:
                return before
            self._numbers += 1
            job = self._jobs[name] = Job(name, self._numbers, arguments)
            thread = threading.Thread(target=self._run, args=(job, work), name=name, daemon=True)
            self._threads = [thread, *(other for other in self._threads if other.is_alive())]
            thread.start()
            return job

    def get(self, name: str) -> Job | None:
        """The job of this name, which may be over; None when there was none."""
        return self._jobs.get(name)

    def running(self) -> list[Job]:
        """Those that are not over."""
        return [job for job in list(self._jobs.values()) if job.state is JobState.RUNNING]

    async def stop(self) -> None:
        """Tell all to end, and wait until they have."""
        self._stopping.set()
        await asyncio.gather(*(asyncio.to_thread(thread.join, _STOP_S) for thread in self._threads))

    def _run(self, job: Job, work: Work) -> None:
        try:
            result = work(job.tell, self._stopping)
        except Exception as error:  # whoever asks for the job is told
            _LOGGER.warning("%s failed: %s", job.name, error, exc_info=error)
            job.end(None, str(error) or type(error).__name__)
        else:
            job.end(result, "")
