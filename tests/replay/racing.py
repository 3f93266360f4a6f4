"""An agent whose calls race each other and the clock, in the versions that it went through.

Its first version is what older golden histories were decided by; see docs/versioning.md for what each step shows.
"""

import asyncio
from typing import ClassVar

from pydantic import BaseModel, ConfigDict

from agents.agent import Agent, Failure
from agents.context import Context, LlmRequest, Message, Purpose
from schemas.events import StepAssigned, StepCompleted, StepFailed

__all__ = ["Asked", "FirstRacer", "Racer", "SecondRacer"]


class Asked(BaseModel):
    """How many steps of a task were answered."""

    model_config = ConfigDict(frozen=True)

    steps: int = 0


def _request(text: str) -> LlmRequest:
    return LlmRequest(purpose=Purpose.ANSWER, messages=(Message(role="user", content=text),))


def _questions(event: StepAssigned) -> list[str]:
    return event.parameters["ask"].split(",")


class FirstRacer(Agent[Asked]):
    """Asks all of a step's questions at once, waits half a second at most, and takes what came; in order of asking."""

    name, version = "racer", "1"
    consumes = (StepAssigned,)
    emits = (StepCompleted, StepFailed)
    capabilities = ("research",)
    state_type = Asked

    async def handle(self, event: StepAssigned, ctx: Context[Asked]) -> None:
        said = await self._said(event, ctx)
        self._emit(event, " ".join(said), ctx)

    async def on_failure(self, event: StepAssigned, failure: Failure, ctx: Context[Asked]) -> None:
        ctx.emit(
            StepFailed(
                task_id=event.task_id,
                step_id=event.step_id,
                attempt=event.attempt,
                error_type=failure.error_type,
                message=failure.message,
            )
        )

    async def _said(self, event: StepAssigned, ctx: Context[Asked]) -> list[str]:
        calls = [asyncio.ensure_future(ctx.scope(text).llm(_request(text))) for text in _questions(event)]
        done, late = await asyncio.wait(calls, timeout=float(event.parameters.get("within", "0.5")))
        for call in late:
            call.cancel()
        await asyncio.gather(*late, return_exceptions=True)
        return [call.result().text if call in done else "(late)" for call in calls]

    def _emit(self, event: StepAssigned, answer: str, ctx: Context[Asked]) -> None:
        ctx.state = Asked(steps=(ctx.state or Asked()).steps + 1)
        ctx.emit(
            StepCompleted(
                task_id=event.task_id,
                step_id=event.step_id,
                attempt=event.attempt,
                capability=event.capability,
                objective=event.objective,
                answer=f"{ctx.state.steps}: {answer}",
            )
        )


class SecondRacer(FirstRacer):
    """Takes the first answer of a race alone, and asks why."""

    version = "2"

    async def _said(self, event: StepAssigned, ctx: Context[Asked]) -> list[str]:
        calls = [asyncio.ensure_future(ctx.scope(text).llm(self._request(text, ctx))) for text in _questions(event)]
        done, late = await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
        for call in late:
            call.cancel()
        await asyncio.gather(*late, return_exceptions=True)
        first = next(call.result().text for call in calls if call in done)
        return [first, (await ctx.llm(self._request(f"why {first}", ctx))).text]

    def _request(self, text: str, ctx: Context[Asked]) -> LlmRequest:
        return _request(text)


class Racer(SecondRacer):
    """Of today: asks politely since the change ``polite``, which is within version 2."""

    predecessors: ClassVar = {"1": FirstRacer}

    def _request(self, text: str, ctx: Context[Asked]) -> LlmRequest:
        return _request(f"please, {text}" if ctx.changed("polite") else text)
