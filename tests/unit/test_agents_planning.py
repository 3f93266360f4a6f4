"""Plans: what can be carried out is ordered and named, what can't is refused with the reason."""

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agents.errors import InvalidPlanError
from agents.planning import MAX_STEPS, PLAN_SCHEMA, Plan, PlanStep, parse_plan, planned_steps

CAPABILITIES = ("retrieve", "research")


def step(name: str, *needs: str, capability: str = "retrieve", objective: str = "find it") -> dict[str, Any]:
    return {"id": name, "capability": capability, "objective": objective, "depends_on": list(needs)}


def refusal(*steps: dict[str, Any]) -> str:
    with pytest.raises(InvalidPlanError) as caught:
        planned_steps(
            parse_plan(json.dumps({"steps": steps, "rationale": ""})),
            task_id="t",
            capabilities=CAPABILITIES,
            parameters={},
        )
    return str(caught.value)


def test_steps_are_named_in_topological_order() -> None:
    plan = parse_plan(json.dumps({"steps": [step("c", "a", "b"), step("b", "a"), step("a")], "rationale": "r"}))
    steps = planned_steps(plan, task_id="t9", capabilities=CAPABILITIES, parameters={"lang": "en"})
    assert [(item.step_id, item.depends_on) for item in steps] == [
        ("t9/1", ()),
        ("t9/2", ("t9/1",)),
        ("t9/3", ("t9/1", "t9/2")),
    ]
    assert all(item.parameters == {"lang": "en"} for item in steps)


def test_a_fenced_plan_is_read() -> None:
    assert parse_plan('```json\n{"steps": [], "rationale": "x"}\n```') == Plan(steps=(), rationale="x")


def test_each_defect_is_named() -> None:
    assert refusal() == "the plan has no steps"
    assert refusal(*(step(str(n)) for n in range(MAX_STEPS + 1))) == "the plan has 13 steps, and at most 12 are allowed"
    assert refusal(step("a"), step("a")) == "two steps have the id 'a'"
    assert refusal(step("a", capability="fly")) == (
        "step 'a' asks for the unknown capability 'fly'; there are: retrieve, research"
    )
    assert refusal(step("a", "a")) == "step 'a' depends on itself"
    assert refusal(step("a", "z")) == "step 'a' depends on 'z', which is no step of the plan"
    assert refusal(step("a", objective="  ")) == "step 'a' has no objective"
    cycle = refusal(step("x", "b"), step("a", "c"), step("b", "a"), step("c", "b"))
    assert cycle == "the plan has a cycle: b -> a -> c -> b"


@pytest.mark.parametrize(
    "text", ["", "no plan", "[]", '{"steps": 3}', '{"steps": [{"id": "a"}]}', '{"steps": [], "x": 1}']
)
def test_what_is_no_plan_is_refused(text: str) -> None:
    with pytest.raises(InvalidPlanError, match=r"not JSON|right form"):
        parse_plan(text)


def test_the_schema_suits_strict_structured_outputs() -> None:
    schema = json.loads(PLAN_SCHEMA)
    objects = [schema, *schema["$defs"].values()]
    for node in objects:
        assert node["additionalProperties"] is False
        assert sorted(node["required"]) == sorted(node["properties"])
    assert "default" not in PLAN_SCHEMA


NAMES = "abcdef"


@given(st.lists(st.tuples(st.sampled_from(NAMES), st.lists(st.sampled_from(NAMES), max_size=3)), max_size=8))
def test_a_plan_is_either_ordered_or_refused(nodes: list[tuple[str, list[str]]]) -> None:
    plan = Plan(
        steps=tuple(
            PlanStep(id=name, capability="retrieve", objective="o", depends_on=tuple(needs)) for name, needs in nodes
        )
    )
    try:
        steps = planned_steps(plan, task_id="t", capabilities=CAPABILITIES, parameters={})
    except InvalidPlanError as error:
        if "cycle" in str(error):
            path = str(error).partition(": ")[2].split(" -> ")
            needs = dict(nodes)
            assert path[0] == path[-1]
            assert all(following in needs[name] for name, following in pairwise(path))
        return
    assert len(steps) == len(nodes)
    done: set[str] = set()
    for item in steps:
        assert done.issuperset(item.depends_on)
        done.add(item.step_id)
