"""The Overseer: what the evidence says passes, what it does not say is sent back once, then rejected."""

from typing import Any

import pytest

from agents.agent import Failure
from agents.errors import EffectFailedError
from agents.overseer import Overseer
from agents.text import not_found
from schemas.events import Assessment, Claim, Evidence, StepAssessed, StepCompleted, StepFailed

TEXT = (
    "orjson is a fast, correct JSON library for Python. It requires Python 3.10 or later and does not support PyPy. "
    "It serializes dataclass instances 40 to 50 times as fast as other libraries. "
    "Tests are run on amd64 with Apache Kafka 4.3."
)
EVIDENCE = (Evidence(chunk_id="o#0", document_id="o", title="orjson", text=TEXT),)


def completed(*claims: str, answer: str = "", cited: bool = True, **fields: Any) -> StepCompleted:
    return StepCompleted(
        task_id="t",
        step_id="t/1",
        attempt=1,
        capability="retrieve",
        objective="What is orjson?",
        answer=answer or " ".join(claims),
        claims=tuple(Claim(text=text, chunk_ids=("o#0",) if cited else ()) for text in claims),
        evidence=EVIDENCE,
        **fields,
    )


async def assess(harness: Any, event: StepCompleted) -> StepAssessed:
    (assessed,) = (output.event for output in (await harness.step(Overseer(), event)).outputs)
    assert isinstance(assessed, StepAssessed)
    return assessed


async def test_verbatim_claims_pass_without_a_look_at_embeddings(harness: Any) -> None:
    event = completed(
        "orjson is a fast, correct JSON library for Python.", "Tests are run on amd64 with Apache Kafka 4.3."
    )
    assessed = await assess(harness, event)
    assert (assessed.decision, assessed.groundedness, assessed.finding) == (Assessment.ACCEPT, 1.0, "")
    assert assessed.answer == event.answer
    assert [claim.lexical_similarity for claim in assessed.claims] == [1.0, 1.0]
    assert harness.embedding.calls == []


@pytest.mark.parametrize(
    "claim",
    [
        "It requires Python 3.9 or later and does not support PyPy.",  # a number changed
        "It requires Python 3.10 or later and does support PyPy.",  # a negation lost
        "orjson is not a fast, correct JSON library for Python.",  # a negation added
        "It serializes dataclass instances 400 to 50 times as fast as other libraries.",
        "Tests are run on amd64 with Apache Pulsar 4.3.",  # a name changed
    ],
)
async def test_a_flipped_fact_fails_however_alike_its_words(harness: Any, claim: str) -> None:
    harness.embedding.cosine = 0.99
    assessed = await assess(harness, completed(claim))
    assert assessed.decision is Assessment.REVISE
    assert assessed.groundedness == 0.0
    assert claim[:40] in assessed.finding


async def test_a_light_paraphrase_passes_lexically(harness: Any) -> None:
    assessed = await assess(harness, completed("orjson is a correct and fast Python library for JSON."))
    assert assessed.decision is Assessment.ACCEPT
    assert harness.embedding.calls == []


@pytest.mark.parametrize(("cosine", "decision"), [(0.8, Assessment.ACCEPT), (0.3, Assessment.REVISE)])
async def test_embeddings_decide_where_words_leave_doubt(harness: Any, cosine: float, decision: Assessment) -> None:
    harness.embedding.cosine = cosine
    assessed = await assess(harness, completed("orjson turns JSON text into objects at high speed."))
    assert assessed.decision is decision
    (texts,) = harness.embedding.calls
    assert len(texts) == 2
    assert assessed.claims[0].embedding_similarity == pytest.approx(cosine, abs=1e-4)


async def test_one_floating_claim_sends_the_step_back_then_fails_it(harness: Any) -> None:
    claims = ("orjson is a fast, correct JSON library for Python.", "Bananas are rich in potassium.")
    first = await assess(harness, completed(*claims))
    assert (first.decision, first.groundedness) == (Assessment.REVISE, 0.5)
    assert "1 of 2 claims" in first.finding
    assert "Bananas" in first.finding
    second = await assess(harness, completed(*claims, revision=1))
    assert (second.decision, second.revision) == (Assessment.REJECT, 1)


