"""The Coordinator: assigns what is ready, survives what is late or repeated, and ends each task exactly once."""

import asyncio
import random
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agents.agent import Failure
from agents.coordinator import MAX_ATTEMPTS, STAND_INS, Coordinator, route
from agents.errors import EffectFailedError
from agents.step import LaneState, TimerChange
from schemas.events import (
    Assessment,
    Citation,
    DirectoryEntry,
    Event,
    Health,
    PlannedStep,
    PlanProposed,
    PlanRejected,
    StepAssessed,
    StepAssigned,
    StepCancelRequested,
    StepFailed,
    TaskCancelled,
    TaskCancelRequested,
    TaskCompleted,
    TaskExpired,
    TaskFailed,
    TimerFired,
)
from schemas.topics import CAPABILITIES

OUTCOMES = (TaskCompleted, TaskFailed, TaskCancelled, TaskExpired)
AT = datetime(2026, 1, 1, tzinfo=UTC)


def proposed(needs: dict[int, tuple[int, ...]], **fields: Any) -> PlanProposed:
    steps = tuple(
        PlannedStep(
            step_id=f"t/{n}", capability="retrieve", objective=f"part {n}", depends_on=tuple(f"t/{d}" for d in deps)
        )
        for n, deps in needs.items()
    )
    return PlanProposed(task_id="t", objective="the whole", steps=steps, **fields)


def cite(marker: int, chunk: str) -> Citation:
    return Citation(marker=marker, chunk_id=chunk, document_id="d", title="d", quote=f"quote of {chunk}")


def assessed(n: int, decision: Assessment = Assessment.ACCEPT, **fields: Any) -> StepAssessed:
    values: dict[str, Any] = {
        "attempt": 1,
        "groundedness": 1.0,
        "answer": f"answer {n} [1].",
        "citations": (cite(1, f"c{n}"),),
        **fields,
    }
    return StepAssessed(task_id="t", step_id=f"t/{n}", decision=decision, **values)


def failed(n: int, attempt: int = 1, *, retryable: bool = True) -> StepFailed:
    return StepFailed(
        task_id="t", step_id=f"t/{n}", attempt=attempt, error_type="Timeout", message="slow", retryable=retryable
    )


class Task:
    """A task's lane: feeds events to the Coordinator and keeps its state."""

    def __init__(self, harness: Any) -> None:
        self.harness = harness
        self.state: LaneState | None = None
        self.timers: tuple[TimerChange, ...] = ()
        """What the last event changed."""

    async def feed(self, event: Event, *, at_ms: int = 1_767_225_600_000) -> list[Any]:
        result = await self.harness.step(Coordinator(), event, self.state, at_ms=at_ms)
        if result.state_changed:
            self.state = result.state
        self.timers = result.timers
        return [output.event for output in result.outputs]


@pytest.fixture
def task(harness: Any) -> Task:
    return Task(harness)


async def test_a_simple_task_passes_its_answer_through(task: Task) -> None:
    (assigned,) = await task.feed(proposed({1: ()}))
    assert isinstance(assigned, StepAssigned)
    (completed,) = await task.feed(assessed(1, groundedness=0.8))
    assert completed == TaskCompleted(
        task_id="t",
        objective="the whole",
        answer="answer 1 [1].",
        citations=(cite(1, "c1"),),
        groundedness=0.8,
        steps=1,
    )
    assert task.state is not None
    assert task.state.expires_at == AT + timedelta(days=30)


async def test_a_step_waits_for_its_dependencies_and_is_given_their_results(task: Task) -> None:
    first = await task.feed(proposed({1: (), 2: (), 3: (1, 2)}))
    assert [event.step_id for event in first] == ["t/1", "t/2"]
    assert await task.feed(assessed(2)) == []
    (last,) = await task.feed(assessed(1))
    assert last.step_id == "t/3"
    assert [(given.step_id, given.answer) for given in last.inputs] == [
        ("t/1", "answer 1 [1]."),
        ("t/2", "answer 2 [1]."),
    ]
    (completed,) = await task.feed(assessed(3))
    assert completed.answer == "answer 3 [1]."
    assert completed.steps == 3


async def test_several_leaves_are_synthesised_with_matching_citations(task: Task) -> None:
    task.harness.llm.answers = ["Second first [2]. Then both [1][2]. Invented [9]."]
    await task.feed(proposed({1: (), 2: ()}))
    await task.feed(assessed(1))
    (completed,) = await task.feed(assessed(2, groundedness=0.5))
    (request,) = task.harness.llm.requests
    assert [passage.text for passage in request.passages] == ["answer 1 [1].", "answer 2 [2]."]
    assert completed.answer == "Second first [1]. Then both [2][1]. Invented."
    assert [(citation.marker, citation.chunk_id) for citation in completed.citations] == [(1, "c2"), (2, "c1")]
    assert completed.groundedness == 0.5


