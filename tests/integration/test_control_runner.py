"""An order in topic ``control`` reaches the step, wherever it is: running, waiting, or not assigned yet."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import pytest
from confluent_kafka import Producer
from pydantic import BaseModel

from agents.agent import Agent
from agents.context import Context, LlmRequest, LlmResponse, Message, Ports, Purpose
from schemas.events import Event, StepAssigned, StepCancelled, StepCancelRequested, StepCompleted
from schemas.metadata import Metadata
from schemas.topics import all_topics, key_of
from streams.binding import Binding
from streams.control import CONTROL_TOPIC
from streams.kafka import producer_settings
from streams.runner import Runner
from tests.support.processors import CODEC, read_committed, until
from tests.support.steps import completed

TOPICS = (CONTROL_TOPIC, "work.results.normal", "effects", "dead-letters", "tasks.lifecycle.normal")


class Asker(Agent[BaseModel]):
    version = "1"
    consumes = (StepAssigned,)
    emits = (StepCompleted,)

    def __init__(self, name: str) -> None:
        self.name = name  # type: ignore[misc]

    def lane(self, event: StepAssigned) -> str:  # type: ignore[override]
        return event.step_id

    async def handle(self, event: StepAssigned, ctx: Context[BaseModel]) -> None:
        said = await ctx.llm(LlmRequest(purpose=Purpose.ANSWER, messages=(Message(role="user", content="?"),)))
        ctx.emit(completed(event, said.text))


class SlowModel:
    """Answers once it is told to."""

    name = "slow"

    def __init__(self) -> None:
        self.asked = 0
        self.go_on = asyncio.Event()

    async def complete(self, request: LlmRequest, **_: Any) -> LlmResponse:
        self.asked += 1
        await self.go_on.wait()
        return LlmResponse(text="yes", provider="test", model="test", prompt_tokens=1, completion_tokens=1)


class Scene:
    def __init__(self, kafka: Any) -> None:
        self.kafka = kafka
        self.model = SlowModel()
        self.topic = f"{kafka.unique('work')}.normal"
        kafka.create_topics(self.topic)
        self.binding = Binding(Asker(kafka.unique("asker")), (self.topic,))
        self._producer = Producer(producer_settings(kafka.config, "scene"))

    def send(self, topic: str, event: Event) -> None:
        key = key_of(event)
        metadata = Metadata(id=str(uuid4()), source="/clients/test", subject=key, time=datetime.now(UTC))
        value, headers = CODEC.encode(event, metadata)
        self._producer.produce(topic, value, key.encode(), headers=headers)
        assert self._producer.flush(20) == 0

    def assign(self, step_id: str) -> None:
        event = StepAssigned(task_id="t", step_id=step_id, capability="research", objective="x")
        self.send(self.topic, event)

    def cancel(self, step_id: str) -> None:
        self.send(CONTROL_TOPIC, StepCancelRequested(target=step_id, task_id="t", reason="nobody wants it"))

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Runner]:
        ports = Ports(llm=self.model)
        runner = Runner([self.binding], codec=CODEC, kafka=self.kafka.config, ports=ports, telemetry=False)
        task = asyncio.create_task(runner.run())
        try:
            await until(lambda: runner.ready or task.done())
            yield runner
        finally:
            runner.stop()
            await task

    def told(self, topic: str, kind: type[Event]) -> list[Any]:
        """This scene's agent's committed events of one kind."""
        found = map(CODEC.decode, read_committed(self.kafka.config, topic))
        source = self.binding.agent.source
        return [each.event for each in found if each.metadata.source == source and isinstance(each.event, kind)]

    def cancelled(self) -> list[str]:
        events = self.told("effects", StepCancelled)
        assert all(event.reason == "nobody wants it" for event in events)
        return [event.step_id for event in events]

    def completed(self) -> list[str]:
        return [event.step_id for event in self.told("work.results.normal", StepCompleted)]


@pytest.fixture
def scene(kafka: Any) -> Scene:
    known, topics = kafka.admin.list_topics(timeout=20).topics, all_topics()
    for name in TOPICS:
        if name not in known:
            kafka.create_topics(name, 1, {"max.message.bytes": str(topics[name].max_message_bytes)})
    return Scene(kafka)


async def test_a_running_step_stops_and_the_others_go_on(scene: Scene) -> None:
    running, other = f"t/{uuid4()}", f"t/{uuid4()}"
    async with scene.running():
        scene.assign(running)
        scene.assign(other)
        await until(lambda: scene.model.asked == 2)
        scene.cancel(running)
        await until(lambda: scene.cancelled() == [running])
        scene.model.go_on.set()
        await until(lambda: scene.completed() == [other])
    assert scene.cancelled() == [running]


async def test_a_step_that_was_cancelled_while_nobody_ran_is_not_run(scene: Scene) -> None:
    cancelled, wanted = f"t/{uuid4()}", f"t/{uuid4()}"
    scene.cancel(cancelled)
    scene.model.go_on.set()
    async with scene.running():
        # Assigned only after the order has had time to be read.
        await asyncio.sleep(2)
        scene.assign(cancelled)
        scene.assign(wanted)
        await until(lambda: scene.completed() == [wanted] and scene.cancelled() == [cancelled])
    assert scene.model.asked == 1
