"""Prompts by name: the same bytes as ever, others where they are asked for, and errors that say what to do."""

from hashlib import sha256
from typing import Any

import pytest

from agents.decomposer import Decomposer
from agents.errors import PromptError
from agents.prompts import PROMPTS, Prompts
from agents.retriever import Retriever
from schemas.events import Evidence, StepAssigned, StepCompleted, TaskSubmitted

EVIDENCE = Evidence(chunk_id="a#0", document_id="a", title="a", text="Ants are small.", score=0.9)


def test_the_texts_are_those_that_histories_were_recorded_with() -> None:
    said = "\x00".join((PROMPTS.plan, PROMPTS.answer, PROMPTS.combining, PROMPTS.synthesise))
    assert sha256(said.encode()).hexdigest() == "3413e77af7fdcad52c7c3e165f492bef8a17a631863ae192aec3d65a913abd91"
    assert PROMPTS.reviewing("why") == "A reviewer sent the last answer back: why\nAnswer again."
    assert PROMPTS.mending("why") == (
        "That plan can't be used: why. Answer with the corrected plan as JSON and nothing else."
    )


def test_combining_follows_a_changed_answer() -> None:
    assert PROMPTS.with_texts({"answer": "Be brief."}).combining == f"Be brief.\n{PROMPTS.combine}"


def test_braces_in_a_prompt_stand_for_themselves() -> None:
    assert Prompts(review='{"why": "{finding}"}').reviewing("{x}") == '{"why": "{x}"}'


def test_an_unknown_name_names_those_that_there_are() -> None:
    with pytest.raises(PromptError, match=r"no prompt 'anwser'.*plan, mend, answer"):
        PROMPTS.with_texts({"anwser": "x"})


def test_a_text_without_its_place_is_refused() -> None:
    with pytest.raises(PromptError, match=r"'review' has no \{finding\}"):
        PROMPTS.with_texts({"review": "Answer again."})


async def test_agents_ask_by_the_prompts_that_they_are_given(harness: Any) -> None:
    prompts = Prompts(answer="Answer in verse.", review="No: {finding}", plan="Plan it.", mend="Not so: {error}")
    harness.memory.hits = (EVIDENCE,)
    harness.llm.answers = ["Ants are small [1].", "no plan", "no plan"]
    step = StepAssigned(task_id="t", step_id="t/1", capability="retrieve", objective="ants?", finding="untrue")
    result = await harness.step(Retriever(prompts), step)
    assert isinstance(result.outputs[0].event, StepCompleted)
    await harness.step(Decomposer(prompts), TaskSubmitted(task_id="t", objective="ants?"))
    answered, planned, mended = harness.llm.requests
    assert (answered.system, answered.messages[-1].content) == ("Answer in verse.", "No: untrue")
    assert planned.system == "Plan it."
    assert mended.messages[-1].content.startswith("Not so: ")
