"""The Coordinator: carries a task's plan out, step by step, to exactly one outcome.

In: all of a task's lifecycle events. Out: StepAssigned for what is ready, and one of TaskCompleted, TaskFailed,
TaskCancelled and TaskExpired. Late, repeated and stale events (of an earlier attempt or revision, of an unknown step,
of a finished task) change nothing. A task without state that something other than a plan arrives for is unknown, and
the event is passed over; a cancellation that overtakes the plan ends the task before it starts. A task with a deadline
has a timer, which ends it on time though nothing else happens. A step whose workers are all gone goes to a capability
that can stand in, where the directory has one.
"""

from collections.abc import Mapping, Sequence
from datetime import timedelta
from enum import StrEnum
from typing import Any, Final

from pydantic import BaseModel, ConfigDict

from agents.agent import Agent, Failure
from agents.context import Context, LlmRequest, Message, Passage, Purpose
from agents.prompts import PROMPTS, Prompts
from agents.text import is_not_found, markers_inside, markers_of, renumber
from schemas.events import (
    Assessment,
    Citation,
    DirectoryEntry,
    Event,
    Health,
    PersonalText,
    PlannedStep,
    PlanProposed,
    PlanRejected,
    StepAssessed,
    StepAssigned,
    StepCancelRequested,
    StepFailed,
    StepInput,
    TaskCancelled,
    TaskCancelRequested,
    TaskCompleted,
    TaskExpired,
    TaskFailed,
    TimerFired,
    Timestamp,
)

__all__ = ["STAND_INS", "Coordinator", "StepProgress", "StepStatus", "TaskState", "route"]

MAX_ATTEMPTS: Final = 3
"""Attempts at one step; the processor has retried each of them already, so what still fails is likely to stay so."""

MAX_REVISIONS: Final = 2
"""A bound of the Coordinator's own on revisions, so that no Overseer can keep a task going for ever."""

_REMEMBERED: Final = timedelta(days=30)
"""How long a finished task is known as one, so that late or repeated events re-run nothing."""

STAND_INS: Final[Mapping[str, tuple[str, ...]]] = {
    # Several rounds of search find what one search finds. Not the other way round.
    "retrieve": ("research",),
}
"""Which capabilities can do another's steps, best first, when all instances that offer that one are gone."""

_DEADLINE: Final = "deadline"
"""The timer's name; it is set exactly while a task with a deadline is under way."""

_NO_STEPS: Final = "the plan has no steps"


class StepStatus(StrEnum):
    """Where a step of a task stands."""

    WAITING = "waiting"
    ASSIGNED = "assigned"
    ACCEPTED = "accepted"


class StepProgress(BaseModel):
    """A planned step and how far it has come."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: PlannedStep
    status: StepStatus = StepStatus.WAITING
    attempt: int = 1
    revision: int = 0
    finding: PersonalText = ""
    answer: PersonalText = ""
    citations: tuple[Citation, ...] = ()
    groundedness: float = 1.0


class TaskState(BaseModel):
    """A task under way, or with ``finished`` the marker that stays of it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    finished: bool = False
    objective: PersonalText = ""
    deadline: Timestamp | None = None
    steps: tuple[StepProgress, ...] = ()


_FINISHED: Final = TaskState(finished=True)


