"""A dead letter's way back: through processors on a real Kafka, and through the commands of a running system."""

import asyncio
import json
import subprocess
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest
from confluent_kafka import Consumer, KafkaError, Producer, TopicPartition
from pydantic import BaseModel, ConfigDict

from agents.agent import Agent
from agents.context import Context
from magnatronic.client import Client
from magnatronic.dlq import DeadLetters
from magnatronic.letters import DEAD_LETTERS, Entry, Filter, LetterReader
from schemas.codec import Codec
from schemas.events import StepAssigned, StepCompleted
from schemas.metadata import REDRIVE_HEADER, Metadata
from schemas.record import Record
from schemas.topics import all_topics
from streams.binding import Binding
from streams.kafka import producer_settings, reader_settings
from streams.processor import Processor

if TYPE_CHECKING:
    from tests.integration.conftest import SystemForTests

CODEC = Codec()
RESULTS = "work.results.normal"


class Total(BaseModel):
    model_config = ConfigDict(frozen=True)

    sum: int = 0


class Adder(Agent[Total]):
    """Adds up a task's numbers, and can't do so with 13 while it is ``broken``."""

    version = "1"
    consumes = (StepAssigned,)
    emits = (StepCompleted,)
    state_type = Total

    def __init__(self, name: str, *, broken: bool = False) -> None:
        self.name = name  # type: ignore[misc]
        self._broken = broken

    async def handle(self, event: StepAssigned, ctx: Context[Total]) -> None:
        number = int(event.parameters["number"])
        if self._broken and number == 13:
            raise ValueError("13 is no number")
        ctx.state = Total(sum=(ctx.state or Total()).sum + number)
        ctx.emit(
            StepCompleted(
                task_id=event.task_id,
                step_id=event.step_id,
                attempt=1,
                capability=event.capability,
                objective=event.objective,
                answer=str(ctx.state.sum),
            )
        )


class Scene:
    """Two agents on one topic, one of them broken at first."""

    def __init__(self, kafka: Any) -> None:
        self.kafka = kafka
        self.broken, self.sound = kafka.unique("broken"), kafka.unique("sound")
        self.topic = f"{kafka.unique('work')}.normal"
        kafka.create_topics(self.topic, 2)
        self._producer = Producer(producer_settings(kafka.config, "scene"))
        self.reader = LetterReader(kafka.config, CODEC)

    def send(self, *numbers: int) -> None:
        for number in numbers:
            step_id = f"t/{uuid4()}"
            event = StepAssigned(
                task_id="t", step_id=step_id, capability="research", objective="add", parameters={"number": str(number)}
            )
            metadata = Metadata(id=str(uuid4()), source="/clients/test", subject="t", time=datetime.now(UTC))
            value, headers = CODEC.encode(event, metadata)
            self._producer.produce(self.topic, value, b"t", headers=headers)
        assert self._producer.flush(20) == 0

    @asynccontextmanager
    async def running(self, *, mended: bool) -> AsyncIterator[None]:
        agents = Adder(self.broken, broken=not mended), Adder(self.sound)
        async with AsyncExitStack() as stack:
            for agent in agents:
                await stack.enter_async_context(self._running(agent))
            yield

    @asynccontextmanager
    async def _running(self, agent: Adder) -> AsyncIterator[None]:
        processor = Processor(Binding(agent, (self.topic,)), codec=CODEC, kafka=self.kafka.config)
        task = asyncio.create_task(processor.run())
        try:
            yield
        finally:
            processor.stop()
            await task

    async def until(self, done: Callable[[], bool]) -> None:
        async with asyncio.timeout(40):
            while not done():  # noqa: ASYNC110 - what is waited for is in the log
                await asyncio.sleep(0.1)

    def letters(self) -> list[Entry]:
        return list(filter(Filter(topic=self.topic), self.reader.entries()))

    def answers(self) -> dict[str, list[int]]:
        """The sums that each agent said, in order."""
        found: dict[str, list[int]] = defaultdict(list)
        for record in self._committed(RESULTS):
            envelope = CODEC.decode(record)
            agent = envelope.metadata.source.removeprefix("/agents/").partition("@")[0]
            if agent in (self.broken, self.sound) and isinstance(envelope.event, StepCompleted):
                found[agent].append(int(envelope.event.answer))
        return dict(found)

    def input(self) -> list[Record]:
        return list(self._committed(self.topic))

    def _committed(self, topic: str) -> Iterator[Record]:
        consumer = Consumer(reader_settings(self.kafka.config, f"test-{uuid4()}"))
        try:
            waiting = set(consumer.list_topics(topic, timeout=20).topics[topic].partitions)
            consumer.assign([TopicPartition(topic, number, 0) for number in waiting])
            while waiting:
                for message in consumer.consume(1000, 0.3):
                    if (error := message.error()) is None:
                        yield Record.from_message(message)
                    elif error.code() == KafkaError._PARTITION_EOF:
                        waiting.discard(message.partition())
        finally:
            consumer.close()


