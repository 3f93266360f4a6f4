"""Priorities: how long a high-priority event takes behind a hundred thousand low ones, against an idle system.

In: a broker. Out: the latency of single high-priority events, produce to committed output, with nothing else to do and
behind a backlog of low ones, for handlers that wait for nothing and for handlers that wait 20 ms for a recorded effect;
and the ratios. The events of a probe are sent one at a time, a while apart; only theirs are read.
"""

import tempfile
import time
from collections.abc import Callable
from typing import Final

from confluent_kafka.admin import AdminClient

from bench.figures import Figure, Histogram, percentile, ratio
from bench.hop import Hop, Shot, shots_of
from bench.kafka import make_topics, produce, stable_offsets
from bench.samples import submission, submissions
from bench.trial import Worker
from bench.workers.effects_worker import TARGET
from bench.workers.task import WorkerTask

__all__ = ["measure"]

PART: Final = "priority"
HANDLERS: Final = (("trivial handlers", 0.0), ("20 ms handlers", 0.02))
_PARTITIONS: Final = 4
_APART_S: Final = 0.04
_BEGUN: Final = 2000
"""Outputs of the backlog that are committed before the first probe: the worker is at full speed then."""
_START_S: Final = 60.0
_WARM_UP_S: Final = 3.0


def measure(bootstrap_servers: str, *, backlog: int, probes: int, log: Callable[[str], None]) -> list[Figure]:
    """Figures with up to ``probes`` high-priority events on each system, as many as the ``backlog`` of low ones lasts.

    Raises:
        RuntimeError: the backlog was worked off before a single probe was answered, or an output is missing.
    """
    figures = []
    for name, wait_s in HANDLERS:
        idle, behind = _measure(bootstrap_servers, f"bench.priority-{wait_s * 1000:.0f}", wait_s, backlog, probes)
        log(f"{name}: {len(behind)} probes behind the backlog")
        for label, delays in (("idle", idle), (f"behind {backlog:,}", behind)):
            figures.append(
                Figure(PART, f"p50, {name}, {label}", "ms", (percentile(delays, 0.5),), "", Histogram.of(delays))
            )
            figures.append(Figure(PART, f"p99, {name}, {label}", "ms", (percentile(delays, 0.99),)))
        medians = [percentile(behind, 0.5)], [percentile(idle, 0.5)]
        figures.append(ratio(PART, f"{name}: behind {backlog:,} low ones / idle", *medians, "p50, less is better"))
    return figures


def _measure(
    bootstrap_servers: str, stem: str, wait_s: float, backlog: int, probes: int
) -> tuple[list[float], list[float]]:
    """Milliseconds of each probe on the idle system, and behind the backlog."""
    high, low = f"{stem}.high", f"{stem}.low"
    target, others = f"{TARGET}.high", f"{TARGET}.low"
    make_topics(bootstrap_servers, [high, low, target, others, "effects"], _PARTITIONS)
    admin = AdminClient({"bootstrap.servers": bootstrap_servers})

    def run(state: str, prepare: Callable[[], None], more: Callable[[], bool]) -> list[float]:
        with tempfile.TemporaryDirectory(prefix="bench-") as folder:
            group, options = f"{stem}-{state}".replace(".", "-"), {"topics": [high, low], "wait_s": wait_s}
            task = WorkerTask(bootstrap_servers, group, high, target, _PARTITIONS, folder, options)
            worker = Worker("effects_worker", task)
            try:
                with Hop(bootstrap_servers, high, target, partitions=_PARTITIONS, alive=worker.cpu_s) as hop:
                    prepare()
                    return _probe(hop, [*shots_of(submission(number, group) for number in range(probes))], more)
            finally:
                worker.stop()

    def warm_up() -> None:
        time.sleep(_WARM_UP_S)

    idle = run("idle", warm_up, lambda: True)
    before = sum(stable_offsets(admin, others, _PARTITIONS))
    produce(bootstrap_servers, low, submissions(backlog, stem))

    def done() -> int:
        # Control records count too, so the backlog lasts a little longer than this says.
        return sum(stable_offsets(admin, others, _PARTITIONS)) - before

    def begin() -> None:
        deadline = time.monotonic() + _START_S
        while done() < _BEGUN:
            if time.monotonic() > deadline:
                raise RuntimeError(f"the worker has not begun with {low} after {_START_S:g} s")
            time.sleep(0.02)

    return idle, run("behind", begin, lambda: done() < backlog)


def _probe(hop: Hop, shots: list[Shot], more: Callable[[], bool]) -> list[float]:
    """Milliseconds of each shot, one after another while there is ``more``; the first one warms up."""
    delays: list[float] = []
    for number, shot in enumerate(shots):
        hop.send(shot)
        delay = hop.wait([shot.key])[0]
        if not more():
            break  # it may not have been behind the backlog
        if number:
            delays.append(delay * 1000)
        time.sleep(_APART_S)
    if not delays:
        raise RuntimeError("the backlog was worked off before a probe was answered; take more events")
    return delays
