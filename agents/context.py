"""What a handler sees besides its event: the context, and the ports behind it.

In: the event's metadata, the lane's state, a journal of effects, the ports of this process. Out: emitted events and the
state left behind, which :mod:`agents.step` collects. Every port call is an effect: its request and response are
recorded, and the handler is given what was recorded, live and in replay alike.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from schemas.events import Event, Evidence, Priority, Value
from schemas.metadata import Metadata, deterministic_id

if TYPE_CHECKING:
    from agents.journal import Journal

__all__ = [
    "Context",
    "EmbeddingModel",
    "LanguageModel",
    "LlmRequest",
    "LlmResponse",
    "Memory",
    "Message",
    "Passage",
    "Ports",
    "Purpose",
    "RecallRequest",
    "Vectors",
]

Vectors = NDArray[np.float32]
"""Shape (n, dimensions), float32; rows have unit length."""

StateT = TypeVar("StateT", bound=BaseModel)


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


class LanguageModel(Protocol):
    """A language model behind an adapter."""

    name: str

    async def complete(self, request: LlmRequest) -> LlmResponse:
        """Answer ``request``.

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


@dataclass(frozen=True, slots=True)
class Ports:
    """The outside world, as far as this process is configured with it."""

    llm: LanguageModel | None = None
    memory: Memory | None = None
    embedding: EmbeddingModel | None = None


class _Outputs:
    """What the context and its scopes collect together."""

    __slots__ = ("emitted", "expires_after", "new_ids", "random", "state")

    def __init__(self, state: BaseModel | None) -> None:
        self.emitted: list[Event] = []
        self.state = state
        self.expires_after: timedelta | None = None
        self.new_ids = 0
        self.random: random.Random | None = None


class Context(Generic[StateT]):
    """Everything a handler may decide by, and the only way its decisions leave it."""

    __slots__ = ("_journal", "_outputs", "_scope", "agent", "metadata", "now", "priority")

    def __init__(
        self,
        *,
        agent: str,
        metadata: Metadata,
        now: datetime,
        priority: Priority,
        state: StateT | None,
        journal: "Journal",
    ) -> None:
        self.agent = agent
        self.metadata = metadata
        self.now = now
        """The later of the record's timestamp and the lane's last ``now``; never the wall clock."""
        self.priority = priority
        self._journal = journal
        self._scope = ""
        self._outputs = _Outputs(state)

    @property
    def state(self) -> StateT | None:
        """The lane's state, None when it has none. Assign a new model to change it, None to delete it."""
        return self._outputs.state  # type: ignore[return-value]

    @state.setter
    def state(self, value: StateT | None) -> None:
        self._outputs.state = value
        self._outputs.expires_after = None

    def expire_state(self, after: timedelta) -> None:
        """Forget the state that was just assigned when ``after`` has passed since ``now``."""
        self._outputs.expires_after = after

    def emit(self, event: Event) -> None:
        """Emit ``event`` to the topic of its type; it commits with the handler's other outputs or not at all."""
        self._outputs.emitted.append(event)

    def new_id(self) -> str:
        """A fresh id: the UUIDv5 of the event, the scope and how many were made before it in this handler."""
        self._outputs.new_ids += 1
        return deterministic_id(self.metadata.id, self.agent, "new_id", self._scope, self._outputs.new_ids)

    @property
    def random(self) -> random.Random:
        """Pseudo-random numbers, seeded by the event."""
        if self._outputs.random is None:
            self._outputs.random = random.Random(f"{self.metadata.id}/{self.agent}")
        return self._outputs.random

    def scope(self, name: str) -> "Context[StateT]":
        """The same context under a scope of its own.

        Give each of several concurrent branches its own scope, so that equal requests in them keep their identities.
        """
        scoped: Context[StateT] = object.__new__(type(self))
        scoped.agent, scoped.metadata, scoped.now, scoped.priority = self.agent, self.metadata, self.now, self.priority
        scoped._journal, scoped._outputs = self._journal, self._outputs
        scoped._scope = f"{self._scope}/{name}"
        return scoped

    async def llm(self, request: LlmRequest) -> LlmResponse:
        """Call a language model. Recorded as LlmCalled.

        Raises:
            EffectFailedError: the call failed.
            MissingPortError: this process has no language model.
        """
        return await self._journal.llm(self._scope, request)

    async def recall(self, query: str, *, limit: int = 8, document_ids: Sequence[str] = ()) -> tuple[Evidence, ...]:
        """The passages most similar to ``query``, best first. Recorded as MemoryRecalled.

        Raises:
            EffectFailedError: the search failed.
            MissingPortError: this process has no memory.
        """
        request = RecallRequest(query=query, limit=limit, document_ids=tuple(document_ids))
        return await self._journal.recall(self._scope, request)

    async def embed(self, texts: Sequence[str]) -> Vectors:
        """The vectors of ``texts``, shape (len(texts), dimensions). Recorded as TextsEmbedded.

        Raises:
            EffectFailedError: the model failed.
            MissingPortError: this process has no embedding model.
        """
        return await self._journal.embed(self._scope, tuple(texts))

    def collected(self) -> tuple[tuple[Event, ...], Any, timedelta | None]:
        """What the handler left: emitted events in order, the state, and when it expires. For :mod:`agents.step`."""
        return tuple(self._outputs.emitted), self._outputs.state, self._outputs.expires_after
