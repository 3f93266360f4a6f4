"""Ends this process when its event loop stands still or it takes too much memory, from outside of it.

In: limits. Out: nothing while all goes well; else the stacks of all threads on standard error and the process's end by
SIGVTALRM, exit code 154 in a shell or container. What ran is counted before it runs (:mod:`streams.suspects`), so that
an event which does this again and again is dead-lettered by the processes that come after. A handler that merely waits
too long is the processor's to end; this is for an endless loop, a C call that does not come back, and a handler that
eats the machine's memory, which would have the kernel strike whichever process it likes.

The watching is done by a small process of its own (:mod:`streams.guard`). ``faulthandler.dump_traceback_later`` would
do for a call that holds the interpreter lock, but its clock goes on while the process is stopped: whatever was paused
for longer than the limit would be ended as soon as it goes on.
"""

import asyncio
import faulthandler
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Final, Self

from streams import guard

__all__ = ["EXIT_CODE", "Watchdog", "memory_there_mib"]

EXIT_CODE: Final = 128 + guard.FATAL
"""What a shell or container reports for a process that the watchdog ended."""

_BEAT_S: Final = 1.0
_STOP_S: Final = 2.0
_STDERR: Final = 2
_CGROUPS: Final = Path("/sys/fs/cgroup")
_MIB: Final = 1024 * 1024

log = logging.getLogger(__name__)


class Watchdog:
    """A context manager, to be entered on the event loop that it watches.

    ``loop_timeout_s`` is how long the loop may stand still: longer than the longest call that blocks it for good
    reason. Time that the process is stopped, or the machine asleep, does not count. ``memory_limit_mib`` bounds what
    the process holds apart from code and mapped files. None, or 0, is no bound; with neither nothing is started.
    """

    def __init__(self, *, loop_timeout_s: float | None = None, memory_limit_mib: int | None = None) -> None:
        self._loop_timeout_s = loop_timeout_s or 0.0
        self._memory_limit_mib = memory_limit_mib or 0
        self._beat_s = min(_BEAT_S, self._loop_timeout_s / 4) if self._loop_timeout_s else _BEAT_S
        self._guard: subprocess.Popen[bytes] | None = None
        self._next: asyncio.TimerHandle | None = None

    @property
    def guard_pid(self) -> int | None:
        """The process that watches, while there is one."""
        return None if self._guard is None else self._guard.pid

    def __enter__(self) -> Self:
        """Begins to watch."""
        if self._loop_timeout_s or self._memory_limit_mib:
            loop = asyncio.get_running_loop()
            # Written by the signal's own handler, whoever holds the interpreter lock; then the default: the end.
            faulthandler.register(guard.FATAL, file=_STDERR, all_threads=True, chain=True)
            self._start()
            self._beat(loop)
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the watch."""
        if self._next is not None:
            self._next.cancel()
            self._next = None
        if self._guard is not None:
            self._dismiss(self._guard)
            self._guard = None
            faulthandler.unregister(guard.FATAL)

    def _start(self) -> None:
        limits = str(self._loop_timeout_s), str(self._memory_limit_mib)
        self._guard = subprocess.Popen(
            [sys.executable, "-I", "-S", guard.__file__, str(os.getpid()), *limits],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            # Ctrl-C is for the watched process; this one ends after it.
            start_new_session=True,
            cwd="/",
        )
        assert self._guard.stdin is not None
        os.set_blocking(self._guard.stdin.fileno(), False)

    def _beat(self, loop: asyncio.AbstractEventLoop) -> None:
        assert self._guard is not None
        assert self._guard.stdin is not None
        try:
            os.write(self._guard.stdin.fileno(), b".")
        except BlockingIOError:
            pass  # it is stopped, and has much to read when it goes on
        except BrokenPipeError:
            log.error("the process that watches this one (%d) is gone; another one is started", self._guard.pid)
            self._dismiss(self._guard)
            self._start()
        self._next = loop.call_later(self._beat_s, self._beat, loop)

    def _dismiss(self, process: "subprocess.Popen[bytes]") -> None:
        assert process.stdin is not None
        process.stdin.close()  # unbuffered as far as we wrote: nothing is left to flush
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def memory_there_mib() -> int:
    """The memory that there is for this process, in MiB: the machine's, or its control group's where that is less."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in _group_limits():
        try:
            limits.append(int(path.read_text()))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return min(limits) // _MIB


def _group_limits() -> list[Path]:
    """Files that may hold a limit: of this process's control group and of those around it, versions 2 and 1."""
    paths = [_CGROUPS / "memory.max", _CGROUPS / "memory" / "memory.limit_in_bytes"]
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return paths
    for line in lines:
        _, controllers, name = line.split(":", 2)
        within = Path(name.lstrip("/"))
        if not controllers:
            paths += [_CGROUPS / group / "memory.max" for group in (within, *within.parents)]
        elif "memory" in controllers.split(","):
            paths += [_CGROUPS / "memory" / group / "memory.limit_in_bytes" for group in (within, *within.parents)]
    return paths
