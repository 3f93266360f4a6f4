"""Dispatch: events of one lane one after another, lanes side by side, up to a limit.

In: items, each with its lane. Out: a call of the runner for each, in lane order. Runs are done by worker tasks that
take the next ready lane when they are through with one, so that handlers which never wait cost no task each, and each
handler still runs within one task from begin to end (asyncio.timeout and cancellation need that).
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Final, Generic, TypeVar

__all__ = ["Dispatcher", "Lane", "Worker"]

ItemT = TypeVar("ItemT")

_BURST: Final = 64
"""After so many runs that never waited, a worker lets the event loop do its other work."""


class Lane(Generic[ItemT]):
    """A lane's waiting items, first the oldest. It is ``active`` while one runs or the lane waits for a worker."""

    __slots__ = ("active", "items", "key")

    def __init__(self, key: str) -> None:
        self.key = key
        self.items: deque[ItemT] = deque()
        self.active = False


class Worker(Generic[ItemT]):
    """A task that runs items; ``item`` is what it runs now and ``since`` when that began (event loop time)."""

    __slots__ = ("item", "since", "task")

    def __init__(self) -> None:
        self.item: ItemT | None = None
        self.since = 0.0
        self.task: asyncio.Task[None] | None = None


class Dispatcher(Generic[ItemT]):
    """Runs items through ``run``, at most ``concurrency`` at once.

    ``idle(lane)`` is called when a lane has nothing left; ``failed(error)`` when ``run`` raised, which it should not.
    """

    def __init__(
        self,
        run: Callable[[ItemT], Awaitable[None]],
        *,
        concurrency: int,
        idle: Callable[[Lane[ItemT], ItemT], None],
        failed: Callable[[BaseException], None],
    ) -> None:
        self._run = run
        self._concurrency = concurrency
        self._idle = idle
        self._failed = failed
        self._loop = asyncio.get_running_loop()
        self._ready: deque[Lane[ItemT]] = deque()
        self._pumping = False
        self.workers: set[Worker[ItemT]] = set()

    def submit(self, lane: Lane[ItemT], item: ItemT) -> None:
        """Run ``item`` after all that is in its lane."""
        lane.items.append(item)
        if not lane.active:
            lane.active = True
            self._ready.append(lane)
            if not self._pumping:
                self._pumping = True
                self._loop.call_soon(self._pump)

    def _pump(self) -> None:
        """See to it that somebody takes the next ready lane; a worker that waits in its handler can't."""
        self._pumping = False
        if self._ready and len(self.workers) < self._concurrency:
            worker: Worker[ItemT] = Worker()
            self.workers.add(worker)
            worker.task = self._loop.create_task(self._work(worker))

    async def _work(self, worker: Worker[ItemT]) -> None:
        ready, run, clock = self._ready, self._run, self._loop.time
        runs = 0
        try:
            while ready:
                lane = ready.popleft()
                if not lane.items:  # its partition was taken away
                    lane.active = False
                    continue
                item = lane.items.popleft()
                if ready and not self._pumping:
                    self._pumping = True
                    self._loop.call_soon(self._pump)
                worker.item, worker.since = item, clock()
                await run(item)
                worker.item = None
                if lane.items:
                    ready.append(lane)
                else:
                    lane.active = False
                    self._idle(lane, item)
                runs += 1
                if runs % _BURST == 0:
                    await asyncio.sleep(0)
        except asyncio.CancelledError:
            # The item's partition was taken away, and the lane with it.
            pass
        except Exception as error:  # noqa: BLE001 - handed on: the processor ends with it
            self._failed(error)
        finally:
            self.workers.discard(worker)
            if ready and not self._pumping:
                self._pumping = True
                self._loop.call_soon(self._pump)

    async def cancel(self, chosen: Callable[[ItemT], bool], timeout_s: float) -> None:
        """Cancel the runs whose item is ``chosen`` and wait, at most ``timeout_s`` seconds, until they have ended."""
        tasks = []
        for worker in self.workers:
            if worker.item is not None and worker.task is not None and chosen(worker.item):
                worker.task.cancel()
                tasks.append(worker.task)
        if tasks:
            await asyncio.wait(tasks, timeout=timeout_s)
