"""The index is made again from the log and compared row by row, on Milvus Lite and on a server with Docker."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agents.context import RecallRequest, Vectors
from schemas.events import ChunkEmbedded, DocumentIndexed
from sinks.comparison import DifferenceKind
from sinks.errors import HistoryLostError, ReplacedError, StoreError
from sinks.milvus import comparing
from sinks.milvus.memory import MilvusMemory
from sinks.milvus.naming import collection_name, in_generation, plain_name
from sinks.milvus.shadow import MilvusProjection
from sinks.milvus.sink import MilvusSink
from sinks.milvus.store import MilvusStore
from sinks.rebuild import Phase, Rebuild, RebuildReport
from tests.support.rebuilding import MemoryLog

MILVUS_IMAGE = "milvusdb/milvus:v2.6.4"
TOPIC = "embeddings"
DIMENSIONS = 8
ROOT = Path(__file__).parents[2]


def vector_of(text: str) -> Vectors:
    seed = int.from_bytes(sha256(text.encode()).digest()[:8], "little")
    raw = np.random.default_rng(seed).standard_normal(DIMENSIONS).astype(np.float32)
    return np.asarray(raw / np.linalg.norm(raw), np.float32)


class ToyModel:
    """Vectors by hash: a text is nearest to itself."""

    version, dimensions = "1", DIMENSIONS

    def __init__(self, model: str) -> None:
        self.model = model

    async def embed(self, texts: Sequence[str]) -> Vectors:
        return np.stack([vector_of(text) for text in texts])


class World:
    """A log and the index that was fed from it."""

    def __init__(self, store: MilvusStore, model: str) -> None:
        self.log = MemoryLog(batch=5)
        self.store = store
        self.model = model
        self.collection = collection_name(model, "1", DIMENSIONS)
        self.sink = MilvusSink(store)
        self.sink.open()
        self.memory = MilvusMemory(store, ToyModel(model))
        self.memory.open()
        self.sink.offsets()

    def close(self) -> None:
        self.memory.close()
        self.sink.close()

    def write(self, document: str, *texts: str, standing: Sequence[str] | None = None) -> None:
        for ordinal, text in enumerate(texts):
            chunk = ChunkEmbedded(
                **{"chunk_id": f"{document}/{text}", "document_id": document, "ordinal": ordinal, "tokens": 2},
                **{"title": document, "heading": "h", "source": "s.md", "text": text, "model": self.model},
                **{"model_version": "1", "vector": tuple(vector_of(text).tolist())},
            )
            self.log.add(TOPIC, chunk, key=document, partition=len(document) % 2)
        stands = texts if standing is None else standing
        indexed = DocumentIndexed(
            **{"document_id": document, "content_hash": "", "model": self.model, "model_version": "1"},
            chunk_ids=tuple(f"{document}/{text}" for text in stands),
        )
        self.log.add(TOPIC, indexed, key=document, partition=len(document) % 2)

    def fill(self) -> None:
        """Three documents, one of them changed later; the same log each time."""
        self.write("one", "a", "b", "c")
        self.write("two", "x", "y")
        self.write("three", *(f"t{number}" for number in range(30)))
        self.write("one", "d", standing=("a", "b", "d"))

    def follow(self) -> None:
        """Feed the sink what it has not seen, as its runner would."""
        if self.sink.replaced():
            self.sink.offsets()
        self.sink.write(self.log.sink_records(self.sink.offsets()), self.log.ends)

    def rebuild(self, **options: Any) -> RebuildReport:
        projection = MilvusProjection(self.store)
        try:
            return Rebuild(projection, self.log, self.log.codec, **options).run()
        finally:
            projection.close()

    async def texts(self, query: str = "anything", limit: int = 100) -> set[str]:
        found = await self.memory.recall(RecallRequest(query=query, limit=limit, document_ids=()))
        return {evidence.text for evidence in found}

    def damage(self) -> None:
        """Change a text and a vector, lose a row, invent one."""
        collection = in_generation(self.collection, self.store.generation())
        rows = {row["chunk_id"]: row for row in self.store.chunks(collection, 'chunk_id != ""', 1_000)}
        changed = [
            rows["one/a"] | {"text": "magic"},
            rows["two/y"] | {"vector": [0.5] * DIMENSIONS},
            rows["one/b"] | {"chunk_id": "one/invented"},
        ]
        self.store._do(lambda client: client.upsert(collection, changed))
        self.store.delete(collection, ["two/x"])
        self.store.flush()

    def all_collections(self) -> list[str]:
        names: list[str] = self.store._do(lambda client: client.list_collections())
        return sorted(name for name in names if name != "sink_offsets")


@pytest.fixture(scope="module")
def server(docker_engine: None) -> Iterator[str]:
    from testcontainers.community.milvus import MilvusContainer

    with MilvusContainer(MILVUS_IMAGE) as container:
        yield container.get_connection_url()


@pytest.fixture(params=["lite", pytest.param("server", marks=pytest.mark.docker)])
def world(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[World]:
    uri = str(tmp_path / "milvus.db") if request.param == "lite" else str(request.getfixturevalue("server"))
    store = MilvusStore(uri, idle_s=0.1)
    store.open()
    for collection in store.collections():
        store.drop(collection)
    for generation in range(4):
        store.forget_offsets(f"milvus@{generation}" if generation else "milvus")
    made = World(store, "model" + sha256(request.node.nodeid.encode()).hexdigest()[:8])
    made.fill()
    made.follow()
    yield made
    made.close()
    store.close()


STANDING = {"a", "b", "d", "x", "y", *(f"t{number}" for number in range(30))}


async def test_what_is_made_again_equals_what_was_there(world: World) -> None:
    assert await world.texts() == STANDING
    offsets, before = world.sink.offsets(), world.store.generation()
    phases: list[Phase] = []
    report = await asyncio.to_thread(world.rebuild, on_progress=lambda phase, done, of: phases.append(phase))
    assert report.equal
    assert report.switched
    assert not report.resumed
    (compared,) = report.compared
    assert compared.table == world.collection
    assert compared.stored_rows == compared.rebuilt_rows == len(STANDING)
    assert compared.stored_hash == compared.rebuilt_hash != 0
    assert list(dict.fromkeys(phases)) == [Phase.READING, Phase.COMPARING, Phase.SWITCHING, Phase.FINISHING]
    assert world.store.generation() == before + 1
    assert world.all_collections() == [in_generation(world.collection, before + 1)]
    assert await world.texts() == STANDING
    assert world.sink.replaced()
    with pytest.raises(ReplacedError, match="new index"):
        world.sink.write((), {(TOPIC, 0): 99})
    assert world.sink.offsets() == offsets
    assert not world.sink.replaced()
    world.write("four", "new")
    world.follow()
    assert await world.texts() == STANDING | {"new"}
    assert (await asyncio.to_thread(world.rebuild)).equal


async def test_damage_is_named_and_mended(world: World) -> None:
    world.damage()
    damaged = await world.texts()
    report = await asyncio.to_thread(world.rebuild)
    assert not report.equal
    assert not report.switched
    (compared,) = report.compared
    assert (compared.missing, compared.surplus, compared.changed) == (1, 1, 2)
    said = {(each.kind, each.place.removeprefix(f"{world.collection} "), each.field) for each in compared.examples}
    assert said == {
        (DifferenceKind.CHANGED, "one/a", "text"),
        (DifferenceKind.CHANGED, "two/y", "vector[0]"),
        (DifferenceKind.SURPLUS, "one/invented", ""),
        (DifferenceKind.MISSING, "two/x", ""),
    }
    assert await world.texts() == damaged, "nothing is changed that was not accepted"
    report = await asyncio.to_thread(world.rebuild, accept=True)
    assert report.switched
    assert report.resumed
    assert report.records == 0
    assert await world.texts() == STANDING
    world.follow()
    assert (await asyncio.to_thread(world.rebuild)).equal


async def test_recall_and_writes_go_on_all_the_time(world: World) -> None:
    stop, writing, failures = threading.Event(), threading.Lock(), list[Exception]()

    def write() -> None:
        number = 0
        while not stop.is_set():
            try:
                with writing:
                    number += 1
                    world.write(f"doc{number}", f"text {number}")
                    world.follow()
            except Exception as error:  # noqa: BLE001 - the test's thread tells it
                failures.append(error)
                return
            time.sleep(0.02)

    thread = threading.Thread(target=write)
    thread.start()
    rebuilding = asyncio.gather(*(asyncio.to_thread(world.rebuild, hold=lambda: writing) for _ in range(1)))
    asked = 0
    try:
        while not rebuilding.done():
            assert await world.texts("t7", limit=1) == {"t7"}
            asked += 1
        (report,) = await rebuilding
    finally:
        stop.set()
        thread.join()
    assert not failures
    assert report.equal
    assert asked > 5
    world.follow()
    assert (await asyncio.to_thread(world.rebuild)).equal


async def test_without_a_hold_a_moving_index_is_compared_again(world: World) -> None:
    """A sink in another process writes between the shadow's feeding and the comparison."""
    projection = MilvusProjection(world.store)
    compare, moves = projection.compare, iter([True, True])

    def moving(*arguments: Any) -> Any:
        if next(moves, False):
            world.write("late", "late text")
            world.follow()
        return compare(*arguments)

    projection.compare = moving  # type: ignore[method-assign,assignment]
    report = await asyncio.to_thread(Rebuild(projection, world.log, world.log.codec).run)
    projection.close()
    assert report.equal
    assert report.switched
    assert "late text" in await world.texts()


