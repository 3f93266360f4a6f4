"""An agent that asks what its events tell it to, one after another or side by side, and sets timers."""

import asyncio
from datetime import timedelta
from typing import Any

from agents.agent import Agent, Failure
from agents.context import Context, LlmRequest, Message, Purpose
from schemas.events import StepAssigned, StepCompleted, StepFailed, TimerFired
from tests.support.steps import Total


def ask(text: str) -> LlmRequest:
    return LlmRequest(purpose=Purpose.ANSWER, messages=(Message(role="user", content=text),))


class Asker(Agent[Total]):
    """Asks each of the event's questions, one after another or side by side, and counts its lane's events."""

    version = "1"
    consumes = (StepAssigned, TimerFired)
    emits = (StepCompleted, StepFailed)
    state_type = Total

    def __init__(self, name: str) -> None:
        self.name = name  # type: ignore[misc]

    def lane(self, event: StepAssigned) -> str:  # type: ignore[override]
        return event.step_id if event.parameters.get("lane") == "step" else event.task_id

    async def handle(self, event: Any, ctx: Context[Total]) -> None:
        if isinstance(event, TimerFired):
            self._emit(event.task_id, event.timer, f"{event.timer} due {event.due:%H:%M:%S.%f}", ctx)
            return
        before = ctx.state or Total()
        ctx.state = Total(count=before.count + 1)
        questions = [question for question in event.parameters.get("ask", "").split(",") if question]
        if event.objective == "together":
            answers = await asyncio.gather(*(ctx.scope(text).llm(ask(text)) for text in questions))
        else:
            answers = [await ctx.llm(ask(text)) for text in questions]
        if "timer" in event.parameters:
            ctx.timer(event.parameters["timer"], ctx.now + timedelta(seconds=float(event.parameters["after"])))
        if "stop" in event.parameters:
            ctx.cancel_timer(event.parameters["stop"])
        self._emit(event.task_id, event.step_id, " ".join([str(before.count), *(each.text for each in answers)]), ctx)

    def _emit(self, task_id: str, step_id: str, answer: str, ctx: Context[Total]) -> None:
        ctx.emit(
            StepCompleted(
                task_id=task_id, step_id=step_id, attempt=1, capability="research", objective="", answer=answer
            )
        )

    async def on_failure(self, event: Any, failure: Failure, ctx: Context[Total]) -> None:
        ctx.emit(
            StepFailed(
                task_id=event.task_id,
                step_id=getattr(event, "step_id", ""),
                attempt=1,
                error_type=failure.error_type,
                message=failure.message,
            )
        )
