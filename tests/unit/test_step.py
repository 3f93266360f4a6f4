"""One step: deterministic outputs, state and time, whatever way it is run."""

from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from pydantic import BaseModel

from agents.agent import Agent, Failure
from agents.context import Context
from agents.errors import EffectFailedError, UndeclaredOutputError
from agents.journal import Journal
from agents.step import (
    LaneState,
    StepResult,
    TimerChange,
    concerns,
    decision_time,
    failure_of,
    lane_of,
    run_failure,
    run_step,
)
from schemas.events import PlanProposed, PlanRejected, Priority, TaskCompleted, TaskSubmitted, TimerFired
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
        elif event.objective == "timers":
            ctx.timer("once", ctx.now + timedelta(seconds=5))
            ctx.timer("moved", ctx.now)
            ctx.scope("s").timer("moved", (ctx.now + timedelta(seconds=9)).astimezone(timezone(timedelta(hours=2))))
            ctx.cancel_timer("old")
        elif event.objective == "naive":
            ctx.timer("naive", datetime(2026, 1, 1))
        elif event.objective == "nameless":
            ctx.timer("a\x1fb", ctx.now)
        elif event.objective == "undeclared":
            ctx.emit(TaskCompleted(task_id=event.task_id, objective="", answer=""))
        elif event.objective != "look":
            ctx.state = Count(seen=seen)
            ctx.expire_state(timedelta(days=30))

    async def on_failure(self, event: TaskSubmitted, failure: Failure, ctx: Context[Count]) -> None:
        ctx.emit(PlanRejected(task_id=event.task_id, objective=event.objective, reason=failure.message))
        ctx.timer("again", ctx.now)


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
    assert [timer.name for timer in result.timers] == ["again"]
    assert result.outputs[0].metadata.id != (await step("count")).outputs[0].metadata.id


async def test_timers_are_told_once_each_as_last_set_in_utc() -> None:
    now = datetime.fromtimestamp(AT_MS / 1000, UTC)
    assert (await step("timers")).timers == (
        TimerChange("once", now + timedelta(seconds=5)),
        TimerChange("moved", now + timedelta(seconds=9)),
        TimerChange("old", None),
    )
    moved = (await step("timers")).timers[1].due
    assert moved is not None
    assert moved.tzinfo is UTC
    assert (await step("count")).timers == ()


@pytest.mark.parametrize(("objective", "said"), [("naive", "has no time zone"), ("nameless", "printable")])
async def test_timers_without_a_time_zone_or_a_plain_name_are_refused(objective: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        await step(objective)


class Waker(Counter):
    """An agent that also hears its timers."""

    name = "waker"
    consumes = (TaskSubmitted, TimerFired)  # type: ignore[assignment]


def fired(agent: str, due: datetime) -> TimerFired:
    return TimerFired(task_id="t1", agent=agent, lane="lane-7", timer="once", due=due)


def test_a_fired_timer_concerns_its_agent_alone_and_goes_to_the_lane_that_set_it() -> None:
    due = datetime(2026, 1, 1, tzinfo=UTC)
    mine, others, task = fired("waker", due), fired("counter", due), TaskSubmitted(task_id="t1", objective="x")
    assert (concerns(Waker(), mine), concerns(Waker(), others), concerns(Waker(), task)) == (True, False, True)
    assert not concerns(Counter(), fired("counter", due)), "it does not consume any"
    assert (lane_of(Waker(), mine), lane_of(Waker(), task)) == ("lane-7", "t1")


def test_no_timer_seems_to_come_too_early() -> None:
    due = datetime.fromtimestamp(AT_MS / 1000, UTC) + timedelta(milliseconds=3)
    assert decision_time(AT_MS, None, fired("waker", due)) == due
    assert decision_time(AT_MS + 9, None, fired("waker", due)) == due + timedelta(milliseconds=6)
    later = LaneState(Count(seen=1), due + timedelta(days=1))
    assert decision_time(AT_MS, later, fired("waker", due)) == later.now


def test_only_failed_effects_are_worth_another_attempt() -> None:
    assert failure_of(EffectFailedError("Timeout", "m", retryable=True)).retryable
    assert not failure_of(EffectFailedError("AuthenticationError", "m", retryable=False)).retryable
    assert failure_of(KeyError("x")) == Failure("KeyError", "'x'", retryable=False)