@pytest.mark.parametrize("when", list(Phase))
async def test_stopped_anywhere_the_next_run_goes_on(world: World, when: Phase) -> None:
    world.damage()
    before = world.store.generation()

    def die(phase: Phase, done: int, of: int) -> None:
        if phase is when and (phase is not Phase.READING or done):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        await asyncio.to_thread(world.rebuild, accept=True, on_progress=die)
    report = await asyncio.to_thread(world.rebuild, accept=True)
    assert report.resumed
    assert report.switched
    assert await world.texts() == STANDING
    assert world.store.generation() == before + 1
    assert world.all_collections() == [in_generation(world.collection, before + 1)]
    world.follow()
    assert (await asyncio.to_thread(world.rebuild)).equal


def rebuild_until_killed(uri: str, phase: str) -> None:
    """In a process of its own: end by SIGKILL as soon as the rebuild comes to ``phase``."""
    store = MilvusStore(uri, idle_s=0.1)
    store.open()
    world = World(store, "killed")
    world.fill()

    def die(now: Phase, done: int, of: int) -> None:
        if now == phase and (now is not Phase.READING or done):
            os.kill(os.getpid(), signal.SIGKILL)

    world.rebuild(accept=True, on_progress=die)


@pytest.mark.parametrize("phase", list(Phase))
def test_killed_anywhere_the_next_run_goes_on(tmp_path: Path, phase: Phase) -> None:
    uri = str(tmp_path / "milvus.db")
    with contextlib.closing(MilvusStore(uri, idle_s=0.1)) as store:
        store.open()
        world = World(store, "killed")
        world.fill()
        world.follow()
        world.damage()
        world.close()
    code = f"from {__name__} import rebuild_until_killed; rebuild_until_killed({uri!r}, {phase.value!r})"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    with contextlib.closing(MilvusStore(uri, idle_s=0.1)) as store:
        store.open()
        world = World(store, "killed")
        world.fill()
        report = world.rebuild(accept=True)
        assert report.switched
        # Milvus Lite writes to disk now and then: of what was read last, nothing may be there.
        assert report.resumed or phase is Phase.READING
        assert asyncio.run(world.texts()) == STANDING
        assert world.all_collections() == [in_generation(world.collection, 1)]
        world.follow()
        assert world.rebuild().equal
        world.close()


