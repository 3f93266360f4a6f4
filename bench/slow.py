"""A slow handler: what one event that takes a minute costs ten thousand quick ones in its partition.

In: a broker. Out: the quick events' latency at 1,000 events/s, produce to committed output, in a partition where one
handler waits for a recorded effect all the while and in one where none does; and the ratio of the 99th percentiles.
Two workers, one for each, get a second's events in turns, so that a busy moment of the machine hits both. The slow
one's committed offset stands still as long as it runs. When it ends its output must come too.
"""

import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Final

from bench.figures import Figure, Histogram, percentile, ratio
from bench.hop import Hop, shots_of
from bench.kafka import make_topics
from bench.samples import submission
from bench.trial import Worker
from bench.workers.effects_worker import TARGET
from bench.workers.task import WorkerTask

__all__ = ["measure"]

PART: Final = "slow handler"
SLOW: Final = "bench.slow.high"
NONE: Final = "bench.quick.high"
RATE: Final = 1000
_PARTITIONS: Final = 4
_PARTITION: Final = 0
_SLICES: Final = 4
_TURN: Final = 1000
"""Events sent to one worker before it is the other's turn."""
_WARM_UP_TURNS: Final = 2


def measure(bootstrap_servers: str, *, slow_s: float, quick: int, log: Callable[[str], None]) -> list[Figure]:
    """Figures with ``quick`` events beside one of ``slow_s`` seconds, and with as many without one.

    Raises:
        RuntimeError: an event had no output, or two, or the slow one was through before the quick ones were.
    """
    target = f"{TARGET}.high"
    make_topics(bootstrap_servers, [SLOW, NONE, target, "effects"], _PARTITIONS)
    delays: dict[str, list[float]] = {SLOW: [], NONE: []}
    with ExitStack() as stack:
        workers = []
        for source in delays:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-"))
            group = source.replace(".", "-")
            worker = Worker("effects_worker", WorkerTask(bootstrap_servers, group, source, target, _PARTITIONS, folder))
            stack.callback(worker.stop)
            workers.append(worker)
        hop = stack.enter_context(
            Hop(
                bootstrap_servers,
                SLOW,
                target,
                partitions=_PARTITIONS,
                alive=lambda: [each.cpu_s() for each in workers],
            )
        )

        def take_turn(name: str, source: str) -> list[float]:
            events = (submission(number, f"{source}-{name}") for number in range(_TURN))
            return [delay * 1000 for delay in hop.run(shots_of(events, _PARTITION), RATE, source=source)]

        for turn in range(_WARM_UP_TURNS):
            for source in delays:
                take_turn(f"warm-up-{turn}", source)
        event = submission(0, "slow")
        slow = shots_of([event.model_copy(update={"parameters": {"wait_s": str(slow_s)}})], _PARTITION)[0]
        hop.send(slow)
        ends = time.monotonic() + slow_s
        for turn in range(max(1, quick // _TURN)):
            # Each goes first as often as the other.
            for source in (SLOW, NONE) if turn % 2 else (NONE, SLOW):
                delays[source] += take_turn(str(turn), source)
        if time.monotonic() > ends:
            raise RuntimeError(f"{quick} quick events took longer than the slow one of {slow_s:g} s")
        log(f"{quick:,} quick events are through; the slow one has {ends - time.monotonic():.0f} s to go")
        took = hop.wait([slow.key], timeout_s=slow_s + 30)[0]
    if took < slow_s:
        raise RuntimeError(f"the slow event took {took:.1f} s, not {slow_s:g}")
    return _figures(delays[NONE], delays[SLOW], slow_s)


def _figures(alone: list[float], beside: list[float], slow_s: float) -> list[Figure]:
    figures, p99 = [], []
    for label, delays in (("none", alone), (f"one of {slow_s:g} s", beside)):
        size = len(delays) // _SLICES
        slices = [delays[place * size : (place + 1) * size] for place in range(_SLICES)]
        for name, share in (("p50", 0.5), ("p99", 0.99)):
            found = tuple(percentile(part, share) for part in slices)
            spread = Histogram.of(delays) if name == "p50" else None
            figures.append(Figure(PART, f"{name} of the others, slow handlers: {label}", "ms", found, "", spread))
        p99.append(percentile(delays, 0.99))
    none, slow = p99
    return [*figures, ratio(PART, "p99 of the others, one slow / none", [slow], [none], "less is better")]
