"""The Milvus sink and memory, on Milvus Lite always and on a Milvus server where Docker is there."""

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agents.context import RecallRequest, Vectors
from schemas.events import ChunkEmbedded, DocumentIndexed, Event
from schemas.metadata import Envelope, Metadata
from schemas.record import Record
from sinks.errors import StoreBusyError, StoreError
from sinks.milvus.memory import MilvusMemory
from sinks.milvus.naming import collection_name
from sinks.milvus.sink import MilvusSink
from sinks.milvus.store import MilvusStore
from sinks.sink import SinkRecord

MILVUS_IMAGE = "milvusdb/milvus:v2.6.4"
TOPIC = "embeddings"
METADATA = Metadata("e", "/agents/embedder@1", "d", datetime(2026, 1, 1, tzinfo=UTC))
HOSTILE = 'd"1\\" or document_id != \'\n\u0001é'


def vector_of(text: str, dimensions: int = 16) -> Vectors:
    seed = int.from_bytes(sha256(text.encode()).digest()[:8], "little")
    raw = np.random.default_rng(seed).standard_normal(dimensions).astype(np.float32)
    return np.asarray(raw / np.linalg.norm(raw), np.float32)


class ToyModel:
    """Vectors by hash: a text is nearest to itself."""

    version, dimensions = "1", 16

    def __init__(self, model: str) -> None:
        self.model = model

    async def embed(self, texts: Sequence[str]) -> Vectors:
        return np.stack([vector_of(text) for text in texts])


class Index:
    """A sink, its store, a memory, and the events of one embedding model."""

    def __init__(self, uri: str, model: str) -> None:
        self.model = model
        self.collection = collection_name(model, "1", 16)
        self.store = MilvusStore(uri, idle_s=0.1)
        self.sink = MilvusSink(self.store)
        self.memory = MilvusMemory(self.store, ToyModel(model))
        self.position = 0

    def open(self) -> "Index":
        self.sink.open()
        self.memory.open()
        return self

    def close(self) -> None:
        self.memory.close()
        self.sink.close()

    def chunk(self, document: str, text: str, *, vector: str | None = None, model: str | None = None) -> ChunkEmbedded:
        return ChunkEmbedded(
            chunk_id=f"{document[:20]}/{text[:20]}",
            document_id=document,
            ordinal=0,
            title=f"Title of {document}",
            heading="Use",
            source="w.md",
            text=text,
            tokens=3,
            model=model or self.model,
            model_version="1",
            vector=tuple(vector_of(vector or text).tolist()),
        )

    def indexed(self, document: str, *texts: str, model: str | None = None) -> DocumentIndexed:
        return DocumentIndexed(
            document_id=document,
            content_hash="",
            chunk_ids=tuple(f"{document[:20]}/{text[:20]}" for text in texts),
            model=model or self.model,
            model_version="1",
        )

    def document(self, document: str, *texts: str) -> list[Event]:
        return [*(self.chunk(document, text) for text in texts), self.indexed(document, *texts)]

    def write(self, *events: Event, at: int | None = None) -> None:
        first = self.position if at is None else at
        records = [
            SinkRecord(Record(TOPIC, 0, offset, 0, b"", b""), Envelope(event, METADATA))
            for offset, event in enumerate(events, first)
        ]
        self.position = first + len(events)
        self.sink.write(records, {(TOPIC, 0): self.position})

    async def texts(self, query: str, limit: int = 100, documents: tuple[str, ...] = ()) -> list[str]:
        found = await self.memory.recall(RecallRequest(query=query, limit=limit, document_ids=documents))
        return [evidence.text for evidence in found]

    async def everything(self) -> set[str]:
        return set(await self.texts("anything"))


@pytest.fixture(scope="module")
def server(docker_engine: None) -> Iterator[str]:
    from testcontainers.community.milvus import MilvusContainer

    with MilvusContainer(MILVUS_IMAGE) as container:
        yield container.get_connection_url()


@pytest.fixture(params=["lite", pytest.param("server", marks=pytest.mark.docker)])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "lite":
        return str(tmp_path / "milvus.db")
    address: str = request.getfixturevalue("server")
    return address


@pytest.fixture
def index(uri: str, request: pytest.FixtureRequest) -> Iterator[Index]:
    made = Index(uri, "model" + sha256(request.node.nodeid.encode()).hexdigest()[:8]).open()
    for collection in made.store.collections():
        made.store.drop(collection)
    made.store.forget_offsets("milvus")
    yield made
    made.close()


