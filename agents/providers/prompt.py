"""A request as the vendors' chat models take it: one system text and turns, with the passages rendered into the last.

In: :class:`~agents.context.LlmRequest`. Out: :class:`Prompt`. One rendering for all vendors, so that switching vendor
changes the model and not the question.
"""

from dataclasses import dataclass
from typing import Any

import orjson

from agents.context import LlmRequest, Purpose

__all__ = ["Prompt", "Turn", "render"]


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn; ``role`` is user or assistant."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Prompt:
    """What is sent. ``schema`` is the JSON Schema that the response must satisfy, None for prose."""

    system: str
    turns: tuple[Turn, ...]
    schema: dict[str, Any] | None


def render(request: LlmRequest) -> Prompt:
    """The prompt for ``request``: turns of one role in a row are joined, as not every vendor takes them apart."""
    contents = [(message.role, message.content) for message in request.messages]
    if request.passages:
        role, last = contents[-1]
        contents[-1] = role, f"{_passages(request)}\n\n{last}"
    turns: list[Turn] = []
    for role, content in contents:
        if turns and turns[-1].role == role:
            turns[-1] = Turn(role, f"{turns[-1].content}\n\n{content}")
        else:
            turns.append(Turn(role, content))
    schema = orjson.loads(request.response_schema) if request.response_schema else None
    return Prompt(request.system, tuple(turns), schema)


def _passages(request: LlmRequest) -> str:
    """Passages are numbered by their markers. The notes of a synthesis are not: their text has markers of its own."""
    if request.purpose is Purpose.SYNTHESISE:
        return "\n\n".join(f"Note on: {passage.title}\n{passage.text}" for passage in request.passages)
    return "\n\n".join(f"[{passage.marker}] {passage.title}\n{passage.text}" for passage in request.passages)
