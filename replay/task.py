"""Decides one task again, from the log, and holds every output against the recorded one.

In: a task's records (inputs, effects, outputs) and the agents' code. Each step is run by the same
:func:`agents.step.run_step` that ran it live, with the recorded effects in place of the outside world. Out: a
:class:`ReplayReport` with the hash of every output, recorded and re-decided; equal hashes prove that the recorded
decisions are the ones this code makes. A step that was cancelled is not decided again: the log says why it has no
outputs. A fired timer must be one that a step decided now has set.
"""

import asyncio
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from typing import Any

from agents.agent import Agent
from agents.errors import NondeterminismError
from agents.journal import Journal
from agents.step import LaneState, StepResult, concerns, failure_of, lane_of, run_failure, run_step
from replay.errors import OpenTaskError, UnknownTaskError
from replay.kafka_log import KafkaLog
from replay.selection import Selection
from schemas.codec import Codec
from schemas.events import (
    Effect,
    Event,
    StepCancelled,
    TaskCancelled,
    TaskCompleted,
    TaskExpired,
    TaskFailed,
    TimerFired,
)
from schemas.metadata import REDRIVE_HEADER, Envelope, deterministic_id
from schemas.record import Header, Record
from schemas.topics import TOPICS, key_of, priority_of, topic_name

__all__ = ["OutputCheck", "ReplayReport", "ReplayedStep", "record_hash", "redecide", "replay_task"]

_OUTCOMES = (TaskCompleted, TaskFailed, TaskExpired, TaskCancelled)
_NOT_DECIDED = "traceparent"
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def record_hash(topic: str, key: bytes | None, value: bytes | None, headers: Iterable[Header]) -> str:
    """The SHA-256 (hex) of a record as decided: topic, key, value and headers, but for the trace context."""
    digest = sha256()
    parts: list[bytes | None] = [topic.encode(), key, value]
    for name, content in headers:
        if name != _NOT_DECIDED:
            parts += [name.encode(), content]
    for part in parts:  # lengths first, so that no two different records read the same
        digest.update(b"-" if part is None else len(part).to_bytes(8) + part)
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class OutputCheck:
    """One output: its type and id, and its hash as recorded and as decided now; None where there is no such output."""

    event_type: str
    event_id: str
    topic: str
    recorded_hash: str | None
    redecided_hash: str | None

    @property
    def same(self) -> bool:
        """Whether the recorded output is the one decided now."""
        return self.recorded_hash == self.redecided_hash


@dataclass(frozen=True, slots=True)
class ReplayedStep:
    """One event's handling by one agent, decided again. ``difference`` is empty when everything is as recorded."""

    agent: str
    event_type: str
    event_id: str
    topic: str
    partition: int
    offset: int
    effects: int
    outputs: tuple[OutputCheck, ...]
    difference: str = ""

    @property
    def ok(self) -> bool:
        """Whether every output and every effect is as recorded."""
        return not self.difference and all(output.same for output in self.outputs)