async def test_what_was_written_is_recalled_best_first(index: Index) -> None:
    index.write(*index.document("d1", "cables", "widgets"), *index.document("d2", "pies"))
    (best, *rest) = await index.memory.recall(RecallRequest(query="widgets", limit=3))
    assert (best.text, best.document_id, best.chunk_id) == ("widgets", "d1", "d1/widgets")
    assert (best.title, best.heading, best.source, best.score) == ("Title of d1", "Use", "w.md", 1.0)
    scores = [best.score, *(one.score for one in rest)]
    assert scores == sorted(scores, reverse=True)
    assert scores[1] == pytest.approx(float(vector_of("widgets") @ vector_of(rest[0].text)), abs=1e-4)
    assert await index.texts("widgets", limit=1) == ["widgets"]
    assert await index.texts("widgets", limit=0) == []


async def test_an_empty_index_recalls_nothing(index: Index) -> None:
    assert await index.texts("anything") == []
    assert index.sink.offsets() == {}
    assert index.store.count(index.collection) == 0


async def test_recall_can_be_narrowed_to_documents(index: Index) -> None:
    index.write(*index.document(HOSTILE, "one"), *index.document("d2", "two"), *index.document("d3", "three"))
    assert await index.texts("two", documents=(HOSTILE,)) == ["one"]
    assert await index.texts("two", documents=("d3", "d2")) == ["two", "three"]
    assert await index.texts("two", documents=("unknown",)) == []
    index.write(index.indexed(HOSTILE))
    assert await index.everything() == {"two", "three"}


async def test_a_changed_documents_stale_chunks_go(index: Index) -> None:
    index.write(*index.document("d1", "old", "kept"), *index.document("d2", "other"))
    index.write(index.chunk("d1", "new"), index.indexed("d1", "kept", "new"))
    assert await index.everything() == {"kept", "new", "other"}
    assert index.store.count(index.collection) == 3


async def test_a_removed_documents_chunks_go(index: Index) -> None:
    index.write(*index.document("d1", "a", "b"), *index.document("d2", "c"))
    index.write(index.indexed("d1"))
    assert await index.everything() == {"c"}


@pytest.mark.parametrize("size", [1, 3, 100])
async def test_batches_of_any_size_end_alike(index: Index, size: int) -> None:
    events = [
        *index.document("d1", "a", "b"),
        index.indexed("d1"),
        *index.document("d2", "c"),
        *index.document("d1", "b", "e"),
        index.chunk("d2", "f"),
        index.indexed("d2", "f"),
        index.chunk("d3", "not yet listed"),
    ]
    for first in range(0, len(events), size):
        index.write(*events[first : first + size])
    assert await index.everything() == {"b", "e", "f", "not yet listed"}
    index.write(*events, at=0)  # all of it once more, as after a crash
    assert await index.everything() == {"b", "e", "f", "not yet listed"}
    assert index.store.count(index.collection) == 4


async def test_a_chunk_written_again_is_replaced(index: Index) -> None:
    index.write(index.chunk("d1", "text", vector="elsewhere"))
    index.write(index.chunk("d1", "text"), index.indexed("d1", "text"))
    (only,) = await index.memory.recall(RecallRequest(query="text"))
    assert only.score == 1.0


async def test_models_have_collections_of_their_own(index: Index) -> None:
    other = index.model + "b"
    index.write(index.chunk("d1", "a"), index.indexed("d1", "a"), index.chunk("d2", "b", model=other))
    assert await index.everything() == {"a"}
    index.write(index.chunk("d1", "a2", model=other), index.indexed("d1", "a2", model=other))
    assert await index.everything() == set()  # the old model's chunks of a document that has been embedded anew


async def test_records_that_do_not_decode_are_passed_over(index: Index) -> None:
    bad = SinkRecord(Record(TOPIC, 0, 0, 0, b"", b"?"), None, "truncated")
    index.sink.write([bad], {(TOPIC, 0): 1})
    index.sink.write([], {(TOPIC, 1): 7})
    assert index.sink.offsets() == {(TOPIC, 0): 1, (TOPIC, 1): 7}


