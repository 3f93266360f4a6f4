"""What a handler sees besides its event: the context.

In: the event's metadata, the lane's state, a journal of effects. Out: emitted events, the state left behind and timers,
which :mod:`agents.step` collects. Every call to the outside is an effect: its request and response are recorded, and
the handler is given what was recorded, live and in replay alike. Handlers may run effects side by side, race them and
set timeouts on them by asyncio's own means: :mod:`agents.turns` sees to it that replay goes the same way.
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from random import Random
from typing import Any, Generic, TypeVar

from pydantic import BaseModel

from agents import effects
from agents.journal import Journal
from agents.ports import (
    Directory,
    EmbeddingModel,
    InDoubt,
    LanguageModel,
    LlmRequest,
    LlmResponse,
    Memory,
    Message,
    Passage,
    Ports,
    Purpose,
    RecallRequest,
    ToolInfo,
    ToolResult,
    Tools,
    Vectors,
)
from schemas.events import DirectoryEntry, Event, Evidence, Priority
from schemas.metadata import Metadata, deterministic_id

__all__ = [
    "Context",
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

StateT = TypeVar("StateT", bound=BaseModel)


class _Outputs:
    """What the context and its scopes collect together."""

    __slots__ = ("emitted", "expires_after", "new_ids", "random", "state", "timers")

    def __init__(self, state: BaseModel | None) -> None:
        self.emitted: list[Event] = []
        self.expires_after: timedelta | None = None
        self.new_ids = 0
        self.random: Random | None = None
        self.state = state
        self.timers: dict[str, datetime | None] | None = None


class Context(Generic[StateT]):
    """Everything a handler may decide by, and the only way its decisions leave it."""

    __slots__ = ("_journal", "_outputs", "_scope", "agent", "metadata", "now", "priority")

    def __init__(
        self,
        agent: str,
        metadata: Metadata,
        now: datetime,
        priority: Priority,
        state: StateT | None,
        journal: Journal,
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

    def timer(self, name: str, at: datetime) -> None:
        """Have a TimerFired for this lane written at ``at``, or as soon as can be after it.

        The timer is the lane's, by its name: setting it again moves it, also where another event set it.

        Raises:
            ValueError: ``at`` has no time zone, or the name is empty or holds a control character.
        """
        if at.tzinfo is None:
            raise ValueError(f"timer {name!r}: {at} has no time zone; give it one, as ctx.now has")
        self._set_timer(name, at.astimezone(UTC))

    def cancel_timer(self, name: str) -> None:
        """Forget the lane's timer of this name, if it has one. A TimerFired that is already written still comes."""
        self._set_timer(name, None)

    def _set_timer(self, name: str, due: datetime | None) -> None:
        if not name or not name.isprintable():
            raise ValueError(f"timer {name!r}: give it a name of printable characters")
        if self._outputs.timers is None:
            self._outputs.timers = {}
        self._outputs.timers[name] = due

    def new_id(self) -> str:
        """A fresh id: the UUIDv5 of the event, the scope and how many were made before it in this handler."""
        self._outputs.new_ids += 1
        return deterministic_id(self.metadata.id, self.agent, "new_id", self._scope, self._outputs.new_ids)

    @property
    def random(self) -> Random:
        """Pseudo-random numbers, seeded by the event."""
        if self._outputs.random is None:
            self._outputs.random = Random(f"{self.metadata.id}/{self.agent}")
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

    def changed(self, change: str) -> bool:
        """Whether the change of this handler's code that is called ``change`` applies to this event. Recorded as
        ChangeMarked.

        True for events that the changed code handles. False where older code decided, so that an audit goes its way:
        no marker is recorded; and where older code had got past this point when the event came to this one, by a retry
        or a crash. The first call of an event decides; others, in whatever scope or attempt, are told the same.

        >>> if ctx.changed("ask for sources"):
        ...     prompt = SOURCED
        ... else:
        ...     prompt = PLAIN

        Raises:
            ValueError: the name is empty or holds a control character.
        """
        if not change or not change.isprintable():
            raise ValueError(f"change {change!r}: give it a name of printable characters")
        return self._journal.changed(change)

    async def llm(self, request: LlmRequest) -> LlmResponse:
        """Call a language model. Recorded as LlmCalled.

        Raises:
            EffectFailedError: the call failed.
            MissingPortError: this process has no language model.
        """
        return await effects.llm(self._journal, self._scope, request)

    async def recall(self, query: str, *, limit: int = 8, document_ids: Sequence[str] = ()) -> tuple[Evidence, ...]:
        """The passages most similar to ``query``, best first. Recorded as MemoryRecalled.

        Raises:
            EffectFailedError: the search failed.
            MissingPortError: this process has no memory.
        """
        request = RecallRequest(query=query, limit=limit, document_ids=tuple(document_ids))
        return await effects.recall(self._journal, self._scope, request)

    async def embed(self, texts: Sequence[str]) -> Vectors:
        """The vectors of ``texts``, shape (len(texts), dimensions). Recorded as TextsEmbedded.

        Raises:
            EffectFailedError: the model failed.
            MissingPortError: this process has no embedding model.
        """
        return await effects.embed(self._journal, self._scope, tuple(texts))

    async def tool(self, name: str, arguments: Mapping[str, Any]) -> ToolResult:
        """Run a tool. Recorded as ToolCalled, and before it as ToolStarted when the tool has side effects.

        Raises:
            EffectFailedError: the tool failed, or there is none of this name. ToolInDoubt and ToolNeedsApproval: it was
                started before, whether it did its work is not known, and its policy is not to try again.
            MissingPortError: this process has no tools.
        """
        return await effects.tool(self._journal, self._scope, name, arguments)

    async def directory(self, capability: str) -> tuple[DirectoryEntry, ...]:
        """The known instances of agents with ``capability``. Recorded as Queried.

        Raises:
            EffectFailedError: the lookup failed.
            MissingPortError: this process has no directory.
        """
        return await effects.directory(self._journal, self._scope, capability)

    @property
    def data_subjects(self) -> tuple[str, ...]:
        """The key ids of the people that this decision is about: those of the event, of the lane's state and of what
        was recalled so far. What is emitted inherits them.
        """
        return self._journal.data_subjects

    @property
    def outputs(self) -> _Outputs:
        """What the handler has left so far. For :mod:`agents.step`."""
        return self._outputs
