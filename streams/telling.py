"""Tells what a process's processors do and how they fare: topics ``telemetry`` and ``agents.directory``.

In: the running processors and their readiness, looked at on the event loop. Out, through one plain idempotent producer
for all of them: ProcessorStats each second, AgentRegistered at the start and each minute, AgentHeartbeat every few
seconds and at once when an agent's health changes, ``gone`` last. They are about the process, not decided from events,
and must flow when transactions are stuck.
"""

import logging
import time
from collections import deque
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final

from confluent_kafka import KafkaException, Producer

from schemas.codec import Codec
from schemas.events import AgentHeartbeat, AgentRegistered, Event, Health, ProcessorStats
from schemas.metadata import Metadata, deterministic_id
from schemas.topics import key_of, topic_name
from streams.directory import HEARTBEAT_S
from streams.kafka import producer_settings
from streams.processor import Processor
from streams.readiness import Kind, Readiness

__all__ = ["INTERVAL_S", "Teller"]

INTERVAL_S: Final = 1.0

_REGISTER_S: Final = 60.0
_FLUSH_S: Final = 2.0
_FULL: Final = 0.9
"""A processor that may fetch no more than a tenth of what it may have in flight is busy."""
_JUDGED: Final = 30
_FEWEST_FAILURES: Final = 5
_STARTING: Final = frozenset({Kind.STARTING, Kind.NOT_JOINED, Kind.RESTORING})

log = logging.getLogger(__name__)


class _Told:
    """What was last told of one agent, and its latest figures: (failures, events) a second."""

    def __init__(self) -> None:
        self.health: Health | None = None
        self.heartbeat_at = self.registered_at = float("-inf")
        self.seconds: deque[tuple[int, int]] = deque(maxlen=_JUDGED)

    @property
    def failing(self) -> bool:
        """Whether half of the attempts in the last seconds failed, and not just one or two."""
        failures = sum(each for each, _ in self.seconds)
        return failures >= _FEWEST_FAILURES and failures >= sum(done for _, done in self.seconds)


class Teller:
    """Tells for the processors of one process, which ``instance`` names. Not to be shared between threads."""

    def __init__(self, *, codec: Codec, kafka: Mapping[str, Any], instance: str) -> None:
        self._codec = codec
        self._instance = instance
        self._producer = Producer(producer_settings(kafka, f"magnatronic-telemetry-{instance}"))
        self._told: dict[str, _Told] = {}

    def tell(self, processor: Processor, readiness: Readiness) -> None:
        """Tell of the last second; to be called once a second for each processor."""
        agent = processor.binding.agent
        told = self._told.setdefault(agent.name, _Told())
        stats = processor.stats.interval(
            agent=agent.name,
            instance=self._instance,
            interval_s=INTERVAL_S,
            stalled=readiness.stalled,
            partitions=len(processor.partitions),
        )
        told.seconds.append((stats.failures, stats.events_in))
        self._send(processor.name, stats)
        now = time.monotonic()
        if now - told.registered_at >= _REGISTER_S:
            told.registered_at = now
            self._send(
                processor.name,
                AgentRegistered(
                    name=agent.name,
                    instance=self._instance,
                    version=agent.version,
                    capabilities=agent.capabilities,
                    consumes=tuple(event.__name__ for event in agent.consumes),
                    emits=tuple(event.__name__ for event in agent.emits),
                ),
            )
        health = _health(processor, readiness, stats, failing=told.failing)
        if health is not told.health or now - told.heartbeat_at >= HEARTBEAT_S:
            told.health, told.heartbeat_at = health, now
            self._heartbeat(processor, health, stats.in_flight)
        self._producer.poll(0)

    def close(self, processors: Mapping[str, Processor]) -> None:
        """Say that they are gone, and wait a moment until that is heard. Blocks up to two seconds."""
        for processor in processors.values():
            self._heartbeat(processor, Health.GONE, 0)
        self._producer.flush(_FLUSH_S)

    def _heartbeat(self, processor: Processor, health: Health, in_flight: int) -> None:
        name = processor.binding.agent.name
        self._send(
            processor.name,
            AgentHeartbeat(name=name, instance=self._instance, health=health, in_flight=in_flight),
        )

    def _send(self, name: str, event: Event) -> None:
        now, key = datetime.now(UTC), key_of(event)
        metadata = Metadata(
            id=deterministic_id(name, type(event).__name__, now.isoformat()),
            source=f"/processors/{name}",
            subject=key,
            time=now,
        )
        value, headers = self._codec.encode(event, metadata)
        try:
            self._producer.produce(topic_name(event), value, key.encode(), headers=headers)
        except (BufferError, KafkaException) as error:
            # Figures are worth less than the work; the next second has new ones.
            log.debug("%s: %s is not told: %s", name, type(event).__name__, error)


def _health(processor: Processor, readiness: Readiness, stats: ProcessorStats, *, failing: bool) -> Health:
    kinds = {cause.kind for cause in readiness.causes}
    if not processor.joined or (kinds & _STARTING and not processor.partitions):
        return Health.STARTING
    if failing or kinds - _STARTING:
        return Health.DEGRADED
    return Health.BUSY if stats.in_flight >= _FULL * processor.binding.max_in_flight else Health.READY
