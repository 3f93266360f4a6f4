"""Runs one handler so that its concurrency is deterministic: tasks, races, timeouts and cancellations replay alike.

In: a handler's coroutine, and the journal as its world. Out: when the handler is done, whatever it raised. Nothing
happens to a handler until all of it waits. Then it is one thing's turn: the next answer in the recorded order or, live,
whichever call or delay ends next, which is recorded in that place. Between two turns only the handler's own code runs,
first in first out, on a :class:`~agents.handler_loop.HandlerLoop`. So the recorded order of completion is all that
replay needs. Calls themselves run on the processor's loop; a handler that never waits costs no task and no queue.
"""

import asyncio
from asyncio import CancelledError, Handle, _set_running_loop, get_running_loop
from asyncio.tasks import _enter_task, _leave_task
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager, suppress
from contextvars import copy_context
from time import monotonic
from typing import Any, Final

from agents.errors import HandlerCancelledError, NondeterminismError
from agents.handler_loop import TURNS, Delay, HandlerLoop, of_thread
from agents.world import Call, World

__all__ = ["Turns", "begin", "handlers_only"]

_AT_ONCE: Final = 1000
"""Callbacks of one handler before others get their turn: one that only yields to itself must not hold the process."""
_CLOSING_ROUNDS: Final = 8
"""How often a handler that is being stopped may catch its cancellation and go on."""

_ending: set[asyncio.Task[None]] = set()
"""Calls that nobody waits for any more, until they have ended: an event loop itself keeps no hold of its tasks."""


@contextmanager
def handlers_only() -> Iterator[None]:
    """Within it handlers may be begun, many of them, and nothing else may ask for the running loop.

    :func:`begin` then need not change loops for each: asyncio makes three calls of the system for that, 0.5 µs.
    """
    loop = of_thread.loop
    _enter(loop)
    try:
        yield
    finally:
        _leave(loop)


def _enter(loop: HandlerLoop) -> None:
    loop.real = get_running_loop()
    _set_running_loop(loop)  # type: ignore[arg-type]


def _leave(loop: HandlerLoop) -> None:
    _set_running_loop(loop.real)
    loop.real = None


def begin(world: World, handler: Coroutine[Any, Any, None]) -> "Turns | None":
    """Run ``handler`` to where it first waits. None when it does not, else what is still to be finished.

    >>> if (turns := begin(journal, agent.handle(event, ctx))) is not None:
    ...     await turns.finish()

    Raises:
        Exception: whatever the handler raised at once.
    """
    loop = of_thread.loop
    spare = loop.spare
    turns: Turns = spare.pop() if spare else Turns(loop)
    turns._world, turns._handler = world, handler
    if loop.real is not None:
        return _begin(loop, turns)
    _enter(loop)
    try:
        return _begin(loop, turns)
    finally:
        _leave(loop)


def _begin(loop: HandlerLoop, turns: "Turns") -> "Turns | None":
    assert loop.real is not None
    turns._real = loop.real
    loop.owner = turns
    _enter_task(loop, turns)  # type: ignore[arg-type]
    try:
        waits_for = turns._handler.send(None)
    except StopIteration:
        if turns.tasks or turns.ready or turns._delays or turns._cancelling or turns._must_cancel:
            turns._done = True
        else:
            # As good as new, and most events are handled so: to make a new one takes longer than all of the above.
            loop.spare.append(turns)
            return None
    except BaseException as error:
        if not turns.tasks and not isinstance(error, CancelledError):
            raise
        turns._done, turns._error = True, error
    else:
        turns._wait(waits_for)
    finally:
        _leave_task(loop, turns)  # type: ignore[arg-type]
        loop.owner = None
    return turns


