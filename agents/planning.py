"""The plan as a model writes it, and what makes it one that can be carried out.

In: a plan's JSON (from a language model, or from the user in ``parameters["plan"]``). Out: planned steps in topological
order with global step ids, or an :class:`~agents.errors.InvalidPlanError` that says in one sentence what is wrong.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import orjson
from pydantic import BaseModel, ConfigDict, ValidationError

from agents.errors import InvalidPlanError
from schemas.events import PlannedStep
from schemas.metadata import canonical_json

__all__ = ["MAX_STEPS", "PLAN_SCHEMA", "Plan", "PlanStep", "parse_plan", "planned_steps"]

MAX_STEPS: Final = 12
"""More steps than a question of some sentences needs; a plan beyond it is a model run wild, and would cost as much."""


class PlanStep(BaseModel):
    """A step: ``id`` is local to the plan, ``depends_on`` names the ids whose results this step needs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    capability: str
    objective: str
    depends_on: tuple[str, ...] = ()


class Plan(BaseModel):
    """A directed acyclic graph of steps, and why it is cut so."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: tuple[PlanStep, ...]
    rationale: str = ""


def _schema() -> str:
    # The vendors' strict structured outputs insist that every field is required, and refuse `default`.
    def plain(node: Any) -> Any:
        if isinstance(node, dict):
            kept = {key: plain(value) for key, value in node.items() if key not in ("default", "title", "description")}
            return kept | {"required": list(kept["properties"])} if "properties" in kept else kept
        return [plain(item) for item in node] if isinstance(node, list) else node

    return canonical_json(plain(Plan.model_json_schema()))


PLAN_SCHEMA: Final = _schema()
"""The JSON Schema (as JSON) of :class:`Plan`, in the form that strict structured outputs take."""


def parse_plan(text: str) -> Plan:
    """The plan that ``text`` holds as JSON; a Markdown fence around it is forgiven.

    Raises:
        InvalidPlanError: it is not JSON, or not a plan.
    """
    text = text.strip()
    if text.startswith("```"):
        text = text.partition("\n")[2].rpartition("```")[0]
    try:
        return Plan.model_validate(orjson.loads(text))
    except orjson.JSONDecodeError as error:
        raise InvalidPlanError(f"the plan is not JSON: {error}") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or "the whole"
        raise InvalidPlanError(f"the plan does not have the right form: {place}: {first['msg']}") from None


def planned_steps(
    plan: Plan, *, task_id: str, capabilities: Sequence[str], parameters: Mapping[str, str]
) -> tuple[PlannedStep, ...]:
    """The steps of ``plan`` in topological order (ties in the plan's order), named ``<task_id>/<n>`` from 1.

    Raises:
        InvalidPlanError: no steps or too many, an empty objective, duplicate ids, an unknown capability or dependency,
            a step that depends on itself, or a cycle.
    """
    ordered = _topological(_checked(plan, capabilities))
    names = {step.id: f"{task_id}/{number}" for number, step in enumerate(ordered, start=1)}
    return tuple(
        PlannedStep(
            step_id=names[step.id],
            capability=step.capability,
            objective=step.objective.strip(),
            depends_on=tuple(names[needed] for needed in dict.fromkeys(step.depends_on)),
            parameters=dict(parameters),
        )
        for step in ordered
    )


def _checked(plan: Plan, capabilities: Sequence[str]) -> tuple[PlanStep, ...]:
    steps = plan.steps
    if not steps:
        raise InvalidPlanError("the plan has no steps")
    if len(steps) > MAX_STEPS:
        raise InvalidPlanError(f"the plan has {len(steps)} steps, and at most {MAX_STEPS} are allowed")
    seen: set[str] = set()
    for step in steps:
        if step.id in seen:
            raise InvalidPlanError(f"two steps have the id {step.id!r}")
        seen.add(step.id)
    for step in steps:
        if step.capability not in capabilities:
            raise InvalidPlanError(
                f"step {step.id!r} asks for the unknown capability {step.capability!r}; "
                f"there are: {', '.join(capabilities)}"
            )
        if not step.objective.strip():
            raise InvalidPlanError(f"step {step.id!r} has no objective")
        for needed in step.depends_on:
            if needed == step.id:
                raise InvalidPlanError(f"step {step.id!r} depends on itself")
            if needed not in seen:
                raise InvalidPlanError(f"step {step.id!r} depends on {needed!r}, which is no step of the plan")
    return steps


def _topological(steps: tuple[PlanStep, ...]) -> list[PlanStep]:
    ordered: list[PlanStep] = []
    done: set[str] = set()
    waiting = list(steps)
    while waiting:
        ready = next((step for step in waiting if done.issuperset(step.depends_on)), None)
        if ready is None:
            raise InvalidPlanError(f"the plan has a cycle: {' -> '.join(_cycle(waiting))}")
        waiting.remove(ready)
        ordered.append(ready)
        done.add(ready.id)
    return ordered


def _cycle(waiting: Sequence[PlanStep]) -> list[str]:
    """The ids of one cycle among ``waiting``, its first id repeated at the end. Each of them waits for another."""
    needs = {step.id: step.depends_on for step in waiting}
    path = [waiting[0].id]
    while True:
        following = next(needed for needed in needs[path[-1]] if needed in needs)
        if following in path:
            return [*path[path.index(following) :], following]
        path.append(following)