@pytest.fixture
def scene(kafka: Any) -> Scene:
    known, topics = kafka.admin.list_topics(timeout=20).topics, all_topics()
    for name in (RESULTS, DEAD_LETTERS, "effects", "tasks.lifecycle.normal"):
        if name not in known:
            kafka.create_topics(name, 1, {"max.message.bytes": str(topics[name].max_message_bytes)})
    return Scene(kafka)


async def test_a_redriven_event_is_done_once_by_its_agent_and_by_no_other(scene: Scene) -> None:
    scene.send(1, 13, 2)
    async with scene.running(mended=False):
        await scene.until(lambda: sum(map(len, scene.answers().values())) == 5 and bool(scene.letters()))
    assert scene.answers() == {scene.broken: [1, 3], scene.sound: [1, 14, 16]}
    (letter,) = scene.letters()
    assert (letter.place.agent, letter.error_type, letter.error) == (scene.broken, "ValueError", "13 is no number")

    operator = DeadLetters(scene.kafka.config, CODEC, by="tester")
    operator.redrive([letter])
    async with scene.running(mended=False):
        await scene.until(lambda: len(scene.letters()) == 2)
    _, again = scene.letters()
    assert again.resolved is None
    assert again.place.agent == scene.broken
    operator.redrive([again])

    async with scene.running(mended=True):
        await scene.until(lambda: len(scene.answers()[scene.broken]) == 3)
        scene.send(5)
        await scene.until(lambda: sum(map(len, scene.answers().values())) == 8)
    assert scene.answers() == {scene.broken: [1, 3, 16, 21], scene.sound: [1, 14, 16, 21]}
    assert [letter.resolved is not None for letter in scene.letters()] == [True, True]
    redriven = [header for record in scene.input() for header in record.headers if header[0] == REDRIVE_HEADER]
    assert redriven == [(REDRIVE_HEADER, scene.broken.encode())] * 2


def as_json(done: "subprocess.CompletedProcess[str]") -> Any:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_commands_of_a_running_system(system: "SystemForTests") -> None:
    with Client.connect(system.data_dir) as client:
        producer = Producer({"bootstrap.servers": client.kafka["bootstrap.servers"]})
    for _ in range(2):
        producer.produce("tasks.high", b"\x00poison\xff" * 300, b"k1", headers={"x": b"\xfe"})
    assert producer.flush(20) == 0

    def open_() -> Any:
        return as_json(system.run("dlq list", "--json", "--agent", "decomposer", "--topic", "tasks.high"))

    def wait_for(number: int) -> Any:
        deadline = time.monotonic() + 30
        while len(found := open_()) < number:
            assert time.monotonic() < deadline
        return found

    first, second = wait_for(2)
    assert first["source_topic"] == "tasks.high"
    table = system.run("dlq list", "--since", "1h", "--error", first["error_type"], "--limit", "1")
    assert second["id"] in table.stdout
    assert first["id"] not in table.stdout
    assert "the newest 1 of 2; --limit shows more" in table.stderr

    shown = system.run("dlq show", first["id"])
    assert shown.returncode == 0, shown.stderr
    assert "no event: " in shown.stdout
    assert "00000000  00 70 6f 69 73 6f 6e ff 00 70 6f 69 73 6f 6e ff  .poison..poison." in shown.stdout
    assert "... 1376 more bytes; --full shows them" in shown.stdout
    assert "header x  0xfe" in shown.stdout
    whole = as_json(system.run("dlq show", "--json", first["place"]))
    assert bytes.fromhex(whole["value_hex"]) == b"\x00poison\xff" * 300
    assert (whole["key"], whole["headers"], whole["event"]) == ("k1", [["x", "0xfe"]], None)

    (redriven,) = as_json(system.run("dlq redrive", "--json", first["id"], "--reason", "try"))
    assert redriven["place"] == first["place"]
    third = wait_for(2)[-1]  # it is no better now, and comes back as another letter
    assert third["source_offset"] == redriven["offset"]
    refused = system.run("dlq redrive", first["id"])
    assert (refused.returncode, refused.stdout) == (2, "")
    assert f"dead letter {first['id']} was redriven by " in refused.stderr
    resolved = system.run("dlq list", "--resolved", "--agent", "decomposer")
    assert "redriven by " in resolved.stdout

    unsure = system.run("dlq discard", "--all", "--agent", "decomposer", "--reason", "poison")
    assert (unsure.returncode, unsure.stdout) == (2, "")
    assert "say --yes" in unsure.stderr
    discarded = system.run("dlq discard", "--all", "--agent", "decomposer", "--reason", "poison", "--yes")
    assert discarded.returncode == 0, discarded.stderr
    assert discarded.stdout.count("is discarded") == 2
    assert open_() == []
    assert system.run("dlq redrive", "--all", "--agent", "decomposer").returncode == 0
