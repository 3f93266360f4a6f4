"""The Decomposer: turns what a user asks for into a plan of steps.

In: TaskSubmitted. Out: PlanProposed, a directed acyclic graph of steps with capabilities, or PlanRejected with the
reason. The plan comes from a language model, or from the user in ``parameters["plan"]``; either is checked alike.
"""

from datetime import timedelta
from typing import Final

from pydantic import BaseModel, ConfigDict

from agents.agent import Agent, Failure
from agents.context import Context, LlmRequest, Message, Purpose
from agents.errors import InvalidPlanError
from agents.planning import PLAN_SCHEMA, Plan, parse_plan, planned_steps
from agents.prompts import PROMPTS, Prompts
from schemas.events import PlannedStep, PlanProposed, PlanRejected, TaskSubmitted
from schemas.topics import CAPABILITIES

__all__ = ["PLAN_PARAMETER", "Decomposer", "PlanMarker"]

PLAN_PARAMETER: Final = "plan"
"""The task parameter that holds a plan of the user's own, as JSON."""

_REMEMBERED: Final = timedelta(days=30)
"""How long a repeated submission is known as one; the design's time for markers of finished tasks."""


class PlanMarker(BaseModel):
    """What stays of a planned task: that it was planned, into how many steps (0: it was rejected)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int


class Decomposer(Agent[PlanMarker]):
    """Plans a task once; a repeated submission of the same task_id re-runs nothing."""

    name, version = "decomposer", "1"
    consumes = (TaskSubmitted,)
    emits = (PlanProposed, PlanRejected)
    state_type = PlanMarker

    def __init__(self, prompts: Prompts = PROMPTS) -> None:
        self._prompts = prompts

    async def handle(self, event: TaskSubmitted, ctx: Context[PlanMarker]) -> None:
        """Propose a plan, or reject the task with the reason.

        Raises:
            EffectFailedError: the language model failed.
        """
        if ctx.state is not None:
            return
        try:
            plan, steps = await self._plan(event, ctx)
        except InvalidPlanError as error:
            self._reject(event, str(error), ctx)
            return
        ctx.emit(
            PlanProposed(
                task_id=event.task_id,
                objective=event.objective,
                steps=steps,
                rationale=plan.rationale,
                deadline=event.deadline,
            )
        )
        ctx.state = PlanMarker(steps=len(steps))
        ctx.expire_state(_REMEMBERED)

    async def on_failure(self, event: TaskSubmitted, failure: Failure, ctx: Context[PlanMarker]) -> None:
        """Reject the task, unless it was planned before."""
        if ctx.state is None:
            self._reject(event, f"planning failed: {failure.error_type}: {failure.message}", ctx)

    async def _plan(self, event: TaskSubmitted, ctx: Context[PlanMarker]) -> tuple[Plan, tuple[PlannedStep, ...]]:
        given = event.parameters.get(PLAN_PARAMETER)
        if given is not None:
            return _understood(given, event)
        messages: tuple[Message, ...] = (Message(role="user", content=event.objective),)
        answer = await ctx.llm(self._request(messages))
        try:
            return _understood(answer.text, event)
        except InvalidPlanError as error:
            mend = Message(role="user", content=self._prompts.mending(str(error)))
            messages += (Message(role="assistant", content=answer.text), mend)
        answer = await ctx.llm(self._request(messages))
        return _understood(answer.text, event)

    def _request(self, messages: tuple[Message, ...]) -> LlmRequest:
        return LlmRequest(
            purpose=Purpose.PLAN, system=self._prompts.plan, messages=messages, response_schema=PLAN_SCHEMA
        )

    def _reject(self, event: TaskSubmitted, reason: str, ctx: Context[PlanMarker]) -> None:
        ctx.emit(PlanRejected(task_id=event.task_id, objective=event.objective, reason=reason))
        ctx.state = PlanMarker(steps=0)
        ctx.expire_state(_REMEMBERED)


def _understood(text: str, event: TaskSubmitted) -> tuple[Plan, tuple[PlannedStep, ...]]:
    plan = parse_plan(text)
    parameters = {name: value for name, value in event.parameters.items() if name != PLAN_PARAMETER}
    return plan, planned_steps(plan, task_id=event.task_id, capabilities=CAPABILITIES, parameters=parameters)
