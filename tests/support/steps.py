"""What tests' agents have in common: a lane's state, the answer to a step, and the agent that says what it was told."""

import asyncio

from pydantic import BaseModel, ConfigDict

from agents.agent import Agent
from agents.context import Context
from schemas.events import StepAssigned, StepCompleted


class Total(BaseModel):
    """A lane's sum, and how many events it stands for."""

    model_config = ConfigDict(frozen=True)

    sum: int = 0
    count: int = 0


def completed(event: StepAssigned, answer: str) -> StepCompleted:
    return StepCompleted(
        task_id=event.task_id,
        step_id=event.step_id,
        attempt=event.attempt,
        capability=event.capability,
        objective=event.objective,
        answer=answer,
    )


class Echo(Agent[BaseModel]):
    """Answers with the objective, after ``pause_s``."""

    version = "1"
    consumes = (StepAssigned,)
    emits = (StepCompleted,)
    capabilities = ("echoing",)

    def __init__(self, name: str, *, pause_s: float = 0.0) -> None:
        self.name = name  # type: ignore[misc]
        self._pause_s = pause_s

    async def handle(self, event: StepAssigned, ctx: Context[BaseModel]) -> None:
        if self._pause_s:
            await asyncio.sleep(self._pause_s)
        ctx.emit(completed(event, event.objective))
