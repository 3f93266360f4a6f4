"""The directory of agents: a projection of topic ``agents.directory``, which handlers route by (``ctx.directory``).

In: AgentRegistered and AgentHeartbeat of every processor, and the Monitor's verdicts, which are AgentHeartbeat too.
Out: for each agent's instance what it can do and how it fares. The pure part (:class:`Presence`,
:func:`presence_after`) is what the Monitor's table holds as well; :class:`AgentDirectory` is fed by a thread.

Handlers are answered from what instances say themselves, and from their silence: not by the Monitor's verdicts, so that
its death changes no result (docs/decisions/0007).
"""

import asyncio
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, Final

from pydantic import BaseModel, ConfigDict

from schemas.codec import Codec
from schemas.events import AgentHeartbeat, AgentRegistered, DirectoryEntry, Event, Health
from schemas.metadata import Envelope
from schemas.topics import topic_of
from streams.tail import Projection

__all__ = [
    "DIRECTORY_TOPIC",
    "FORGOTTEN_AFTER_MS",
    "HEARTBEAT_S",
    "MONITOR_SOURCE",
    "SILENT_AFTER_MS",
    "AgentDirectory",
    "Presence",
    "health_at",
    "presence_after",
]

DIRECTORY_TOPIC: Final = topic_of(AgentHeartbeat).name
MONITOR_SOURCE: Final = "/monitor"
"""The CloudEvents source of what the Monitor emits; its heartbeats about others are verdicts."""

HEARTBEAT_S: Final = 5.0
"""How often an instance says that it lives; at once when its health changes."""
SILENT_AFTER_MS: Final = 20_000
"""An instance that has missed four heartbeats is gone. A stopped one says so itself."""
VERDICT_MS: Final = 60_000
"""How long a verdict of the Monitor holds that it doesn't repeat: a dead Monitor leaves nobody degraded."""
FORGOTTEN_AFTER_MS: Final = 24 * 3600 * 1000
"""How long one that is gone is known as gone."""

_READ_BACK: Final = timedelta(hours=1)
"""What a starting process reads: at most some thousand records for each agent; who was gone before is unknown to it."""
_CAUGHT_UP_S: Final = 5.0
_SHOWN: Final = 8
_ORDER: Final = (Health.READY, Health.BUSY, Health.DEGRADED, Health.STARTING, Health.GONE)


class Presence(BaseModel):
    """What is known of one instance. Times are the broker's append times: one clock for all machines.

    ``seen_ms`` is when it last spoke for itself. ``verdict`` is what the Monitor said of it since, at ``verdict_ms``.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    agent: str
    instance: str
    version: str = ""
    capabilities: tuple[str, ...] = ()
    health: Health = Health.STARTING
    in_flight: int = 0
    seen_ms: int
    verdict: Health | None = None
    verdict_ms: int = 0


def presence_after(known: Presence | None, event: Event, *, source: str, at_ms: int) -> Presence | None:
    """What is known of the event's instance after it. Late and repeated events change nothing.

    >>> presence_after(None, AgentHeartbeat(name="retriever", instance="a", health=Health.READY),
    ...                source="/processors/retriever-a", at_ms=1).health
    <Health.READY: 'ready'>
    """
    if not isinstance(event, AgentRegistered | AgentHeartbeat):
        return known
    if source.startswith(MONITOR_SOURCE) and isinstance(event, AgentHeartbeat):
        if known is None or at_ms < max(known.seen_ms, known.verdict_ms):
            return known
        return known.model_copy(update={"verdict": event.health, "verdict_ms": at_ms})
    if known is None:
        known = Presence(agent=event.name, instance=event.instance, seen_ms=at_ms)
    elif at_ms < known.seen_ms:
        return known
    if isinstance(event, AgentRegistered):
        # Registering tells who it is, not how it fares; one that was gone is starting.
        health = Health.STARTING if known.health is Health.GONE else known.health
        said: dict[str, Any] = {"version": event.version, "capabilities": event.capabilities, "health": health}
    else:
        said = {"health": event.health, "in_flight": event.in_flight}
    if known.verdict is Health.GONE:
        said |= {"verdict": None}
    return known.model_copy(update={**said, "seen_ms": at_ms})


def health_at(known: Presence, now_ms: int, *, verdicts: bool = False) -> Health:
    """How the instance fares at ``now_ms``; with ``verdicts`` the Monitor's opinion counts too."""
    if known.health is Health.GONE or now_ms - known.seen_ms > SILENT_AFTER_MS:
        return Health.GONE
    if verdicts and known.verdict is not None and now_ms - known.verdict_ms <= VERDICT_MS:
        if known.verdict is Health.GONE:
            return Health.GONE
        if known.verdict is Health.DEGRADED and known.health in (Health.READY, Health.BUSY):
            return Health.DEGRADED
    return known.health


class AgentDirectory(Projection):
    """The directory as this process knows it: the port behind ``ctx.directory``.

    ``kafka`` holds librdkafka settings. ``clock`` gives seconds since the epoch; the port may look at it, since its
    answer is recorded as an effect.
    """

    def __init__(self, kafka: Mapping[str, Any], codec: Codec, *, clock: Callable[[], float] = time.time) -> None:
        self._known: dict[tuple[str, str], Presence] = {}
        self._clock = clock
        super().__init__(kafka, codec, DIRECTORY_TOPIC, since=_READ_BACK)

    def hear(self, envelope: Envelope, at_ms: int) -> None:
        """Take one event of the topic in; for the reading thread."""
        event = envelope.event
        if not isinstance(event, AgentRegistered | AgentHeartbeat):
            return
        place = event.name, event.instance
        after = presence_after(self._known.get(place), event, source=envelope.metadata.source, at_ms=at_ms)
        if after is not None:
            self._known[place] = after
        if isinstance(event, AgentRegistered):
            for old in [key for key, each in self._known.items() if at_ms - each.seen_ms > FORGOTTEN_AFTER_MS]:
                del self._known[old]

    def entries(self, *, verdicts: bool = True) -> tuple[DirectoryEntry, ...]:
        """Every instance, by agent and then by instance."""
        now_ms = int(self._clock() * 1000)
        known = sorted(self._known.copy().values(), key=lambda each: (each.agent, each.instance))
        return tuple(_entry(each, health_at(each, now_ms, verdicts=verdicts)) for each in known)

    async def lookup(self, capability: str) -> tuple[DirectoryEntry, ...]:
        """The instances that offer ``capability``, or any capability where it is empty.

        At most eight an agent, the healthiest and least busy first: where the first is gone, all are. Empty where
        nobody has announced itself, or the topic could not be read for some seconds.
        """
        if not self._tail.caught_up:
            await asyncio.to_thread(self._tail.wait_caught_up, _CAUGHT_UP_S)
        able = [
            each
            for each in self.entries(verdicts=False)
            if (capability in each.capabilities if capability else each.capabilities)
        ]
        able.sort(key=lambda each: (each.agent, _ORDER.index(each.health), each.in_flight))
        shown: dict[str, int] = {}
        found = []
        for each in able:
            shown[each.agent] = shown.get(each.agent, 0) + 1
            if shown[each.agent] <= _SHOWN:
                found.append(each)
        return tuple(found)


def _entry(known: Presence, health: Health) -> DirectoryEntry:
    return DirectoryEntry(
        agent=known.agent,
        instance=known.instance,
        version=known.version,
        capabilities=known.capabilities,
        health=health,
        in_flight=known.in_flight,
    )
