"""The index is fed from a real Kafka, and is rebuilt from the log alone: no embedding model takes part."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Producer

from magnatronic.rebuild import Stretches
from replay.kafka_log import KafkaLog
from schemas.codec import Codec
from schemas.events import ChunkEmbedded, DocumentIndexed, Event
from schemas.metadata import Metadata
from schemas.topics import key_of
from sinks.milvus.naming import collection_name, in_generation, offsets_name
from sinks.milvus.shadow import MilvusProjection
from sinks.milvus.sink import MilvusSink
from sinks.milvus.store import MilvusStore
from sinks.rebuild import Rebuild, RebuildReport
from sinks.runner import SinkRunner

DIMENSIONS = 8
COLLECTION = collection_name("toy", "1", DIMENSIONS)


def chunk(document: str, n: int) -> ChunkEmbedded:
    vector = tuple(1.0 if place == n % DIMENSIONS else 0.0 for place in range(DIMENSIONS))
    return ChunkEmbedded(
        chunk_id=f"{document}-{n}",
        document_id=document,
        ordinal=n,
        title=document,
        text=f"text {n}",
        tokens=2,
        model="toy",
        model_version="1",
        vector=vector,
    )


def indexed(document: str, *numbers: int) -> DocumentIndexed:
    return DocumentIndexed(
        document_id=document,
        content_hash="",
        chunk_ids=tuple(f"{document}-{n}" for n in numbers),
        model="toy",
        model_version="1",
    )


EVENTS: list[Event] = [
    *(chunk("a", n) for n in range(5)),
    indexed("a", *range(5)),
    *(chunk("b", n) for n in range(3)),
    indexed("b", *range(3)),
    chunk("a", 5),
    indexed("a", 0, 5),
    indexed("b"),
]


def eventually(holds: Callable[[], bool], timeout_s: float = 30) -> bool:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if holds():
            return True
        time.sleep(0.05)
    return False


def standing(store: MilvusStore) -> set[str]:
    collections = store.collections()
    there = store.chunk_ids(collections[0], ["a", "b", "c"]) if collections else {}
    return {chunk_id for ids in there.values() for chunk_id in ids}


class World:
    """A topic with events, and an index on disk."""

    def __init__(self, kafka: Any, folder: Path) -> None:
        self.kafka = kafka
        self.topic = kafka.topic("embeddings", partitions=2)
        self.codec = Codec()
        self.produced = 0
        self.store = MilvusStore(folder / "milvus.db", idle_s=0.1)
        self._producer = Producer({**kafka.config})
        self._group = kafka.unique("milvus")

    def produce(self, *events: Event) -> None:
        for event in events:
            key = key_of(event)
            metadata = Metadata(f"e{self.produced}", "/agents/embedder@1", key, datetime(2026, 1, 1, tzinfo=UTC))
            encoded = self.codec.encode(event, metadata)
            self._producer.produce(self.topic, key=key, value=encoded.value, headers=list(encoded.headers))
            self.produced += 1
        assert self._producer.flush(30) == 0

    @contextmanager
    def following(self) -> Iterator[SinkRunner]:
        """A sink's runner, as a system has one."""
        sink = MilvusSink(self.store)
        sink.topics = (self.topic,)
        runner = SinkRunner(sink, codec=self.codec, kafka=self.kafka.config, group=self._group, instance="0")
        runner.start()
        try:
            yield runner
        finally:
            runner.stop()
        assert runner.error is None

    def rebuild(self, runner: SinkRunner) -> RebuildReport:
        projection = MilvusProjection(self.store, [self.topic])
        try:
            with KafkaLog(self.kafka.config) as log:
                return Rebuild(projection, Stretches(log), self.codec, hold=runner.between_batches).run()
        finally:
            projection.close()

    def all_there(self) -> bool:
        self.store.flush()
        generation = self.store.generation()
        return sum(self.store.offsets(offsets_name("milvus", generation)).values()) == self.produced


@pytest.fixture
def world(kafka: Any, tmp_path: Path) -> Iterator[World]:
    made = World(kafka, tmp_path)
    made.store.open()
    made.produce(*EVENTS)
    yield made
    made.store.close()


def test_the_index_follows_the_log(world: World) -> None:
    for _ in range(2):
        with world.following():
            assert eventually(world.all_there)
            assert standing(world.store) == {"a-0", "a-5"}
    assert world.store.count(COLLECTION) == 2


def test_the_sink_goes_on_in_the_index_that_was_made_again(world: World) -> None:
    with world.following() as runner:
        assert runner.wait_caught_up(30)
        report = world.rebuild(runner)
        assert report.equal
        assert report.switched
        assert standing(world.store) == {"a-0", "a-5"}
        world.produce(chunk("c", 1), indexed("c", 1))
        assert eventually(world.all_there), runner.error
        assert standing(world.store) == {"a-0", "a-5", "c-1"}
        assert world.store.collections() == [in_generation(COLLECTION, 1)]
        report = world.rebuild(runner)
        assert report.equal
        assert eventually(lambda: runner.caught_up())
    with world.following():
        world.produce(indexed("c"))
        assert eventually(world.all_there)
        assert standing(world.store) == {"a-0", "a-5"}


def test_a_sink_that_nobody_can_hold_notices_the_switch_though_nothing_comes(world: World) -> None:
    """It has written more than the new index holds, and no further event tells it to look."""
    with world.following() as runner:
        assert runner.wait_caught_up(30)
        shadow = MilvusSink(world.store, 1)
        shadow.write((), {(world.topic, 0): 0, (world.topic, 1): 0})
        world.store.use(1)
        assert eventually(world.all_there), runner.error
        assert standing(world.store) == {"a-0", "a-5"}
        assert world.store.collections() == [in_generation(COLLECTION, 1)]
