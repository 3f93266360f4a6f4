"""Calls in flight: how many slow calls one process waits for at once on four partitions, and what they cost.

In: a broker. Out: the most calls that were in flight, events/s, CPU an event and the process's memory. Each event makes
one recorded call of two seconds: the call's result is journalled, recorded in ``effects``, and given to the handler,
which answers. Every output must be there, once.
"""

from collections import Counter
from typing import Final

from bench.figures import Figure
from bench.kafka import make_topics, produce
from bench.samples import submissions
from bench.trial import run_trial
from bench.workers.effects_worker import TARGET

__all__ = ["measure"]

PART: Final = "in flight"
SOURCE: Final = "bench.in-flight"
CALL_S: Final = 2.0
CONCURRENCY: Final = 10_000
_PARTITIONS: Final = 4
_MIB: Final = 2**20


def measure(bootstrap_servers: str, *, events: int) -> list[Figure]:
    """Figures over ``events`` events, in a topic of their own. Not to be called twice on one broker.

    Raises:
        RuntimeError: outputs were lost or doubled.
    """
    target = f"{TARGET}.normal"
    make_topics(bootstrap_servers, [SOURCE, target, "effects"], _PARTITIONS)
    produce(bootstrap_servers, SOURCE, submissions(events, "in-flight"))
    options = {"wait_s": CALL_S, "concurrency": CONCURRENCY, "max_in_flight": 2 * CONCURRENCY}
    trial = run_trial(
        "effects_worker",
        bootstrap_servers,
        group="bench-in-flight",
        source=SOURCE,
        target=target,
        partitions=_PARTITIONS,
        wanted=events,
        all_of_it=True,
        options=options,
    )
    seen = Counter(output.key for output in trial.outputs)
    if len(seen) != events or seen.total() != events:
        raise RuntimeError(f"{len(seen)} of {events} tasks have an output, and {seen.total() - len(seen)} are doubled")
    report = trial.report
    before, peak, calls = report["idle_rss"], report["peak_rss"], report["peak_calls"]
    return [
        Figure(PART, "calls in flight at once, at most", "calls", (calls,), f"calls of {CALL_S:g} s, 4 partitions"),
        Figure(PART, "events, each with a recorded call", "events/s", (trial.rate,), f"over {trial.events:,}"),
        Figure(PART, "CPU", "s/1k events", (trial.cpu_s_per_1k,)),
        Figure(PART, "memory of the process, at most", "MiB", (peak / _MIB,), f"{before / _MIB:.0f} before"),
        Figure(PART, "memory a call in flight", "KiB", ((peak - before) / calls / 1024,)),
    ]
