"""The outside world in our own terms: what handlers can ask, and the ports that answer, as Protocols.

In: nothing. Out: requests and responses as frozen models, and one Protocol a part; adapters in :mod:`agents.providers`,
:mod:`agents.memory` and beyond implement them, and each process is given the ones that it is configured with. A port
that can do something twice takes an ``idempotency_key``: the same after a crash and for each attempt of one call.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

import numpy as np
import orjson
from numpy.typing import NDArray

from schemas.events import DirectoryEntry, Evidence, Value

__all__ = [
    "Directory",
    "EmbeddingModel",
    "InDoubt",
    "LanguageModel",
    "LlmRequest",
    "LlmResponse",
    "Memory",
    "Message",
    "Passage",
    "Ports",
    "Purpose",
    "RecallRequest",
    "ToolInfo",
    "ToolResult",
    "Tools",
    "Vectors",
]

Vectors = NDArray[np.float32]
"""Shape (n, dimensions), float32; rows have unit length."""


class Purpose(StrEnum):
    """What a language model is asked to do."""

    PLAN = "plan"
    ANSWER = "answer"
    SYNTHESISE = "synthesise"


class Message(Value):
    """One turn of a conversation; ``role`` is user or assistant."""

    role: str
    content: str


class Passage(Value):
    """Text that an answer may rest on and cite as ``[marker]``."""

    marker: int
    chunk_id: str
    title: str
    text: str


class LlmRequest(Value):
    """A call to a language model, in no vendor's terms.

    ``passages`` are put before the last message by the adapter. ``response_schema`` is a JSON Schema (as JSON) that
    the response's text must satisfy; empty means prose. An empty ``model`` takes the provider's default.
    """

    purpose: Purpose
    system: str = ""
    messages: tuple[Message, ...]
    passages: tuple[Passage, ...] = ()
    response_schema: str = ""
    model: str = ""
    temperature: float = 0.0
    max_tokens: int = 1024


class LlmResponse(Value):
    """A language model's answer. ``provider`` and ``model`` say whose; ``cost_usd`` is in US dollars."""

    text: str
    provider: str
    model: str
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost_usd: float = 0.0
    finish_reason: str = "stop"


class RecallRequest(Value):
    """Ask memory for the ``limit`` passages most similar to ``query``; ``document_ids`` narrows where to look."""

    query: str
    limit: int = 8
    document_ids: tuple[str, ...] = ()


class InDoubt(StrEnum):
    """What becomes of a tool call that was started, and that nobody knows the end of."""

    RETRY = "retry"
    """Call it again with the same idempotency key, which the tool honours."""
    ASK = "ask"
    """Fail with ToolNeedsApproval: a person has to say."""
    FAIL = "fail"
    """Fail with ToolInDoubt."""


@dataclass(frozen=True, slots=True)
class ToolInfo:
    """What is to be known of a tool before it is called."""

    name: str
    side_effects: bool
    in_doubt: InDoubt = InDoubt.FAIL


class ToolResult(Value):
    """What a tool gave back; ``result`` is JSON."""

    tool: str
    result: str

    @property
    def value(self) -> Any:
        """The result as Python holds it."""
        return orjson.loads(self.result)


class LanguageModel(Protocol):
    """A language model behind an adapter."""

    name: str

    async def complete(self, request: LlmRequest, *, idempotency_key: str) -> LlmResponse:
        """Answer ``request``. A vendor that knows the key answers a repeat as it did the first time.

        Raises:
            EffectFailedError: the call failed; ``retryable`` is set for timeouts, rate limits and server errors.
        """


class Memory(Protocol):
    """Recall by similarity."""

    model: str

    async def recall(self, request: RecallRequest) -> tuple[Evidence, ...]:
        """The passages nearest to the request's query, best first, scores in [-1, 1] (cosine)."""


class EmbeddingModel(Protocol):
    """Texts to vectors."""

    model: str
    version: str
    dimensions: int

    async def embed(self, texts: Sequence[str]) -> Vectors:
        """One unit-length row a text, shape (len(texts), dimensions)."""


class Tools(Protocol):
    """The tools of this process."""

    def describe(self, name: str) -> ToolInfo:
        """What the tool is like.

        Raises:
            EffectFailedError: there is no such tool.
        """

    async def call(self, name: str, arguments: str, *, idempotency_key: str) -> str:
        """Run the tool with ``arguments``, a JSON object, and give its result as JSON.

        Raises:
            EffectFailedError: it failed; ``retryable`` says whether another try may succeed.
        """


class Directory(Protocol):
    """Which agents there are, and how they fare."""

    async def lookup(self, capability: str) -> tuple[DirectoryEntry, ...]:
        """The instances of agents with this capability, as far as is known; () where nobody watches them."""


@dataclass(frozen=True, slots=True)
class Ports:
    """The outside world, as far as this process is configured with it."""

    llm: LanguageModel | None = None
    memory: Memory | None = None
    embedding: EmbeddingModel | None = None
    tools: Tools | None = None
    directory: Directory | None = None
