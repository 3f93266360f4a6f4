"""What the tests of what-ifs share: recorded tasks over a small corpus, and simulations of them with any change."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from agents.agent import Agent
from agents.context import LlmRequest, LlmResponse, Ports, RecallRequest, Vectors
from agents.coordinator import Coordinator
from agents.decomposer import Decomposer
from agents.errors import EffectFailedError
from agents.overseer import Overseer
from agents.prompts import PROMPTS, Prompts
from agents.providers.extractive import ExtractiveModel
from agents.researcher import Researcher
from agents.retriever import Retriever
from agents.text import content_words, overlap
from replay.whatif.answers import Answers
from replay.whatif.budget import Budget, tokens_of
from replay.whatif.calls import CallLog
from replay.whatif.changes import Changes
from replay.whatif.fleet import LocalFleet, Post
from replay.whatif.past import Past
from replay.whatif.result import TaskResult
from replay.whatif.simulation import Simulation
from schemas.codec import Codec
from schemas.events import DirectoryEntry, Evidence
from schemas.record import Record
from streams.bindings import bind
from tests.support.recording import record

CORPUS = {
    "httpx": "HTTPX is a fully featured HTTP client library for Python 3. It has support for both HTTP/1.1 and HTTP/2.",
    "fastavro": "fastavro is a fast Avro reader and writer. fastavro reads 10,000 records in 1.7 seconds.",
    "avro": "Apache Avro is a data serialization system. The Python avro package is slow, as it is pure Python.",
    "uvloop": "uvloop is a fast, drop-in replacement of the built-in asyncio event loop.",
}

QUESTIONS = (
    "What is uvloop?",
    "What is httpx and does it support HTTP/2?",
    "Compare fastavro with avro",
    "What is the capital of France?",
)


@dataclass
class Corpus:
    """Memory over ``CORPUS``."""

    asked: list[RecallRequest] = field(default_factory=list)
    model: str = "words"

    async def recall(self, request: RecallRequest) -> tuple[Evidence, ...]:
        self.asked.append(request)
        words = content_words(request.query)
        found = [
            Evidence(
                chunk_id=f"{name}#0",
                document_id=name,
                title=name,
                text=text,
                score=overlap(words, content_words(f"{name} {text}")),
            )
            for name, text in CORPUS.items()
        ]
        return tuple(sorted(found, key=lambda item: -item.score)[: request.limit])


class Embedding:
    """Every text has the same vector."""

    model, version, dimensions = "one", "1", 2

    async def embed(self, texts: Sequence[str]) -> Vectors:
        return np.tile(np.array([1.0, 0.0], dtype=np.float32), (len(texts), 1))


class Nobody:
    """An empty directory."""

    async def lookup(self, capability: str) -> tuple[DirectoryEntry, ...]:
        return ()


@dataclass
class Model:
    """Answers as the extractive model does, after so many failures; every answer goes through ``change``."""

    name: str = "model"
    failures: int = 0
    requests: list[LlmRequest] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    change: Any = None

    async def complete(self, request: LlmRequest, *, idempotency_key: str) -> LlmResponse:
        self.requests.append(request)
        self.keys.append(idempotency_key)
        if self.failures:
            self.failures -= 1
            raise EffectFailedError("Http429", "slow down", retryable=True)
        done = await ExtractiveModel().complete(request, idempotency_key=idempotency_key)
        text = done.text if self.change is None else self.change(request, done.text)
        return done.model_copy(update={"text": text, "provider": self.name, "model": "m1", "cost_usd": 0.001})


def fleet_of(prompts: Prompts = PROMPTS) -> tuple[Agent[Any], ...]:
    return Decomposer(prompts), Coordinator(prompts), Retriever(prompts), Researcher(prompts), Overseer()


def posts_of(agents: Sequence[Agent[Any]]) -> dict[str, Post]:
    bindings = [bind(agent) for agent in agents]
    return {each.agent.name: Post(each.agent, frozenset(each.topics), each) for each in bindings}


async def recorded(objective: str, task_id: str = "t1", **options: Any) -> list[Record]:
    """The log of a task, by the extractive model unless ``llm`` is another."""
    agents = options.pop("agents", None) or fleet_of()
    options.setdefault("topics", {agent.name: frozenset(bind(agent).topics) for agent in agents})
    llm, tools = options.pop("llm", None) or ExtractiveModel(), options.pop("tools", None)
    ports = Ports(llm, Corpus(), Embedding(), tools, Nobody())
    return await record(objective, task_id=task_id, agents=agents, ports=ports, **options)


def past_of(records: Sequence[Record], task_id: str = "t1", codec: Codec | None = None) -> Past:
    codec = codec or Codec()
    agents = [agent.name for agent in fleet_of()]
    return Past(task_id, [(each, codec.decode(each)) for each in records], agents)


async def simulated(
    records: Sequence[Record],
    folder: Path,
    *,
    changes: Changes | None = None,
    ports: Ports | None = None,
    budget: Budget | None = None,
    agents: Sequence[Agent[Any]] | None = None,
    task_id: str = "t1",
    codec: Codec | None = None,
) -> TaskResult:
    """What becomes of the task with ``changes``."""
    changes, codec = changes or Changes(), codec or Codec()
    agents = agents or fleet_of(PROMPTS.with_texts(changes.prompts))
    calls = CallLog(folder / "calls.jsonl", codec)

    def estimate(request: LlmRequest) -> tuple[int, float]:
        return sum(tokens_of(request)), 0.001

    try:
        answers = Answers(changes, ports or Ports(), calls, budget or Budget(), estimate=estimate, run_id="test")
        posts, past = posts_of(agents), past_of(records, task_id, codec)
        return await Simulation(past, LocalFleet(agents, codec), posts, answers, codec).run()
    finally:
        calls.close()
