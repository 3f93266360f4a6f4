"""The Overseer's thresholds with the real embedding model: how many paraphrases pass, how many falsehoods are caught.

The evidence is from the READMEs of packages that Magnatronic builds on; the claims are written by hand.
"""

from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest

from agents.context import Vectors
from agents.memory.embedding_onnx import OnnxMiniLm
from agents.overseer import Overseer
from schemas.events import Assessment, Claim, Evidence, StepAssessed, StepCompleted

EVIDENCE = {
    "uvloop": "uvloop is a fast, drop-in replacement of the built-in asyncio event loop. uvloop makes asyncio "
    "2-4x faster.",
    "orjson": "orjson is a fast, correct JSON library for Python.",
    "click": "Click is a Python package for creating beautiful command line interfaces in a composable way "
    "with as little code as necessary.",
    "rich": "Rich is a Python library for rich text and beautiful formatting in the terminal.",
    "httpx": "HTTPX is a fully featured HTTP client library for Python 3. It includes an integrated command "
    "line client, has support for both HTTP/1.1 and HTTP/2, and provides both sync and async APIs.",
    "fastavro": "Because the Apache Python avro package is written in pure Python, it is relatively slow. With "
    "regular CPython, fastavro uses C extensions which allow it to iterate the same 10,000 record "
    "file in 1.7 seconds.",
    "avro": "Apache Avro™ is a data serialization system.",
    "numpy": "NumPy is the fundamental package for scientific computing with Python.",
    "tenacity": "Tenacity is a general-purpose retrying library to simplify the task of adding retry behavior to"
    " just about anything.",
    "confluent-kafka": "Enterprise Features: Schema Registry integration, transactions, exactly-once semantics, and "
    "advanced serialization support out of the box.",
    "pytest": "The pytest framework makes it easy to write small tests, yet scales to support complex "
    "functional testing for applications and libraries.",
    "idna": 'For example, "Königsgäßchen" is not a permissible label as capital letters are not allowed.',
    "milvus-lite": "Single process per data_dir; Milvus Lite uses a file lock to protect local storage.",
}

PARAPHRASES = [
    ("uvloop", "uvloop is a speedy substitute for Python's default asyncio event loop."),
    ("uvloop", "The event loop that ships with asyncio can be swapped for uvloop, which is faster."),
    ("orjson", "orjson is a JSON library for Python that is correct and fast."),
    ("orjson", "For JSON in Python, orjson offers speed and correctness."),
    ("click", "Click is used to build command line interfaces with little code."),
    ("click", "You can create elegant CLIs in Python with Click while writing very little code."),
    ("rich", "Rich formats text beautifully in the terminal."),
    ("rich", "Pretty terminal output in Python is what Rich is for."),
    ("httpx", "HTTPX is an HTTP client for Python 3 with all features."),
    ("httpx", "HTTPX offers synchronous and asynchronous interfaces and speaks HTTP/2."),
    ("fastavro", "The avro package is slow because it is pure Python."),
    ("fastavro", "Being written entirely in Python makes the official avro module run slowly."),
    ("fastavro", "fastavro iterates over 10,000 records in 1.7 seconds on CPython."),
    ("avro", "Avro is a system to serialize data."),
    ("numpy", "Scientific computing in Python is built upon NumPy."),
    ("tenacity", "Tenacity makes it simple to retry almost anything."),
    ("confluent-kafka", "It supports transactions and exactly-once semantics."),
    ("pytest", "With pytest, writing small tests is easy and it scales to complex functional tests."),
    ("idna", "Labels with uppercase letters are not permitted."),
    ("milvus-lite", "Only one process may open a Milvus Lite data directory, since it is protected by a file lock."),
]

FALSEHOODS = [
    ("uvloop", "uvloop is a fast replacement of the built-in garbage collector."),
    ("uvloop", "uvloop is a slow replacement of asyncio's event loop."),
    ("uvloop", "uvloop makes asyncio 20-40x faster."),
    ("orjson", "orjson is a YAML library for Python."),
    ("orjson", "orjson parses XML documents quickly."),
    ("click", "Click is a package for creating web interfaces."),
    ("click", "Click draws charts in notebooks."),
    ("rich", "Rich is a library for plotting data in the browser."),
    ("httpx", "HTTPX is a fully featured HTTP server."),
    ("httpx", "HTTPX caches responses on disk."),
    ("fastavro", "The avro package is fast because it is written in C."),
    ("fastavro", "fastavro iterates over 10,000 records in 2.7 seconds on CPython."),
    ("avro", "Avro is a data visualization system."),
    ("avro", "Avro is a message broker."),
    ("numpy", "NumPy trains neural networks on GPUs."),
    ("tenacity", "Tenacity caches the results of function calls."),
    ("confluent-kafka", "It does not support exactly-once semantics."),
    ("pytest", "pytest generates test data at random."),
    ("idna", "Capital letters are allowed in labels."),
    ("milvus-lite", "Milvus Lite can be opened by many processes at once."),
]


class Embedding:
    """The packaged model as the port."""

    model, version, dimensions = "all-MiniLM-L6-v2", "test", 384

    def __init__(self) -> None:
        self.encoder = OnnxMiniLm(threads=1)

    async def embed(self, texts: Sequence[str]) -> Vectors:
        return self.encoder.encode(texts)


@pytest.fixture
async def bench(harness: Any) -> AsyncIterator[Any]:
    harness.embedding = Embedding()
    yield harness
    harness.embedding.encoder.close()


async def accepted(bench: Any, package: str, text: str) -> bool:
    evidence = Evidence(chunk_id="c", document_id=package, title=package, text=EVIDENCE[package])
    event = StepCompleted(
        task_id="t",
        step_id="t/1",
        attempt=1,
        capability="retrieve",
        objective="o",
        answer=text,
        claims=(Claim(text=text, chunk_ids=("c",)),),
        evidence=(evidence,),
    )
    assessed = (await bench.step(Overseer(), event)).outputs[0].event
    assert isinstance(assessed, StepAssessed)
    return assessed.decision is Assessment.ACCEPT


async def test_paraphrases_pass_and_falsehoods_are_caught(bench: Any) -> None:
    refused = [text for package, text in PARAPHRASES if not await accepted(bench, package, text)]
    missed = [text for package, text in FALSEHOODS if await accepted(bench, package, text)]
    assert len(refused) <= 3, refused
    assert len(missed) <= 3, missed


async def test_verbatim_sentences_all_pass(bench: Any) -> None:
    for package, text in EVIDENCE.items():
        assert await accepted(bench, package, text.split(". ")[0].rstrip(".") + "."), text