async def test_a_claim_is_held_against_the_chunks_it_cites_only(harness: Any) -> None:
    event = completed("orjson is a fast, correct JSON library for Python.")
    elsewhere = event.claims[0].model_copy(update={"chunk_ids": ("other#1",)})
    assessed = await assess(harness, event.model_copy(update={"claims": (elsewhere,)}))
    assert assessed.decision is Assessment.REVISE
    uncited = await assess(harness, completed("orjson is a fast, correct JSON library for Python.", cited=False))
    assert uncited.decision is Assessment.ACCEPT


async def test_an_answer_without_claims_is_held_sentence_by_sentence(harness: Any) -> None:
    good = await assess(harness, completed(answer="orjson is a fast, correct JSON library for Python."))
    assert (good.decision, len(good.claims)) == (Assessment.ACCEPT, 1)
    bad = await assess(harness, completed(answer="Bananas are rich in potassium [1]."))
    assert (bad.decision, bad.groundedness) == (Assessment.REVISE, 0.0)


async def test_an_honest_not_found_is_no_hallucination(harness: Any) -> None:
    honest = await assess(harness, completed(answer=not_found("What is zod?")))
    assert (honest.decision, honest.groundedness, honest.claims) == (Assessment.ACCEPT, 1.0, ())
    claimed = await assess(harness, completed("Bananas are rich.", answer=f"{not_found('What is zod?')} [1]"))
    assert claimed.decision is Assessment.REVISE


async def test_an_empty_answer_does_not_pass(harness: Any) -> None:
    assessed = await assess(harness, completed(answer=" "))
    assert (assessed.decision, assessed.groundedness, assessed.finding) == (
        Assessment.REVISE,
        0.0,
        "the answer is empty",
    )


async def test_a_result_that_could_not_be_assessed_fails_the_step(harness: Any) -> None:
    async def broken(texts: Any) -> Any:
        raise EffectFailedError("OSError", "model gone", retryable=False)

    harness.embedding.embed = broken
    result = await harness.step(Overseer(), completed("orjson turns JSON text into objects at high speed."))
    (failed,) = (output.event for output in result.outputs)
    assert isinstance(failed, StepFailed)
    assert not failed.retryable
    assert "could not be assessed: model gone" in failed.message
    again = await harness.fail(Overseer(), completed("x"), Failure("E", "m", retryable=True))
    assert not again.outputs[0].event.retryable


async def test_any_verbatim_sentence_passes_with_its_full_stop_or_without(harness: Any) -> None:
    text = "Explicit support for Python 3.15 (on Linux)\n\nIt never blocks. asyncio client for Kafka"
    evidence = (Evidence(chunk_id="o#0", document_id="o", title="orjson", text=text),)
    event = completed(
        "Explicit support for Python 3.15 (on Linux).", "It never blocks. asyncio client for Kafka."
    ).model_copy(update={"evidence": evidence})
    assert (await assess(harness, event)).decision is Assessment.ACCEPT
    assert harness.embedding.calls == []


async def test_a_piece_of_a_sentence_that_leaves_its_negation_out_fails(harness: Any) -> None:
    harness.embedding.cosine = 0.95
    evidence = (Evidence(chunk_id="o#0", document_id="o", title="o", text="It is not true that orjson is slow."),)
    event = completed("orjson is slow.").model_copy(update={"evidence": evidence})
    assert (await assess(harness, event)).decision is Assessment.REVISE


async def test_a_version_is_one_number_and_no_name(harness: Any) -> None:
    harness.embedding.cosine = 0.95
    evidence = (Evidence(chunk_id="o#0", document_id="o", title="o", text="It needs CPython 3.15 on each machine."),)
    event = completed("Each machine needs CPython 3.15.").model_copy(update={"evidence": evidence})
    assert (await assess(harness, event)).decision is Assessment.ACCEPT
