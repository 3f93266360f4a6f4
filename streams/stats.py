"""A processor's figures: what it did, how long it took, what it waits for.

In: counts and times as the processor works. Out: :class:`schemas.events.ProcessorStats` for an interval.
"""

from collections import deque
from dataclasses import dataclass, field
from typing import Final

from schemas.events import ProcessorStats
from streams.dispatch import RANKS
from streams.histogram import COMMIT_BOUNDS, Histogram

__all__ = ["Stats"]

_SAMPLES: Final = 4096


def _samples() -> deque[float]:
    return deque(maxlen=_SAMPLES)


@dataclass(slots=True)
class Stats:
    """Counters since the start; latencies in seconds, a sample of the interval's.

    ``events_in`` counts events that were handled or dead-lettered and committed, ``skipped`` those that were not for
    this agent or were done before, ``events_out`` committed output events, ``failures`` failed attempts of handlers,
    ``retries`` those that are followed by another, ``journalled`` effects committed before their step was done,
    ``cancelled`` stopped steps, ``erased`` events that were refused since a data subject of theirs was forgotten,
    ``timers`` those that fired. ``in_flight``, ``lag``, ``parked`` (events that wait for
    their next attempt) and ``restore_s`` (how long the last restore took) are the latest figures, not counts.
    ``assigned``, ``revoked`` and ``lost`` count partitions that came and went.
    ``latencies``: from fetched to committed, a sample a transaction and more. ``commit_latencies``: of transactions.
    ``handler_latencies``: of attempts. ``waits``: from fetched to the first attempt, by rank. Both are samples.
    Each :meth:`interval` moves all of them into the histograms, which begin with the processor.
    """

    events_in: int = 0
    events_out: int = 0
    skipped: int = 0
    failures: int = 0
    dead_letters: int = 0
    transactions: int = 0
    aborted: int = 0
    tokens: int = 0
    cost_usd: float = 0.0
    in_flight: int = 0
    lag: int = 0
    parked: int = 0
    retries: int = 0
    journalled: int = 0
    cancelled: int = 0
    erased: int = 0
    timers: int = 0
    restore_s: float = 0.0
    assigned: int = 0
    revoked: int = 0
    lost: int = 0
    latencies: deque[float] = field(default_factory=_samples)
    commit_latencies: deque[float] = field(default_factory=_samples)
    handler_latencies: deque[float] = field(default_factory=_samples)
    waits: tuple[deque[float], ...] = field(default_factory=lambda: tuple(_samples() for _ in RANKS))
    latency_histogram: Histogram = field(default_factory=Histogram)
    commit_histogram: Histogram = field(default_factory=lambda: Histogram(COMMIT_BOUNDS))
    handler_histogram: Histogram = field(default_factory=Histogram)
    wait_histograms: tuple[Histogram, ...] = field(default_factory=lambda: tuple(Histogram() for _ in RANKS))
    _told: tuple[int, int, int, int, int, int, float] = (0, 0, 0, 0, 0, 0, 0.0)

    def interval(
        self, *, agent: str, instance: str, interval_s: float, stalled: str = "", partitions: int = 0
    ) -> ProcessorStats:
        """The figures since the last call. ``stalled`` says what holds it up, ``partitions`` how many it owns."""
        p50_ms, p99_ms = quantile_ms(self.latencies, 0.5), quantile_ms(self.latencies, 0.99)
        self._move(self.latencies, self.latency_histogram)
        self._move(self.commit_latencies, self.commit_histogram)
        self._move(self.handler_latencies, self.handler_histogram)
        for waits, histogram in zip(self.waits, self.wait_histograms, strict=True):
            self._move(waits, histogram)
        now = (
            self.events_in,
            self.events_out,
            self.failures,
            self.dead_letters,
            self.skipped,
            self.tokens,
            self.cost_usd,
        )
        events_in, events_out, failures, dead_letters, skipped, tokens, cost = (
            new - old for new, old in zip(now, self._told, strict=True)
        )
        self._told = now
        return ProcessorStats(
            source=f"{agent}/{instance}",
            agent=agent,
            instance=instance,
            interval_s=interval_s,
            events_in=int(events_in),
            events_out=int(events_out),
            failures=int(failures),
            dead_letters=int(dead_letters),
            in_flight=self.in_flight,
            lag=self.lag,
            p50_ms=p50_ms,
            p99_ms=p99_ms,
            tokens=int(tokens),
            cost_usd=max(cost, 0.0),
            stalled=stalled,
            partitions=partitions,
            parked=self.parked,
            skipped=int(skipped),
        )

    @staticmethod
    def _move(samples: "deque[float]", histogram: Histogram) -> None:
        histogram.add(samples)
        samples.clear()


def quantile_ms(samples: "deque[float]", quantile: float) -> float:
    """A quantile of samples in seconds, in milliseconds; 0 where there are none."""
    ordered = sorted(samples)
    return round(ordered[int(quantile * (len(ordered) - 1))] * 1000, 3) if ordered else 0.0
