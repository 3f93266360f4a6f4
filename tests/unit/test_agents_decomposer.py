"""The Decomposer: one plan a task, repaired once, refused with the reason."""

import json
from datetime import timedelta
from typing import Any

from agents.context import Purpose
from agents.decomposer import Decomposer
from agents.errors import EffectFailedError
from agents.providers.extractive import ExtractiveModel
from schemas.events import PlanProposed, PlanRejected, TaskSubmitted

TASK = TaskSubmitted(task_id="t1", objective="What is httpx?", parameters={"tone": "brief"})


def plan(*needs: str, capability: str = "retrieve") -> str:
    step = {"id": "1", "capability": capability, "objective": "What is httpx?", "depends_on": list(needs)}
    return json.dumps({"steps": [step], "rationale": "simple"})


async def test_a_plan_is_proposed_with_the_tasks_parameters(harness: Any) -> None:
    harness.llm.answers = [plan()]
    result = await harness.step(Decomposer(), TASK)
    (proposed,) = (output.event for output in result.outputs)
    assert isinstance(proposed, PlanProposed)
    assert [(step.step_id, step.parameters) for step in proposed.steps] == [("t1/1", {"tone": "brief"})]
    assert proposed.rationale == "simple"
    (request,) = harness.llm.requests
    assert request.purpose is Purpose.PLAN
    assert request.response_schema
    assert "retrieve" in request.system
    assert "research" in request.system


async def test_a_repeated_submission_re_runs_nothing(harness: Any) -> None:
    harness.llm.answers = [plan()]
    first = await harness.step(Decomposer(), TASK)
    assert first.state.expires_at - first.state.now == timedelta(days=30)
    again = await harness.step(Decomposer(), TASK, first.state)
    assert again.outputs == ()
    assert not again.state_changed
    assert len(harness.llm.requests) == 1


async def test_a_bad_plan_is_repaired_once(harness: Any) -> None:
    harness.llm.answers = [plan(capability="fly"), plan()]
    result = await harness.step(Decomposer(), TASK)
    assert isinstance(result.outputs[0].event, PlanProposed)
    assert "unknown capability 'fly'" in harness.llm.requests[1].messages[-1].content


async def test_a_plan_that_stays_bad_is_rejected_with_the_reason(harness: Any) -> None:
    harness.llm.answers = ["nonsense", plan("1")]
    result = await harness.step(Decomposer(), TASK)
    (rejected,) = (output.event for output in result.outputs)
    assert isinstance(rejected, PlanRejected)
    assert rejected.reason == "step '1' depends on itself"
    assert result.state is not None


async def test_a_users_own_plan_needs_no_model_and_is_checked_alike(harness: Any) -> None:
    given = TASK.model_copy(update={"parameters": {"plan": plan(), "tone": "brief"}})
    result = await harness.step(Decomposer(), given)
    proposed = result.outputs[0].event
    assert isinstance(proposed, PlanProposed)
    assert proposed.steps[0].parameters == {"tone": "brief"}
    bad = TASK.model_copy(update={"parameters": {"plan": plan("2")}})
    rejected = (await harness.step(Decomposer(), bad)).outputs[0].event
    assert isinstance(rejected, PlanRejected)
    assert "depends on '2'" in rejected.reason
    assert harness.llm.requests == []


async def test_a_failed_model_rejects_the_task(harness: Any) -> None:
    harness.llm.answers = [EffectFailedError("Http401", "no such key", retryable=False)]
    result = await harness.step(Decomposer(), TASK)
    rejected = result.outputs[0].event
    assert isinstance(rejected, PlanRejected)
    assert "Http401: no such key" in rejected.reason
    assert not harness.failure.retryable


async def test_rules_of_english_cut_compound_questions(harness: Any) -> None:
    harness.llm = ExtractiveModel()

    async def cut(objective: str) -> list[tuple[str, str, int]]:
        result = await harness.step(Decomposer(), TaskSubmitted(task_id="t", objective=objective))
        proposed = result.outputs[0].event
        assert isinstance(proposed, PlanProposed), objective
        return [(step.capability, step.objective, len(step.depends_on)) for step in proposed.steps]

    assert await cut("What is uvloop?") == [("retrieve", "What is uvloop?", 0)]
    assert await cut("What is httpx and does it support HTTP/2?") == [
        ("retrieve", "What is httpx?", 0),
        ("retrieve", "Does httpx support HTTP/2?", 0),
    ]
    assert await cut("What is click? How is it installed?") == [
        ("retrieve", "What is click?", 0),
        ("retrieve", "How is click installed?", 0),
    ]
    assert await cut("How does milvus-lite store data, and what are its limits?") == [
        ("retrieve", "How does milvus-lite store data?", 0),
        ("retrieve", "What are milvus-lite's limits?", 0),
    ]
    for question in (
        "Compare fastavro with avro",
        "fastavro vs avro",
        "What is the difference between fastavro and avro?",
    ):
        assert await cut(question) == [
            ("retrieve", "What is fastavro?", 0),
            ("retrieve", "What is avro?", 0),
            ("research", question, 2),
        ]
    assert await cut("Compare rich and click for colour support") == [
        ("retrieve", "rich: colour support", 0),
        ("retrieve", "click: colour support", 0),
        ("research", "Compare rich and click for colour support", 2),
    ]
    assert await cut("How do salt and pepper taste?") == [("retrieve", "How do salt and pepper taste?", 0)]