async def test_equal_citations_of_several_leaves_are_one(task: Task) -> None:
    task.harness.llm.answers = ["Both [1]."]
    await task.feed(proposed({1: (), 2: ()}))
    await task.feed(assessed(1, citations=(cite(1, "same"),)))
    (completed,) = await task.feed(assessed(2, citations=(cite(1, "same"),)))
    assert [passage.text for passage in task.harness.llm.requests[0].passages] == ["answer 1 [1].", "answer 2 [1]."]
    assert len(completed.citations) == 1


async def test_a_revision_goes_out_with_the_finding(task: Task) -> None:
    await task.feed(proposed({1: ()}))
    (again,) = await task.feed(assessed(1, Assessment.REVISE, finding="not supported: x"))
    assert (again.revision, again.attempt, again.finding) == (1, 1, "not supported: x")
    assert await task.feed(assessed(1)) == [], "the assessment of the first revision is stale"
    (completed,) = await task.feed(assessed(1, revision=1))
    assert isinstance(completed, TaskCompleted)


async def test_a_rejected_step_fails_the_task_and_cancels_the_others(task: Task) -> None:
    await task.feed(proposed({1: (), 2: (), 3: (1,)}))
    cancelled, ended = await task.feed(assessed(2, Assessment.REJECT, revision=0, finding="claims float"))
    assert cancelled == StepCancelRequested(target="t/1", task_id="t", reason="the task failed")
    assert isinstance(ended, TaskFailed)
    assert ended.step_id == "t/2"
    assert "claims float" in ended.reason


async def test_endless_revisions_end(task: Task) -> None:
    await task.feed(proposed({1: ()}))
    for revision in range(10):
        (out,) = await task.feed(assessed(1, Assessment.REVISE, revision=revision, finding="f"))
        if isinstance(out, TaskFailed):
            break
    assert isinstance(out, TaskFailed)
    assert revision == 2


async def test_a_failed_step_is_tried_again_up_to_the_limit(task: Task) -> None:
    await task.feed(proposed({1: ()}))
    for attempt in range(1, MAX_ATTEMPTS):
        (again,) = await task.feed(failed(1, attempt))
        assert again.attempt == attempt + 1
        assert await task.feed(failed(1, attempt)) == [], "a repeat is stale"
    (ended,) = await task.feed(failed(1, MAX_ATTEMPTS))
    assert isinstance(ended, TaskFailed)
    assert ended.reason == "the step 'part 1' failed after 3 attempts: Timeout: slow"


async def test_a_final_failure_fails_the_task_at_once(task: Task) -> None:
    await task.feed(proposed({1: ()}))
    (ended,) = await task.feed(failed(1, retryable=False))
    assert isinstance(ended, TaskFailed)


async def test_a_rejected_plan_fails_the_task(task: Task) -> None:
    rejected = PlanRejected(task_id="t", objective="the whole", reason="the plan has a cycle: a -> b -> a")
    assert await task.feed(rejected) == [
        TaskFailed(task_id="t", objective="the whole", reason="the plan has a cycle: a -> b -> a")
    ]
    assert await task.feed(rejected) == []


async def test_cancelling_stops_what_runs(task: Task) -> None:
    await task.feed(proposed({1: (), 2: ()}))
    await task.feed(assessed(1))
    cancel = TaskCancelRequested(task_id="t", requested_by="ada", reason="no need")
    stopped, ended = await task.feed(cancel)
    assert stopped == StepCancelRequested(target="t/2", task_id="t", reason="no need")
    assert ended == TaskCancelled(task_id="t", objective="the whole", requested_by="ada", reason="no need")
    assert await task.feed(assessed(2)) == []


async def test_a_cancellation_that_overtakes_the_plan_holds(task: Task) -> None:
    (ended,) = await task.feed(TaskCancelRequested(task_id="t", requested_by="ada"))
    assert isinstance(ended, TaskCancelled)
    assert await task.feed(proposed({1: ()})) == []


async def test_a_task_past_its_deadline_expires(task: Task) -> None:
    deadline = AT + timedelta(minutes=1)
    await task.feed(proposed({1: ()}, deadline=deadline))
    stopped, ended = await task.feed(assessed(1), at_ms=int((deadline.timestamp() + 1) * 1000))
    assert isinstance(stopped, StepCancelRequested)
    assert ended == TaskExpired(task_id="t", objective="the whole", deadline=deadline)


