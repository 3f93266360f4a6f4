"""A partition's timers: set by handlers, due by the wall clock, fired by whoever owns the partition then.

In: what steps set and cancelled, and what was restored. Out: the timers that are due, in their order. A timer is state:
it is in the changelog, and firing it writes TimerFired to the partition itself, so that the handler meets it as an
event among others.
"""

from collections.abc import Iterable
from datetime import datetime
from heapq import heapify, heappop, heappush

from streams.changelog import Timer

__all__ = ["Timers"]


class Timers:
    """The pending timers of one partition, by lane and name."""

    __slots__ = ("_due", "_pending", "changed")

    def __init__(self, restored: Iterable[Timer] = ()) -> None:
        self._pending = {(timer.lane, timer.name): timer for timer in restored}
        # A heap; entries whose timer was moved or cancelled are stale and fall out when they come up.
        self._due = [(timer.due, timer.lane, timer.name) for timer in self._pending.values()]
        heapify(self._due)
        self.changed = False
        """Whether one was set since the owner last looked."""

    def __len__(self) -> int:
        """How many are pending."""
        return len(self._pending)

    def __contains__(self, place: tuple[str, str]) -> bool:
        """Whether (lane, name) is pending."""
        return place in self._pending

    @property
    def next_due(self) -> datetime | None:
        """When the first is due; None without any."""
        while self._due and not self._is_current(self._due[0]):
            heappop(self._due)
        return self._due[0][0] if self._due else None

    def set(self, timer: Timer) -> None:
        """Set a timer, or move the one of its lane and name."""
        self._pending[timer.lane, timer.name] = timer
        heappush(self._due, (timer.due, timer.lane, timer.name))
        self.changed = True

    def cancel(self, lane: str, name: str) -> bool:
        """Forget a timer; whether there was one."""
        return self._pending.pop((lane, name), None) is not None

    def pop_due(self, now: datetime) -> list[Timer]:
        """Take out what is due at ``now``, first the earliest."""
        fired = []
        while (due := self.next_due) is not None and due <= now:
            _, lane, name = heappop(self._due)
            fired.append(self._pending.pop((lane, name)))
        return fired

    def _is_current(self, entry: tuple[datetime, str, str]) -> bool:
        timer = self._pending.get(entry[1:])
        return timer is not None and timer.due == entry[0]
