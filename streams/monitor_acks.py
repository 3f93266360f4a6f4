"""When the Monitor's records count as done: in the order of their partition, once what they changed is in the log.

In: a stream's events, and for each what says that it is done. Out: acknowledgements, which let Faust commit offsets. By
itself it commits them while changes still wait to be sent.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any, Final, Protocol

__all__ = ["Acks"]

_Waiting = deque[tuple["_Event", "asyncio.Future[Any] | None"]]


class _Event(Protocol):
    """Faust's event: what is needed of it."""

    def ack(self) -> bool: ...


class Acks:
    """Acknowledges events; ``on_failed`` is called on the event loop when what one changed can't be written."""

    def __init__(self, on_failed: Callable[[BaseException], None]) -> None:
        self._on_failed: Final = on_failed
        self._waiting: dict[int, _Waiting] = {}

    def add(self, partition: int, event: _Event, done: Awaitable[Any] | None) -> None:
        """Acknowledge ``event`` after those before it in ``partition`` and when ``done`` is; None is now."""
        waiting = self._waiting.setdefault(partition, deque())
        waiting.append((event, None if done is None else asyncio.ensure_future(done)))
        if len(waiting) == 1:
            self._acknowledge(partition, waiting)

    def forget(self) -> None:
        """Acknowledge nothing of what was added: it comes again."""
        self._waiting = {}

    def _acknowledge(self, partition: int, waiting: _Waiting) -> None:
        while waiting and self._waiting.get(partition) is waiting:
            event, done = waiting[0]
            if done is not None:
                if not done.done():
                    done.add_done_callback(lambda _: self._acknowledge(partition, waiting))
                    return
                if done.cancelled():
                    return
                if (failure := done.exception()) is not None:
                    self._on_failed(failure)
                    return
            waiting.popleft()
            event.ack()