class Coordinator(Agent[TaskState]):
    """The state machine of a task; its lane is the task_id."""

    name, version = "coordinator", "2"
    consumes = (PlanProposed, PlanRejected, StepAssessed, StepFailed, TaskCancelRequested, TimerFired)
    emits = (StepAssigned, StepCancelRequested, TaskCompleted, TaskFailed, TaskCancelled, TaskExpired)
    state_type = TaskState

    def __init__(self, prompts: Prompts = PROMPTS) -> None:
        self._prompts = prompts

    async def handle(self, event: Event, ctx: Context[TaskState]) -> None:
        """Take the task one step further.

        Raises:
            EffectFailedError: the language model failed to synthesise.
        """
        task = ctx.state
        if task is None:
            await self._begin(event, ctx)
        elif task.finished or isinstance(event, PlanProposed | PlanRejected):
            return
        elif isinstance(event, TaskCancelRequested):
            self._cancel(event, task, ctx)
        elif task.deadline is not None and (ctx.now > task.deadline or isinstance(event, TimerFired)):
            _cancel_running(event, task, "the task's deadline has passed", ctx)
            _end(TaskExpired(task_id=_task_id(event), objective=task.objective, deadline=task.deadline), task, ctx)
        elif isinstance(event, StepAssessed):
            await self._assessed(event, task, ctx)
        elif isinstance(event, StepFailed):
            await self._failed(event, task, ctx)

    async def on_failure(self, event: Event, failure: Failure, ctx: Context[TaskState]) -> None:
        """Fail the task that ``event`` belongs to, if it is under way or about to be."""
        task = ctx.state
        if task is None and isinstance(event, PlanProposed):
            task = TaskState(objective=event.objective)
        if task is not None and not task.finished:
            _fail(event, task, f"the coordinator failed: {failure.error_type}: {failure.message}", ctx)

    async def _begin(self, event: Event, ctx: Context[TaskState]) -> None:
        if isinstance(event, PlanProposed):
            task = TaskState(
                objective=event.objective,
                deadline=event.deadline,
                steps=tuple(StepProgress(step=step) for step in event.steps),
            )
            if event.deadline is not None and ctx.now > event.deadline:
                expired = TaskExpired(task_id=event.task_id, objective=event.objective, deadline=event.deadline)
                _end(expired, TaskState(), ctx)
            elif not task.steps:
                _end(TaskFailed(task_id=event.task_id, objective=event.objective, reason=_NO_STEPS), TaskState(), ctx)
            else:
                if event.deadline is not None:
                    ctx.timer(_DEADLINE, event.deadline)
                ctx.state = await _assign_ready(event.task_id, task, ctx)
        elif isinstance(event, PlanRejected):
            failed = TaskFailed(task_id=event.task_id, objective=event.objective, reason=event.reason)
            _end(failed, TaskState(), ctx)
        elif isinstance(event, TaskCancelRequested):
            self._cancel(event, TaskState(), ctx)

    def _cancel(self, event: TaskCancelRequested, task: TaskState, ctx: Context[TaskState]) -> None:
        _cancel_running(event, task, event.reason or "the task was cancelled", ctx)
        _end(
            TaskCancelled(
                task_id=event.task_id,
                objective=task.objective,
                requested_by=event.requested_by,
                reason=event.reason,
            ),
            task,
            ctx,
        )

    async def _assessed(self, event: StepAssessed, task: TaskState, ctx: Context[TaskState]) -> None:
        found = _running(task, event.step_id, event.attempt)
        if found is None or found.revision != event.revision:
            return
        if event.decision is Assessment.ACCEPT:
            accepted = found.model_copy(
                update={
                    "status": StepStatus.ACCEPTED,
                    "answer": event.answer,
                    "citations": event.citations,
                    "groundedness": event.groundedness,
                }
            )
            task = _with(task, accepted)
            if all(progress.status is StepStatus.ACCEPTED for progress in task.steps):
                _end(await _completed(event.task_id, task, ctx, self._prompts), task, ctx)
            else:
                ctx.state = await _assign_ready(event.task_id, task, ctx)
        elif event.decision is Assessment.REVISE and event.revision < MAX_REVISIONS:
            again = found.model_copy(update={"revision": event.revision + 1, "finding": event.finding})
            await _assign(event.task_id, task, [again], ctx)
            ctx.state = _with(task, again)
        else:
            reason = f"the answer to {found.step.objective!r} was rejected: {event.finding}"
            _fail(event, task, reason, ctx, step_id=event.step_id)

    async def _failed(self, event: StepFailed, task: TaskState, ctx: Context[TaskState]) -> None:
        found = _running(task, event.step_id, event.attempt)
        if found is None:
            return
        if event.retryable and event.attempt < MAX_ATTEMPTS:
            again = found.model_copy(update={"attempt": event.attempt + 1})
            await _assign(event.task_id, task, [again], ctx)
            ctx.state = _with(task, again)
            return
        tries = f" after {event.attempt} attempts" if event.attempt > 1 else ""
        reason = f"the step {found.step.objective!r} failed{tries}: {event.error_type}: {event.message}"
        _fail(event, task, reason, ctx, step_id=event.step_id)


def _task_id(event: Any) -> str:
    return str(event.task_id)


def _end(outcome: Event, task: TaskState, ctx: Context[TaskState]) -> None:
    ctx.emit(outcome)
    if task.deadline is not None:
        ctx.cancel_timer(_DEADLINE)
    ctx.state = _FINISHED
    ctx.expire_state(_REMEMBERED)


def _fail(event: Event, task: TaskState, reason: str, ctx: Context[TaskState], *, step_id: str | None = None) -> None:
    _cancel_running(event, task, "the task failed", ctx, but=getattr(event, "step_id", None))
    _end(TaskFailed(task_id=_task_id(event), objective=task.objective, reason=reason, step_id=step_id), task, ctx)


def _cancel_running(
    event: Event, task: TaskState, reason: str, ctx: Context[TaskState], *, but: str | None = None
) -> None:
    for progress in task.steps:
        if progress.status is StepStatus.ASSIGNED and progress.step.step_id != but:
            ctx.emit(StepCancelRequested(target=progress.step.step_id, task_id=_task_id(event), reason=reason))


def _running(task: TaskState, step_id: str, attempt: int) -> StepProgress | None:
    """The step that is out for this attempt; None when the event is stale or the step unknown."""
    for progress in task.steps:
        if progress.step.step_id == step_id:
            return progress if progress.status is StepStatus.ASSIGNED and progress.attempt == attempt else None
    return None


