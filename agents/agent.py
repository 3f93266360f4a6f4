"""The handler contract: what an agent is.

In: one event of a type the agent consumes, and a :class:`~agents.context.Context`. Out: what the handler emits and
the state it leaves, through the context. A handler decides by nothing else: no clock, no randomness, no I/O of its
own, no attribute of ``self`` that changes. The same event, state and recorded effects then always give the same
outputs, which is what makes retries safe and replay a proof. A handler may run its effects side by side, race them and
bound them in time by asyncio's own means (``gather``, ``TaskGroup``, ``wait``, ``timeout``): see :mod:`agents.turns`.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Generic, TypeVar

from pydantic import BaseModel

from agents.context import Context
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

    def lane(self, event: Event) -> str:
        """The lane of ``event``: events of one lane are handled one after another. By default its record key."""
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