@dataclass(frozen=True, slots=True)
class ReplayReport:
    """What deciding a task again showed, step by step in the order of the log."""

    task_id: str
    steps: tuple[ReplayedStep, ...]

    @property
    def ok(self) -> bool:
        """Whether every step decides as recorded."""
        return all(step.ok for step in self.steps)

    @property
    def outputs(self) -> int:
        """How many outputs were compared."""
        return sum(len(step.outputs) for step in self.steps)

    @property
    def digest(self) -> str:
        """The SHA-256 (hex) over all recorded output hashes in order: one name for this history."""
        digest = sha256()
        for step in self.steps:
            for output in step.outputs:
                digest.update((output.recorded_hash or "-").encode())
        return digest.hexdigest()

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON can hold it."""
        return {
            "task_id": self.task_id,
            "ok": self.ok,
            "outputs": self.outputs,
            "digest": self.digest,
            "steps": [{**asdict(step), "ok": step.ok} for step in self.steps],
        }


def replay_task(task_id: str, *, agents: Sequence[Agent[Any]], kafka: Mapping[str, Any], codec: Codec) -> ReplayReport:
    """Read the task's history from the log and decide it again.

    Raises:
        UnknownTaskError: the log holds nothing of this task.
        OpenTaskError: the task has no outcome yet.
        LogReadError: the log could not be read.
    """
    topics = [name for topic in TOPICS if topic.key == "task_id" for name in topic.names()]
    selection = Selection(topics=frozenset(topics), tasks=frozenset({task_id}))
    with KafkaLog(kafka) as log:
        records = [record for batch in log.read(selection) for record in batch.records]
    if not records:
        raise UnknownTaskError(
            f'the log holds no task {task_id!r}; `magnatronic query "select * from tasks"` lists them'
        )
    history = [(record, codec.decode(record)) for record in records]
    if not any(isinstance(envelope.event, _OUTCOMES) for _, envelope in history):
        raise OpenTaskError(f"task {task_id!r} has no outcome yet; replay it when it is done")
    return asyncio.run(redecide(task_id, history, agents=agents, codec=codec))


async def redecide(
    task_id: str, history: Sequence[tuple[Record, Envelope]], *, agents: Sequence[Agent[Any]], codec: Codec
) -> ReplayReport:
    """Decide ``history`` again: a task's records with their events, in offset order within each partition.

    Only the order within a lane matters to the decisions, and a lane lies in one partition.
    """
    recorded = _Recorded(history)
    states: dict[tuple[str, str, int, str], LaneState | None] = {}
    steps = []
    for record, envelope in _by_time(history):
        for agent in agents:
            handled = agent.name, envelope.metadata.id
            if _handles(agent, record, envelope.event) and handled not in recorded.cancelled:
                lane = (agent.name, record.topic, record.partition, lane_of(agent, envelope.event))
                step, states[lane] = await _redecide_step(agent, record, envelope, states.get(lane), recorded, codec)
                steps.append(step)
    return ReplayReport(task_id, tuple(steps))


def _handles(agent: Agent[Any], record: Record, event: Event) -> bool:
    """Whether ``event`` is one for ``agent``; workers see only the topics of their own capabilities."""
    if not concerns(agent, event) or _redriven_for(record) not in ("", agent.name):
        return False
    return not agent.capabilities or type(event) is TimerFired or event.__dict__.get("capability") in agent.capabilities


def _redriven_for(record: Record) -> str:
    """The one agent that the record was sent again for, empty for a record that is for all."""
    name, value = record.headers[-1] if record.headers else ("", None)
    return (value or b"").decode() if name == REDRIVE_HEADER else ""


def _by_time(history: Sequence[tuple[Record, Envelope]]) -> list[tuple[Record, Envelope]]:
    """In order of append time, and within a partition of offset, even where a broker's clock stepped back."""
    latest: dict[tuple[str, int], int] = {}
    timed = []
    for record, envelope in history:
        place = record.topic, record.partition
        latest[place] = max(latest.get(place, 0), record.timestamp_ms)
        timed.append((latest[place], record, envelope))
    return [(record, envelope) for _, record, envelope in sorted(timed, key=lambda item: item[0])]


class _Recorded:
    """What the log says each step did: effects and outputs by the agent and the event that caused them."""

    def __init__(self, history: Sequence[tuple[Record, Envelope]]) -> None:
        self._effects: dict[tuple[str, str], list[tuple[Record, Effect]]] = defaultdict(list)
        self._outputs: dict[tuple[str, str], list[tuple[Record, Envelope]]] = defaultdict(list)
        self._redriven: dict[tuple[str, str], list[int]] = defaultdict(list)
        self.cancelled: set[tuple[str, str]] = set()
        self.timers: set[str] = set()
        """The ids that TimerFired have for timers that were set so far, decided now."""
        for record, envelope in history:
            event, metadata = envelope.event, envelope.metadata
            if agent := _redriven_for(record):
                self._redriven[agent, metadata.id].append(record.timestamp_ms)
            if isinstance(event, Effect):
                self._effects[event.agent, event.event_id].append((record, event))
            elif isinstance(event, StepCancelled):
                self.cancelled.add((event.agent, event.event_id))
            elif metadata.causation_id and not agent and type(event) is not TimerFired:
                self._outputs[_agent_name(metadata.source), metadata.causation_id].append((record, envelope))

    def take(self, step: tuple[str, str], record: Record) -> tuple[list[Effect], list[tuple[Record, Envelope]]]:
        """The effects and outputs of ``step``, an agent's name and an event's id, that come of ``record``.

        An event that was sent again after it had failed is handled anew, under the same id: what was written before
        that is the first handling's.
        """
        again = min((at for at in self._redriven.get(step, ()) if at > record.timestamp_ms), default=None)

        def mine(at: int) -> bool:
            return again is None or at < again

        effects, outputs = self._effects.pop(step, []), self._outputs.pop(step, [])
        if later := [item for item in effects if not mine(item[0].timestamp_ms)]:
            self._effects[step] = later
        if left := [item for item in outputs if not mine(item[0].timestamp_ms)]:
            self._outputs[step] = left
        return (
            sorted((effect for of, effect in effects if mine(of.timestamp_ms)), key=lambda effect: effect.sequence),
            [item for item in outputs if mine(item[0].timestamp_ms)],
        )


