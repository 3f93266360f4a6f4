"""Agents as real ones are: each event may wait for a language model, and the call is recorded, journalled and paid for.

In: a :class:`~bench.workers.task.WorkerTask` with ``options``. Out: a PlanRejected for each TaskSubmitted, on
``tasks.lifecycle`` of the input's priority; at the end ``report.json`` in the task's folder. The model waits as long as
the task's parameter ``wait_s`` says, else as the option ``wait_s``; 0 is no call at all.
"""

import asyncio
import signal
from pathlib import Path
from typing import Any, Final

import orjson
import psutil
import uvloop
from pydantic import BaseModel

from agents.agent import Agent
from agents.context import Context, Ports
from agents.ports import LlmRequest, LlmResponse, Message, Purpose
from bench.workers.task import WorkerTask, end_with_parent
from schemas.codec import Codec
from schemas.events import PlanRejected, TaskSubmitted
from streams.binding import Binding
from streams.runner import Runner

__all__ = ["REPORT", "TARGET", "CallingAgent", "WaitingModel", "build"]

REPORT: Final = "report.json"
"""Its fields: ``peak_calls``, the most calls that were in flight at once; ``peak_rss``, the process's resident memory
in bytes, the highest of twenty samples a second; ``idle_rss``, that of before the first call."""
TARGET: Final = "tasks.lifecycle"
_TIMEOUT_S: Final = 600.0
_RSS_EVERY_S: Final = 0.05


class WaitingModel:
    """A language model that answers after as many seconds as the request's system prompt says."""

    name = "waiting"

    def __init__(self) -> None:
        self.calls = self.peak_calls = 0

    async def complete(self, request: LlmRequest, *, idempotency_key: str) -> LlmResponse:
        """Wait; the answer is the question."""
        self.calls += 1
        self.peak_calls = max(self.peak_calls, self.calls)
        try:
            await asyncio.sleep(float(request.system))
        finally:
            self.calls -= 1
        return LlmResponse(
            text=request.messages[0].content,
            provider=self.name,
            model=self.name,
            prompt_tokens=20,
            completion_tokens=20,
            cost_usd=0.0001,
        )


class CallingAgent(Agent[BaseModel]):
    """Asks the model, if it is to wait at all, then answers."""

    name = "bench"
    version = "1"
    consumes = (TaskSubmitted,)
    emits = (PlanRejected,)
    wait_s = 0.0

    async def handle(self, event: Any, ctx: Context[BaseModel]) -> None:
        """Decide."""
        wait_s = float(event.parameters.get("wait_s", self.wait_s))
        reason = event.objective
        if wait_s:
            message = Message(role="user", content=event.objective)
            reason = (await ctx.llm(LlmRequest(purpose=Purpose.PLAN, system=str(wait_s), messages=(message,)))).text
        ctx.emit(PlanRejected(task_id=event.task_id, objective=event.objective, reason=reason))


def build(task: WorkerTask, model: WaitingModel) -> Runner:
    """The processor in its runner. Options: ``topics`` instead of the task's source, ``wait_s``, ``concurrency`` and
    ``max_in_flight`` instead of a binding's defaults.
    """
    options = dict(task.options)
    named = type("NamedAgent", (CallingAgent,), {"name": task.group, "wait_s": float(options.pop("wait_s", 0.0))})
    topics = tuple(options.pop("topics", (task.source,)))
    binding = Binding(named(), topics, timeout_s=_TIMEOUT_S, **options)
    kafka = {"bootstrap.servers": task.bootstrap_servers}
    return Runner([binding], codec=Codec(), kafka=kafka, ports=Ports(llm=model), telemetry=False)


async def run(task: WorkerTask) -> None:
    """Run the processor until SIGTERM, then write the report."""
    model = WaitingModel()
    runner = build(task, model)
    process = psutil.Process()
    idle_rss = peak_rss = process.memory_info().rss

    async def sample() -> None:
        nonlocal peak_rss
        while True:
            await asyncio.sleep(_RSS_EVERY_S)
            peak_rss = max(peak_rss, process.memory_info().rss)

    sampler = asyncio.create_task(sample())
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, runner.stop)
    try:
        await runner.run()
    finally:
        sampler.cancel()
    report = {"peak_calls": model.peak_calls, "peak_rss": peak_rss, "idle_rss": idle_rss}
    (Path(task.folder) / REPORT).write_bytes(orjson.dumps(report))


if __name__ == "__main__":
    worker_task = WorkerTask.from_arguments()
    end_with_parent()
    uvloop.run(run(worker_task))
