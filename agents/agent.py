"""The handler contract: what an agent is.

In: one event of a type the agent consumes, and a :class:`~agents.context.Context`. Out: what the handler emits and
the state it leaves, through the context. A handler decides by nothing else: no clock, no randomness, no I/O of its
own, no attribute of ``self`` that changes. The same event, state and recorded effects then always give the same
outputs, which is what makes retries safe and replay a proof. A handler may run its effects side by side, race them and
bound them in time by asyncio's own means (``gather``, ``TaskGroup``, ``wait``, ``timeout``): see :mod:`agents.turns`.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any, ClassVar, Generic, Self, TypeVar

from pydantic import BaseModel

from agents.context import Context
from agents.errors import PredecessorError
from schemas.events import Event
from schemas.topics import key_of

__all__ = ["Agent", "Failure"]

StateT = TypeVar("StateT", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a handler gave up: the error's class name, its message, and whether a later try may succeed."""

    error_type: str
    message: str
    retryable: bool


class Agent(ABC, Generic[StateT]):
    """A stream processor's decisions.

    Subclasses name themselves (``name`` is the consumer group's stem and part of every event's source), give a
    ``version`` that changes when decisions do, and list the event types they consume and emit. An agent with state
    names its frozen pydantic model as ``state_type``; state belongs to a lane.

    >>> class Echo(Agent[BaseModel]):
    ...     name, version = "echo", "1"
    ...     consumes, emits = (StepAssigned,), (StepCompleted,)
    ...     async def handle(self, event, ctx):
    ...         ctx.emit(StepCompleted(**event.model_dump(include={"task_id", "step_id", ...}), answer=event.objective))
    """

    name: ClassVar[str]
    version: ClassVar[str]
    consumes: ClassVar[tuple[type[Event], ...]]
    emits: ClassVar[tuple[type[Event], ...]]
    capabilities: ClassVar[tuple[str, ...]] = ()
    state_type: ClassVar[type[BaseModel] | None] = None
    starts_anew: ClassVar[bool] = False
    """Whether a lane whose state was erased, because a data subject was forgotten, has none. By default its events are
    refused: ``on_failure`` is called with SubjectForgotten, and nothing is decided on what is left of the state."""
    predecessors: ClassVar[Mapping[str, "type[Agent[Any]]"]] = MappingProxyType({})
    """The classes that decided under earlier versions, where this one decides otherwise: see :meth:`at_version`."""

    def lane(self, event: Event) -> str:
        """The lane of ``event``: events of one lane are handled one after another. By default its record key.

        A lane lies within one record key: whatever the event type, events of one lane have the same key.
        """
        return key_of(event)

    @abstractmethod
    async def handle(self, event: Any, ctx: Context[StateT]) -> None:
        """Decide. Emit through ``ctx.emit``, leave state in ``ctx.state``, reach outside only through ``ctx``.

        Raises:
            EffectFailedError: a call failed; it is tried again by policy when it is retryable.
            Exception: anything else is a defect; the event goes to dead-letters after ``on_failure``.
        """

    async def on_failure(self, event: Any, failure: Failure, ctx: Context[StateT]) -> None:
        """Say what failed, so that nobody waits: emit StepFailed, PlanRejected or TaskFailed.

        Called once, when ``handle`` has given up on ``event``; its outputs commit together with the dead letter. The
        context starts afresh: nothing that the failed ``handle`` emitted is kept. By default nothing is emitted.
        """

    @cached_property
    def source(self) -> str:
        """The CloudEvents source of what this agent emits: ``/agents/<name>@<version>``."""
        return f"/agents/{self.name}@{self.version}"

    def at_version(self, version: str) -> "Agent[Any]":
        """The agent that makes the decisions of ``version``: what an audit re-decides events with that it had handled.

        An older class that ``predecessors`` names for the version, always the same instance; else this agent, which
        so stands for its own version and for all whose decisions it still makes. One class may stand for several
        versions. It has this agent's name and lanes, and reads the state that others of them left: fields that a
        later state model gained have defaults there.

        >>> class Polite(Echo):
        ...     version = "2"
        ...     predecessors: ClassVar = {"1": Echo}
        >>> type(Polite().at_version("1")), type(Polite().at_version("2"))
        (<class 'Echo'>, <class 'Polite'>)

        Raises:
            PredecessorError: the older class is another agent's: it has another name.
        """
        older = self.predecessors.get(version)
        if older is None:
            return self
        if (agent := self._older.get(older)) is None:
            if older.name != self.name:
                raise PredecessorError(
                    f"{type(self).__name__}.predecessors names {older.__name__} for version {version}, which is agent "
                    f"{older.name!r}, not {self.name!r}: list a class of the same agent"
                )
            agent = self._older[older] = older.preceding(self)
        return agent

    @classmethod
    def preceding(cls, successor: "Agent[Any]") -> Self:
        """An instance of this older class, for ``successor`` to re-decide with. Override it where ``__init__`` takes
        arguments: what they were comes from ``successor``.
        """
        return cls()

    @cached_property
    def _older(self) -> "dict[type[Agent[Any]], Agent[Any]]":
        return {}
