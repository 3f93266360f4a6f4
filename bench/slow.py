"""A slow handler: what one event that takes a minute costs ten thousand quick ones in its partition.

In: a broker. Out: the quick events' latency at 1,000 events/s, produce to committed output, with no slow handler, then
with one that waits for a recorded effect all the while; and the ratio of the 99th percentiles. All go to one partition,
so the committed offset stands still as long as the slow one runs. When it ends its output must come too.
"""

import tempfile
import time
from collections.abc import Callable
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
SOURCE: Final = "bench.slow.high"
RATE: Final = 1000
_PARTITIONS: Final = 4
_PARTITION: Final = 0
_SLICES: Final = 4
_WARM_UP: Final = 1000


def measure(bootstrap_servers: str, *, slow_s: float, quick: int, log: Callable[[str], None]) -> list[Figure]:
    """Figures with ``quick`` events beside one of ``slow_s`` seconds, and with half as many before and after it alone.

    Raises:
        RuntimeError: an event had no output, or two, or the slow one was through before the quick ones were.
    """
    target = f"{TARGET}.high"
    make_topics(bootstrap_servers, [SOURCE, target, "effects"], _PARTITIONS)
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        task = WorkerTask(bootstrap_servers, "bench-slow", SOURCE, target, _PARTITIONS, folder)
        worker = Worker("effects_worker", task)
        try:
            with Hop(bootstrap_servers, SOURCE, target, partitions=_PARTITIONS, alive=worker.cpu_s) as hop:

                def run(name: str, count: int) -> list[float]:
                    events = (submission(number, f"slow-{name}") for number in range(count))
                    return [delay * 1000 for delay in hop.run(shots_of(events, _PARTITION), RATE)]

                run("warm-up", _WARM_UP)
                alone = run("before", quick // 2)
                event = submission(0, "slow")
                slow = shots_of([event.model_copy(update={"parameters": {"wait_s": str(slow_s)}})], _PARTITION)[0]
                hop.send(slow)
                ends = time.monotonic() + slow_s
                beside = run("beside", quick)
                if time.monotonic() > ends:
                    raise RuntimeError(f"{quick} quick events took longer than the slow one of {slow_s:g} s")
                log(f"{quick:,} quick events are through; the slow one has {ends - time.monotonic():.0f} s to go")
                took = hop.wait([slow.key], timeout_s=slow_s + 30)[0]
                alone += run("after", quick // 2)
        finally:
            worker.stop()
    if took < slow_s:
        raise RuntimeError(f"the slow event took {took:.1f} s, not {slow_s:g}")
    return _figures(alone, beside, slow_s)


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