def _with(task: TaskState, changed: StepProgress) -> TaskState:
    steps = tuple(changed if known.step.step_id == changed.step.step_id else known for known in task.steps)
    return task.model_copy(update={"steps": steps})


async def _assign_ready(task_id: str, task: TaskState, ctx: Context[TaskState]) -> TaskState:
    """Emit every waiting step whose dependencies are accepted; the task with these marked as assigned."""
    accepted = {progress.step.step_id for progress in task.steps if progress.status is StepStatus.ACCEPTED}
    ready = [
        progress
        for progress in task.steps
        if progress.status is StepStatus.WAITING and accepted.issuperset(progress.step.depends_on)
    ]
    await _assign(task_id, task, ready, ctx)
    for progress in ready:
        task = _with(task, progress.model_copy(update={"status": StepStatus.ASSIGNED}))
    return task


async def _assign(task_id: str, task: TaskState, steps: Sequence[StepProgress], ctx: Context[TaskState]) -> None:
    """Emit ``steps``, each to who can do it. The directory is asked once, and only where it can make a difference."""
    known: tuple[DirectoryEntry, ...] = ()
    if any(progress.step.capability in STAND_INS for progress in steps):
        known = await ctx.directory("")
    for progress in steps:
        ctx.emit(_assignment(task_id, task, progress, route(progress.step.capability, known)))


def route(capability: str, known: Sequence[DirectoryEntry]) -> str:
    """The capability to ask for: the planned one, unless all who offer it are gone and a stand-in has somebody.

    Where nobody is known to offer it, it is asked for as planned: the step waits in its topic until somebody comes.
    """
    able = [entry for entry in known if capability in entry.capabilities]
    if able and all(entry.health is Health.GONE for entry in able):
        for other in STAND_INS.get(capability, ()):
            if any(other in entry.capabilities and entry.health in (Health.READY, Health.BUSY) for entry in known):
                return other
    return capability


def _assignment(task_id: str, task: TaskState, progress: StepProgress, capability: str) -> StepAssigned:
    step = progress.step
    return StepAssigned(
        task_id=task_id,
        step_id=step.step_id,
        attempt=progress.attempt,
        revision=progress.revision,
        capability=capability,
        objective=step.objective,
        inputs=tuple(
            StepInput(
                step_id=known.step.step_id,
                objective=known.step.objective,
                answer=known.answer,
                citations=known.citations,
            )
            for known in task.steps
            if known.step.step_id in step.depends_on
        ),
        parameters=step.parameters,
        finding=progress.finding,
        deadline=task.deadline,
    )


async def _completed(task_id: str, task: TaskState, ctx: Context[TaskState], prompts: Prompts) -> TaskCompleted:
    needed = {name for progress in task.steps for name in progress.step.depends_on}
    leaves = [progress for progress in task.steps if progress.step.step_id not in needed]
    if len(leaves) == 1:
        answer, citations = leaves[0].answer, leaves[0].citations
    else:
        answer, citations = await _synthesised(task.objective, leaves, ctx, prompts)
    return TaskCompleted(
        task_id=task_id,
        objective=task.objective,
        answer=answer,
        citations=citations,
        groundedness=min(progress.groundedness for progress in task.steps),
        steps=len(task.steps),
    )


async def _synthesised(
    objective: str, leaves: Sequence[StepProgress], ctx: Context[TaskState], prompts: Prompts
) -> tuple[str, tuple[Citation, ...]]:
    """One answer out of several: the leaves' answers as notes, with markers that are unique over all of them."""
    notes, citations = _notes(leaves)
    response = await ctx.llm(
        LlmRequest(
            purpose=Purpose.SYNTHESISE,
            system=prompts.synthesise,
            messages=(Message(role="user", content=objective),),
            passages=notes,
        )
    )
    text = markers_inside(response.text.strip()) or "\n\n".join(note.text for note in notes)
    cited = [marker for marker in markers_of(text) if 1 <= marker <= len(citations)]
    numbers = {old: new for new, old in enumerate(cited, start=1)}
    chosen = tuple(citations[old - 1].model_copy(update={"marker": new}) for old, new in numbers.items())
    return renumber(text, numbers), chosen


def _notes(leaves: Sequence[StepProgress]) -> tuple[tuple[Passage, ...], list[Citation]]:
    """The leaves' answers with citations numbered through, equal ones (chunk and quote) under one number."""
    known: dict[tuple[str, str], int] = {}
    citations: list[Citation] = []
    notes: list[Passage] = []
    for number, leaf in enumerate(leaves, start=1):
        numbers: dict[int, int] = {}
        for citation in leaf.citations:
            place = known.setdefault((citation.chunk_id, citation.quote), len(known) + 1)
            if place > len(citations):
                citations.append(citation)
            numbers[citation.marker] = place
        text = leaf.answer if is_not_found(leaf.answer) else renumber(leaf.answer, numbers)
        notes.append(Passage(marker=number, chunk_id=leaf.step.step_id, title=leaf.step.objective, text=text))
    return tuple(notes), citations
