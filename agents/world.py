"""What a handler's turns and its journal know of each other: calls, and the world that answers them.

In: a call that a handler made. Out: what comes of it, now or as recorded. :class:`~agents.turns.Turns` decides when the
handler is told; :class:`~agents.journal.Journal` is the world, which performs and records.
"""

import asyncio
from typing import Any, Protocol

from agents.handler_loop import Delay

__all__ = ["Call", "World"]


class Call:
    """What a handler asked of the world. ``sequence`` is the recorded answer's place in the order of completion."""

    __slots__ = ("future", "sequence", "task")

    def __init__(self) -> None:
        self.future: asyncio.Future[Any]
        self.sequence: int | None = None
        self.task: asyncio.Task[None] | None = None


class World(Protocol):
    """What turns need of the journal."""

    replaying: bool

    @property
    def seed(self) -> int:
        """A number that goes with the event, to tell its tasks from others'."""

    async def perform(self, call: Any) -> None:
        """Make the call; what comes of it, failures too, is kept in ``call``.

        Raises:
            BaseException: the run is to end with this.
        """

    def settle(self, call: Any) -> Any:
        """The answer that the handler is given: the recorded one, or what came of the call, recorded now."""

    def abandon(self, call: Any) -> None:
        """Record that the handler cancelled the call before there was an answer."""

    def delay_set(self, delay: Delay) -> None:
        """Give ``delay`` its identity, and its sequence if it is recorded to have passed."""

    def delay_passed(self, delay: Delay) -> None:
        """Record that the delay passed while calls were under way: their order decides."""

    def ended(self) -> None:
        """The handler ran to its end, by its own will."""