def _agent_name(source: str) -> str:
    return source.removeprefix("/agents/").partition("@")[0]


async def _redecide_step(
    agent: Agent[Any],
    record: Record,
    envelope: Envelope,
    state: LaneState | None,
    recorded: _Recorded,
    codec: Codec,
) -> tuple[ReplayedStep, LaneState | None]:
    effects, written = recorded.take((agent.name, envelope.metadata.id), record)
    journal = Journal(
        agent=agent.name,
        source=agent.source,
        key=key_of(envelope.event),
        cause=envelope.metadata,
        recorded=effects,
        replaying=True,
    )
    result, difference = await _decide(agent, record, envelope, state, journal)
    if not difference and (unasked := journal.unasked()):
        difference = f"recorded, but not asked for any more: {', '.join(unasked)}"
    if not difference and type(envelope.event) is TimerFired and envelope.metadata.id not in recorded.timers:
        difference = f"the timer {envelope.event.timer!r} that fired was not set by any step decided again"
    lane = lane_of(agent, envelope.event)
    recorded.timers.update(
        deterministic_id(envelope.metadata.id, agent.name, "timer", lane, timer.name, _micros(timer.due))
        for timer in result.timers
        if timer.due is not None
    )
    outputs = _compare(result, record, written, codec)
    step = ReplayedStep(
        agent=agent.name,
        event_type=type(envelope.event).__name__,
        event_id=envelope.metadata.id,
        topic=record.topic,
        partition=record.partition,
        offset=record.offset,
        effects=len(effects),
        outputs=outputs,
        difference=difference,
    )
    return step, result.state


def _micros(at: datetime) -> int:
    return (at - _EPOCH) // timedelta(microseconds=1)


async def _decide(
    agent: Agent[Any], record: Record, envelope: Envelope, state: LaneState | None, journal: Journal
) -> tuple[StepResult, str]:
    where: dict[str, Any] = {
        "timestamp_ms": record.timestamp_ms,
        "priority": priority_of(record.topic),
        "state": state,
        "journal": journal,
    }
    try:
        return await run_step(agent, envelope, **where), ""
    except NondeterminismError as error:
        return StepResult((), state, state_changed=False), str(error)
    except Exception as error:  # noqa: BLE001 - the live processor took it for the step's failure, whatever it was
        return await run_failure(agent, envelope, failure_of(error), **where), ""


def _compare(
    result: StepResult, record: Record, recorded: Sequence[tuple[Record, Envelope]], codec: Codec
) -> tuple[OutputCheck, ...]:
    """Match outputs by event id; what stands on one side only has no hash on the other."""
    checks = []
    by_id = {envelope.metadata.id: (output, envelope) for output, envelope in recorded}
    priority = priority_of(record.topic)
    for envelope in result.outputs:
        topic = topic_name(envelope.event, priority)
        encoded = codec.encode(envelope.event, envelope.metadata)
        was = by_id.pop(envelope.metadata.id, None)
        checks.append(
            OutputCheck(
                event_type=type(envelope.event).__name__,
                event_id=envelope.metadata.id,
                topic=topic,
                recorded_hash=None if was is None else _hash_of(was[0]),
                redecided_hash=record_hash(topic, envelope.metadata.subject.encode(), encoded.value, encoded.headers),
            )
        )
    for output, envelope in by_id.values():
        checks.append(
            OutputCheck(type(envelope.event).__name__, envelope.metadata.id, output.topic, _hash_of(output), None)
        )
    return tuple(checks)


def _hash_of(record: Record) -> str:
    return record_hash(record.topic, record.key, record.value, record.headers)
