"""Retriever and Researcher: answers whose markers, claims and citations agree, over evidence that was looked for."""

from typing import Any

from agents.context import Purpose
from agents.errors import EffectFailedError
from agents.providers.extractive import ExtractiveModel
from agents.researcher import Researcher
from agents.retriever import Retriever
from agents.text import is_not_found
from schemas.events import Citation, Evidence, StepAssigned, StepCompleted, StepFailed, StepInput


def evidence(chunk: str, text: str, *, document: str = "", score: float = 0.5) -> Evidence:
    document = document or chunk.partition("#")[0]
    return Evidence(chunk_id=chunk, document_id=document, title=document, text=text, score=score)


UVLOOP = evidence(
    "uvloop#0", "uvloop is a fast, drop-in replacement of the built-in asyncio event loop. It has 2 parts."
)
HTTPX = evidence("httpx#0", "HTTPX is a fully featured HTTP client library for Python 3. It supports HTTP/2.")


def assigned(objective: str = "What is uvloop?", **fields: Any) -> StepAssigned:
    values: dict[str, Any] = {"capability": "retrieve", **fields}
    return StepAssigned(task_id="t", step_id="t/1", objective=objective, **values)


async def test_an_answers_markers_claims_and_citations_agree(harness: Any) -> None:
    harness.memory.hits = [HTTPX, UVLOOP]
    harness.llm.answers = ["uvloop replaces the event loop. [2] It has 2 parts [2][1]. Made up [7]."]
    result = await harness.step(Retriever(), assigned())
    (done,) = (output.event for output in result.outputs)
    assert isinstance(done, StepCompleted)
    assert done.answer == "uvloop replaces the event loop [1]. It has 2 parts [1][2]. Made up."
    assert [(claim.text, claim.chunk_ids) for claim in done.claims] == [
        ("uvloop replaces the event loop.", ("uvloop#0",)),
        ("It has 2 parts.", ("uvloop#0", "httpx#0")),
        ("Made up.", ()),
    ]
    assert [(item.marker, item.chunk_id) for item in done.citations] == [(1, "uvloop#0"), (2, "httpx#0")]
    assert done.citations[0].quote.startswith("uvloop is a fast, drop-in replacement")
    assert {item.chunk_id for item in done.evidence} == {"uvloop#0", "httpx#0"}
    assert done.model == "scripted/m1"
    (request,) = harness.llm.requests
    assert request.purpose is Purpose.ANSWER
    assert [passage.marker for passage in request.passages] == [1, 2]


async def test_only_cited_evidence_travels_on(harness: Any) -> None:
    harness.memory.hits = [HTTPX, UVLOOP]
    harness.llm.answers = ["HTTPX is an HTTP client [1]."]
    (done,) = (output.event for output in (await harness.step(Retriever(), assigned())).outputs)
    assert done.evidence == (HTTPX,)


async def test_a_model_that_finds_nothing_says_so_honestly(harness: Any) -> None:
    harness.memory.hits = [HTTPX]
    for answer in ("NOT_FOUND", " not_found. "):
        harness.llm.answers = [answer]
        (done,) = (output.event for output in (await harness.step(Retriever(), assigned())).outputs)
        assert is_not_found(done.answer)
        assert "What is uvloop?" in done.answer
        assert done.claims == done.citations == ()


async def test_an_empty_corpus_fails_the_step_for_good(harness: Any) -> None:
    for agent in (Retriever(), Researcher()):
        (failed,) = (output.event for output in (await harness.step(agent, assigned())).outputs)
        assert isinstance(failed, StepFailed)
        assert not failed.retryable
        assert "ingest documents" in failed.message


async def test_a_revision_recalls_more_and_passes_the_finding_on(harness: Any) -> None:
    harness.memory.hits = [HTTPX, UVLOOP]
    harness.llm.answers = ["uvloop is fast [2]."] * 2
    await harness.step(Retriever(), assigned())
    await harness.step(Retriever(), assigned(revision=1, finding="no support for 'slow'"))
    first, second, third = harness.memory.requests
    assert second.limit > first.limit
    assert "no support for 'slow'" in third.query
    assert "no support for 'slow'" in harness.llm.requests[1].messages[-1].content


async def test_failures_are_reported_with_their_kind(harness: Any) -> None:
    for agent in (Retriever(), Researcher()):
        harness.memory.hits = [UVLOOP]
        harness.llm.answers = [EffectFailedError("Http429", "slow down", retryable=True)]
        (failed,) = (output.event for output in (await harness.step(agent, assigned(attempt=2))).outputs)
        assert (failed.error_type, failed.retryable, failed.attempt) == ("Http429", True, 2)


def from_step(n: int, chunk: str, quote: str) -> StepInput:
    citation = Citation(marker=1, chunk_id=chunk, document_id=chunk, title=chunk, quote=quote)
    return StepInput(step_id=f"t/{n}", objective=f"What is {chunk}?", answer=f"{quote} [1]", citations=(citation,))


async def test_research_asks_again_and_takes_its_inputs_results(harness: Any) -> None:
    by_query = {"Compare a with b": [evidence("c#0", "Nothing about either.")]}
    harness.memory.by_query = lambda query: by_query.get(query, [evidence(f"{query}#0", f"More on {query}.")])
    harness.llm.answers = ["a is quick [1]. b is slow [2]."]
    step = assigned(
        "Compare a with b",
        capability="research",
        inputs=(from_step(1, "a", "a is quick."), from_step(2, "b", "b is slow.")),
    )
    (done,) = (output.event for output in (await harness.step(Researcher(), step)).outputs)
    assert isinstance(done, StepCompleted)
    assert [request.query for request in harness.memory.requests] == ["Compare a with b", "What is a?", "What is b?"]
    assert [claim.chunk_ids for claim in done.claims] == [("a",), ("b",)]
    assert [item.quote for item in done.citations] == ["a is quick.", "b is slow."]


async def test_research_looks_for_what_its_passages_do_not_cover(harness: Any) -> None:
    harness.memory.hits = [evidence("kafka#0", "Kafka keeps a log.")]
    harness.llm.answers = ["NOT_FOUND"]
    await harness.step(Researcher(), assigned("Kafka tombstones compaction", capability="research"))
    assert [request.query for request in harness.memory.requests] == [
        "Kafka tombstones compaction",
        "tombstones compaction",
    ]


async def test_no_document_drowns_the_others(harness: Any) -> None:
    loud = [evidence(f"loud#{n}", f"Loud passage {n}.", score=0.8) for n in range(20)]
    quiet = [evidence(f"quiet{n}#0", f"Quiet passage {n}.", score=0.6) for n in range(4)]
    harness.memory.by_query = lambda query: [*loud[:6], *quiet]
    harness.llm.answers = ["NOT_FOUND"]
    await harness.step(Researcher(), assigned("passage", capability="research"))
    order = [passage.chunk_id for passage in harness.llm.requests[0].passages]
    assert order[0] == "loud#0"
    assert order.index("quiet0#0") < 4


async def test_extractive_answers_are_verbatim_and_cited(harness: Any) -> None:
    harness.llm = ExtractiveModel()
    harness.memory.hits = [HTTPX, UVLOOP]
    (done,) = (output.event for output in (await harness.step(Retriever(), assigned())).outputs)
    assert done.answer.startswith("uvloop is a fast, drop-in replacement of the built-in asyncio event loop [1].")
    assert all(claim.text in UVLOOP.text for claim in done.claims)
    assert done.model == "extractive/extractive-1"