async def test_what_is_in_use_is_known_after_the_process_ended(world: World) -> None:
    await asyncio.to_thread(world.rebuild)
    in_use = world.store.generation()
    uri = world.store.uri
    world.close()
    world.store.close()
    again = World(MilvusStore(uri, idle_s=0.1), world.model)
    assert again.store.generation() == in_use
    assert await again.texts() == STANDING
    assert again.sink.offsets() == world.log.ends
    again.close()
    world.store.open()
    world.sink.open()
    world.memory.open()


async def test_what_the_log_no_longer_holds_is_said_before_anything_is_made(world: World) -> None:
    world.log.begins[TOPIC, 1] = 3
    with pytest.raises(HistoryLostError, match=r"embeddings\[1\] begins at offset 3 and 3 records .*--from"):
        await asyncio.to_thread(world.rebuild)
    with pytest.raises(StoreError, match="--from"):
        await asyncio.to_thread(world.rebuild, carry=True)
    assert len(world.all_collections()) == 1


async def test_what_was_in_use_can_be_kept_and_a_shadow_discarded(world: World) -> None:
    world.damage()
    assert not (await asyncio.to_thread(world.rebuild)).switched
    assert len(world.all_collections()) == 2
    projection = MilvusProjection(world.store)
    projection.discard()
    projection.close()
    assert len(world.all_collections()) == 1
    report = await asyncio.to_thread(world.rebuild, accept=True, keep=True)
    assert not report.resumed
    assert report.kept in world.all_collections()
    assert world.store.count(report.kept) == len(STANDING)
    world.follow()
    assert (await asyncio.to_thread(world.rebuild)).equal
    world.store.drop(report.kept)


async def test_ranges_that_are_too_full_are_split(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparing, "_MOST", 4)
    monkeypatch.setattr(comparing, "_WINDOW", 3)
    monkeypatch.setattr(comparing, "_CROWDED", 2)
    report = await asyncio.to_thread(world.rebuild)
    assert report.equal
    assert report.compared[0].stored_rows == len(STANDING)
    world.follow()
    world.damage()
    compared = (await asyncio.to_thread(world.rebuild)).compared[0]
    assert (compared.missing, compared.surplus, compared.changed) == (1, 1, 2)


def test_a_generation_is_known_by_its_name() -> None:
    assert plain_name("chunks_m", 0) == "chunks_m"
    assert plain_name("g3_chunks_m", 3) == "chunks_m"
    assert plain_name("g3_chunks_m", 0) is None
    assert plain_name("g13_chunks_m", 3) is None
    assert plain_name("sink_offsets", 0) is None
