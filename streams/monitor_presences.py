"""The Monitor's directory: who is there, and who has fallen silent.

In: events of topic ``agents.directory``, whose times tell the time. Out: a verdict ``gone`` for each instance that has
said nothing for a while and can't say so itself. What follows from an event is in :mod:`streams.directory`.
"""

from collections.abc import Awaitable
from datetime import UTC, datetime
from typing import Any, Final

from schemas.events import AgentHeartbeat, AgentRegistered, Health
from schemas.metadata import Envelope, deterministic_id
from streams.directory import FORGOTTEN_AFTER_MS, Presence, health_at, presence_after
from streams.monitor_tables import Emit, Table

__all__ = ["Presences"]

_LOOK_MS: Final = 1_000
"""How often the silent ones are looked for: with thousands of instances a look at all for each heartbeat would be most
of the work.
"""


class Presences:
    """Keeps a table of instances by ``<agent>/<instance>``."""

    def __init__(self, presences: Table[str, Presence], emit: Emit) -> None:
        self._presences = presences
        self._emit = emit
        self._looked_ms = 0

    async def take(self, envelope: Envelope, at_ms: int) -> Awaitable[Any] | None:
        """Take in an event that was appended at ``at_ms``. When the answer is done (None: now), the record is."""
        event = envelope.event
        if not isinstance(event, AgentRegistered | AgentHeartbeat):
            return None
        place = f"{event.name}/{event.instance}"
        known = self._presences.get(place)
        after = presence_after(known, event, source=envelope.metadata.source, at_ms=at_ms)
        written = None
        if after is not None and after is not known:
            self._presences.hold(place, after)
            written = await self._presences.write(place)
        if abs(at_ms - self._looked_ms) >= _LOOK_MS:
            self._looked_ms = at_ms
            await self._look(at_ms)
        return written

    async def _look(self, at_ms: int) -> None:
        """Forget who is long gone, and say who is."""
        for place, each in self._presences.items():
            if at_ms - each.seen_ms > FORGOTTEN_AFTER_MS:
                self._presences.drop(place)
                await self._presences.write(place)
            elif Health.GONE not in (each.health, each.verdict) and health_at(each, at_ms) is Health.GONE:
                verdict = AgentHeartbeat(name=each.agent, instance=each.instance, health=Health.GONE)
                event_id = deterministic_id("verdict", each.agent, each.instance, Health.GONE.value, each.seen_ms)
                await self._emit(verdict, event_id, datetime.fromtimestamp(at_ms / 1000, UTC))
                said = {"verdict": Health.GONE, "verdict_ms": at_ms}
                self._presences.hold(place, each.model_copy(update=said))
                await (await self._presences.write(place))
