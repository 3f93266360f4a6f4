"""Replay of one task: what is as recorded is proved so, and every kind of difference is found and named."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from agents.agent import Agent, Failure
from agents.context import Context, LlmRequest, LlmResponse, Message, Ports, Purpose
from agents.errors import EffectFailedError
from agents.journal import Journal
from agents.step import failure_of, run_failure, run_step
from replay.task import ReplayReport, record_hash, redecide
from schemas.codec import Codec
from schemas.events import PlanProposed, PlanRejected, Priority, StepCancelled, TaskSubmitted, TimerFired
from schemas.metadata import REDRIVE_HEADER, Envelope, Metadata, deterministic_id
from schemas.record import Record
from schemas.topics import key_of, topic_name

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
    try:
        result = await run_step(agent, envelope, **where)
    except EffectFailedError as error:
        result = await run_failure(agent, envelope, failure_of(error), **where)
    everything = [envelope, *journal.performed, *result.outputs]
    return [as_record(item, offset) for offset, item in enumerate(everything, first)]


async def replay(records: list[Record], agent: Agent[Any]) -> ReplayReport:
    return await redecide("t1", [(record, CODEC.decode(record)) for record in records], agents=[agent], codec=CODEC)


async def test_a_recorded_task_decides_the_same_again() -> None:
    records = await recorded_history(Model())
    report = await replay(records, Planner())
    (step,) = report.steps
    (output,) = step.outputs
    assert report.ok
    assert (step.agent, step.event_type, step.effects) == ("planner", "TaskSubmitted", 1)
    assert output.recorded_hash == record_hash(records[2].topic, records[2].key, records[2].value, records[2].headers)
    assert report.digest == (await replay(records, Planner())).digest


async def test_a_recorded_failure_decides_the_same_again() -> None:
    report = await replay(await recorded_history(Model(fails=True)), Planner())
    assert report.ok
    assert report.steps[0].outputs[0].event_type == "PlanRejected"


async def test_trace_context_is_no_part_of_the_decision() -> None:
    records = await recorded_history(Model())
    traced = replace(records[2], headers=[*records[2].headers, ("traceparent", b"00-aa-bb-01")])
    assert (await replay([*records[:2], traced], Planner())).ok


async def test_one_changed_byte_of_an_output_is_found() -> None:
    records = await recorded_history(Model())
    value = records[2].value or b""
    changed = replace(records[2], value=value.replace(b"WHY", b"WHX"))
    report = await replay([*records[:2], changed], Planner())
    assert not report.ok
    (output,) = report.steps[0].outputs
    assert output.recorded_hash != output.redecided_hash


async def test_one_changed_byte_of_an_effect_is_found() -> None:
    records = await recorded_history(Model())
    value = records[1].value or b""
    report = await replay([records[0], replace(records[1], value=value.replace(b"WHY", b"WHX")), records[2]], Planner())
    assert not report.ok


async def test_a_removed_effect_is_found() -> None:
    records = await recorded_history(Model())
    report = await replay([records[0], records[2]], Planner())
    assert "not recorded" in report.steps[0].difference


async def test_a_changed_prompt_is_found() -> None:
    report = await replay(await recorded_history(Model()), OtherPrompt())
    assert "not recorded" in report.steps[0].difference
    assert "please: why" in report.steps[0].difference


async def test_a_call_no_longer_made_is_found() -> None:
    report = await replay(await recorded_history(Model()), Silent())
    assert "not asked for any more: LlmCalled" in report.steps[0].difference
    assert report.steps[0].outputs[0].same


async def test_a_new_output_is_found() -> None:
    report = await replay(await recorded_history(Model()), OtherOutput())
    assert [output.recorded_hash is None for output in report.steps[0].outputs] == [False, True]


async def test_an_output_that_is_gone_from_the_decision_is_found() -> None:
    records = await recorded_history(Model())
    extra = as_record(
        Envelope(
            PlanRejected(task_id="t1", objective="why", reason="forged"),
            Metadata("forged", "/agents/planner@1", "t1", datetime(2026, 1, 1, tzinfo=UTC), "submission", "t1"),
        ),
        9,
    )
    report = await replay([*records, extra], Planner())
    assert not report.ok
    assert report.steps[0].outputs[-1].redecided_hash is None


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
    report = await replay(records, Hasty())
    assert "'remind' that fired was not set" in report.steps[1].difference


async def test_another_agents_timer_is_not_handled() -> None:
    records = await waited_history()
    others = as_record(fired("submission", datetime(2026, 1, 2, tzinfo=UTC), agent="other"), 7)
    report = await replay([*records, others], Waiter())
    assert report.ok
    assert len(report.steps) == 2


async def test_a_cancelled_step_is_not_decided_again() -> None:
    submitted, *_ = await recorded_history(Model())
    cancelled = StepCancelled(
        task_id="t1", step_id="t1/1", attempt=1, agent="planner", event_id="submission", reason="enough"
    )
    metadata = Metadata("c", "/agents/planner@1", "t1", datetime(2026, 1, 1, tzinfo=UTC), "submission", "t1")
    report = await replay([submitted, as_record(Envelope(cancelled, metadata), 5)], Planner())
    assert report.ok
    assert report.steps == ()
    assert not (await replay([submitted], Planner())).ok


async def test_an_event_that_was_sent_again_is_decided_each_time_by_its_own_effects() -> None:
    failed, later = await recorded_history(Model(fails=True)), await recorded_history(Model(), first=10)
    later[0] = replace(later[0], headers=[*later[0].headers, (REDRIVE_HEADER, b"planner")])
    report = await replay([*failed, *later], Planner())
    assert report.ok
    assert [step.outputs[0].event_type for step in report.steps] == ["PlanRejected", "PlanProposed"]
    later[0] = replace(later[0], headers=[*later[0].headers[:-1], (REDRIVE_HEADER, b"another")])
    assert len((await replay([*failed, later[0]], Planner())).steps) == 1
