"""The index is fed from a real Kafka, and is rebuilt from the log alone: no embedding model takes part."""

import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Producer

from schemas.codec import Codec
from schemas.events import ChunkEmbedded, DocumentIndexed, Event
from schemas.metadata import Metadata
from schemas.topics import key_of
from sinks.milvus.sink import MilvusSink
from sinks.milvus.store import MilvusStore, collection_name
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
    there = store.chunk_ids(COLLECTION, ["a", "b"]) if store.collections() else {}
    return {chunk_id for ids in there.values() for chunk_id in ids}


@pytest.mark.parametrize("rebuilt", [False, True], ids=["restart", "rebuild"])
def test_the_index_follows_the_log_and_comes_back_from_it(kafka: Any, tmp_path: Path, rebuilt: bool) -> None:
    topic = kafka.topic("embeddings", partitions=2)
    codec = Codec()
    producer = Producer({**kafka.config})
    for number, event in enumerate(EVENTS):
        key = key_of(event)
        metadata = Metadata(f"e{number}", "/agents/embedder@1", key, datetime(2026, 1, 1, tzinfo=UTC))
        encoded = codec.encode(event, metadata)
        producer.produce(topic, key=key, value=encoded.value, headers=list(encoded.headers))
    assert producer.flush(30) == 0

    store = MilvusStore(tmp_path / "milvus.db", idle_s=0.1)

    def follow() -> dict[tuple[str, int], int]:
        sink = MilvusSink(store)
        sink.topics = (topic,)
        runner = SinkRunner(sink, codec=codec, kafka=kafka.config, group=kafka.unique("milvus"))
        runner.start()
        try:
            assert eventually(lambda: sum(store.offsets(sink.name).values()) == len(EVENTS)), runner.error
            assert standing(store) == {"a-0", "a-5"}
            return store.offsets(sink.name)
        finally:
            runner.stop()

    store.open()
    try:
        before = follow()
        if rebuilt:
            sink = MilvusSink(store)
            sink.rebuild()
            assert standing(store) == set()
            assert not sink.offsets()
        assert follow() == before
        assert store.count(COLLECTION) == 2
    finally:
        store.close()
