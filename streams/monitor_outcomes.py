"""The Monitor's look at outcomes: a task that ended twice is told of.

In: events of topic ``task.outcomes``, each with its place. Out: AlertRaised by rule ``conflict``. A table remembers how
the latest tasks ended; a partition's oldest are forgotten, by their offsets.
"""

from collections import deque
from collections.abc import Awaitable
from datetime import UTC, datetime
from typing import Any, Final

from pydantic import BaseModel, ConfigDict

from schemas.metadata import Envelope
from streams.alerting import OUTCOMES, conflict_of
from streams.monitor_tables import Emit, Table, raise_alerts

__all__ = ["Outcome", "Outcomes"]

_REMEMBERED: Final = 50_000
"""Outcomes a partition that are held against later ones, some 300 bytes each."""


class Outcome(BaseModel):
    """How a task ended: the event's id and type, and where it lay."""

    model_config = ConfigDict(frozen=True)

    id: str
    type: str
    partition: int
    offset: int


class Outcomes:
    """Holds each outcome against an earlier one of the same task; ``remembered`` of a partition's are known."""

    def __init__(self, ended: Table[str, Outcome], emit: Emit, *, remembered: int = _REMEMBERED) -> None:
        self._ended = ended
        self._emit = emit
        self._remembered = remembered
        self._recent: dict[int, deque[str]] = {}

    def forget_derived(self) -> None:
        """Forget what follows from the table, which holds something else now."""
        self._recent = {}

    async def take(self, envelope: Envelope, partition: int, offset: int, at_ms: int) -> Awaitable[Any] | None:
        """Compare the event that was appended at ``at_ms``. When the answer is done (None: now), the record is."""
        event = envelope.event
        if not isinstance(event, OUTCOMES):
            return None
        outcome = Outcome(id=envelope.metadata.id, type=type(event).__name__, partition=partition, offset=offset)
        known = self._ended.get(event.task_id)
        if known is None:
            return await self._remember(event.task_id, outcome)
        at = datetime.fromtimestamp(at_ms / 1000, UTC)
        alert = conflict_of(event.task_id, (known.id, known.type), (outcome.id, outcome.type), at)
        await raise_alerts(self._emit, [] if alert is None else [alert])
        return None

    async def _remember(self, task_id: str, outcome: Outcome) -> Awaitable[Any]:
        recent = self._recent.get(outcome.partition)
        if recent is None:
            mine = [(each.offset, key) for key, each in self._ended.items() if each.partition == outcome.partition]
            recent = self._recent[outcome.partition] = deque(key for _, key in sorted(mine))
        recent.append(task_id)
        self._ended.hold(task_id, outcome)
        written = await self._ended.write(task_id, outcome.partition)
        while len(recent) > self._remembered:
            oldest = recent.popleft()
            self._ended.drop(oldest)
            await self._ended.write(oldest, outcome.partition)
        return written
