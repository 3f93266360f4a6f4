"""All five agents together, without Kafka: real questions through to an outcome, on the extractive provider."""

from typing import Any

from agents.context import LlmRequest, LlmResponse, Purpose
from agents.coordinator import Coordinator
from agents.decomposer import Decomposer
from agents.overseer import Overseer
from agents.providers.extractive import ExtractiveModel
from agents.researcher import Researcher
from agents.retriever import Retriever
from agents.text import content_words, is_not_found, markers_of, overlap
from schemas.events import (
    Assessment,
    DirectoryEntry,
    Evidence,
    Health,
    StepAssessed,
    StepAssigned,
    StepCompleted,
    TaskCompleted,
    TaskFailed,
    TaskSubmitted,
)
from schemas.topics import CAPABILITIES

AGENTS = (Decomposer(), Coordinator(), Retriever(), Researcher(), Overseer())

CORPUS = {
    "httpx": "HTTPX is a fully featured HTTP client library for Python 3. It has support for both HTTP/1.1 and HTTP/2.",
    "fastavro": "fastavro is a fast Avro reader and writer. fastavro reads 10,000 records in 1.7 seconds.",
    "avro": "Apache Avro is a data serialization system. The Python avro package is slow, as it is pure Python.",
    "uvloop": "uvloop is a fast, drop-in replacement of the built-in asyncio event loop.",
}


def recall(query: str) -> list[Evidence]:
    words = content_words(query)
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
    return sorted(found, key=lambda item: -item.score)


async def ask(harness: Any, objective: str) -> list[Any]:
    harness.memory.by_query = recall
    events: list[Any] = await harness.drain(AGENTS, TaskSubmitted(task_id="t1", objective=objective))
    outcomes = [event for event in events if isinstance(event, TaskCompleted | TaskFailed)]
    assert len(outcomes) == 1
    assert events[-1] is outcomes[0]
    return events


async def test_a_simple_question(harness: Any) -> None:
    harness.llm = ExtractiveModel()
    done = (await ask(harness, "What is uvloop?"))[-1]
    assert done.answer == "uvloop is a fast, drop-in replacement of the built-in asyncio event loop [1]."
    assert [citation.document_id for citation in done.citations] == ["uvloop"]
    assert done.groundedness == 1.0


async def test_a_compound_question_is_answered_in_parts(harness: Any) -> None:
    harness.llm = ExtractiveModel()
    done = (await ask(harness, "What is httpx and does it support HTTP/2?"))[-1]
    assert done.steps == 2
    assert "fully featured HTTP client" in done.answer
    assert "both HTTP/1.1 and HTTP/2" in done.answer
    assert markers_of(done.answer) == tuple(citation.marker for citation in done.citations)


async def test_a_comparison_combines_its_parts(harness: Any) -> None:
    harness.llm = ExtractiveModel()
    events = await ask(harness, "Compare fastavro with avro")
    assigned = [event for event in events if isinstance(event, StepAssigned)]
    assert [step.capability for step in assigned] == ["retrieve", "retrieve", "research"]
    assert len(assigned[2].inputs) == 2
    assert {citation.document_id for citation in events[-1].citations} == {"fastavro", "avro"}


async def test_what_the_corpus_lacks_is_said(harness: Any) -> None:
    harness.llm = ExtractiveModel()
    done = (await ask(harness, "What is the capital of France?"))[-1]
    assert is_not_found(done.answer)
    assert done.citations == ()


async def test_where_no_retriever_is_left_a_researcher_answers(harness: Any) -> None:
    harness.llm = ExtractiveModel()
    harness.directory.entries = tuple(
        DirectoryEntry(agent=agent, instance="a", version="1", capabilities=(capability,), health=health)
        for agent, capability, health in (
            ("retriever", "retrieve", Health.GONE),
            ("researcher", "research", Health.READY),
        )
    )
    events = await ask(harness, "What is uvloop?")
    assert [event.capability for event in events if isinstance(event, StepAssigned)] == ["research"]
    assert [event.capability for event in events if isinstance(event, StepCompleted)] == ["research"]
    assert "drop-in replacement" in events[-1].answer


class Liar:
    """Plans and combines honestly, but its answers float; ``honest_after`` of them it mends its ways."""

    name = "liar"

    def __init__(self, honest_after: int) -> None:
        self.left = honest_after
        self.honest = ExtractiveModel()

    async def complete(self, request: LlmRequest, *, idempotency_key: str) -> LlmResponse:
        if request.purpose is not Purpose.ANSWER or self.left == 0:
            return await self.honest.complete(request, idempotency_key=idempotency_key)
        self.left -= 1
        return LlmResponse(text="Bananas grow on Mars [1].", provider=self.name, model="m")


async def test_an_ungrounded_answer_is_sent_back_and_mended(harness: Any) -> None:
    harness.llm = Liar(1)
    events = await ask(harness, "What is uvloop?")
    decisions = [event.decision for event in events if isinstance(event, StepAssessed)]
    assert decisions == [Assessment.REVISE, Assessment.ACCEPT]
    assert isinstance(events[-1], TaskCompleted)


async def test_an_answer_that_stays_ungrounded_fails_the_task(harness: Any) -> None:
    harness.llm = Liar(2)
    failed = (await ask(harness, "What is uvloop?"))[-1]
    assert isinstance(failed, TaskFailed)
    assert "Bananas grow on Mars" in failed.reason


def test_every_capability_has_its_worker() -> None:
    assert {name for agent in AGENTS for name in agent.capabilities} == set(CAPABILITIES)