def fired(due: datetime) -> TimerFired:
    return TimerFired(task_id="t", agent="coordinator", lane="t", timer="deadline", due=due)


async def test_a_deadline_ends_a_task_that_nothing_else_happens_to(task: Task) -> None:
    deadline = AT + timedelta(minutes=1)
    await task.feed(proposed({1: (), 2: (1,)}, deadline=deadline))
    assert task.timers == (TimerChange("deadline", deadline),)
    # By the broker's clock the timer came a little early.
    stopped, ended = await task.feed(fired(deadline), at_ms=int(deadline.timestamp() * 1000) - 5)
    assert stopped == StepCancelRequested(target="t/1", task_id="t", reason="the task's deadline has passed")
    assert ended == TaskExpired(task_id="t", objective="the whole", deadline=deadline)
    assert await task.feed(fired(deadline)) == []
    assert await task.feed(assessed(1)) == []


@pytest.mark.parametrize(
    "last",
    [assessed(1), failed(1, retryable=False), TaskCancelRequested(task_id="t", requested_by="ada")],
    ids=lambda event: type(event).__name__,
)
async def test_the_timer_goes_with_the_task(task: Task, last: Event) -> None:
    deadline = AT + timedelta(minutes=1)
    await task.feed(proposed({1: ()}, deadline=deadline))
    (ended,) = [out for out in await task.feed(last) if isinstance(out, OUTCOMES)]
    assert not isinstance(ended, TaskExpired)
    assert task.timers == (TimerChange("deadline", None),)
    assert await task.feed(fired(deadline)) == []
    assert not task.timers


async def test_a_task_without_deadline_has_no_timer(task: Task) -> None:
    await task.feed(proposed({1: ()}))
    assert not task.timers
    await task.feed(assessed(1))
    assert not task.timers


async def test_a_plan_past_its_deadline_sets_no_timer(task: Task) -> None:
    (ended,) = await task.feed(proposed({1: ()}, deadline=AT - timedelta(minutes=1)))
    assert isinstance(ended, TaskExpired)
    assert not task.timers


def instance(capability: str, health: Health, name: str = "a") -> DirectoryEntry:
    agent = {"retrieve": "retriever", "research": "researcher"}[capability]
    return DirectoryEntry(agent=agent, instance=name, version="1", capabilities=(capability,), health=health)


READY, BUSY, DEGRADED, GONE = Health.READY, Health.BUSY, Health.DEGRADED, Health.GONE
ROUTES: list[tuple[str, tuple[DirectoryEntry, ...], str]] = [
    ("nobody is known", (), "retrieve"),
    ("all are well", (instance("retrieve", READY), instance("research", READY)), "retrieve"),
    ("it is gone", (instance("retrieve", GONE), instance("research", READY)), "research"),
    ("it is gone, the other is busy", (instance("retrieve", GONE), instance("research", BUSY)), "research"),
    ("both are gone", (instance("retrieve", GONE), instance("research", GONE)), "retrieve"),
    ("the other is no help", (instance("retrieve", GONE), instance("research", DEGRADED)), "retrieve"),
    ("only the other is known", (instance("research", READY),), "retrieve"),
    ("one of two is gone", (instance("retrieve", GONE), instance("retrieve", BUSY, "b")), "retrieve"),
    (
        "one of two is gone, the other does badly",
        (instance("retrieve", GONE), instance("retrieve", DEGRADED, "b"), instance("research", READY)),
        "retrieve",
    ),
]


@pytest.mark.parametrize(("why", "known", "chosen"), ROUTES, ids=[why for why, _, _ in ROUTES])
async def test_a_step_goes_where_somebody_is(
    task: Task, why: str, known: tuple[DirectoryEntry, ...], chosen: str
) -> None:
    task.harness.directory.entries = known
    assert route("retrieve", known) == chosen, why
    first, second = await task.feed(proposed({1: (), 2: (), 3: (1, 2)}))
    assert [first.capability, second.capability] == [chosen, chosen]
    # What was planned stays planned: the next round asks again.
    assert task.state is not None
    assert {each.step.capability for each in task.state.value.steps} == {"retrieve"}
    task.harness.directory.entries = ()
    (again,) = await task.feed(failed(1))
    assert again.capability == "retrieve"
    assert task.harness.directory.asked == ["", ""]


