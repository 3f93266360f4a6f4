"""Fires timers that are due: TimerFired goes to the partition whose handler set the timer.

In: the partitions that a processor owns, with their :class:`~streams.timers.Timers`. Out: an entry a partition and
moment, with the events and the tombstones of the timers. Nobody waits while nothing is pending.
"""

import asyncio
from collections.abc import Callable, Collection
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from agents.agent import Agent
from schemas.events import TimerFired
from schemas.metadata import Envelope, Metadata, deterministic_id
from streams.changelog import Timer, timer_key
from streams.messages import Messages
from streams.partition import Entry, Partition
from streams.stats import Stats
from streams.transactor import Outgoing

__all__ = ["Firing"]

_LOOK_AGAIN_S: Final = 60.0
"""Clocks may be set: what is far off is looked at again."""
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)


class Firing:
    """Watches the timers of ``partitions()``; ``add`` has an entry committed."""

    def __init__(
        self,
        agent: Agent[Any],
        messages: Messages,
        partitions: Callable[[], Collection[Partition]],
        add: Callable[[Entry], None],
        stats: Stats,
    ) -> None:
        self._agent = agent
        self._messages = messages
        self._partitions = partitions
        self._add = add
        self._stats = stats
        self._loop = asyncio.get_running_loop()
        self._next: asyncio.TimerHandle | None = None

    def look(self) -> None:
        """See to it that the first timer that is due fires; to be called when timers were set or partitions came."""
        first: datetime | None = None
        for partition in self._partitions():
            partition.timers.changed = False
            due = partition.timers.next_due
            if due is not None and (first is None or due < first):
                first = due
        self.stop()
        if first is not None:
            wait_s = max(0.0, (first - datetime.now(UTC)).total_seconds())
            self._next = self._loop.call_later(min(wait_s, _LOOK_AGAIN_S), self._fire)

    def stop(self) -> None:
        """Fire nothing more."""
        if self._next is not None:
            self._next.cancel()
            self._next = None

    def _fire(self) -> None:
        now = datetime.now(UTC)
        for partition in self._partitions():
            if partition.owned and (due := partition.timers.pop_due(now)):
                messages: list[Outgoing] = []
                for timer in due:
                    messages += self._fired(partition, timer)
                self._stats.timers += len(due)
                self._add(Entry(partition, messages))
        self.look()

    def _fired(self, partition: Partition, timer: Timer) -> list[Outgoing]:
        agent = self._agent
        event = TimerFired(task_id=timer.subject, agent=agent.name, lane=timer.lane, timer=timer.name, due=timer.due)
        micros = (timer.due - _EPOCH) // _MICROSECOND
        metadata = Metadata(
            id=deterministic_id(timer.cause, agent.name, "timer", timer.lane, timer.name, micros),
            source=agent.source,
            subject=timer.subject,
            time=timer.due,
            causation_id=timer.cause,
            correlation_id=timer.correlation,
            traceparent=timer.traceparent,
            data_subjects=timer.data_subjects,
        )
        return [
            self._messages.to(partition.topic, Envelope(event, metadata), partition.number),
            (partition.changelog, timer_key(timer.lane, timer.name), None, None, partition.number),
        ]
