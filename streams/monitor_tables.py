"""What the Monitor's parts need of their surroundings: tables with a changelog, and a way to tell.

In: keys and values. Out: :class:`Table`, which :class:`FaustTable` makes of Faust's (without importing it), and
:class:`Emit`. A change is made in memory at once and written when a part says so: the figures of a window change each
second, and are worth a message only when a record is about to count as done.
"""

import logging
from collections.abc import Awaitable, Callable, Collection, Iterable
from datetime import datetime
from typing import Any, Generic, Protocol, TypeVar

from schemas.events import Event
from streams.rules import Alert

__all__ = ["Emit", "FaustTable", "Table", "raise_alerts"]

K = TypeVar("K")
V = TypeVar("V")
log = logging.getLogger(__name__)


class Table(Protocol[K, V]):
    """A dictionary whose changelog the next process reads it back from."""

    def get(self, key: K) -> V | None:
        """What the key holds."""

    def items(self) -> Collection[tuple[K, V]]:
        """All that it holds, as it is now."""

    def hold(self, key: K, value: V) -> None:
        """Set the key, in memory alone."""

    def drop(self, key: K) -> None:
        """Forget the key, in memory alone."""

    async def write(self, key: K, partition: int = 0) -> Awaitable[Any]:
        """Send to the changelog what the key holds, or that it holds nothing; the answer comes when it is there."""


class FaustTable(Generic[K, V]):
    """A table of Faust's as a :class:`Table`. ``to`` and ``of`` turn keys into its own, and back."""

    def __init__(
        self, table: Any, to: Callable[[K], Any] = lambda key: key, of: Callable[[Any], K] = lambda key: key
    ) -> None:
        self._table = table
        self._to = to
        self._of = of

    def get(self, key: K) -> V | None:
        """What the key holds."""
        found: V | None = self._table.data.get(self._to(key))
        return found

    def items(self) -> Collection[tuple[K, V]]:
        """All that it holds."""
        return [(self._of(key), value) for key, value in self._table.data.items()]

    def hold(self, key: K, value: V) -> None:
        """Set the key, in memory."""
        self._table.data[self._to(key)] = value

    def drop(self, key: K) -> None:
        """Forget the key, in memory."""
        self._table.data.pop(self._to(key), None)

    async def write(self, key: K, partition: int = 0) -> Awaitable[Any]:
        """Send what the key holds to the changelog."""
        # Not the table's own way, which puts messages aside one by one, to be sent one by one.
        place = self._to(key)
        value = self._table.data.get(place)
        sent: Awaitable[Any] = await self._table.changelog_topic.send(
            key=place,
            value=value,
            partition=partition,
            key_serializer=self._table.key_serializer,
            value_serializer="raw" if value is None else self._table.value_serializer,
        )
        return sent


class Emit(Protocol):
    """Sends an event, and waits until it is in the log."""

    async def __call__(self, event: Event, event_id: str, at: datetime) -> None:
        """Send ``event`` with this id, of this time."""


async def raise_alerts(emit: Emit, alerts: Iterable[Alert]) -> None:
    """Send ``alerts``, one after the other."""
    for alert in alerts:
        await emit(alert.event, alert.id, alert.at)
        log.info("%s %s: %s", type(alert.event).__name__, alert.event.rule, alert.event.source)
