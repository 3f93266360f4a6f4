"""Deciding again: what is as recorded is proved so, and every kind of difference is found and named."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from agents.agent import Agent, Failure
from agents.context import Context, LlmRequest, LlmResponse, Message, Ports, Purpose
from agents.errors import EffectFailedError
from agents.journal import Journal
from agents.step import failure_of, run_failure, run_step
from replay.decide import Decided, FindingKind, Station, Verdict, record_hash, redecide
from schemas.codec import Codec
from schemas.encryption import SubjectCipher
from schemas.events import (
    DeadLettered,
    Evidence,
    PlanProposed,
    PlanRejected,
    Priority,
    StepCancelled,
    TaskSubmitted,
    TimerFired,
)
from schemas.metadata import REDRIVE_HEADER, Envelope, Metadata, deterministic_id
from schemas.record import Record
from schemas.topics import key_of, topic_name
from tests.support.keys import ADA, MemoryKeys

AT_MS = 1_767_225_600_000
CODEC = Codec()


class Model:
    """A language model that answers, or fails."""

    name = "scripted"

    def __init__(self, *, fails: bool = False) -> None:
        self.fails = fails

    async def complete(self, request: LlmRequest, *, idempotency_key: str) -> LlmResponse:
        if self.fails:
            raise EffectFailedError("APIStatusError", "overloaded", retryable=True)
        return LlmResponse(text=request.messages[0].content.upper(), provider="scripted", model="m")


class Planner(Agent[Any]):
    """Plans by asking the model."""

    name, version = "planner", "1"
    consumes = (TaskSubmitted,)
    emits = (PlanProposed, PlanRejected)

    async def handle(self, event: TaskSubmitted, ctx: Context[Any]) -> None:
        request = LlmRequest(purpose=Purpose.PLAN, messages=(Message(role="user", content=self.prompt(event)),))
        response = await ctx.llm(request)
        ctx.emit(PlanProposed(task_id=event.task_id, objective=event.objective, steps=(), rationale=response.text))

    async def on_failure(self, event: TaskSubmitted, failure: Failure, ctx: Context[Any]) -> None:
        ctx.emit(PlanRejected(task_id=event.task_id, objective=event.objective, reason=failure.message))

    def prompt(self, event: TaskSubmitted) -> str:
        return event.objective


class OtherPrompt(Planner):
    """The same agent with another prompt."""

    def prompt(self, event: TaskSubmitted) -> str:
        return f"please: {event.objective}"


class OtherOutput(Planner):
    """The same agent, emitting something else."""

    async def handle(self, event: TaskSubmitted, ctx: Context[Any]) -> None:
        await super().handle(event, ctx)
        ctx.emit(PlanRejected(task_id=event.task_id, objective=event.objective, reason="second thoughts"))


class Silent(Planner):
    """The same agent, asking nobody."""

    async def handle(self, event: TaskSubmitted, ctx: Context[Any]) -> None:
        ctx.emit(PlanProposed(task_id=event.task_id, objective=event.objective, steps=(), rationale="WHY"))


def as_record(envelope: Envelope, offset: int) -> Record:
    encoded = CODEC.encode(envelope.event, envelope.metadata)
    topic = topic_name(envelope.event, Priority.NORMAL)
    return Record(topic, 0, offset, AT_MS + offset, key_of(envelope.event).encode(), encoded.value, encoded.headers)


async def recorded_history(model: Model, first: int = 0) -> list[Record]:
    """The log as a live processor would have written it."""
    agent = Planner()
    cause = Metadata("submission", "/clients/test", "t1", datetime(2026, 1, 1, tzinfo=UTC), correlation_id="t1")
    envelope = Envelope(TaskSubmitted(task_id="t1", objective="why"), cause)
    journal = Journal(agent=agent.name, source=agent.source, key="t1", cause=cause, ports=Ports(llm=model))
    where: dict[str, Any] = {
        "timestamp_ms": AT_MS + first,
        "priority": Priority.NORMAL,
        "state": None,
        "journal": journal,
    }
    failure = None
    try:
        result = await run_step(agent, envelope, **where)
    except EffectFailedError as error:
        failure = failure_of(error)
        result = await run_failure(agent, envelope, failure, **where)
    everything = [envelope, *journal.performed, *result.outputs]
    records = [as_record(item, offset) for offset, item in enumerate(everything, first)]
    if failure is not None:
        records.append(letter_of(records[0], agent.name, failure.error_type, failure.message, first + 7))
    return records


class Finished:
    """An agent that has finished everything, or the offsets named."""

    def __init__(self, *offsets: int) -> None:
        self.offsets = offsets

    def finished(self, topic: str, partition: int, offset: int) -> bool:
        return not self.offsets or offset in self.offsets


async def replay(records: list[Record], agent: Agent[Any], handled: Finished | None = None) -> Decided:
    history = [(record, CODEC.decode(record)) for record in records]
    station = Station(agent, frozenset({"tasks.normal", "tasks.lifecycle.normal"}))
    known = {} if handled is None else {agent.name: handled}
    return await redecide(history, stations=[station], codec=CODEC, handled=known)


def kinds(decided: Decided) -> list[FindingKind]:
    return [finding.kind for finding in decided.findings]


def letter_of(record: Record, agent: str, error_type: str, error: str, offset: int) -> Record:
    """The dead letter as the processor writes it."""
    letter = DeadLettered(
        source_topic=record.topic,
        source_partition=record.partition,
        source_offset=record.offset,
        source_timestamp=datetime.fromtimestamp(record.timestamp_ms / 1000, UTC),
        key=record.key,
        value=record.value,
        header_names=tuple(name for name, _ in record.headers),
        header_values=tuple(content or b"" for _, content in record.headers),
        agent=agent,
        error_type=error_type,
        error=error,
    )
    metadata = Metadata(
        id=deterministic_id(record.topic, record.partition, record.offset, agent, "dead-letter"),
        source=f"/agents/{agent}@1",
        subject=record.topic,
        time=letter.source_timestamp,
        causation_id=dict(record.headers)["ce_id"].decode(),  # type: ignore[union-attr]
    )
    return as_record(Envelope(letter, metadata), offset)


async def test_a_recorded_task_decides_the_same_again() -> None:
    records = await recorded_history(Model())
    decided = await replay(records, Planner())
    (step,) = decided.steps
    (output,) = step.outputs
    assert decided.ok
    assert step.verdict is Verdict.SAME
    assert (step.agent, step.version, type(step.envelope.event), len(step.effects)) == (
        "planner",
        "1",
        TaskSubmitted,
        1,
    )
    assert output.recorded_hash == record_hash(records[2].topic, records[2].key, records[2].value, records[2].headers)
    assert output.recorded_hash == output.redecided_hash


async def test_a_recorded_failure_decides_the_same_again() -> None:
    decided = await replay(await recorded_history(Model(fails=True)), Planner())
    assert decided.ok
    assert decided.steps[0].outputs[0].event_type == "PlanRejected"


async def test_a_dead_letter_that_is_gone_or_changed_or_too_many_is_found() -> None:
    submitted, effect, rejected, letter = await recorded_history(Model(fails=True))
    assert kinds(await replay([submitted, effect, rejected], Planner())) == [FindingKind.LETTER_MISSING]
    other = letter_of(submitted, "planner", "APIStatusError", "quota", 7)
    (finding,) = (await replay([submitted, effect, rejected, other], Planner())).findings
    assert (finding.kind, finding.field) == (FindingKind.LETTER_DIFFERS, "error")
    assert finding.diff == "- quota\n+ overloaded"
    answered = await recorded_history(Model())
    assert kinds(await replay([*answered, letter], Planner())) == [FindingKind.LETTER_UNEXPECTED]


async def test_a_crash_is_not_enacted_again_but_what_it_meant_is_decided() -> None:
    submitted, effect, rejected, _ = await recorded_history(Model(fails=True))
    agent, cause = Planner(), CODEC.decode(submitted).metadata
    journal = Journal(agent=agent.name, source=agent.source, key="t1", cause=cause)
    result = await run_failure(
        agent,
        CODEC.decode(submitted),
        Failure("ProcessCrashed", "it was running 3 times", retryable=False),
        timestamp_ms=AT_MS,
        priority=Priority.NORMAL,
        state=None,
        journal=journal,
    )
    crashed = letter_of(submitted, "planner", "ProcessCrashed", "it was running 3 times", 7)
    assert (await replay([submitted, effect, as_record(result.outputs[0], 5), crashed], Planner())).ok
    assert kinds(await replay([submitted, effect, rejected, crashed], Planner())) == [FindingKind.OUTPUT_DIFFERS]


async def test_trace_context_is_no_part_of_the_decision() -> None:
    records = await recorded_history(Model())
    traced = replace(records[2], headers=[*records[2].headers, ("traceparent", b"00-aa-bb-01")])
    assert (await replay([*records[:2], traced], Planner())).ok


async def test_one_changed_byte_of_an_output_is_found() -> None:
    records = await recorded_history(Model())
    value = records[2].value or b""
    changed = replace(records[2], value=value.replace(b"WHY", b"WHX"))
    decided = await replay([*records[:2], changed], Planner())
    (finding,) = decided.findings
    assert (finding.kind, finding.field) == (FindingKind.OUTPUT_DIFFERS, "rationale")
    assert finding.diff == "rationale:\n- WHX\n+ WHY"
    assert (finding.agent, finding.event_id, finding.place) == ("planner", "submission", "tasks.normal[0]@0")
    (output,) = decided.steps[0].outputs
    assert output.recorded_hash != output.redecided_hash


async def test_one_changed_byte_of_an_outputs_headers_is_found() -> None:
    records = await recorded_history(Model())
    headers = [
        (name, b"x" + (text or b"") if name == "ce_correlationid" else text) for name, text in records[2].headers
    ]
    (finding,) = (await replay([*records[:2], replace(records[2], headers=headers)], Planner())).findings
    assert (finding.kind, finding.field) == (FindingKind.OUTPUT_DIFFERS, "headers.ce_correlationid")


async def test_one_changed_byte_of_an_effects_response_is_found_in_what_was_made_of_it() -> None:
    records = await recorded_history(Model())
    value = records[1].value or b""
    changed = replace(records[1], value=value.replace(b"WHY", b"WHX"))
    (finding,) = (await replay([records[0], changed, records[2]], Planner())).findings
    assert (finding.kind, finding.field) == (FindingKind.OUTPUT_DIFFERS, "rationale")


@pytest.mark.parametrize(
    ("old", "new", "field"),
    [
        (b'"temperature":0.0', b'"temperature":0.5', "request"),
        (b'"model":"m"', b'"model":"n"', "model"),
    ],
)
async def test_a_changed_byte_of_an_effect_that_decides_nothing_contradicts_the_effect(
    old: bytes, new: bytes, field: str
) -> None:
    records = await recorded_history(Model())
    value = records[1].value or b""
    assert old in value
    changed = replace(records[1], value=value.replace(old, new))
    decided = await replay([records[0], changed, records[2]], Planner())
    (finding,) = decided.findings
    assert (finding.kind, finding.field) == (FindingKind.EFFECT_ALTERED, field)
    assert "effects[0]@1" in finding.message
    assert decided.steps[0].verdict is Verdict.DIFFERS


async def test_a_removed_effect_is_found() -> None:
    records = await recorded_history(Model())
    decided = await replay([records[0], records[2]], Planner())
    (missing,) = decided.findings
    assert (missing.kind, missing.field) == (FindingKind.EFFECT_MISSING, "request")
    assert "asks for LlmCalled, which is not recorded" in missing.message
    assert decided.steps[0].outputs[0].redecided_hash is None


async def test_a_changed_prompt_is_found_and_held_against_the_recorded_one() -> None:
    finding, *_ = (await replay(await recorded_history(Model()), OtherPrompt())).findings
    assert (finding.kind, finding.field) == (FindingKind.EFFECT_MISSING, "request.messages.0.content")
    assert finding.diff == "request.messages.0.content:\n- why\n+ please: why"


async def test_a_call_no_longer_made_is_found() -> None:
    decided = await replay(await recorded_history(Model()), Silent())
    (finding,) = decided.findings
    assert finding.kind is FindingKind.EFFECT_UNASKED
    assert "LlmCalled" in finding.message
    assert decided.steps[0].outputs[0].same


async def test_a_new_output_is_found() -> None:
    decided = await replay(await recorded_history(Model()), OtherOutput())
    assert kinds(decided) == [FindingKind.OUTPUT_MISSING]
    assert [output.recorded_hash is None for output in decided.steps[0].outputs] == [False, True]


async def test_a_removed_output_is_found_when_the_step_is_known_to_be_finished() -> None:
    submitted, effect, _ = await recorded_history(Model())
    assert kinds(await replay([submitted, effect], Planner(), Finished())) == [FindingKind.OUTPUT_MISSING]
    (step,) = (await replay([submitted, effect], Planner())).steps
    assert step.verdict is Verdict.OPEN
    (step,) = (await replay([submitted, effect], Planner(), Finished(99))).steps
    assert step.verdict is Verdict.OPEN


async def test_a_step_that_waits_for_another_attempt_is_open() -> None:
    submitted, effect, _, _ = await recorded_history(Model(fails=True))
    (step,) = (await replay([submitted, effect], Planner(), Finished())).steps
    assert step.verdict is Verdict.OPEN


async def test_an_output_that_is_gone_from_the_decision_is_found() -> None:
    records = await recorded_history(Model())
    extra = as_record(
        Envelope(
            PlanRejected(task_id="t1", objective="why", reason="forged"),
            Metadata("forged", "/agents/planner@1", "t1", datetime(2026, 1, 1, tzinfo=UTC), "submission", "t1"),
        ),
        9,
    )
    decided = await replay([*records, extra], Planner())
    assert kinds(decided) == [FindingKind.OUTPUT_UNEXPECTED]
    assert decided.steps[0].outputs[-1].redecided_hash is None


async def test_an_output_that_stands_twice_is_found() -> None:
    records = await recorded_history(Model())
    decided = await replay([*records, replace(records[2], offset=9)], Planner())
    assert kinds(decided) == [FindingKind.OUTPUT_UNEXPECTED]


async def test_an_event_that_was_written_twice_is_decided_twice() -> None:
    records, later = await recorded_history(Model()), await recorded_history(Model(), first=10)
    decided = await replay([*records, *later], Planner())
    assert [step.outputs[0].same for step in decided.steps] == [True, True]
    assert decided.ok


class Renumbered(Planner):
    """The same decisions under another version."""

    version = "2"


async def test_another_version_number_alone_is_no_difference() -> None:
    decided = await replay(await recorded_history(Model()), Renumbered())
    assert decided.ok
    assert decided.steps[0].version == "1"


def fired(cause: str, due: datetime, agent: str = "waiter") -> Envelope:
    """What the processor writes when the timer is due."""
    micros = (due - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)
    metadata = Metadata(
        deterministic_id(cause, agent, "timer", "t1", "remind", micros), f"/agents/{agent}@1", "t1", due, cause, "t1"
    )
    return Envelope(TimerFired(task_id="t1", agent=agent, lane="t1", timer="remind", due=due), metadata)


class Waiter(Planner):
    """Sets a timer, and plans when it has fired."""

    name = "waiter"
    consumes = (TaskSubmitted, TimerFired)  # type: ignore[assignment]
    wait = timedelta(seconds=2)

    async def handle(self, event: TaskSubmitted | TimerFired, ctx: Context[Any]) -> None:
        if isinstance(event, TaskSubmitted):
            ctx.timer("remind", ctx.now + self.wait)
        else:
            ctx.emit(PlanProposed(task_id=event.task_id, objective="x", steps=(), rationale=ctx.now.isoformat()))


class Hasty(Waiter):
    """The same agent, with a shorter wait."""

    wait = timedelta(seconds=1)


async def waited_history() -> list[Record]:
    agent = Waiter()
    cause = Metadata("submission", "/clients/test", "t1", datetime(2026, 1, 1, tzinfo=UTC), correlation_id="t1")
    first = Envelope(TaskSubmitted(task_id="t1", objective="why"), cause)
    timer = fired("submission", datetime.fromtimestamp(AT_MS / 1000, UTC) + agent.wait)
    journal = Journal(agent=agent.name, source=agent.source, key="t1", cause=timer.metadata)
    result = await run_step(agent, timer, timestamp_ms=AT_MS + 1, priority=Priority.NORMAL, state=None, journal=journal)
    return [as_record(item, offset) for offset, item in enumerate([first, timer, *result.outputs])]


async def test_a_timer_that_fired_is_one_that_is_set_again() -> None:
    records = await waited_history()
    assert (await replay(records, Waiter())).ok
    finding, *_ = (await replay(records, Hasty())).findings
    assert finding.kind is FindingKind.TIMER
    assert "'remind' that fired was not set" in finding.message


async def test_another_agents_timer_is_not_handled() -> None:
    records = await waited_history()
    others = as_record(fired("submission", datetime(2026, 1, 2, tzinfo=UTC), agent="other"), 7)
    decided = await replay([*records, others], Waiter())
    assert decided.ok
    assert len(decided.steps) == 2


async def test_a_cancelled_step_is_not_decided_again() -> None:
    submitted, *_ = await recorded_history(Model())
    cancelled = StepCancelled(
        task_id="t1", step_id="t1/1", attempt=1, agent="planner", event_id="submission", reason="enough"
    )
    metadata = Metadata("c", "/agents/planner@1", "t1", datetime(2026, 1, 1, tzinfo=UTC), "submission", "t1")
    decided = await replay([submitted, as_record(Envelope(cancelled, metadata), 5)], Planner(), Finished())
    assert decided.ok
    assert [step.verdict for step in decided.steps] == [Verdict.CANCELLED]
    assert not (await replay([submitted], Planner(), Finished())).ok


async def test_an_event_that_was_sent_again_is_decided_each_time_by_its_own_effects() -> None:
    failed, later = await recorded_history(Model(fails=True)), await recorded_history(Model(), first=10)
    later[0] = replace(later[0], headers=[*later[0].headers, (REDRIVE_HEADER, b"planner")])
    decided = await replay([*failed, *later], Planner())
    assert decided.ok
    assert [step.outputs[0].event_type for step in decided.steps] == ["PlanRejected", "PlanProposed"]
    later[0] = replace(later[0], headers=[*later[0].headers[:-1], (REDRIVE_HEADER, b"another")])
    assert len((await replay([*failed, later[0]], Planner())).steps) == 1


class Recaller(Planner):
    """Plans by what memory holds."""

    async def handle(self, event: TaskSubmitted, ctx: Context[Any]) -> None:
        (hit,) = await ctx.recall(event.objective)
        ctx.emit(PlanProposed(task_id=event.task_id, objective=event.objective, steps=(), rationale=hit.text))


async def test_who_a_recalled_passage_is_about_is_the_same_in_both_runs() -> None:
    hit = Evidence(
        chunk_id="c", document_id="d", title="t", heading="", source="s", text="X", score=1.0, data_subjects=(ADA,)
    )

    class Memory:
        model = "m"

        async def recall(self, request: Any) -> tuple[Evidence, ...]:
            return (hit,)

    codec = Codec(cipher=SubjectCipher(MemoryKeys()))
    cause = Metadata("submission", "/clients/test", "t1", datetime(2026, 1, 1, tzinfo=UTC), correlation_id="t1")
    envelope = Envelope(TaskSubmitted(task_id="t1", objective="why"), cause)
    agent = Recaller()
    journal = Journal(agent=agent.name, source=agent.source, key="t1", cause=cause, ports=Ports(memory=Memory()))
    result = await run_step(agent, envelope, timestamp_ms=AT_MS, priority=Priority.NORMAL, state=None, journal=journal)
    made = [envelope, *journal.performed, *result.outputs]
    assert [item.metadata.data_subjects for item in made] == [(), (ADA,), (ADA,)]
    records = []
    for offset, item in enumerate(made):
        value, headers = codec.encode(item.event, item.metadata)
        records.append(Record(topic_name(item.event), 0, offset, AT_MS + offset, b"t1", value, headers))
    history = [(record, codec.decode(record)) for record in records]
    station = Station(agent, frozenset({"tasks.normal"}))
    decided = await redecide(history, stations=[station], codec=codec)
    assert decided.findings == ()
    assert decided.steps[0].verdict is Verdict.SAME
    # Without the keys the same records are told apart from changed ones.
    blank = [(record, CODEC.decode(record)) for record in records]
    assert [step.verdict for step in (await redecide(blank, stations=[station], codec=CODEC)).steps] == [Verdict.ERASED]
