"""One hop's latency: from ``produce`` of an event to the moment a read_committed consumer has its committed output.

In: a broker. Out: milliseconds at four percentiles with a histogram, at 200 and at 1,000 events/s, through our
processor in a process of its own. The events are encoded beforehand.
"""

import tempfile
from typing import Final

from bench.figures import Figure, Histogram, percentile
from bench.hop import Hop, shots_of
from bench.kafka import make_topics
from bench.samples import submission
from bench.step import OURS_TARGET, PARTITIONS
from bench.trial import Worker
from bench.workers.task import WorkerTask

__all__ = ["measure"]

PART: Final = "latency"
RATES: Final = (200, 1000)
SOURCE: Final = "tasks.high"
_WARM_UP_S: Final = 2.0
_SLICES: Final = 4


def measure(bootstrap_servers: str, *, seconds: float) -> list[Figure]:
    """Figures for each of :data:`RATES`, after ``seconds`` that warm the broker up and two more at each rate; a sample
    for each quarter of ``seconds``, but one alone for the 99.9th percentile, which a quarter has too few events for.

    Raises:
        RuntimeError: an event had no output within 30 s, or two, or the worker ended.
    """
    make_topics(bootstrap_servers, [SOURCE, OURS_TARGET], PARTITIONS)
    figures = []
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        task = WorkerTask(bootstrap_servers, "bench-latency", SOURCE, OURS_TARGET, PARTITIONS, folder)
        worker = Worker("processor_worker", task)
        try:
            with Hop(bootstrap_servers, SOURCE, OURS_TARGET, partitions=PARTITIONS, alive=worker.cpu_s) as hop:
                hop.run(shots_of(submission(number, "latency-start") for number in range(50)), 50)
                warm_up = int(max(RATES) * seconds)
                hop.run(shots_of(submission(number, "latency-warm") for number in range(warm_up)), max(RATES))
                for rate in RATES:
                    count = int(rate * (_WARM_UP_S + seconds))
                    shots = shots_of(submission(number, f"latency-{rate}") for number in range(count))
                    figures += _figures(rate, hop.run(shots, rate)[int(rate * _WARM_UP_S) :])
        finally:
            worker.stop()
    return figures


def _figures(rate: int, delays: list[float]) -> list[Figure]:
    delays_ms = [delay * 1000 for delay in delays]
    size = len(delays_ms) // _SLICES
    slices = [delays_ms[place * size : (place + 1) * size] for place in range(_SLICES)]
    figures = []
    for label, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99)):
        found = tuple(percentile(part, share) for part in slices)
        spread = Histogram.of(delays_ms) if label == "p50" else None
        figures.append(Figure(PART, f"{label} at {rate:,} events/s", "ms", found, "", spread))
    figures.append(Figure(PART, f"p99.9 at {rate:,} events/s", "ms", (percentile(delays_ms, 0.999),)))
    return figures
