import asyncio
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from confluent_kafka import Producer

from schemas.events import AgentHeartbeat, AgentRegistered, Health, ProcessorStats, StepAssigned
from schemas.metadata import Metadata, deterministic_id
from schemas.topics import topic_of
from streams.binding import Binding
from streams.directory import AgentDirectory
from streams.errors import FencedError, MissingTopicError
from streams.kafka import producer_settings, transactional_ids
from streams.runner import Runner
from tests.support.processors import CODEC, read_committed, until
from tests.support.steps import Echo


class Scene:
    """Two agents, each with an input topic."""

    def __init__(self, kafka: Any) -> None:
        self.kafka = kafka
        self.bindings = [self._binding() for _ in range(2)]
        self._producer = Producer(producer_settings(kafka.config, "scene"))
        self._sent = 0

    def _binding(self) -> Binding:
        topic = f"{self.kafka.unique('work')}.normal"
        self.kafka.create_topics(topic)
        return Binding(Echo(self.kafka.unique("echo")), (topic,))

    def send(self, count: int) -> None:
        for binding in self.bindings:
            for _ in range(count):
                self._sent += 1
                event = StepAssigned(task_id="t", step_id=f"t/{self._sent}", capability="research", objective="x")
                metadata = Metadata(
                    id=deterministic_id(binding.topics[0], self._sent),
                    source="/clients/test",
                    subject="t",
                    time=datetime.now(UTC),
                )
                value, headers = CODEC.encode(event, metadata)
                self._producer.produce(binding.topics[0], value, b"t", headers=headers)
        assert self._producer.flush(20) == 0

    def runner(self, **settings: Any) -> Runner:
        return Runner(self.bindings, codec=CODEC, kafka=self.kafka.config, **settings)

    def told(self, topic: str, chosen: Callable[[Any], bool]) -> list[Any]:
        decoded = map(CODEC.decode, read_committed(self.kafka.config, topic))
        return [envelope.event for envelope in decoded if chosen(envelope)]


@pytest.fixture
def scene(kafka: Any) -> Scene:
    known = kafka.admin.list_topics(timeout=20).topics
    for name in ("work.results.normal", "telemetry", "dead-letters", "agents.directory"):
        if name not in known:
            kafka.create_topics(name)
    return Scene(kafka)


async def test_processors_run_side_by_side_and_tell_their_figures(scene: Scene) -> None:
    scene.send(50)
    runner = scene.runner()
    running = asyncio.create_task(runner.run())
    await until(
        lambda: runner.ready and all(each.stats.events_in == 50 for each in runner.processors.values()),
        running=running,
    )
    await asyncio.sleep(2.2)
    runner.stop()
    await running
    names = {binding.agent.name for binding in scene.bindings}
    stats = scene.told(topic_of(ProcessorStats).name, lambda each: each.event.agent in names)
    for name in names:
        mine = [each for each in stats if each.agent == name]
        assert sum(each.events_in for each in mine) == 50
        assert sum(each.events_out for each in mine) == 50
        assert all(each.p99_ms >= each.p50_ms for each in mine)
        assert max(each.p50_ms for each in mine) > 0
        assert (mine[-1].lag, mine[-1].in_flight) == (0, 0)


async def test_processors_announce_themselves_and_their_end(scene: Scene) -> None:
    runner = scene.runner(slot="here")
    names = {binding.agent.name for binding in scene.bindings}
    with AgentDirectory(scene.kafka.config, CODEC) as directory:

        def health_of_mine() -> list[Health]:
            return [each.health for each in directory.entries() if each.agent in names and each.instance == "here"]

        running = asyncio.create_task(runner.run())
        await until(lambda: health_of_mine() == [Health.READY] * 2, running=running)
        # One that starts later learns it from the topic.
        with AgentDirectory(scene.kafka.config, CODEC) as later:
            assert {each.agent for each in await later.lookup("echoing")} >= names
        runner.stop()
        await running
        await until(lambda: health_of_mine() == [Health.GONE] * 2)
    told = scene.told(topic_of(AgentRegistered).name, lambda each: each.event.name in names)
    for name in names:
        mine = [each for each in told if each.name == name]
        healths = [each.health for each in mine if isinstance(each, AgentHeartbeat)]
        assert healths[0] is Health.STARTING
        assert healths[-1] is Health.GONE
        assert Health.DEGRADED not in healths
        (registered,) = [each for each in mine if isinstance(each, AgentRegistered)]
        assert registered == AgentRegistered(
            name=name,
            instance="here",
            version="1",
            capabilities=("echoing",),
            consumes=("StepAssigned",),
            emits=("StepCompleted",),
        )


async def test_a_processor_that_cannot_run_stops_the_others(scene: Scene) -> None:
    scene.bindings[1] = Binding(scene.bindings[1].agent, ("nowhere.normal",))
    with pytest.raises(MissingTopicError, match="nowhere"):
        await asyncio.wait_for(scene.runner(telemetry=False).run(), 30)


async def test_a_fenced_processor_comes_back_once_and_yields_to_a_rival(scene: Scene) -> None:
    runner = scene.runner(telemetry=False)
    running = asyncio.create_task(runner.run())
    await until(lambda: runner.ready, running=running)
    name = scene.bindings[0].agent.name
    rival_of = scene.bindings[0]

    def take_ids() -> None:
        for each in transactional_ids(rival_of.group, 0):
            Producer({**scene.kafka.config, "transactional.id": each}).init_transactions(20)

    async def fence() -> None:
        before = runner.processors[name]
        await asyncio.to_thread(take_ids)
        # The fenced producer notices with its next transaction.
        scene.send(1)
        await until(lambda: runner.processors[name] is not before, running=running)

    await fence()
    await until(lambda: runner.ready and runner.processors[name].stats.events_in == 1, running=running)
    await asyncio.to_thread(take_ids)
    scene.send(1)
    with pytest.raises(FencedError, match="slot"):
        await asyncio.wait_for(running, 30)
    source = rival_of.agent.source
    results = scene.told("work.results.normal", lambda each: each.metadata.source == source)
    assert len(results) == 1


async def test_a_stop_before_the_start_is_over_is_heard(scene: Scene) -> None:
    runner = scene.runner(telemetry=False)
    running = asyncio.create_task(runner.run())
    await asyncio.sleep(0.05)
    started = time.monotonic()
    runner.stop()
    await running
    assert time.monotonic() - started < 15
