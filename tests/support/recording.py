"""Records tasks as live processors would, without Kafka: real agents, journals and codec, and a clock of its own.

In: what happens from outside, agents, ports. Out: the records of the log, in which every call took what it is said to
take. It keeps lanes in order, tries failed calls again, writes dead letters, fires timers and stops cancelled steps.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from heapq import heappop, heappush
from typing import Any

from agents.agent import Agent
from agents.journal import Journal
from agents.ports import Ports
from agents.step import LaneState, StepResult, concerns, failure_of, lane_of, run_failure, run_step
from schemas.codec import Codec
from schemas.events import (
    DeadLettered,
    Effect,
    Event,
    Priority,
    StepAssigned,
    StepCancelled,
    StepCancelRequested,
    TaskSubmitted,
    TimerFired,
)
from schemas.metadata import Envelope, Metadata, deterministic_id
from schemas.record import Record
from schemas.topics import key_of, topic_name

__all__ = ["START_MS", "Happening", "Recording", "record"]

START_MS = 1_767_225_600_000
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass
class Happening:
    """Something that comes from outside, so many milliseconds after the start."""

    event: Event
    at_ms: int = 0


@dataclass
class Recording:
    """One task's recording. ``latency_ms`` says how long a call takes, by its type."""

    agents: Sequence[Agent[Any]]
    topics: Mapping[str, frozenset[str]]
    ports: Ports
    codec: Codec = field(default_factory=Codec)
    latency_ms: Callable[[Effect], float] = lambda effect: 40.0
    attempts: int = 3
    start_ms: int = START_MS
    data_subjects: tuple[str, ...] = ()
    records: list[Record] = field(default_factory=list)
    _heap: list[tuple[int, int, Any]] = field(default_factory=list)
    _count: int = 0
    _offsets: dict[str, int] = field(default_factory=dict)
    _states: dict[Any, LaneState | None] = field(default_factory=dict)
    _free: dict[Any, int] = field(default_factory=dict)
    _timers: dict[Any, int] = field(default_factory=dict)
    _busy: list[dict[str, Any]] = field(default_factory=list)

    def _push(self, at: int, due: Any) -> None:
        self._count += 1
        heappush(self._heap, (at, self._count, due))

    async def run(self, happenings: Iterable[Happening]) -> list[Record]:
        priority = Priority.NORMAL
        for number, happening in enumerate(happenings):
            event = happening.event
            if isinstance(event, TaskSubmitted):
                priority = event.priority
            key = key_of(event)
            metadata = Metadata(
                deterministic_id(key, "outside", number), "/clients/test", key, self._time(happening.at_ms), "", key,
                data_subjects=self.data_subjects,
            )  # fmt: skip
            self._push(
                self.start_ms + happening.at_ms, ("write", topic_name(event, priority), Envelope(event, metadata))
            )
        while self._heap:
            at, _, (what, *rest) = heappop(self._heap)
            await getattr(self, f"_{what}")(at, *rest)
        return self.records

    def _time(self, after_ms: int) -> datetime:
        return _EPOCH + timedelta(milliseconds=self.start_ms + after_ms)

    def _append(self, at: int, topic: str, envelope: Envelope) -> Record:
        value, headers = self.codec.encode(envelope.event, envelope.metadata)
        offset = self._offsets.get(topic, 0)
        self._offsets[topic] = offset + 2  # transactions leave gaps
        record = Record(topic, 0, offset, at, envelope.metadata.subject.encode(), value, headers)
        self.records.append(record)
        return record

    async def _write(self, at: int, topic: str, envelope: Envelope, busy: Any = None) -> None:
        if busy is not None and busy["cancelled"]:
            return
        record = self._append(at, topic, envelope)
        envelope = self.codec.decode(record)
        event = envelope.event
        if isinstance(event, StepCancelRequested):
            for each in self._busy:
                if each["step"] == event.target and each["ends"] > at:
                    each["cancelled"] = True
                    for effect in each["effects"]:
                        self._append(at, "effects", effect)
                    self._append(at, "effects", each["stopped"])
        for agent in self.agents:
            if topic in self.topics[agent.name] and concerns(agent, event):
                await self._handle(at, agent, record, envelope)

    async def _fire(self, at: int, key: Any, topic: str, envelope: Envelope) -> None:
        if self._timers.get(key) == at:
            del self._timers[key]
            await self._write(at, topic, envelope)

    async def _handle(self, at: int, agent: Agent[Any], record: Record, envelope: Envelope) -> None:
        lane = agent.name, record.topic, lane_of(agent, envelope.event)
        start = max(at, self._free.get(lane, 0))
        journal = Journal(
            agent=agent.name,
            source=agent.source,
            key=key_of(envelope.event),
            cause=envelope.metadata,
            ports=self.ports,
        )
        where: dict[str, Any] = {
            "timestamp_ms": at,
            "priority": Priority(record.topic.rpartition(".")[2]),
            "state": self._states.get(lane),
            "journal": journal,
        }
        letter = None
        attempt = 1
        while True:
            try:
                result = await run_step(agent, envelope, **where)
                break
            except Exception as error:  # noqa: BLE001 - as a processor takes it
                failure = failure_of(error)
                if failure.retryable and attempt < self.attempts:
                    attempt += 1
                    journal.next_attempt()
                    continue
                result = await run_failure(agent, envelope, failure, **where)
                letter = self._letter(agent, record, envelope, failure.error_type, failure.message)
                break
        effects, ends = [], float(start)
        for made in journal.performed:
            assert isinstance(made.event, Effect)
            latency = self.latency_ms(made.event)
            ends += latency
            effects.append((int(ends), Envelope(made.event.model_copy(update={"latency_ms": latency}), made.metadata)))
        busy = None
        if isinstance(envelope.event, StepAssigned):
            busy = self._begun(agent, envelope, int(ends), [effect for _, effect in effects])
            self._busy.append(busy)
        for when, effect in effects:
            self._push(when, ("write", "effects", effect, busy))
        self._left(agent, record, envelope, result, lane, int(ends), busy)
        if letter is not None:
            self._push(int(ends), ("write", "dead-letters", letter))

    def _begun(self, agent: Agent[Any], envelope: Envelope, ends: int, effects: list[Envelope]) -> dict[str, Any]:
        event = envelope.event
        assert isinstance(event, StepAssigned)
        fact = StepCancelled(
            task_id=event.task_id,
            step_id=event.step_id,
            attempt=event.attempt,
            agent=agent.name,
            event_id=envelope.metadata.id,
        )
        cause = envelope.metadata
        metadata = Metadata(
            deterministic_id(cause.id, agent.name, "cancelled"), agent.source, event.task_id, cause.time, cause.id,
            cause.correlation_id,
        )  # fmt: skip
        stopped = Envelope(fact, metadata)
        return {"step": event.step_id, "ends": ends, "effects": effects[:1], "cancelled": False, "stopped": stopped}

    def _left(
        self, agent: Agent[Any], record: Record, envelope: Envelope, result: StepResult, lane: Any, ends: int, busy: Any
    ) -> None:
        self._states[lane], self._free[lane] = result.state, ends
        priority = Priority(record.topic.rpartition(".")[2])
        for output in result.outputs:
            self._push(ends, ("write", topic_name(output.event, priority), output, busy))
        cause = envelope.metadata
        for change in result.timers:
            key = *lane, change.name
            self._timers.pop(key, None)
            if change.due is None:
                continue
            micros = (change.due - _EPOCH) // timedelta(microseconds=1)
            event = TimerFired(task_id=cause.subject, agent=agent.name, lane=lane[2], timer=change.name, due=change.due)
            metadata = Metadata(
                deterministic_id(cause.id, agent.name, "timer", lane[2], change.name, micros), agent.source,
                cause.subject, change.due, cause.id, cause.correlation_id,
            )  # fmt: skip
            at = max(ends, micros // 1000)
            self._timers[key] = at
            self._push(at, ("fire", key, record.topic, Envelope(event, metadata)))

    @staticmethod
    def _letter(agent: Agent[Any], record: Record, envelope: Envelope, kind: str, message: str) -> Envelope:
        letter = DeadLettered(
            source_topic=record.topic,
            source_partition=record.partition,
            source_offset=record.offset,
            source_timestamp=envelope.metadata.time,
            key=record.key,
            value=record.value,
            agent=agent.name,
            error_type=kind,
            error=message,
        )
        metadata = Metadata(
            deterministic_id(record.topic, record.partition, record.offset, agent.name, "dead-letter"), agent.source,
            record.topic, envelope.metadata.time, envelope.metadata.id, envelope.metadata.correlation_id,
        )  # fmt: skip
        return Envelope(letter, metadata)


async def record(
    objective: str,
    *,
    task_id: str,
    agents: Sequence[Agent[Any]],
    topics: Mapping[str, frozenset[str]],
    ports: Ports,
    happenings: Iterable[Happening] = (),
    start_ms: int = START_MS,
    codec: Codec | None = None,
    data_subjects: tuple[str, ...] = (),
    **task: Any,
) -> list[Record]:
    """The log of one task."""
    submitted = Happening(TaskSubmitted(task_id=task_id, objective=objective, **task))
    recording = Recording(agents, topics, ports, codec or Codec(), start_ms=start_ms, data_subjects=data_subjects)
    return await recording.run([submitted, *happenings])
