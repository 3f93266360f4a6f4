"""Deciding again what several versions of an agent, and of the schemas, have written."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, ClassVar

import pytest
from pydantic import BaseModel

from agents.agent import Agent
from agents.context import Context
from agents.journal import Journal
from agents.step import LaneState, run_step, state_for
from replay.decide import Decided, FindingKind, Station, redecide
from replay.evolution import is_same_by_older_schema
from schemas.avro_schema import fingerprint
from schemas.avro_writer import compile_writer
from schemas.codec import Codec
from schemas.events import (
    Event,
    PlanProposed,
    PlanRejected,
    Priority,
    StepCompleted,
    TaskCancelRequested,
    TaskSubmitted,
)
from schemas.metadata import Envelope, Metadata
from schemas.record import Record
from schemas.registry import Manifest
from schemas.topics import key_of, topic_name

CODEC = Codec()
AT_MS = 1_767_225_600_000
TOPIC = "tasks.normal"


class Count(BaseModel, frozen=True):
    seen: int = 0


class Tally(BaseModel, frozen=True):
    seen: int = 0
    words: int = 0


class First(Agent[Any]):
    """Speaks at every second task of a key; says how many it has seen."""

    name, version = "counter", "1"
    consumes: ClassVar[tuple[type[Event], ...]] = (TaskSubmitted, TaskCancelRequested)
    emits = (PlanRejected,)
    state_type: ClassVar[type[BaseModel] | None] = Count

    async def handle(self, event: Any, ctx: Context[Any]) -> None:
        seen = (ctx.state.seen if ctx.state else 0) + 1
        ctx.state = Count(seen=seen)
        if seen % 2 == 0:
            ctx.emit(PlanRejected(task_id=event.task_id, objective="", reason=f"seen {seen}"))


class Second(First):
    """Counts twice what it sees, and cancellations not at all; its state has a field more."""

    version = "2"
    consumes = (TaskSubmitted,)
    state_type = Tally
    predecessors: ClassVar = {"1": First}

    async def handle(self, event: TaskSubmitted, ctx: Context[Any]) -> None:
        assert ctx.state is None or isinstance(ctx.state, Tally)
        before = ctx.state or Tally()
        ctx.state = Tally(seen=before.seen + 2, words=before.words + len(event.objective.split()))
        if ctx.state.seen % 4 < 2:
            reason = f"seen {ctx.state.seen}, {ctx.state.words} words"
            ctx.emit(PlanRejected(task_id=event.task_id, objective="", reason=reason))


class SecondAlone(Second):
    predecessors: ClassVar = {}


def written(envelope: Envelope, topic: str, offset: int) -> Record:
    value, headers = CODEC.encode(envelope.event, envelope.metadata)
    return Record(topic, 0, offset, AT_MS + offset, key_of(envelope.event).encode(), value, headers)


async def live(*handled: tuple[Agent[Any], Event]) -> list[Record]:
    """The log of one lane whose events were handled by these agents in turn, as after a restart with other code."""
    records: list[Record] = []
    state: LaneState | None = None
    for number, (agent, event) in enumerate(handled):
        cause = Metadata(f"e{number}", "/clients/test", "t1", datetime(2026, 1, 1, tzinfo=UTC), correlation_id="t1")
        envelope = Envelope(event, cause)
        records.append(written(envelope, TOPIC, len(records)))
        if type(event) in agent.consumes:
            result = await run_step(
                agent,
                envelope,
                timestamp_ms=records[-1].timestamp_ms,
                priority=Priority.NORMAL,
                state=state_for(agent, state),
                journal=Journal(agent=agent.name, source=agent.source, key="t1", cause=cause),
            )
            state = result.state
            records += [written(output, topic_name(output.event), len(records)) for output in result.outputs]
    return records


async def decided(records: Sequence[Record], agent: Agent[Any]) -> Decided:
    history = [(record, CODEC.decode(record)) for record in records]
    return await redecide(history, stations=[Station(agent, frozenset({TOPIC}))], codec=CODEC)


def task(words: str = "a b") -> TaskSubmitted:
    return TaskSubmitted(task_id="t1", objective=words)


async def test_silent_steps_are_decided_by_the_version_that_was_at_work() -> None:
    first, second = First(), Second()
    cancel = TaskCancelRequested(task_id="t1", requested_by="x", reason="")
    records = await live(
        (first, task()),  # silent, before anything was said
        (first, cancel),  # says 2; the second version would pass it over
        (first, task()),  # silent, after version 1 spoke
        (second, task()),  # 5: version 2 reads what version 1 left
        (second, cancel),  # passed over, which version 1 would not
        (second, task()),  # 7
        (second, task()),  # 9
    )
    found = await decided(records, second)
    assert found.findings == ()
    assert [(step.version, type(step.envelope.event).__name__, len(step.outputs)) for step in found.steps] == [
        ("1", "TaskSubmitted", 0),
        ("1", "TaskCancelRequested", 1),
        ("1", "TaskSubmitted", 0),
        ("2", "TaskSubmitted", 1),
        ("2", "TaskSubmitted", 0),
        ("2", "TaskSubmitted", 1),
    ]
    (state,) = found.states.values()
    assert state is not None
    assert state.value == Tally(seen=9, words=6)
    assert [finding.kind for finding in (await decided(records, SecondAlone())).findings]


async def test_a_raised_version_that_decides_alike_needs_no_predecessor() -> None:
    class Renumbered(First):
        version = "1.1"

    records = await live((First(), task()), (First(), task()), (Renumbered(), task()), (Renumbered(), task()))
    found = await decided(records, Renumbered())
    assert found.findings == ()
    assert [step.version for step in found.steps] == ["1", "1", "1", "1.1"]


# Schemas.


def by_first_schema(envelope: Envelope, record: Record) -> Record:
    """``record`` as the first release wrote it, with the first schema of its type."""
    name = envelope.event.full_name
    version = next(each for each in Manifest.load().versions if each.name == name and each.version == 1)
    raw = b"".join(compile_writer(version.parsed)(envelope.event))
    schema = f"{name}/{fingerprint(version.parsed)}".encode()
    headers = [(key, schema if key == "ce_dataschema" else text) for key, text in record.headers]
    return Record(
        record.topic,
        record.partition,
        record.offset,
        record.timestamp_ms,
        record.key,
        b"\0" + version.id.to_bytes(4, "big") + raw,
        headers,
    )


def completed(answer: str = "yes") -> Envelope:
    event = StepCompleted(
        task_id="t1", step_id="t1/1", attempt=1, capability="research", objective="o", answer=answer, model="m"
    )
    return Envelope(event, Metadata("o1", "/agents/x@1", "t1", datetime(2026, 1, 1, tzinfo=UTC), "e0", "t1"))


def test_an_output_of_an_older_schema_is_the_same_when_it_says_the_same() -> None:
    envelope = completed()
    record = written(envelope, "work.results.normal", 0)
    old = by_first_schema(envelope, record)
    assert old.value != record.value
    was = CODEC.decode(old)
    now = CODEC.encode(envelope.event, envelope.metadata)
    assert is_same_by_older_schema(old, was, envelope, now)
    assert not is_same_by_older_schema(record, envelope, envelope, now), "the same schema is compared by its bytes"

    other = completed("no")
    assert not is_same_by_older_schema(old, was, other, CODEC.encode(other.event, other.metadata))
    later = Envelope(envelope.event, Metadata("o1", "/agents/x@1", "t1", datetime(2026, 1, 2, tzinfo=UTC), "e0", "t1"))
    assert not is_same_by_older_schema(old, was, later, CODEC.encode(later.event, later.metadata))


def test_other_bytes_for_the_same_values_are_not_taken_for_an_older_schemas() -> None:
    envelope = completed()
    old = by_first_schema(envelope, written(envelope, "work.results.normal", 0))
    assert old.value is not None
    # Avro can write a length in more bytes than it needs: the values are the same, the bytes are no writer's.
    padded = old.value[:5] + bytes([old.value[5] | 128, 0]) + old.value[6:]
    record = Record(old.topic, 0, 0, old.timestamp_ms, old.key, padded, old.headers)
    now = CODEC.encode(envelope.event, envelope.metadata)
    assert not is_same_by_older_schema(record, CODEC.decode(old), envelope, now)
    unknown = [
        (key, b"magnatronic.work.StepCompleted/0" if key == "ce_dataschema" else text) for key, text in old.headers
    ]
    stranger = Record(old.topic, 0, 0, old.timestamp_ms, old.key, old.value, unknown)
    assert not is_same_by_older_schema(stranger, CODEC.decode(old), envelope, now)
    broken = Record(old.topic, 0, 0, old.timestamp_ms, old.key, old.value[:-3], old.headers)
    assert not is_same_by_older_schema(broken, CODEC.decode(old), envelope, now)


class Worker(Agent[Any]):
    name, version = "worker", "1"
    consumes, emits = (TaskSubmitted,), (StepCompleted, PlanProposed)

    async def handle(self, event: TaskSubmitted, ctx: Context[Any]) -> None:
        ctx.emit(completed().event)


@pytest.mark.parametrize(("said", "kinds"), [("yes", []), ("no", [FindingKind.OUTPUT_DIFFERS])])
async def test_an_audit_takes_an_older_schemas_output_for_what_it_says(said: str, kinds: list[FindingKind]) -> None:
    records = await live((Worker(), task()))
    output = CODEC.decode(records[1])
    assert isinstance(output.event, StepCompleted)
    output = Envelope(output.event.model_copy(update={"answer": said}), output.metadata)
    records[1] = by_first_schema(output, records[1])
    found = await decided(records, Worker())
    assert [finding.kind for finding in found.findings] == kinds
    assert [finding.field for finding in found.findings] == ["answer"] * len(kinds)
    assert all(check.same == (not kinds) for step in found.steps for check in step.outputs)