class Turns:
    """One run of a handler: its own coroutine, stepped as asyncio steps a task, and all that it waits for."""

    __slots__ = (
        "_calls",
        "_cancelling",
        "_closing",
        "_delays",
        "_done",
        "_error",
        "_fault",
        "_finished",
        "_handler",
        "_loop",
        "_must_cancel",
        "_numbered",
        "_real",
        "_waits_for",
        "_waker",
        "_world",
        "ready",
        "tasks",
        "time",
    )

    _world: World
    _handler: Coroutine[Any, Any, None]
    _real: asyncio.AbstractEventLoop

    def __init__(self, loop: HandlerLoop) -> None:
        self._loop = loop
        self._closing = self._must_cancel = self._done = False
        self._cancelling = self._numbered = 0
        self._error: BaseException | None = None
        self._fault: Exception | None = None
        self._waits_for: asyncio.Future[Any] | None = None
        self._waker: asyncio.Future[None] | None = None
        self._calls: list[Call] = []
        self._delays: list[Delay] = []
        self._finished: list[Call] = []  # lists, as a deque of one entry takes 600 bytes
        self.ready: list[Handle] = []
        self.tasks: list[asyncio.Task[Any]] = []
        self.time = 0.0

    @property
    def is_alone(self) -> bool:
        """Whether nothing but the handler's own coroutine is under way: the answer to what it asks comes next."""
        return not (self._calls or self.tasks or self.ready or self._delays or self._must_cancel or self._closing)

    # What the handler's code does, in its own turn.

    def ask(self, call: Call) -> "asyncio.Future[Any]":
        """The future of the call's answer, for the handler to await."""
        call.future = asyncio.Future(loop=self._loop)  # type: ignore[arg-type]
        if not self._closing:  # one that asks while it is being ended is cancelled there
            self._calls.append(call)
        return call.future

    def give_up(self, fault: Exception) -> "asyncio.Future[Any]":
        """End the run with ``fault``, past all that the handler would catch; it awaits what never comes."""
        self._fault = self._fault or fault
        return asyncio.Future(loop=self._loop)  # type: ignore[arg-type]

    def number_task(self) -> int:
        """A number for the next task: the same in replay, and most likely no other handler's."""
        self._numbered += 1
        return self._world.seed + self._numbered

    def set_delay(self, delay: Delay) -> None:
        """Let ``delay`` run when it has passed."""
        delay.due = monotonic() + delay.seconds
        self._world.delay_set(delay)
        self._delays.append(delay)

    def cancel(self, msg: Any = None) -> bool:
        """As ``asyncio.Task.cancel``, for the handler's own coroutine."""
        if self._done:
            return False
        self._cancelling += 1
        if self._waits_for is None or not self._waits_for.cancel(msg):
            self._must_cancel = True
        return True

    def cancelling(self) -> int:
        """As ``asyncio.Task.cancelling``."""
        return self._cancelling

    def uncancel(self) -> int:
        """As ``asyncio.Task.uncancel``."""
        self._cancelling = max(self._cancelling - 1, 0)
        return self._cancelling

    def done(self) -> bool:
        """Whether the handler's own coroutine has ended."""
        return self._done

    def _step(self, error: BaseException | None = None) -> None:
        if self._must_cancel:
            self._must_cancel = False
            error = CancelledError()
        self._waits_for = None
        _enter_task(self._loop, self)  # type: ignore[arg-type]
        try:
            waits_for = self._handler.send(None) if error is None else self._handler.throw(error)
        except StopIteration:
            self._done = True
        except BaseException as raised:  # noqa: BLE001 - kept until the run is over
            self._done, self._error = True, raised
        else:
            self._wait(waits_for)
        finally:
            _leave_task(self._loop, self)  # type: ignore[arg-type]

    def _wait(self, future: Any) -> None:
        if future is None:  # a bare yield: asyncio.sleep(0)
            self._loop.call_soon(self._step)
        elif getattr(future, "_asyncio_future_blocking", None):
            future._asyncio_future_blocking = False
            context = copy_context()
            context.run(TURNS.set, self)
            future.add_done_callback(self._woken, context=context)
            self._waits_for = future
            if self._must_cancel and future.cancel():
                self._must_cancel = False
        else:
            fault = RuntimeError(f"a handler awaited {future!r}, which asyncio can't wait for")
            self._loop.call_soon(self._step, fault)

    def _woken(self, future: "asyncio.Future[Any]") -> None:
        if self._done:
            return
        if self._loop.owner is not self:  # a future of another loop
            self.ready.append(Handle(self._woken, (future,), self._loop))  # type: ignore[arg-type]
            self.wake()
            return
        try:
            future.result()
        except BaseException as error:  # noqa: BLE001 - it is the handler's to catch
            self._step(error)
        else:
            self._step()

    # What happens between.

    def _raise_error(self) -> None:
        if isinstance(self._error, CancelledError):
            raise HandlerCancelledError(
                "the handler ended by a cancellation of its own; catch it where the cancelled task is awaited"
            ) from self._error
        if self._error is not None:
            raise self._error

    def wake(self) -> None:
        """End the wait for something to happen."""
        if self._waker is not None and not self._waker.done():
            self._waker.set_result(None)

    async def finish(self) -> None:
        """Take turns until the handler is done.

        Raises:
            NondeterminismError: in replay, it waits for what was not recorded.
            HandlerCancelledError: it ended by a cancellation that came from itself.
            asyncio.CancelledError: this coroutine was cancelled; the handler has ended, its calls are cancelled.
            Exception: whatever else the handler raised.
        """
        try:
            await self._take_turns()
        except BaseException:
            self._abort()
            raise
        self._world.ended()
        self._raise_error()

    async def _take_turns(self) -> None:
        while True:
            while self._drain():  # noqa: ASYNC110 - it is other handlers' turn; nobody tells when it is over
                await asyncio.sleep(0)
            if self._fault is not None:
                raise self._fault
            self._drop_cancelled()
            if self._done:
                break
            if not self._take_recorded():
                await self._happen()
        if self.tasks:
            self._close()
            self._drop_cancelled()
            for call in tuple(self._calls):
                self._abandon(call)

    def _drain(self) -> bool:
        """Run the handler's code until all of it waits, or for long enough; True when there is more to run."""
        if not self.ready:
            return False
        loop, done = self._loop, 0
        _set_running_loop(loop)  # type: ignore[arg-type]
        loop.owner = self
        try:
            while self.ready and self._fault is None and done < _AT_ONCE:
                round_, self.ready = self.ready, []
                for handle in round_:
                    if not handle.cancelled():
                        handle._run()
                done += len(round_)
        finally:
            loop.owner = None
            _set_running_loop(self._real)
        return bool(self.ready) and self._fault is None

    def _drop_cancelled(self) -> None:
        for call in tuple(self._calls):
            if call.future.done():
                self._abandon(call)

    def _abandon(self, call: Call) -> None:
        self._calls.remove(call)
        if call in self._finished:  # its result came, if too late for this run: it was paid for, so it is recorded
            self._finished.remove(call)
            if call.task is not None and not call.task.cancelled() and call.task.exception() is None:
                self._world.settle(call)
            else:
                self._world.abandon(call)
        elif call.sequence is None:
            self._world.abandon(call)
        self._end(call)

    def _take_recorded(self) -> bool:
        """Give the handler the next of the recorded answers that it waits for; in replay nothing else happens.

        Raises:
            NondeterminismError: in replay, there is none.
        """
        self._delays = [delay for delay in self._delays if not delay.cancelled()]
        item: Call | Delay
        if self._calls:
            waiting: tuple[Call | Delay, ...] = (*self._calls, *self._delays)
            recorded = [item for item in waiting if item.sequence is not None]
            if not recorded and not self._world.replaying:
                return False
            if not recorded:
                raise NondeterminismError("in replay the handler waits for calls that are not recorded to have ended")
            item = min(recorded, key=_sequence_of)
        elif not self._world.replaying:
            return False
        elif not self._delays:
            raise NondeterminismError("in replay the handler waits for something that is no effect, and was not woken")
        else:
            item = self._next_delay()
        if isinstance(item, Delay):
            self._pass(item)
        else:
            self._answer(item)
        return True

    async def _happen(self) -> None:
        """Wait until something happens to the handler, and let it."""
        calls = self._calls
        if len(calls) == 1 and not self._delays and calls[0].task is None:
            # The usual case: nothing else can happen, and no task is needed to wait for it.
            call = calls[0]
            await self._world.perform(call)
            self._answer(call)
            return
        for call in calls:
            if call.task is None:
                self._begin(call)
        delay = self._next_delay() if self._delays else None
        if not self._finished and not self.ready and (delay is None or delay.due > monotonic()):
            await self._wait_for_news(delay)
        if self.ready:
            return
        if self._finished:
            call = self._finished.pop(0)
            assert call.task is not None
            call.task.result()  # raises what is no failure of the call, but the end of this run
            self._answer(call)
        elif delay is not None and delay.due <= monotonic():
            if calls:
                self._world.delay_passed(delay)
            self._pass(delay)

    def _next_delay(self) -> Delay:
        """The delay that passes next: while calls are under way by real time, since then its place is recorded; else
        by the handler's own clock, which tells the same in replay.
        """
        return min(self._delays, key=_due_of if self._calls and not self._world.replaying else Delay.when)

    async def _wait_for_news(self, delay: Delay | None) -> None:
        loop = self._real
        self._waker = loop.create_future()
        alarm = None if delay is None else loop.call_later(delay.due - monotonic(), self.wake)
        try:
            await self._waker
        finally:
            self._waker = None
            if alarm is not None:
                alarm.cancel()

    def _begin(self, call: Call) -> None:
        def ended(task: "asyncio.Task[None]") -> None:
            if call in self._calls:
                self._finished.append(call)
                self.wake()

        call.task = self._real.create_task(self._world.perform(call))
        call.task.add_done_callback(ended)

    def _answer(self, call: Call) -> None:
        self._calls.remove(call)
        self._loop.owner = self
        try:
            call.future.set_result(self._world.settle(call))
        finally:
            self._loop.owner = None

    def _pass(self, delay: Delay) -> None:
        self._delays.remove(delay)
        self.time = max(self.time, delay.when())
        self.ready.append(delay)

    @staticmethod
    def _end(call: Call) -> None:
        task = call.task
        if task is not None and not task.done():
            _ending.add(task)
            task.add_done_callback(_ending.discard)
            task.cancel()

    # How it ends.

    def _abort(self) -> None:
        """End everything at once; nothing of the handler counts, and nothing is recorded."""
        for call in self._calls:
            self._end(call)
        for call in self._finished:
            if call.task is not None and not call.task.cancelled():
                call.task.exception()  # told in the log by nobody, as the run ends for one of them already
        self._close()
        self._calls.clear()

    def _close(self) -> None:
        """Cancel the handler's tasks, and itself when it is not done, and let them clean up after themselves."""
        self._closing, self._fault = True, None
        for _ in range(_CLOSING_ROUNDS):
            self._loop.owner = self
            try:
                for task in self.tasks:
                    task.cancel()
                self.cancel()
            finally:
                self._loop.owner = None
            self._drain()
            self.tasks = [task for task in self.tasks if not task.done()]
            if self._done and not self.tasks:
                break
        for task in self.tasks:
            task._log_destroy_pending = False  # type: ignore[attr-defined]
        if not self._done:
            self._done = True
            with suppress(RuntimeError):
                self._handler.close()


def _sequence_of(item: Call | Delay) -> int:
    assert item.sequence is not None
    return item.sequence


def _due_of(delay: Delay) -> float:
    return delay.due
