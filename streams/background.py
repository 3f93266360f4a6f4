"""A thread for calls that block, one after another, and may never return.

In: functions, from the event loop. Out: awaitables of their results. The client's transactional calls are to end within
their timeouts, but one of them has been seen to wait for ever for a coordinator that is gone (librdkafka's issues 5456
and 5511). A process must be able to end all the same; it waits for an executor's threads, but not for this one.
"""

import asyncio
import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

__all__ = ["Background"]

ResultT = TypeVar("ResultT")


class Background:
    """Runs calls on a daemon thread called ``name``; to be made and used on an event loop's thread."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.get_running_loop()
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        threading.Thread(target=self._main, name=name, daemon=True).start()

    def run(self, call: Callable[[], ResultT]) -> "asyncio.Future[ResultT]":
        """The result of ``call``, which runs after all that was given before. Cancelling does not stop the call."""
        result: asyncio.Future[ResultT] = self._loop.create_future()

        def run() -> None:
            try:
                given = call()
            except BaseException as error:  # noqa: BLE001 - handed over to who awaits it
                self._tell(result, None, error)
            else:
                self._tell(result, given, None)

        self._calls.put(run)
        return result

    def close(self) -> None:
        """End the thread when it is through with its calls."""
        self._calls.put(None)

    def _main(self) -> None:
        while (call := self._calls.get()) is not None:
            call()

    def _tell(self, result: "asyncio.Future[ResultT]", given: ResultT | None, error: BaseException | None) -> None:
        def tell() -> None:
            if result.done():
                return
            if error is None:
                result.set_result(given)  # type: ignore[arg-type]
            else:
                result.set_exception(error)

        with suppress(RuntimeError):  # the loop is closed; nobody awaits anything any more
            self._loop.call_soon_threadsafe(tell)
