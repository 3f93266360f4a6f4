"""One step: deterministic outputs, state and time, whatever way it is run."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from pydantic import BaseModel

from agents.agent import Agent, Failure
from agents.context import Context
from agents.errors import EffectFailedError, UndeclaredOutputError
from agents.journal import Journal
from agents.step import LaneState, StepResult, failure_of, run_failure, run_step
from schemas.events import PlanProposed, PlanRejected, Priority, TaskCompleted, TaskSubmitted
from schemas.metadata import Envelope, Metadata

AT_MS = 1_767_225_600_000
CAUSE = Metadata("cause-1", "/clients/test", "t1", datetime(2026, 1, 1, tzinfo=UTC), correlation_id="t1")


class Count(BaseModel, frozen=True):
    """How many events the lane has seen."""

    seen: int


class Counter(Agent[Count]):
    """Counts; emits a plan whose rationale shows everything it could decide by."""

    name, version = "counter", "7"
    consumes = (TaskSubmitted,)
    emits = (PlanProposed, PlanRejected)
    state_type = Count

    async def handle(self, event: TaskSubmitted, ctx: Context[Count]) -> None:
        seen = ctx.state.seen + 1 if ctx.state else 1
        shown = f"{seen} {ctx.now.isoformat()} {ctx.random.random()} {ctx.new_id()} {ctx.scope('a').new_id()}"
        ctx.emit(PlanProposed(task_id=event.task_id, objective=event.objective, steps=(), rationale=shown))
        if event.objective == "forget":
            ctx.state = None
        elif event.objective == "undeclared":
            ctx.emit(TaskCompleted(task_id=event.task_id, objective="", answer=""))
        elif event.objective != "look":
            ctx.state = Count(seen=seen)
            ctx.expire_state(timedelta(days=30))

    async def on_failure(self, event: TaskSubmitted, failure: Failure, ctx: Context[Count]) -> None:
        ctx.emit(PlanRejected(task_id=event.task_id, objective=event.objective, reason=failure.message))


async def step(objective: str, state: LaneState | None = None, *, at_ms: int = AT_MS) -> StepResult:
    agent = Counter()
    envelope = Envelope(TaskSubmitted(task_id="t1", objective=objective), CAUSE)
    journal = Journal(agent=agent.name, source=agent.source, key="t1", cause=CAUSE)
    return await run_step(agent, envelope, timestamp_ms=at_ms, priority=Priority.NORMAL, state=state, journal=journal)


async def test_the_same_step_twice_gives_equal_outputs() -> None:
    first, second = await step("count"), await step("count")
    assert first == second
    assert first.outputs[0].metadata.source == "/agents/counter@7"
    assert first.outputs[0].metadata.causation_id == "cause-1"
    assert first.outputs[0].metadata.correlation_id == "t1"


async def test_scopes_and_ordinals_give_distinct_ids() -> None:
    (output,) = (await step("count")).outputs
    shown: Any = output.event
    *_, one, two = shown.rationale.split()
    assert one != two


async def test_state_is_carried_and_expires() -> None:
    first = await step("count")
    assert first.state_changed
    second = await step("count", first.state)
    assert second.state is not None
    assert second.state.value == Count(seen=2)
    assert second.state.expires_at == datetime(2026, 1, 31, tzinfo=UTC)


async def test_state_that_was_only_read_is_not_stored_again() -> None:
    first = await step("count")
    assert not (await step("look", first.state)).state_changed


async def test_state_can_be_deleted() -> None:
    first = await step("count")
    deleted = await step("forget", first.state)
    assert (deleted.state, deleted.state_changed) == (None, True)
    assert not (await step("forget")).state_changed


async def test_time_never_goes_back_in_a_lane() -> None:
    first = await step("count")
    earlier = await step("count", first.state, at_ms=AT_MS - 5000)
    assert first.state is not None
    assert earlier.outputs[0].metadata.time == first.state.now


async def test_an_undeclared_output_is_refused() -> None:
    with pytest.raises(UndeclaredOutputError, match=r"counter emitted TaskCompleted.*add it"):
        await step("undeclared")


async def test_a_failure_speaks_and_has_ids_of_its_own() -> None:
    agent = Counter()
    envelope = Envelope(TaskSubmitted(task_id="t1", objective="x"), CAUSE)
    journal = Journal(agent=agent.name, source=agent.source, key="t1", cause=CAUSE)
    failure = failure_of(EffectFailedError("Timeout", "too slow", retryable=True))
    result = await run_failure(
        agent, envelope, failure, timestamp_ms=AT_MS, priority=Priority.NORMAL, state=None, journal=journal
    )
    assert result.outputs[0].event == PlanRejected(task_id="t1", objective="x", reason="too slow")
    assert result.outputs[0].metadata.id != (await step("count")).outputs[0].metadata.id


def test_only_failed_effects_are_worth_another_attempt() -> None:
    assert failure_of(EffectFailedError("Timeout", "m", retryable=True)).retryable
    assert not failure_of(EffectFailedError("AuthenticationError", "m", retryable=False)).retryable
    assert failure_of(KeyError("x")) == Failure("KeyError", "'x'", retryable=False)
