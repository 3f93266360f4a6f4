"""One trial: a worker process on a filled topic, watched from outside until its outputs are committed.

In: the worker's module, its task, how many outputs are wanted. Out: :class:`Trial`: events/s and CPU seconds over the
steady part of the run, and every committed output for checks. Nothing is read while the worker runs: last stable
offsets are sampled, and what lay below each is counted afterwards.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import orjson
import psutil
from confluent_kafka.admin import AdminClient

from bench.kafka import Output, committed_counts, read_between, stable_offsets
from bench.workers.task import WorkerTask

__all__ = ["Sample", "Trial", "Worker", "run_trial", "steady_part"]

_ROOT: Final = Path(__file__).resolve().parent.parent
_SAMPLE_S: Final = 0.02
_SETTLED_S: Final = 1.0
_STALLED_S: Final = 30.0
_STOP_S: Final = 20.0
_WARM_UP: Final = 0.1
"""The share of the outputs that passes before the clock starts."""


@dataclass(frozen=True, slots=True)
class Trial:
    """``rate`` in events/s, ``cpu_s_per_1k`` in CPU seconds of the worker per 1,000 events, both over ``events``.

    ``report`` is what the worker wrote into ``report.json`` of its folder, if it did.
    """

    rate: float
    cpu_s_per_1k: float
    events: int
    commits: int
    outputs: list[Output]
    report: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Sample:
    """Last stable offsets by partition, seen ``at`` a time (s), when the worker had used ``cpu_s`` CPU seconds."""

    at: float
    offsets: list[int]
    cpu_s: float


class Worker:
    """A worker process, its output in a file. It gets SIGTERM at the end, and ends by itself if this process dies."""

    def __init__(self, module: str, task: WorkerTask) -> None:
        self._module = module
        self._log_path = Path(task.folder) / "worker.log"
        environment = {**os.environ, "PYTHONPATH": str(_ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
        with self._log_path.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", f"bench.workers.{module}", task.as_json()],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                cwd=task.folder,
                env=environment,
            )
        self._measured = psutil.Process(self._process.pid)

    def cpu_s(self) -> float:
        """CPU seconds, user and system, that the worker has used.

        Raises:
            RuntimeError: it has ended.
        """
        if self._process.poll() is not None:
            raise RuntimeError(f"worker {self._module} ended early: {self.last_lines()}")
        if self._measured.status() == psutil.STATUS_ZOMBIE:
            return 0.0
        times = self._measured.cpu_times()
        return float(times.user + times.system)

    def children(self) -> int:
        """How many processes the worker has started and not ended."""
        return len(self._measured.children(recursive=True))

    def stop(self) -> None:
        """SIGTERM, then SIGKILL when that takes more than 20 s."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()

    def report(self) -> dict[str, float]:
        """What it wrote into ``report.json`` as it ended; empty when it wrote none."""
        path = self._log_path.parent / "report.json"
        return dict(orjson.loads(path.read_bytes())) if path.exists() else {}

    def last_lines(self) -> str:
        """The end of what it wrote."""
        return self._log_path.read_text(errors="replace")[-3000:].strip() or "(it wrote nothing)"


def run_trial(
    module: str,
    bootstrap_servers: str,
    *,
    group: str,
    source: str,
    target: str,
    partitions: int,
    wanted: int,
    all_of_it: bool,
    options: Mapping[str, Any] | None = None,
) -> Trial:
    """Run ``bench.workers.<module>``, with its ``options``, until ``wanted`` outputs are committed to ``target``.

    With ``all_of_it`` the run goes on until nothing more is committed, so that doubles would show.

    Raises:
        RuntimeError: the worker ended early, stalled for 30 s, or committed too rarely to be measured.
    """
    admin = AdminClient({"bootstrap.servers": bootstrap_servers})
    start = stable_offsets(admin, target, partitions)
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        task = WorkerTask(bootstrap_servers, group, source, target, partitions, folder, dict(options or {}))
        worker = Worker(module, task)
        try:
            samples = _watch(worker, admin, target, start, wanted, all_of_it=all_of_it)
            if worker.children():
                raise RuntimeError(f"worker {module} has started processes, whose CPU time would be missed")
        finally:
            worker.stop()
        report = worker.report()
    outputs = read_between(bootstrap_servers, target, start, stable_offsets(admin, target, partitions))
    return replace(steady_part(module, samples, outputs, wanted), report=report)


def _watch(
    worker: Worker, admin: AdminClient, target: str, start: Sequence[int], wanted: int, *, all_of_it: bool
) -> list[Sample]:
    samples: list[Sample] = []
    moved_at, last = time.monotonic(), list(start)
    while True:
        offsets = stable_offsets(admin, target, len(start))
        now = time.monotonic()
        if offsets != last or not samples:
            samples.append(Sample(now, offsets, worker.cpu_s()))
        if offsets != last:
            moved_at, last = now, offsets
        # Control records count here too, so this may be a little early; what settles afterwards is not measured.
        enough = sum(offsets) - sum(start) >= wanted
        if enough and (not all_of_it or now - moved_at > _SETTLED_S):
            return samples
        if now - moved_at > _STALLED_S:
            raise RuntimeError(
                f"no output for {_STALLED_S:g} s, {sum(offsets) - sum(start)} of {wanted} offsets written; the worker "
                f"said: {worker.last_lines()}"
            )
        worker.cpu_s()
        time.sleep(_SAMPLE_S)


def steady_part(module: str, samples: Sequence[Sample], outputs: list[Output], wanted: int) -> Trial:
    """Rate and CPU between the first commit after the warm-up and the last but one: the last commit of a run waits for
    a timer, not for work.
    """
    counts = committed_counts(outputs, [sample.offsets for sample in samples])
    changes = [place for place in range(1, len(counts)) if counts[place] > counts[place - 1]]
    steady = [place for place in changes if counts[place] >= wanted * _WARM_UP][:-1]
    if len(steady) < 2:
        raise RuntimeError(f"{module} committed {len(changes)} times only; that is too few to measure, use more events")
    first, last = samples[steady[0]], samples[steady[-1]]
    events = counts[steady[-1]] - counts[steady[0]]
    rate = events / (last.at - first.at)
    return Trial(rate, (last.cpu_s - first.cpu_s) / events * 1000, events, len(changes), outputs)
