"""A worker of the chaos test: sums each task's numbers. Arguments: bootstrap servers, input topic, name, slot."""

import asyncio
import logging
import os
import random
import signal
import sys

from pydantic import BaseModel, ConfigDict

from agents.agent import Agent
from agents.context import Context
from schemas.codec import Codec
from schemas.events import StepAssigned, StepCompleted
from streams.binding import Binding
from streams.processor import Processor


class Total(BaseModel):
    model_config = ConfigDict(frozen=True)

    sum: int = 0


class Summer(Agent[Total]):
    version = "1"
    consumes = (StepAssigned,)
    emits = (StepCompleted,)
    state_type = Total

    def __init__(self, name: str) -> None:
        self.name = name  # type: ignore[misc]

    async def handle(self, event: StepAssigned, ctx: Context[Total]) -> None:
        if random.random() < 0.02:
            # Others overtake, so that what is committed is no plain prefix.
            await asyncio.sleep(random.random() * 0.2)
        total = (ctx.state.sum if ctx.state else 0) + int(event.parameters["number"])
        ctx.state = Total(sum=total)
        ctx.emit(
            StepCompleted(
                task_id=event.task_id,
                step_id=event.step_id,
                attempt=1,
                capability=event.capability,
                objective=event.objective,
                answer=str(total),
            )
        )


async def main(servers: str, topic: str, name: str, slot: str) -> None:
    processor = Processor(
        Binding(Summer(name), (topic,)),
        codec=Codec(),
        kafka={"bootstrap.servers": servers},
        slot=slot,
        session_timeout_ms=6000,
    )
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, processor.stop)
    print(f"process {os.getpid()} can be stopped", file=sys.stderr, flush=True)
    await processor.run()
    print(f"{processor.name}: {processor.stats.events_in} events", file=sys.stderr)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    asyncio.run(main(*sys.argv[1:]))
