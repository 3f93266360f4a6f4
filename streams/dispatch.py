"""Dispatch: events of one lane one after another, lanes side by side, up to a limit, the urgent ones first.

In: items, each with its lane. Out: a call of the runner for each, in lane order. Runs are done by worker tasks that
take the next ready lane when they are through with one, so that handlers which never wait cost no task and no coroutine
each. Where nothing is ready and there is a place, whoever has an item may run it at once, without a lane, and hand it
over if it has to wait (:meth:`Dispatcher.at_once`): most items need nothing of all this.

Which lane is next: where several ranks have ready lanes, high gets 16 picks to 4 of normal's and 1 of low's. Whatever
the others do, a normal lane that is first among its rank's ready ones is taken within 10 picks and a low one within 85
(25 under a steady flood of both others). Slow handlers could still take every worker, so a part of them is kept for
higher ranks (:func:`shares`).
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Collection
from typing import Final, Generic, TypeVar

from schemas.events import Priority
from schemas.topics import priority_of

__all__ = ["HIGH", "LOW", "NORMAL", "RANKS", "Dispatcher", "Lane", "Turns", "Worker", "rank_of", "shares"]

ItemT = TypeVar("ItemT")

HIGH: Final = 0
NORMAL: Final = 1
LOW: Final = 2
RANKS: Final = (HIGH, NORMAL, LOW)
_RANK_OF: Final = {Priority.HIGH: HIGH, Priority.NORMAL: NORMAL, Priority.LOW: LOW}

_BURST: Final = 64
"""After so many runs that never waited, a worker lets the event loop do its other work."""
_HIGH_PICKS: Final = 16
_NORMAL_PICKS: Final = 4
_IDLE, _READY, _HOLDING, _HELD = range(4)
"""A lane's states. Ready: it runs or waits for a worker; holding: it is held, which who runs it or takes it next sees.
One number, and not two flags, because a lane often lives for one event only."""
_SHARED_FROM: Final = 8
"""Of fewer places none is kept back: an eighth of them would be nothing."""


def rank_of(topic: str) -> int:
    """The rank of what stands in a topic, by the priority that its name tells.

    >>> rank_of("tasks.high"), rank_of("documents"), rank_of("work.research.low")
    (0, 1, 2)
    """
    return _RANK_OF[priority_of(topic)]


def shares(total: int, ranks: Collection[int] = RANKS) -> tuple[int, int, int]:
    """How many of ``total`` places may be taken by all ranks, by normal and low together, and by low.

    A quarter is kept from low and an eighth from normal for what is more urgent, as far as that is among ``ranks``.

    >>> shares(256), shares(256, {NORMAL}), shares(4)
    ((256, 224, 192), (256, 256, 256), (4, 4, 4))
    """
    if total < _SHARED_FROM:
        return total, total, total
    return (
        total,
        total * 7 // 8 if HIGH in ranks else total,
        total * 3 // 4 if HIGH in ranks or NORMAL in ranks else total,
    )


class Turns:
    """Whose turn it is where several ranks wait: 16 : 4 : 1, and nobody for ever behind the others."""

    __slots__ = ("_below_high", "_low")

    def __init__(self) -> None:
        # How far the lower ranks have come to their turn: at _HIGH_PICKS normal and low may go before high, at
        # _NORMAL_PICKS low before normal.
        self._below_high = self._low = 0

    def next(self, high: bool, normal: bool, low: bool) -> int:
        """The rank to go now, of those that wait and may; -1 when none does."""
        if high and (self._below_high < _HIGH_PICKS or not (normal or low)):
            self._below_high += _NORMAL_PICKS * normal + low
            return HIGH
        if not (normal or low):
            return -1
        if high:
            self._below_high -= _HIGH_PICKS
        if not normal:
            return LOW
        if low and self._low >= _NORMAL_PICKS:
            self._low -= _NORMAL_PICKS
            return LOW
        self._low += low
        return NORMAL


class Lane(Generic[ItemT]):
    """A lane's waiting items, first the oldest.

    It is ``active`` while one runs or the lane waits for a worker; while it is ``held`` its items wait for
    :meth:`Dispatcher.release`.
    """

    __slots__ = ("_state", "items", "key", "rank")

    def __init__(self, key: str, rank: int = NORMAL) -> None:
        self.key = key
        self.rank = rank
        self.items: list[ItemT] = []  # mostly of one: a deque takes 600 bytes, and longer to make than to be used
        self._state = _IDLE

    @property
    def active(self) -> bool:
        """Whether an item of it runs, or it stands among the ready ones."""
        return self._state in (_READY, _HOLDING)

    @property
    def held(self) -> bool:
        """Whether it waits for its release."""
        return self._state >= _HOLDING


class Worker(Generic[ItemT]):
    """A task that runs items; ``item`` is what it runs now and ``since`` when it began to wait (event loop time).

    ``rank`` is that of its latest item, and its place counts among that rank's until it takes another's.
    """

    __slots__ = ("_begun", "_unwanted", "item", "rank", "since", "task")

    def __init__(self) -> None:
        self.item: ItemT | None = None
        self.rank = -1
        self.since = 0.0
        self.task: asyncio.Task[None] | None = None
        self._begun = self._unwanted = False

    def cancel(self) -> None:
        """Cancel what it runs."""
        # A task that is cancelled before its first step never takes one, and nobody would hear of its item's end.
        if self._begun and self.task is not None:
            self.task.cancel()
        self._unwanted = True

    def begin(self) -> bool:
        """For its task to call first; False: it was cancelled before, which it meets when it waits next."""
        self._begun = True
        if self._unwanted and self.task is not None:
            self.task.cancel()
        return not self._unwanted


class Dispatcher(Generic[ItemT]):
    """Runs items through ``run``, at most ``concurrency`` at once, of which :func:`shares` keeps some for the ``ranks``
    that are more urgent than others. ``run`` returns None when it is through with an item, else what is to be awaited.

    ``idle(lane, item)`` is called when a lane has nothing left after ``item``; ``failed(error)`` when ``run`` raised,
    which it should not. All of it is for the event loop's thread.
    """

    def __init__(
        self,
        run: Callable[[ItemT], Awaitable[None] | None],
        *,
        concurrency: int,
        idle: Callable[[Lane[ItemT], ItemT], None],
        failed: Callable[[BaseException], None],
        ranks: Collection[int] = RANKS,
    ) -> None:
        self._run = run
        self._idle = idle
        self._failed = failed
        self._concurrency, self._most_below_high, self._most_low = shares(concurrency, ranks)
        self._loop = asyncio.get_running_loop()
        self._ready: tuple[deque[Lane[ItemT]], ...] = (deque(), deque(), deque())
        self._pumping = self._closed = False
        self._taken = [0, 0, 0]
        self._turns = Turns()
        self.workers: set[Worker[ItemT]] = set()

    def submit(self, lane: Lane[ItemT], item: ItemT) -> None:
        """Run ``item`` after all that is in its lane."""
        lane.items.append(item)
        if not lane._state:
            lane._state = _READY
            self._ready[lane.rank].append(lane)
            if not self._pumping:
                self._pumping = True
                self._loop.call_soon(self._pump)

    def at_once(self, rank: int) -> bool:
        """Whether an item of ``rank`` whose lane is empty may be run by who has it: no other is to go before it, and
        there is a worker's place for it if it has to wait, in which case it is to be given to :meth:`go_on`.
        """
        high, normal, low = self._ready
        if high or normal or low or len(self.workers) >= self._concurrency or self._closed:
            return False
        _, normals, lows = self._taken
        return rank == HIGH or (normals + lows < self._most_below_high and (rank != LOW or lows < self._most_low))

    def go_on(self, lane: Lane[ItemT], item: ItemT, rest: Awaitable[None]) -> None:
        """See ``item``, which was begun under :meth:`at_once` and is all of its ``lane``, through to its end."""
        lane._state = _READY
        worker: Worker[ItemT] = Worker()
        worker.item, worker.rank, worker.since = item, lane.rank, self._loop.time()
        self._taken[lane.rank] += 1
        self.workers.add(worker)
        worker.task = self._loop.create_task(self._work(worker, lane, rest))

    def hold(self, lane: Lane[ItemT], item: ItemT) -> None:
        """Put ``item`` at the lane's front and let the lane wait until :meth:`release`, which costs no worker.

        To be called while ``item`` runs, which ends this run of it, or before it ever ran.
        """
        lane.items.insert(0, item)
        lane._state = _HOLDING if lane.active else _HELD

    def release(self, lane: Lane[ItemT]) -> bool:
        """Let a held lane go on. False: nothing runs or waits in it, so ``idle`` won't be called for it."""
        if lane._state == _HOLDING:
            lane._state = _READY
        elif lane._state == _HELD:
            lane._state = _IDLE
            if lane.items:
                lane._state = _READY
                self._ready[lane.rank].append(lane)
                self._pump_soon()
        return lane.active

    async def cancel(self, chosen: Callable[[ItemT], bool], timeout_s: float) -> None:
        """Cancel the runs whose item is ``chosen`` and wait, at most ``timeout_s`` seconds, until they have ended.

        What waits in their lanes is run, unless the caller took it out before.
        """
        tasks = []
        for worker in self.workers:
            if worker.item is not None and worker.task is not None and chosen(worker.item):
                worker.cancel()
                tasks.append(worker.task)
        if tasks:
            await asyncio.wait(tasks, timeout=timeout_s)

    def close(self) -> None:
        """Start nothing any more, and cancel what runs; it has ended a few turns of the loop later."""
        self._closed = True
        for worker in self.workers:
            worker.cancel()

    def _pump_soon(self) -> None:
        if not self._pumping:
            self._pumping = True
            self._loop.call_soon(self._pump)

    def _pump(self) -> None:
        """See to it that somebody takes the next ready lane; a worker that waits in its handler can't."""
        self._pumping = False
        if self._closed:
            return
        if len(self.workers) < self._concurrency and (self._ready[HIGH] or any(self._may_take(-1))):
            worker: Worker[ItemT] = Worker()
            self.workers.add(worker)
            worker.task = self._loop.create_task(self._work(worker))

    def _may_take(self, own: int) -> tuple[bool, bool]:
        """Whether a worker with a place of rank ``own`` (-1: it has none) may take a normal lane, and a low one."""
        _, normal, low = self._ready
        _, normals, lows = self._taken
        if own == NORMAL:
            normals -= 1
        elif own == LOW:
            lows -= 1
        if normals + lows >= self._most_below_high:
            return False, False
        return bool(normal), bool(low) and lows < self._most_low

    def _choose(self, worker: Worker[ItemT]) -> int:
        """The rank that ``worker`` takes a lane of now, -1 when there is none for it."""
        normal, low = self._may_take(worker.rank)
        rank = self._turns.next(bool(self._ready[HIGH]), normal, low)
        if rank < 0:
            return rank
        if rank != worker.rank:
            if worker.rank >= 0:
                self._taken[worker.rank] -= 1
            self._taken[rank] += 1
            worker.rank = rank
        return rank

    async def _work(
        self, worker: Worker[ItemT], lane: Lane[ItemT] | None = None, rest: Awaitable[None] | None = None
    ) -> None:
        """Run what is ready; first of all the ``rest`` of the worker's item in ``lane``, if it has one."""
        run, clock, workers, most = self._run, self._loop.time, self.workers, self._concurrency
        queue = first = second = deque[Lane[ItemT]]()
        left = _BURST
        wanted = worker.begin()
        try:
            if lane is not None and worker.item is not None and rest is not None:
                await rest
                self._ended(lane, worker.item)
                worker.item = None
            if not wanted:
                await asyncio.sleep(0)
            while not self._closed:
                # Mostly one rank alone is ready, and the worker has a place of it: then there is nothing to choose.
                if first or second or not queue:
                    rank = self._choose(worker)
                    if rank < 0:
                        break
                    queue = self._ready[rank]
                    first, second = (other for other in self._ready if other is not queue)
                lane = queue.popleft()
                items = lane.items
                if lane._state != _READY or not items:  # it was told to wait, or its partition was taken away
                    lane._state = _HELD if lane.held else _IDLE
                    continue
                item = items.pop(0)
                if not self._pumping and (queue or first or second) and len(workers) < most:
                    self._pumping = True
                    self._loop.call_soon(self._pump)
                worker.item = item
                rest = run(item)
                if rest is not None:
                    worker.since = clock()
                    await rest
                self._ended(lane, item)
                left -= 1
                if not left:
                    left = _BURST
                    worker.item = None
                    await asyncio.sleep(0)
        except asyncio.CancelledError:
            # Of its item, whose partition was taken away or whose step was stopped; the lane goes on.
            if worker.item is not None and lane is not None:
                self._ended(lane, worker.item)
        except Exception as error:  # noqa: BLE001 - handed on: the processor ends with it
            self._failed(error)
        finally:
            worker.item = None
            workers.discard(worker)
            if worker.rank >= 0:
                self._taken[worker.rank] -= 1
            if any(self._ready):
                self._pump_soon()

    def _ended(self, lane: Lane[ItemT], item: ItemT) -> None:
        if lane._state != _READY:
            lane._state = _HELD
        elif lane.items:
            self._ready[lane.rank].append(lane)
        else:
            lane._state = _IDLE
            self._idle(lane, item)
