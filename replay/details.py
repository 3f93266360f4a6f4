"""What an event has to show beyond its line: prompts, evidence, verdicts, arguments, answers.

In: an event. Out: :class:`Detail` values, each a text or a small table, whole; who shows them cuts where there is
little room. ``brief`` marks what is worth showing even then.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from replay.words import error_of, say_effect, shorten
from schemas.events import (
    AssessedClaim,
    Citation,
    DeadLettered,
    Effect,
    Event,
    Evidence,
    LlmCalled,
    MemoryRecalled,
    PlanProposed,
    Queried,
    StepAssessed,
    StepAssigned,
    StepCompleted,
    TextsEmbedded,
    ToolCalled,
)

__all__ = ["Cell", "Detail", "call_in_words", "details", "readable_json"]

Cell = str | int | float | bool | datetime | None

_LEFT_OUT = frozenset({"vector", "vectors", "task_id", "request_hash"})
"""Numbers that say nothing to a reader, and what stands on the page already."""


@dataclass(frozen=True, slots=True)
class Detail:
    """``text``, or with ``columns`` the ``rows`` of a table."""

    name: str
    text: str = ""
    columns: tuple[str, ...] = ()
    rows: tuple[tuple[Cell, ...], ...] = ()
    brief: bool = False
    code: bool = False


def details(event: Event) -> tuple[Detail, ...]:
    """All that ``event`` has to show; nothing that is empty."""
    return tuple(detail for detail in _details(event) if detail.text or detail.rows)


def call_in_words(effect: Effect) -> str:
    """A call in a line: what was asked, and what came of it."""
    return " ".join(filter(None, (say_effect(effect), _asked(effect))))


def readable_json(text: str) -> str:
    """``text`` as JSON over several lines where it is JSON, else as it is."""
    parsed = _json(text)
    return text if parsed is None else json.dumps(parsed, ensure_ascii=False, indent=2)


def _asked(effect: Effect) -> str:
    match effect:
        case LlmCalled():
            answer = _json(effect.response)
            said = answer.get("text") if isinstance(answer, dict) else None
            return f"“{shorten(str(said))}”" if said else ""
        case MemoryRecalled():
            query = _json(effect.request)
            return f"for “{shorten(str(query.get('query', '')), 80)}”" if isinstance(query, dict) else ""
        case ToolCalled():
            asked = _json(effect.request)
            arguments = asked.get("arguments") if isinstance(asked, dict) else None
            return f"{shorten(json.dumps(arguments, ensure_ascii=False), 80)} gave {shorten(effect.result, 80)}"
        case _:
            return ""


def _details(event: Event) -> Iterator[Detail]:
    match event:
        case LlmCalled():
            yield from _llm(event)
        case MemoryRecalled():
            request = _json(event.request)
            yield Detail("query", str(request.get("query", "")) if isinstance(request, dict) else event.request)
            yield _evidence("evidence", event.hits, brief=True)
        case ToolCalled():
            yield Detail("arguments", readable_json(event.request), code=True)
            yield Detail("result", readable_json(event.result), code=True)
        case Queried():
            yield Detail("request", readable_json(event.request), code=True)
            yield Detail("result", readable_json(event.result), code=True)
        case TextsEmbedded():
            request = _json(event.request)
            texts = request.get("texts", []) if isinstance(request, dict) else []
            yield Detail("texts", columns=("text",), rows=tuple((str(text),) for text in texts))
        case PlanProposed():
            rows = tuple(
                (step.step_id, step.capability, step.objective, ", ".join(step.depends_on)) for step in event.steps
            )
            yield Detail("steps", columns=("step", "capability", "objective", "depends on"), rows=rows)
            yield Detail("rationale", event.rationale)
        case StepAssigned():
            yield Detail("objective", event.objective)
            yield Detail("to mend", event.finding, brief=True)
            inputs = tuple((each.step_id, each.objective, each.answer) for each in event.inputs)
            yield Detail("inputs", columns=("step", "objective", "answer"), rows=inputs)
            yield _parameters(event.parameters)
            yield Detail("deadline", "" if event.deadline is None else event.deadline.isoformat())
        case StepCompleted():
            yield Detail("answer", event.answer)
            claims = tuple((claim.text, ", ".join(claim.chunk_ids)) for claim in event.claims)
            yield Detail("claims", columns=("claim", "chunks"), rows=claims)
            yield _citations(event.citations)
            yield _evidence("evidence", event.evidence)
            yield Detail("model", event.model)
        case StepAssessed():
            yield _claims(event.claims)
            yield Detail("finding", event.finding, brief=True)
            yield Detail("answer", event.answer)
            yield _citations(event.citations)
        case DeadLettered():
            yield Detail("error", f"{event.error_type}: {event.error}", brief=True)
            yield Detail("attempts", str(event.attempts))
        case _:
            yield from _fields(event)
    if isinstance(event, Effect):
        yield Detail("error", error_of(event))


def _llm(event: LlmCalled) -> Iterator[Detail]:
    request, response = _json(event.request), _json(event.response)
    if not isinstance(request, dict):
        yield Detail("request", event.request, code=True)
    else:
        yield Detail("system", str(request.get("system") or ""))
        for message in _dicts(request.get("messages")):
            yield Detail(str(message.get("role", "message")), str(message.get("content", "")))
        passages = tuple(
            tuple(_cell(each.get(name)) for name in ("marker", "title", "text"))
            for each in _dicts(request.get("passages"))
        )
        yield Detail("passages", columns=("marker", "title", "text"), rows=passages)
        shown = {"system", "messages", "passages"}
        rest = {name: value for name, value in request.items() if name not in shown and value not in ("", None)}
        yield Detail("settings", ", ".join(f"{name} {value}" for name, value in rest.items()))
    if isinstance(response, dict):
        yield Detail("response", readable_json(str(response.get("text", ""))))
        yield Detail("finished", str(response.get("finish_reason", "")))
    else:
        yield Detail("response", event.response)
    tokens = f"{event.prompt_tokens:,} in the prompt, {event.completion_tokens:,} in the response"
    yield Detail("tokens", f"{tokens}, ${event.cost_usd:.6f}" if event.cost_usd else tokens)


def _evidence(name: str, hits: Sequence[Evidence], *, brief: bool = False) -> Detail:
    rows = tuple((hit.score, _where(hit), hit.text, hit.source, hit.chunk_id) for hit in hits)
    return Detail(name, columns=("score", "where", "text", "source", "chunk"), rows=rows, brief=brief)


def _citations(citations: Sequence[Citation]) -> Detail:
    rows = tuple((each.marker, _where(each), each.quote, each.source) for each in citations)
    return Detail("citations", columns=("marker", "where", "quote", "source"), rows=rows)


def _where(cited: Evidence | Citation) -> str:
    return " › ".join(filter(None, (cited.title, cited.heading)))


def _claims(claims: Sequence[AssessedClaim]) -> Detail:
    rows = tuple(
        (
            "grounded" if claim.grounded else "not grounded",
            round(claim.lexical_similarity, 3),
            None if claim.embedding_similarity is None else round(claim.embedding_similarity, 3),
            claim.text,
            ", ".join(claim.chunk_ids),
        )
        for claim in claims
    )
    return Detail("claims", columns=("verdict", "words", "meaning", "claim", "chunks"), rows=rows, brief=True)


def _parameters(parameters: dict[str, str]) -> Detail:
    return Detail("parameters", columns=("name", "value"), rows=tuple(parameters.items()))


def _fields(event: Event) -> Iterator[Detail]:
    for name, value in event.model_dump(mode="json", exclude=set(_LEFT_OUT)).items():
        if isinstance(event, Effect) and name in Effect.model_fields:
            continue
        if value not in ("", None, [], {}):
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, indent=2)
            yield Detail(name.replace("_", " "), text)


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _cell(value: Any) -> Cell:
    return value if value is None or isinstance(value, str | int | float) else json.dumps(value, ensure_ascii=False)


def _dicts(value: Any) -> Iterable[dict[str, Any]]:
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []
