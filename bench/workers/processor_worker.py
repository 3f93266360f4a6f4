"""The typed step on our own processor, exactly once, with its default settings.

In: a :class:`~bench.workers.task.WorkerTask`; its target must be ``task.outcomes``, where TaskCompleted goes. Out: one
TaskCompleted for each TaskSubmitted.
"""

import asyncio
import signal
from collections.abc import Sequence
from typing import Any

import uvloop
from pydantic import BaseModel

from agents.agent import Agent
from agents.context import Context
from bench.samples import completion
from bench.workers.task import WorkerTask, end_with_parent
from schemas.codec import Codec
from schemas.events import TaskCompleted, TaskSubmitted
from streams.binding import Binding
from streams.runner import Runner

__all__ = ["CompletingAgent", "build"]


class CompletingAgent(Agent[BaseModel]):
    """Completes every task at once. Its name makes the consumer group, so each round has its own."""

    name = "bench"
    version = "1"
    consumes = (TaskSubmitted,)
    emits = (TaskCompleted,)

    async def handle(self, event: Any, ctx: Context[BaseModel]) -> None:
        """Decide as all systems under test do."""
        ctx.emit(completion(event))


def build(task: WorkerTask, topics: Sequence[str]) -> Runner:
    """The processor in its runner, as roles run it, with its group made of the task's."""
    named = type("NamedAgent", (CompletingAgent,), {"name": task.group})
    binding = Binding(named(), tuple(topics))
    kafka = {"bootstrap.servers": task.bootstrap_servers}
    return Runner([binding], codec=Codec(), kafka=kafka, telemetry=False)


async def run(task: WorkerTask) -> None:
    """Run the processor until SIGTERM."""
    runner = build(task, [task.source])
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, runner.stop)
    await runner.run()


if __name__ == "__main__":
    worker_task = WorkerTask.from_arguments()
    end_with_parent()
    uvloop.run(run(worker_task))