async def test_the_directory_is_not_asked_where_nobody_can_stand_in(task: Task) -> None:
    step = PlannedStep(step_id="t/1", capability="research", objective="x")
    (out,) = await task.feed(PlanProposed(task_id="t", objective="x", steps=(step,)))
    assert out.capability == "research"
    assert task.harness.directory.asked == []


def test_stand_ins_are_capabilities_that_somebody_has() -> None:
    assert set(STAND_INS) < set(CAPABILITIES)
    assert {other for others in STAND_INS.values() for other in others} <= set(CAPABILITIES)


async def test_events_of_unknown_tasks_and_steps_change_nothing(task: Task) -> None:
    assert await task.feed(assessed(1)) == []
    assert await task.feed(failed(1)) == []
    assert task.state is None
    await task.feed(proposed({1: ()}))
    before = task.state
    for stray in (assessed(7), failed(7), assessed(1, attempt=2), failed(1, 2), proposed({1: ()})):
        assert await task.feed(stray) == []
    assert task.state is before


async def test_a_failed_synthesis_fails_the_task(task: Task) -> None:
    task.harness.llm.answers = [EffectFailedError("Http500", "down", retryable=True)]
    await task.feed(proposed({1: (), 2: ()}))
    await task.feed(assessed(1))
    (ended,) = await task.feed(assessed(2))
    assert isinstance(ended, TaskFailed)
    assert "Http500: down" in ended.reason
    assert await task.feed(assessed(2)) == []


async def test_a_defect_on_the_plan_fails_the_task(harness: Any) -> None:
    result = await harness.fail(Coordinator(), proposed({1: ()}), Failure("ValueError", "bug", retryable=False))
    assert [type(output.event) for output in result.outputs] == [TaskFailed]
    assert result.state is not None
    assert result.state.value.finished


PLANS: list[dict[int, tuple[int, ...]]] = [
    {1: ()},
    {1: (), 2: ()},
    {1: (), 2: (), 3: (1, 2)},
    {1: (), 2: (1,), 3: (1,), 4: (2, 3)},
]


@settings(max_examples=150, deadline=None)
@given(
    plan=st.sampled_from(PLANS),
    seed=st.integers(0, 2**32),
    troubles=st.floats(0, 0.6),
    cancels=st.booleans(),
    expires=st.booleans(),
)
def test_whatever_the_order_and_repeats_a_task_ends_exactly_once(
    make_harness: Any, plan: dict[int, tuple[int, ...]], seed: int, troubles: float, cancels: bool, expires: bool
) -> None:
    asyncio.run(_random_task(make_harness(), plan, random.Random(seed), troubles, cancels, expires))


async def _random_task(
    bench: Any, plan: dict[int, tuple[int, ...]], chance: random.Random, troubles: float, cancels: bool, expires: bool
) -> None:
    """Workers that answer, fail, revise at random; every event may arrive again, any time later."""
    bench.llm.answers = ["synthesised [1]."] * 3
    bench.directory.entries = chance.choice(ROUTES)[1]
    lane = Task(bench)
    deadline = AT + timedelta(days=365) if expires else None
    pending: list[Event] = [proposed(plan, deadline=deadline)]
    if cancels:
        pending.append(TaskCancelRequested(task_id="t", requested_by="ada"))
    sent: list[Event] = []
    outcomes: list[Event] = []
    for _ in range(400):
        if not pending:
            break
        event = pending.pop(chance.randrange(len(pending)))
        sent.append(event)
        if chance.random() < 0.3:
            pending.append(chance.choice(sent))
        for out in await lane.feed(event):
            if isinstance(out, OUTCOMES):
                outcomes.append(out)
                # A task that has a timer leaves none.
                if lane.timers:
                    assert lane.timers[-1].due is None
            elif isinstance(out, StepAssigned):
                assert not outcomes, "a finished task assigns nothing"
                pending.append(_worked(out, chance, troubles))
                if deadline is not None and chance.random() < 0.1:
                    pending.append(fired(deadline))
    assert len(outcomes) == 1
    for event in sent:
        assert await lane.feed(event) == []


def _worked(out: StepAssigned, chance: random.Random, troubles: float) -> Event:
    n = int(out.step_id.rpartition("/")[2])
    if chance.random() >= troubles:
        return assessed(n, attempt=out.attempt, revision=out.revision)
    if chance.random() < 0.5:
        return failed(n, out.attempt, retryable=chance.random() < 0.8)
    decision = chance.choice((Assessment.REVISE, Assessment.REJECT))
    return assessed(n, decision, attempt=out.attempt, revision=out.revision, finding="f")
