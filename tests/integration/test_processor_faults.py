"""What a processor does when what it relies upon goes away: one outcome a fault, and nothing is lost or doubled."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from itertools import count
from typing import Any
from uuid import uuid4

import pytest
from confluent_kafka import Consumer, KafkaError, KafkaException, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic

from magnatronic.broker import EmbeddedBroker
from magnatronic.broker.process import free_ports
from schemas.events import StepAssigned
from schemas.metadata import Metadata
from streams.binding import Binding
from streams.errors import FencedError, MissingTopicError, ProcessorError
from streams.kafka import producer_settings
from streams.processor import Processor
from streams.runner import Runner
from tests.support.processors import CODEC, read_committed, until
from tests.support.steps import Echo

PARTITIONS = 2
RESULTS = "work.results.normal"
TOPICS = (RESULTS, "effects", "dead-letters", "tasks.lifecycle.normal")


class Cluster:
    """A broker of this module's own: it is taken away."""

    def __init__(self, broker: EmbeddedBroker) -> None:
        self.broker = broker
        self.kafka: dict[str, Any] = {"bootstrap.servers": broker.bootstrap_servers, "log_level": 0}
        self.admin = AdminClient(self.kafka)

    def create(self, *topics: str) -> None:
        """Create topics; one that was deleted may take a moment to be gone."""
        for topic in topics:
            for _ in range(100):
                try:
                    self.admin.create_topics([NewTopic(topic, PARTITIONS, 1)])[topic].result(30)
                    break
                except KafkaException as error:
                    if error.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:
                        raise
            else:
                raise AssertionError(f"{topic} is still there")

    def delete(self, topic: str) -> None:
        self.admin.delete_topics([topic])[topic].result(30)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    (port,) = free_ports(1)  # the same one after it was away
    with EmbeddedBroker(tmp_path_factory.mktemp("faults"), port=port, heap_mb=384) as broker:
        cluster = Cluster(broker)
        cluster.create(*TOPICS)
        yield cluster


class Scene:
    """An agent on an input topic, events for it, and what came of them."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.topic = f"work-{uuid4().hex[:8]}.normal"
        cluster.create(self.topic)
        self.binding = Binding(Echo(f"echo-{uuid4().hex[:8]}", pause_s=0.002), (self.topic,))
        self.sent: list[str] = []
        self._numbers = count()
        self._producer = Producer(producer_settings(cluster.kafka, "scene"))

    def send(self, number: int, *, flush: bool = True) -> None:
        for _ in range(number):
            step_id = f"t/{next(self._numbers)}"
            event = StepAssigned(task_id=step_id, step_id=step_id, capability="research", objective="x")
            metadata = Metadata(id=str(uuid4()), source="/clients/test", subject=step_id, time=datetime.now(UTC))
            value, headers = CODEC.encode(event, metadata)
            self._producer.produce(self.topic, value, step_id.encode(), headers=headers)
            self._producer.poll(0)
            self.sent.append(step_id)
        if flush:
            self.flush()

    def flush(self) -> None:
        assert self._producer.flush(60) == 0

    def processor(self) -> Processor:
        return Processor(self.binding, codec=CODEC, kafka=self.cluster.kafka, slot=0, session_timeout_ms=6000)

    def runner(self) -> Runner:
        return Runner([self.binding], codec=CODEC, kafka=self.cluster.kafka, telemetry=False)

    def results(self, topic: str = RESULTS) -> Counter[str]:
        """How often each step was completed, of those that this scene's agent did."""
        decoded = map(CODEC.decode, read_committed(self.cluster.kafka, topic))
        mine = (each.event for each in decoded if each.metadata.source == self.binding.agent.source)
        return Counter(getattr(event, "step_id", topic) for event in mine)

    def dead_letters(self) -> int:
        return self.results("dead-letters").total()

    async def all_are_done(self, running: "asyncio.Task[None]") -> None:
        await until(lambda: self.results().keys() >= set(self.sent), running=running, timeout_s=60)

    def committed(self) -> int:
        """How many events the group is through with, by its offsets."""
        consumer = Consumer({**self.cluster.kafka, "group.id": self.binding.group})
        try:
            places = [TopicPartition(self.topic, number) for number in range(PARTITIONS)]
            return sum(max(place.offset, 0) for place in consumer.committed(places, timeout=30))
        finally:
            consumer.close()


@pytest.fixture
def scene(cluster: Cluster) -> Scene:
    return Scene(cluster)


@asynccontextmanager
async def running(work: Processor | Runner) -> AsyncIterator["asyncio.Task[None]"]:
    task = asyncio.create_task(work.run())
    try:
        yield task
    finally:
        work.stop()
        with suppress(ProcessorError):
            await task


def once(steps: Sequence[str]) -> Counter[str]:
    return Counter(dict.fromkeys(steps, 1))


async def test_an_output_topic_that_is_deleted_stops_the_processor_with_its_name(scene: Scene) -> None:
    scene.send(20)
    async with running(scene.processor()) as task:
        await scene.all_are_done(task)
        await asyncio.to_thread(scene.cluster.delete, RESULTS)
        before = list(scene.sent)
        scene.send(30)
        try:
            with pytest.raises(ProcessorError, match=RESULTS) as stopped:
                await asyncio.wait_for(asyncio.shield(task), 60)
        finally:
            scene.cluster.create(RESULTS)
    assert isinstance(stopped.value, MissingTopicError) or stopped.value.retryable
    # None of them is through, and none was given up for what is no fault of its own.
    assert scene.committed() == len(before)
    assert scene.dead_letters() == 0

    async with running(scene.processor()) as task:
        late = [step for step in scene.sent if step not in before]
        await until(lambda: scene.results().keys() >= set(late))
    assert scene.results() == once(late)


async def test_a_second_one_with_the_same_slot_takes_over_and_the_first_stops(scene: Scene) -> None:
    scene.send(500)
    first = scene.processor()
    async with running(first) as task:
        await until(lambda: first.stats.events_in > 50)
        async with running(scene.processor()) as second:
            with pytest.raises(FencedError, match="slot"):
                await asyncio.wait_for(asyncio.shield(task), 30)
            scene.send(100)
            await scene.all_are_done(second)
    assert scene.results() == once(scene.sent)
    assert scene.dead_letters() == 0


async def test_a_broker_that_is_away_for_a_while_is_waited_for(scene: Scene) -> None:
    async with running(scene.runner()) as task:
        scene.send(200)
        await scene.all_are_done(task)
        scene.send(2000)
        await asyncio.sleep(0.3)
        await asyncio.to_thread(scene.cluster.broker.kill)
        scene.send(500, flush=False)
        await asyncio.sleep(8)
        await asyncio.to_thread(scene.cluster.broker.start)
        await asyncio.to_thread(scene.flush)
        await scene.all_are_done(task)
        assert not task.done()
    assert scene.results() == once(scene.sent)
    assert scene.dead_letters() == 0