async def test_data_and_offsets_outlive_the_process(index: Index) -> None:
    index.write(*index.document("d1", "a", "b"))
    index.close()
    index.open()
    assert index.sink.offsets() == {(TOPIC, 0): 3}
    assert await index.everything() == {"a", "b"}


async def test_equal_scores_are_ordered_by_id(index: Index) -> None:
    names = [f"copy-{n:02}" for n in range(6)]
    index.write(*(index.chunk("d1", name, vector="same") for name in reversed(names)))
    for limit in (2, 4, 6):
        assert await index.texts("same", limit=limit) == names[:limit]


async def test_concurrent_recalls_share_searches(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [f"word {n}" for n in range(100)]
    index.write(*index.document("d1", *words))
    searched: list[int] = []
    search: Callable[..., Any] = index.store.search

    def counted(collection: str, vectors: Vectors, limit: int, document_ids: Sequence[str] = ()) -> Any:
        searched.append(len(vectors))
        return search(collection, vectors, limit, document_ids)

    monkeypatch.setattr(index.store, "search", counted)
    found = await asyncio.gather(*(index.texts(word, limit=1 + n % 3) for n, word in enumerate(words)))
    assert [texts[0] for texts in found] == words
    assert [len(texts) for texts in found] == [1 + n % 3 for n in range(100)]
    assert sum(searched) == 100
    assert len(searched) < 20


async def test_recall_goes_on_while_the_sink_writes(index: Index) -> None:
    index.write(*index.document("d0", "anchor"))
    stop = asyncio.Event()

    async def ask() -> int:
        asked = 0
        while not stop.is_set():
            assert await index.texts("anchor", limit=1) == ["anchor"]
            asked += 1
        return asked

    asking = [asyncio.create_task(ask()) for _ in range(4)]
    for n in range(10):
        await asyncio.to_thread(index.write, *index.document(f"d{n + 1}", *(f"text {n} {m}" for m in range(20))))
    stop.set()
    assert min(await asyncio.gather(*asking)) > 0
    assert index.store.count(index.collection) == 201


async def test_long_fields_are_cut_to_what_milvus_holds(index: Index) -> None:
    index.write(index.chunk("d1", "é" * 60_000))
    (only,) = await index.memory.recall(RecallRequest(query="é" * 60_000))
    assert only.text == "é" * 32_767


async def test_a_closed_memory_says_so(index: Index) -> None:
    index.memory.close()
    with pytest.raises(StoreError, match="not open"):
        await index.texts("anything")
    index.memory.open()
    assert await index.texts("anything") == []


# What holds for Milvus Lite alone.


def test_a_second_process_is_refused(tmp_path: Path) -> None:
    index = Index(str(tmp_path / "milvus.db"), "model").open()
    try:
        code = f"from sinks.milvus.store import MilvusStore; MilvusStore({index.store.uri!r}).open()"
        second = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    finally:
        index.close()
    assert second.returncode == 1
    assert StoreBusyError.__name__ in second.stderr
    assert "another process has it open" in second.stderr
    MilvusStore(tmp_path / "milvus.db").open()  # and free again after close


def test_what_is_noted_survives_sigkill(tmp_path: Path) -> None:
    code = f"""
        import os, signal, sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from test_milvus_contract import Index
        index = Index({str(tmp_path / "milvus.db")!r}, "model").open()
        for n in range(5):
            index.write(*index.document(f"d{{n}}", "a", "b"))
            assert index.sink.offsets() == {{("embeddings", 0): 3 * (n + 1)}}
        index.write(*index.document("late", "c"))
        os.kill(os.getpid(), signal.SIGKILL)
    """
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], timeout=60, check=False, env={**os.environ})
    assert killed.returncode == -signal.SIGKILL
    index = Index(str(tmp_path / "milvus.db"), "model").open()
    try:
        assert index.sink.offsets() == {(TOPIC, 0): 15}
        index.write(*index.document("late", "c"), at=15)
        assert index.store.count(index.collection) == 11
    finally:
        index.close()


def test_it_is_flushed_when_nothing_more_comes(tmp_path: Path) -> None:
    index = Index(str(tmp_path / "milvus.db"), "model").open()
    try:
        index.write(*index.document("d1", "a"))
        deadline = time.monotonic() + 10
        while index.store.unflushed_rows and time.monotonic() < deadline:
            time.sleep(0.02)
        assert index.store.unflushed_rows == 0
    finally:
        index.close()
