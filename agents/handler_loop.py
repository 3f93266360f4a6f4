"""The event loop that handlers see: tasks, futures and delays, and nothing of the outside world.

In: what asyncio asks of a running loop while a handler's code runs. Out: callbacks in the queue of that handler's
:class:`~agents.turns.Turns`, which alone decides when they run. Its clock stands still but for delays that pass, so
that it reads the same in replay. There is one such loop a thread; it belongs to whichever handler is running.
"""

import asyncio
import sys
import threading
from asyncio import Handle, TimerHandle
from collections.abc import Callable, Coroutine, Generator
from contextvars import Context as Variables
from contextvars import ContextVar, copy_context
from logging import getLogger
from types import CodeType
from typing import Any, Final, NoReturn, Protocol

from agents.errors import NondeterminismError

__all__ = ["TURNS", "Delay", "HandlerLoop", "Owner", "of_thread"]

_AS_COMPLETED: Final = {
    code
    for code in asyncio.as_completed.__code__.co_consts
    if isinstance(code, CodeType) and code.co_name == "<setcomp>"
}
_FROM_AS_COMPLETED: Final = 3
"""Its set comprehension calls ensure_future, _ensure_future and then create_task."""

log = getLogger(__name__)


class Delay(TimerHandle):
    """A delay that a handler set: ``seconds`` as asked, ``due`` by the clock of the processor's own loop.

    ``sequence`` is its recorded place in the order of completion, None when it is not recorded to have passed.
    """

    __slots__ = ("due", "identity", "seconds", "sequence")
    due: float
    identity: tuple[str, int]
    seconds: float
    sequence: int | None


class HandlerTask(asyncio.Task[Any]):
    """A task whose hash is the same in replay: sets of tasks, as ``asyncio.wait`` gives them, keep their order."""

    def __init__(self, coro: Any, number: int, loop: "HandlerLoop", name: str | None, context: Variables) -> None:
        self._number = number
        super().__init__(coro, loop=loop, name=name, context=context)  # type: ignore[arg-type]

    def __hash__(self) -> int:
        return self._number

    def __eq__(self, other: object) -> bool:
        return self is other


class Owner(Protocol):
    """One handler's run, as far as its loop needs it."""

    ready: list[Handle]
    tasks: list[asyncio.Task[Any]]
    time: float

    def number_task(self) -> int:
        """A number for the next task: the same in replay, and most likely no other handler's."""

    def set_delay(self, delay: Delay) -> None:
        """Let ``delay`` run when it has passed."""

    def wake(self) -> None:
        """Something stands in ``ready`` that came from outside the handler."""


TURNS: Final[ContextVar[Owner]] = ContextVar("turns")
"""Whose a callback is that is called while no handler runs."""


class HandlerLoop:
    """See the module. It has what asyncio needs of a loop for tasks, futures and delays, and says so of all else."""

    def __init__(self) -> None:
        self.owner: Owner | None = None
        self.real: asyncio.AbstractEventLoop | None = None
        """The loop whose place it has, while it is the running one for several handlers."""
        self.spare: list[Any] = []
        """What :func:`agents.turns.begin` made and may use again."""

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"a handler's event loop has no {name!r}: a handler reaches outside only through ctx")

    def call_soon(self, callback: Callable[..., Any], *args: Any, context: Variables | None = None) -> Handle:
        """Queue the callback for the handler that runs, or that it belongs to."""
        handle = Handle(callback, args, self, context)  # type: ignore[arg-type]
        owner = self.owner
        if owner is not None:
            owner.ready.append(handle)
        elif (owner := (context or copy_context()).get(TURNS)) is not None:
            # Woken from outside the handler. Replay can't know of it; live it must not be lost.
            owner.ready.append(handle)
            owner.wake()
        return handle

    def call_later(
        self, delay: float, callback: Callable[..., Any], *args: Any, context: Variables | None = None
    ) -> TimerHandle:
        """Queue the callback when ``delay`` seconds have passed."""
        return self._delay(delay, self.time() + delay, callback, args, context)

    def call_at(
        self, when: float, callback: Callable[..., Any], *args: Any, context: Variables | None = None
    ) -> TimerHandle:
        """Queue the callback at ``when`` of :meth:`time`."""
        return self._delay(when - self.time(), when, callback, args, context)

    def _delay(
        self, seconds: float, when: float, callback: Callable[..., Any], args: Any, context: Variables | None
    ) -> Delay:
        delay = Delay(when, callback, args, self, context)  # type: ignore[arg-type]
        delay.seconds = round(max(seconds, 0.0), 6)
        self._own().set_delay(delay)
        return delay

    def time(self) -> float:
        """Seconds of delays that have passed in this run of the handler."""
        return self._own().time

    def create_future(self) -> asyncio.Future[Any]:
        """A future of this handler."""
        return asyncio.Future(loop=self)  # type: ignore[arg-type]

    def create_task(
        self,
        coro: Generator[Any, None, Any] | Coroutine[Any, Any, Any],
        *,
        name: str | None = None,
        context: Variables | None = None,
    ) -> asyncio.Task[Any]:
        """A task of this handler; it is cancelled when the handler is done.

        Raises:
            NondeterminismError: ``asyncio.as_completed`` wants to start a coroutine.
        """
        owner = self._own()
        if sys._getframe(_FROM_AS_COMPLETED).f_code in _AS_COMPLETED:
            raise NondeterminismError(
                "asyncio.as_completed starts coroutines in an order that differs from run to run; give it tasks"
            )
        context = copy_context() if context is None else context
        context.run(TURNS.set, owner)
        task = HandlerTask(coro, owner.number_task(), self, name, context)
        owner.tasks.append(task)
        return task

    def _own(self) -> Owner:
        if self.owner is None:
            raise RuntimeError("a handler's event loop was used from outside the handler, or after its end")
        return self.owner

    def get_debug(self) -> bool:
        """Never in debug mode."""
        return False

    def is_running(self) -> bool:
        """Whether a handler's code runs."""
        return self.owner is not None

    def is_closed(self) -> bool:
        """Never."""
        return False

    def _timer_handle_cancelled(self, handle: TimerHandle) -> None:
        """Nothing: cancelled delays are passed over when the next one is looked for."""

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """Log what nobody caught."""
        log.error("%s", context.get("message", "unhandled error in a handler"), exc_info=context.get("exception"))

    def run_in_executor(self, *_: Any) -> NoReturn:
        """Refuse.

        Raises:
            NondeterminismError: always.
        """
        raise NondeterminismError("a handler reaches outside, threads included, only through ctx, which records it")


class _OfThread(threading.local):
    def __init__(self) -> None:
        self.loop = HandlerLoop()


of_thread: Final = _OfThread()
"""``of_thread.loop`` is this thread's handler loop."""
