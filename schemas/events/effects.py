"""What handlers did in the outside world: topic ``effects``.

An effect's identity is the event that was being handled (``event_id``), the ``scope`` path inside the handler, the
``request_hash`` (SHA-256, hex, of the canonical JSON request) and its ``occurrence`` among equal requests there.
``sequence`` is the order of completion in the step, from 0, so that concurrent calls replay alike; ``attempt`` says in
which run of the handler, from 1, over all retries and crashes.
"""

from typing import Annotated

from schemas.events.base import Event, Personal, PersonalText, Timestamp
from schemas.events.tasks import Evidence

__all__ = [
    "ChangeMarked",
    "Effect",
    "LlmCalled",
    "MemoryRecalled",
    "Queried",
    "TextsEmbedded",
    "ToolCalled",
    "ToolStarted",
    "Waited",
]


class Effect(Event):
    """The fields every effect has. ``task_id`` is the key: the task's, or for documents the document's id.

    ``request`` is canonical JSON; ``error`` is empty when the call succeeded; ``latency_ms`` is wall time.
    """

    task_id: str
    agent: str
    event_id: str
    scope: str = ""
    occurrence: int = 0
    sequence: int = 0
    attempt: int = 1
    request_hash: PersonalText
    request: PersonalText
    error: PersonalText = ""
    started_at: Timestamp
    latency_ms: float


class LlmCalled(Effect, family="effects"):
    """A language model was called. ``response`` is the canonical JSON response; ``cost_usd`` is in US dollars."""

    provider: str
    model: str
    response: PersonalText = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost_usd: float = 0.0


class ToolStarted(Effect, family="effects"):
    """A tool with side effects is about to run: committed before it does, so that a crash leaves no doubt unnoticed.

    It has the identity of the ToolCalled that follows; without one, nobody knows whether the tool did its work.
    """

    tool: str


class ToolCalled(Effect, family="effects"):
    """A tool ran. ``result`` is canonical JSON."""

    tool: str
    result: PersonalText = ""
    side_effects: bool = False


class MemoryRecalled(Effect, family="effects"):
    """Passages were recalled by similarity to the request's query."""

    model: str
    hits: tuple[Evidence, ...] = ()


class TextsEmbedded(Effect, family="effects"):
    """Texts were embedded. ``vectors`` is ``count`` × ``dimensions`` float32, little-endian, row by row."""

    model: str
    model_version: str
    dimensions: int
    count: int
    vectors: Annotated[bytes, Personal] = b""


class Queried(Effect, family="effects"):
    """A projection was queried. ``result`` is canonical JSON."""

    target: str
    result: PersonalText = ""


class Waited(Effect, family="effects"):
    """A delay that the handler set by its event loop's clock (a timeout, a sleep) had passed; ``seconds`` long."""

    seconds: float


class ChangeMarked(Effect, family="effects"):
    """The handler asked whether a change of its code, by name, applies to this event: ``taken`` when it does, and not
    when older code had begun with the event. It is no call: nothing was done outside.
    """

    change: str
    taken: bool
