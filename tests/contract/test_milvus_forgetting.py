"""A data subject who is forgotten: its chunks go from the index and its files; the others are found as before."""

import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from schemas.codec import Codec
from schemas.encryption import SubjectCipher
from schemas.events import ChunkEmbedded, DocumentIndexed, Event, SubjectForgotten
from schemas.metadata import Metadata
from schemas.record import Record
from schemas.topics import key_of, topic_of
from sinks.decoding import decoded
from sinks.errors import StoreError
from sinks.milvus.forgetting import erase, erased_rows
from sinks.milvus.naming import collection_name
from sinks.milvus.sink import MilvusSink
from sinks.milvus.store import MilvusStore
from sinks.sink import SinkRecord
from tests.support.keys import ADA, BOB, MemoryKeys

AT = datetime(2026, 1, 1, tzinfo=UTC)
COLLECTION = collection_name("m", "1", 8)
EMBEDDINGS = topic_of(ChunkEmbedded).name
PLACE = (EMBEDDINGS, 0)


class Feed:
    """Chunks of documents about somebody, three each."""

    def __init__(self) -> None:
        self.keys = MemoryKeys()
        self.records: list[Record] = []
        self._codec = Codec(cipher=SubjectCipher(self.keys))
        self._random = np.random.default_rng(7)

    def add(self, event: Event, *subjects: str) -> None:
        metadata = Metadata(f"e{len(self.records)}", "/agents/embedder@1", key_of(event), AT, data_subjects=subjects)
        value, headers = self._codec.encode(event, metadata)
        topic = topic_of(type(event)).name
        self.records.append(Record(topic, 0, len(self.records), 1, key_of(event).encode(), value, headers))

    def document(self, name: str, *subjects: str) -> None:
        common: dict[str, Any] = {"document_id": f"d-{name}", "model": "m", "model_version": "1"}
        for ordinal in range(3):
            vector = self._random.normal(size=8)
            chunk = ChunkEmbedded(
                chunk_id=f"{name}-{ordinal}",
                ordinal=ordinal,
                title=f"Title {name}",
                text=f"Quorzapple {name} {ordinal}",
                tokens=3,
                vector=tuple((vector / np.linalg.norm(vector)).tolist()),
                **common,
            )
            self.add(chunk, *subjects)
        chunk_ids = tuple(f"{name}-{ordinal}" for ordinal in range(3))
        self.add(DocumentIndexed(content_hash="h", chunk_ids=chunk_ids, **common), *subjects)

    def read(self, records: list[Record]) -> list[SinkRecord]:
        codec = Codec(cipher=SubjectCipher(self.keys))
        return [decoded(codec, record) for record in records]


@pytest.fixture
def feed() -> Feed:
    made = Feed()
    for name, subjects in (("ada", (ADA,)), ("both", (ADA, BOB)), ("bob", (BOB,)), ("none", ())):
        made.document(name, *subjects)
    return made


@pytest.fixture
def store(tmp_path: Path) -> Iterator[MilvusStore]:
    made = MilvusStore(tmp_path / "milvus.db")
    made.open()
    yield made
    made.close()


def write(store: MilvusStore, batch: list[SinkRecord], offset: int = 1) -> None:
    MilvusSink(store).write(batch, {PLACE: offset})


def forget(store: MilvusStore, feed: Feed, subject: str) -> None:
    feed.keys.forget(subject)
    feed.add(SubjectForgotten(key_id=subject, requested_by="x"))
    write(store, feed.read(feed.records[-1:]), 99)


def found(store: MilvusStore) -> dict[str, tuple[str, ...]]:
    hits = store.search(COLLECTION, np.ones((1, 8), np.float32), 100)[0]
    return {hit.chunk_id: hit.data_subjects for hit in hits}


def files_with(folder: Path, text: str) -> list[str]:
    return subprocess.run(["grep", "-rla", text, folder], capture_output=True, text=True, check=False).stdout.split()


def chunks(*names: str) -> set[str]:
    return {f"{name}-{ordinal}" for name in names for ordinal in range(3)}


def test_rows_say_whom_they_are_about(store: MilvusStore, feed: Feed) -> None:
    write(store, feed.read(feed.records))
    seen = found(store)
    assert seen.keys() == chunks("ada", "both", "bob", "none")
    assert (seen["ada-0"], seen["both-1"], seen["none-2"]) == ((ADA,), (ADA, BOB), ())


def test_nothing_is_left_of_one_and_all_of_the_others(store: MilvusStore, feed: Feed, tmp_path: Path) -> None:
    write(store, feed.read(feed.records))
    store.flush()
    assert files_with(tmp_path, "Quorzapple ada")
    forget(store, feed, ADA)
    assert found(store).keys() == chunks("bob", "none")
    assert erased_rows(store, [ADA, BOB]) == {ADA: 6}
    assert store.offsets("milvus") == {PLACE: 99}
    assert not files_with(tmp_path, "Quorzapple ada")
    assert not files_with(tmp_path, "Quorzapple both")
    assert not files_with(tmp_path, "Title ada")
    assert files_with(tmp_path, "Quorzapple bob")
    store.close()
    store.open()
    assert found(store).keys() == chunks("bob", "none")


def test_records_that_come_again_bring_nothing_back(store: MilvusStore, feed: Feed, tmp_path: Path) -> None:
    with_keys = feed.read(feed.records)
    write(store, with_keys)
    forget(store, feed, ADA)
    # By a process that remembers keys, then by one that does not, then in another order.
    for batch in (with_keys, feed.read(feed.records), list(reversed(feed.read(feed.records)))):
        write(store, batch)
        assert found(store).keys() == chunks("bob", "none")
    store.flush()
    assert not files_with(tmp_path, "Quorzapple ada")
    forget(store, feed, ADA)
    assert found(store).keys() == chunks("bob", "none")


def test_before_there_is_anything_to_forget(store: MilvusStore, feed: Feed) -> None:
    with_keys = feed.read(feed.records)
    forget(store, feed, ADA)
    assert erased_rows(store, [ADA]) == {ADA: 0}
    write(store, with_keys)
    assert found(store).keys() == chunks("bob", "none")
    assert erased_rows(store, [ADA]) == {ADA: 6}


@pytest.mark.parametrize("broken", ["delete", "purge", "note_offsets"])
def test_what_ends_in_the_middle_is_done_again(
    store: MilvusStore, feed: Feed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    write(store, feed.read(feed.records))
    store.flush()

    def fail(*_: object, **__: object) -> None:
        raise StoreError("told to fail", retryable=True)

    with monkeypatch.context() as patched:
        patched.setattr(store, broken, fail)
        with pytest.raises(StoreError):
            erase(store, "milvus", {ADA})
    assert erased_rows(store, [ADA]) == {}
    erase(store, "milvus", {ADA})
    assert erased_rows(store, [ADA]) == {ADA: 6}
    assert found(store).keys() == chunks("bob", "none")
    store.flush()
    assert not files_with(tmp_path, "Quorzapple ada")


def test_an_index_of_an_earlier_release_is_made_again(
    store: MilvusStore, feed: Feed, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(store, feed.read(feed.records), 16)
    store.flush()
    store.close()
    monkeypatch.setattr("sinks.milvus.store._fields", lambda _client, collection: ["chunk_id"])
    store.open()
    monkeypatch.undo()
    assert store.collections() == []
    assert store.offsets("milvus") == {}
    write(store, feed.read(feed.records), 16)
    assert found(store).keys() == chunks("ada", "both", "bob", "none")
