"""What processors did, added up in windows. Pure: no Kafka, no Faust, no clock.

In: each processor's figures by the second (:class:`Sample`), with the times at which the broker appended them. Out:
:class:`Figures` of hopping windows, for an instance and summed for an agent. A record that is read again changes none.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Self

from pydantic import BaseModel, ConfigDict

from schemas.events import ProcessorStats

__all__ = ["STEP_MS", "WINDOW_MS", "Figures", "Sample", "windows_with"]

WINDOW_MS: Final = 60_000
"""A window's length: a minute evens out what a second does."""
STEP_MS: Final = 15_000
"""A window ends, and is judged, this often; each second counts in four of them."""


def windows_with(at_ms: int) -> range:
    """The ends of the windows that a record of ``at_ms`` counts in, oldest first.

    >>> [end - 60_000 for end in windows_with(60_000)]
    [15000, 30000, 45000, 60000]
    """
    first = at_ms - at_ms % STEP_MS + STEP_MS
    return range(first, first + WINDOW_MS, STEP_MS)


class Figures(BaseModel):
    """What one instance did in one window, or with :meth:`total` several of them.

    ``samples`` counts seconds told. ``p99_ms`` is the mean of the seconds' p99, each weighed by its events.
    ``stalled_s`` are seconds in which an offset was held up, ``stalled`` says by what. ``first_lag`` and ``lag`` are
    the first and last told. ``told_us`` is the instance's own time of its newest sample, in microseconds since the
    epoch, ``offset`` where that lay: a record that is read again changes nothing.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    samples: int = 0
    events_in: int = 0
    events_out: int = 0
    failures: int = 0
    dead_letters: int = 0
    in_flight: int = 0
    first_lag: int = 0
    lag: int = 0
    p99_ms: float = 0.0
    tokens: int = 0
    cost_usd: float = 0.0
    stalled_s: float = 0.0
    stalled: str = ""
    told_us: int = 0
    offset: int = -1

    def __add__(self, sample: "Sample") -> Self:
        """These figures and one more second; the same figures where the record is in them already."""
        if sample.offset <= self.offset:
            return self
        stats = sample.stats
        events = self.events_in + stats.events_in
        weighed = self.p99_ms * self.events_in + stats.p99_ms * stats.events_in
        held_up = stats.stalled or ("it takes nothing of what waits" if _idle_before_work(stats) else "")
        return self.model_copy(
            update={
                "samples": self.samples + 1,
                "events_in": events,
                "events_out": self.events_out + stats.events_out,
                "failures": self.failures + stats.failures,
                "dead_letters": self.dead_letters + stats.dead_letters,
                "in_flight": stats.in_flight,
                "first_lag": self.first_lag if self.samples else stats.lag,
                "lag": stats.lag,
                "p99_ms": weighed / events if events else 0.0,
                "tokens": self.tokens + stats.tokens,
                "cost_usd": self.cost_usd + stats.cost_usd,
                "stalled_s": self.stalled_s + (stats.interval_s if held_up else 0.0),
                "stalled": held_up or self.stalled,
                "told_us": sample.told_us,
                "offset": sample.offset,
            }
        )

    @classmethod
    def total(cls, several: Iterable["Figures"]) -> "Figures":
        """The figures of an agent's instances together."""
        known = list(several)
        events = sum(each.events_in for each in known)
        return cls(
            samples=max((each.samples for each in known), default=0),
            events_in=events,
            events_out=sum(each.events_out for each in known),
            failures=sum(each.failures for each in known),
            dead_letters=sum(each.dead_letters for each in known),
            in_flight=sum(each.in_flight for each in known),
            first_lag=sum(each.first_lag for each in known),
            lag=sum(each.lag for each in known),
            p99_ms=sum(each.p99_ms * each.events_in for each in known) / events if events else 0.0,
            tokens=sum(each.tokens for each in known),
            cost_usd=sum(each.cost_usd for each in known),
            stalled_s=max((each.stalled_s for each in known), default=0.0),
            stalled=next((each.stalled for each in known if each.stalled), ""),
        )


def _idle_before_work(stats: ProcessorStats) -> bool:
    """Whether events wait that it has not even fetched, and none of them was finished. Slow ones in its hands are no
    stall: each has its own time limit.
    """
    return stats.lag > stats.in_flight and stats.events_in == 0 and stats.events_out == 0


@dataclass(frozen=True, slots=True)
class Sample:
    """A second's figures: appended at ``at_ms`` and ``offset``, told by the instance's own clock at ``told_us``."""

    stats: ProcessorStats
    at_ms: int
    offset: int
    told_us: int
