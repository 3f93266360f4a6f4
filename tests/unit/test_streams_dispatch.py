import asyncio
import random
from collections import defaultdict
from collections.abc import Callable

import pytest

from streams.dispatch import Dispatcher, Lane

Item = tuple[str, int]


class Harness:
    """Runs items with a handler of the test's, keeping lanes the way the processor does."""

    def __init__(self, handle: Callable[[Item], object], concurrency: int) -> None:
        self.lanes: dict[str, Lane[Item]] = {}
        self.seen: dict[str, list[int]] = defaultdict(list)
        self.errors: list[BaseException] = []
        self.running = self.most = self.done = 0
        self.ran = asyncio.Event()
        self._handle = handle
        self.dispatcher = Dispatcher(self._run, concurrency=concurrency, idle=self._idle, failed=self.errors.append)

    async def _run(self, item: Item) -> None:
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            result = self._handle(item)
            if asyncio.iscoroutine(result):
                await result
            self.seen[item[0]].append(item[1])
            self.done += 1
            self.ran.set()
        finally:
            self.running -= 1

    def _idle(self, lane: Lane[Item], _: Item) -> None:
        del self.lanes[lane.key]

    def submit(self, key: str, number: int) -> None:
        lane = self.lanes.setdefault(key, Lane(key))
        self.dispatcher.submit(lane, (key, number))

    async def until(self, count: int) -> None:
        async with asyncio.timeout(10):
            while self.done < count:
                self.ran.clear()
                await self.ran.wait()


async def test_lanes_keep_their_order_and_run_side_by_side() -> None:
    rng = random.Random(5)

    async def wait(_: Item) -> None:
        if rng.random() < 0.5:
            await asyncio.sleep(rng.random() * 0.005)

    harness = Harness(wait, concurrency=7)
    for number in range(600):
        harness.submit(f"lane{rng.randrange(40)}", number)
    await harness.until(600)
    assert all(numbers == sorted(numbers) for numbers in harness.seen.values())
    assert sum(map(len, harness.seen.values())) == 600
    assert harness.most == 7
    assert not harness.lanes


async def test_a_waiting_handler_stops_no_other_lane() -> None:
    release = asyncio.Event()

    async def slow(item: Item) -> None:
        if item == ("slow", 0):
            await release.wait()

    harness = Harness(slow, concurrency=4)
    harness.submit("slow", 0)
    harness.submit("slow", 1)
    for number in range(200):
        harness.submit(f"quick{number}", number)
    await harness.until(200)
    assert "slow" not in harness.seen
    release.set()
    await harness.until(202)
    assert harness.seen["slow"] == [0, 1]


async def test_many_quick_handlers_leave_the_loop_responsive() -> None:
    harness = Harness(lambda _: None, concurrency=3)
    for number in range(5000):
        harness.submit(f"lane{number}", number)
    turns = 0
    while harness.done < 5000:
        await asyncio.sleep(0)
        turns += 1
    assert turns > 20


async def test_each_handler_runs_in_one_task_from_begin_to_end() -> None:
    async def check(_: Item) -> None:
        before = asyncio.current_task()
        async with asyncio.timeout(5):
            await asyncio.sleep(0.001)
        assert asyncio.current_task() is before

    harness = Harness(check, concurrency=5)
    for number in range(50):
        harness.submit(f"lane{number % 10}", number)
    await harness.until(50)
    assert harness.errors == []


async def test_cancelled_items_end_and_the_others_go_on() -> None:
    async def forever(item: Item) -> None:
        if item[0].startswith("stuck"):
            await asyncio.Event().wait()

    harness = Harness(forever, concurrency=2)
    harness.submit("stuck1", 0)
    harness.submit("stuck2", 0)
    harness.submit("free", 0)
    await asyncio.sleep(0.02)
    assert harness.done == 0
    await harness.dispatcher.cancel(lambda item: item[0].startswith("stuck"), 1.0)
    await harness.until(1)
    assert harness.running == 0


async def test_a_runner_that_raises_is_reported() -> None:
    def fail(_: Item) -> None:
        raise RuntimeError("defect")

    harness = Harness(fail, concurrency=1)
    harness.submit("lane", 0)
    await asyncio.sleep(0.01)
    assert [str(error) for error in harness.errors] == ["defect"]


@pytest.mark.parametrize("concurrency", [1, 3])
async def test_the_limit_holds(concurrency: int) -> None:
    async def wait(_: Item) -> None:
        await asyncio.sleep(0.001)

    harness = Harness(wait, concurrency=concurrency)
    for number in range(30):
        harness.submit(f"lane{number}", number)
    await harness.until(30)
    assert harness.most == concurrency
