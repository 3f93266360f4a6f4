import asyncio
import random
from collections import defaultdict
from collections.abc import Callable, Collection
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streams.dispatch import HIGH, LOW, NORMAL, RANKS, Dispatcher, Lane, shares

Item = tuple[str, int]


class _HeldError(Exception):
    """Raised by a handler whose item went back to its lane."""


class Harness:
    """Runs items with a handler of the test's, keeping lanes the way the processor does."""

    def __init__(self, handle: Callable[[Item], object], concurrency: int, ranks: Collection[int] = RANKS) -> None:
        self.lanes: dict[str, Lane[Item]] = {}
        self.seen: dict[str, list[int]] = defaultdict(list)
        self.errors: list[BaseException] = []
        self.running = self.most = self.done = 0
        self.running_of = [0, 0, 0]
        self.ran = asyncio.Event()
        self._handle = handle
        self.dispatcher = Dispatcher(
            self._run, concurrency=concurrency, idle=self._idle, failed=self.errors.append, ranks=ranks
        )

    async def _run(self, item: Item) -> None:
        rank = self.lanes[item[0]].rank
        self.running += 1
        self.running_of[rank] += 1
        self.most = max(self.most, self.running)
        try:
            result = self._handle(item)
            if asyncio.iscoroutine(result):
                await result
            self.seen[item[0]].append(item[1])
            self.done += 1
            self.ran.set()
        except _HeldError:
            pass
        finally:
            self.running -= 1
            self.running_of[rank] -= 1

    def _idle(self, lane: Lane[Item], _: Item) -> None:
        del self.lanes[lane.key]

    def submit(self, key: str, number: int, rank: int = NORMAL) -> None:
        lane = self.lanes.setdefault(key, Lane(key, rank))
        self.dispatcher.submit(lane, (key, number))

    async def until(self, count: int) -> None:
        async with asyncio.timeout(10):
            while self.done < count:
                self.ran.clear()
                await self.ran.wait()

    async def at_rest(self) -> None:
        """Wait until what can be done without waiting is done."""
        for _ in range(50):
            await asyncio.sleep(0)


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


def limits(concurrency: int) -> tuple[int, int]:
    _, below_high, low = shares(concurrency)
    return below_high, low


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    concurrency=st.integers(1, 24),
    lanes=st.lists(st.tuples(st.sampled_from(RANKS), st.integers(1, 8)), min_size=1, max_size=40),
    slow=st.floats(0, 1),
)
async def test_any_mix_of_ranks_keeps_lane_order_and_limits(
    seed: int, concurrency: int, lanes: list[tuple[int, int]], slow: float
) -> None:
    rng = random.Random(seed)
    below_high, most_low = limits(concurrency)

    async def handle(item: Item) -> None:
        lows = harness.running_of[LOW]
        assert harness.running <= concurrency
        assert lows <= most_low
        assert lows + harness.running_of[NORMAL] <= below_high
        if rng.random() < slow:
            for _ in range(rng.randrange(1, 5)):
                await asyncio.sleep(0)

    harness = Harness(handle, concurrency)
    todo = [(f"lane{place}", rank, count) for place, (rank, count) in enumerate(lanes)]
    numbers = [(key, rank, number) for key, rank, count in todo for number in range(count)]
    numbers.sort(key=lambda one: (one[2], rng.random()))
    for key, rank, number in numbers:
        harness.submit(key, number, rank)
        if rng.random() < 0.2:
            await asyncio.sleep(0)
    await harness.until(len(numbers))
    await asyncio.sleep(0)
    assert harness.errors == []
    assert {key: list(range(count)) for key, _, count in todo} == harness.seen
    assert not harness.lanes
    await harness.at_rest()


class Picks:
    """One worker, and the order in which it takes what is ready; the test feeds it between any two runs."""

    def __init__(self, feed: Callable[[], object]) -> None:
        self.order: list[Item] = []
        self.ran = asyncio.Event()
        self._feed = feed
        self.dispatcher: Dispatcher[Item] = Dispatcher(
            self._run, concurrency=1, idle=lambda lane, item: None, failed=self._raise
        )

    async def _run(self, item: Item) -> None:
        self.order.append(item)
        self.ran.set()
        self._feed()

    def _raise(self, error: BaseException) -> None:
        raise error

    def add(self, rank: int, number: int = 0) -> None:
        self.dispatcher.submit(Lane(f"{rank}", rank), (f"{rank}", number))

    async def until(self, count: int) -> None:
        async with asyncio.timeout(20):
            while len(self.order) < count:
                self.ran.clear()
                await self.ran.wait()


async def test_under_a_flood_of_all_ranks_each_gets_its_share() -> None:
    picks = Picks(lambda: None)
    for rank in RANKS:
        for number in range(2000):
            picks.add(rank, number)
    await picks.until(2100)
    first = [key for key, _ in picks.order[:2100]]
    assert [first.count(f"{rank}") for rank in RANKS] == pytest.approx([1600, 400, 100], rel=0.02)
    lows = [place for place, key in enumerate(first) if key == f"{LOW}"]
    assert max(after - before for before, after in pairwise(lows)) <= 25
    await picks.until(6000)


async def test_high_goes_first_when_it_was_idle() -> None:
    picks = Picks(lambda: picks.add(HIGH) if len(picks.order) == 100 else None)
    for number in range(200):
        picks.add(LOW, number)
    await picks.until(201)
    assert picks.order[100] == (f"{HIGH}", 0)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), rank=st.sampled_from([NORMAL, LOW]), ahead=st.integers(0, 3))
async def test_no_flood_starves_a_ready_lane(seed: int, rank: int, ahead: int) -> None:
    """The bounds that the module states, while the other ranks come and go as badly as chance can make it."""
    rng = random.Random(seed)
    others = [other for other in RANKS if other != rank]
    mood = {other: rng.random() for other in others}
    waited: list[int] = []
    submitted = 0

    def feed() -> None:
        nonlocal submitted
        if waited:
            return
        if rng.random() < 0.05:
            mood[rng.choice(others)] = rng.choice([0.0, 0.3, 1.0])
        for other in others:
            if rng.random() < mood[other]:
                picks.add(other)
        if len(picks.order) >= 50 and not waited:
            taken = [number for key, number in picks.order if key == f"{rank}"]
            if taken and taken[-1] == ahead:
                waited.append(len(picks.order) - submitted)
            elif not submitted:
                submitted = len(picks.order)
                for number in range(ahead + 1):
                    picks.add(rank, number)

    picks = Picks(feed)
    for _ in range(100):
        for other in others:
            picks.add(other)
    bound = (10 if rank == NORMAL else 85) * (ahead + 1)
    await picks.until(50)
    async with asyncio.timeout(20):
        while not waited:
            await asyncio.sleep(0)
            if not picks.dispatcher.workers:
                picks.add(HIGH)
    assert waited[0] <= bound
    await asyncio.wait([worker.task for worker in picks.dispatcher.workers if worker.task is not None])


async def test_slow_handlers_of_lower_ranks_leave_workers_to_higher_ones() -> None:
    release = asyncio.Event()

    async def slow(item: Item) -> None:
        if not item[0].startswith("high"):
            await release.wait()

    harness = Harness(slow, concurrency=16)
    for number in range(40):
        harness.submit(f"low{number}", number, LOW)
    await harness.at_rest()
    assert harness.running == 12
    for number in range(40):
        harness.submit(f"normal{number}", number, NORMAL)
    await harness.at_rest()
    assert harness.running == 14
    for number in range(40):
        harness.submit(f"high{number}", number, HIGH)
    await harness.until(40)
    assert harness.running == 14
    release.set()
    await harness.until(120)


@pytest.mark.parametrize(
    ("ranks", "most"), [({LOW}, 16), ({NORMAL}, 16), ({NORMAL, LOW}, 12), ({HIGH, LOW}, 12), ({HIGH}, 16)]
)
async def test_nothing_is_kept_for_ranks_that_never_come(ranks: set[int], most: int) -> None:
    async def wait(_: Item) -> None:
        await asyncio.sleep(0.001)

    harness = Harness(wait, concurrency=16, ranks=ranks)
    for number in range(60):
        harness.submit(f"lane{number}", number, max(ranks))
    await harness.until(60)
    assert harness.most == most


async def test_a_held_lane_costs_no_worker_and_loses_no_order() -> None:
    held: list[tuple[Lane[Item], Item]] = []

    async def handle(item: Item) -> None:
        if item == ("held", 0) and not held:
            lane = harness.lanes["held"]
            held.append((lane, item))
            harness.dispatcher.hold(lane, item)

    harness = Harness(handle, concurrency=1)
    harness.submit("held", 0)
    harness.submit("held", 1)
    harness.submit("other", 0)
    await harness.at_rest()
    assert harness.dispatcher.workers == set()
    assert harness.seen["other"] == [0]
    harness.submit("held", 2)
    await harness.at_rest()
    assert harness.dispatcher.workers == set()
    lane = held[0][0]
    assert (lane.held, lane.active, len(lane.items)) == (True, False, 3)
    harness.seen.clear()
    assert harness.dispatcher.release(lane)
    await harness.at_rest()
    assert harness.seen == {"held": [0, 1, 2]}
    assert not harness.lanes
    assert not harness.dispatcher.release(lane)


async def test_a_lane_can_be_held_before_it_ever_ran_or_while_it_is_ready() -> None:
    harness = Harness(lambda _: None, concurrency=2)
    for key, ready in (("parked", False), ("queued", True)):
        lane = harness.lanes.setdefault(key, Lane(key))
        if ready:
            harness.submit(key, 1)
        harness.dispatcher.hold(lane, (key, 0))
        if not ready:
            harness.submit(key, 1)
    await harness.at_rest()
    assert harness.done == 0
    for key in ("parked", "queued"):
        assert harness.dispatcher.release(harness.lanes[key])
    await harness.at_rest()
    assert harness.seen == {"parked": [0, 1], "queued": [0, 1]}


async def test_a_lane_released_while_its_item_still_runs_runs_it_again_once() -> None:
    runs: list[Item] = []

    async def handle(item: Item) -> None:
        runs.append(item)
        if len(runs) == 1:
            lane = harness.lanes["lane"]
            harness.dispatcher.hold(lane, item)
            await asyncio.sleep(0)
            assert harness.dispatcher.release(lane)
            await asyncio.sleep(0)

    harness = Harness(handle, concurrency=4)
    harness.submit("lane", 0)
    harness.submit("lane", 1)
    await harness.at_rest()
    assert runs == [("lane", 0), ("lane", 0), ("lane", 1)]
    assert not harness.lanes


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), concurrency=st.integers(1, 9))
async def test_holding_at_random_keeps_every_lane_in_order(seed: int, concurrency: int) -> None:
    rng = random.Random(seed)
    held: list[Lane[Item]] = []

    async def handle(item: Item) -> None:
        if rng.random() < 0.3:
            await asyncio.sleep(0)
        if rng.random() < 0.3:
            lane = harness.lanes[item[0]]
            harness.dispatcher.hold(lane, item)
            held.append(lane)
            raise _HeldError

    harness = Harness(handle, concurrency)
    for number in range(150):
        harness.submit(f"lane{rng.randrange(12)}", number, rng.choice(RANKS))
        if rng.random() < 0.2:
            await asyncio.sleep(0)
        if held and rng.random() < 0.5:
            harness.dispatcher.release(held.pop(rng.randrange(len(held))))
    async with asyncio.timeout(10):
        while harness.done < 150:
            while held:
                harness.dispatcher.release(held.pop())
            await asyncio.sleep(0)
    assert harness.errors == []
    assert all(numbers == sorted(numbers) for numbers in harness.seen.values())
    assert sum(map(len, harness.seen.values())) == 150
    assert not harness.lanes


async def test_a_lane_goes_on_after_its_running_item_was_cancelled() -> None:
    async def handle(item: Item) -> None:
        if item[1] == 0:
            await asyncio.Event().wait()

    harness = Harness(handle, concurrency=1)
    harness.submit("lane", 0, LOW)
    harness.submit("lane", 1, LOW)
    harness.submit("lone", 0)
    await asyncio.sleep(0.01)
    for key in ("lone", "lane"):
        await harness.dispatcher.cancel(lambda item, key=key: item[0] == key, 1.0)  # type: ignore[misc]
        await harness.at_rest()
    assert harness.seen == {"lane": [1]}
    assert not harness.lanes


async def test_cancel_waits_no_longer_than_told() -> None:
    release = asyncio.Event()

    async def stubborn(_: Item) -> None:
        try:
            await release.wait()
        except asyncio.CancelledError:
            await release.wait()

    harness = Harness(stubborn, concurrency=1)
    harness.submit("lane", 0)
    await asyncio.sleep(0.01)
    async with asyncio.timeout(1):
        await harness.dispatcher.cancel(lambda _: True, 0.05)
    assert harness.running == 1
    release.set()
    await harness.until(1)


async def test_nothing_begins_once_it_is_closed() -> None:
    began: list[Item] = []

    async def wait(item: Item) -> None:
        began.append(item)
        await asyncio.sleep(60)

    harness = Harness(wait, concurrency=2)
    for lane in "abcd":
        harness.submit(lane, 0)
        harness.submit(lane, 1)
    await harness.at_rest()
    assert began == [("a", 0), ("b", 0)]
    harness.submit("e", 0)  # so that a turn is under way in which another worker would begin
    harness.dispatcher.close()
    harness.submit("f", 0)
    await harness.dispatcher.cancel(lambda _: True, 5)
    await harness.at_rest()
    assert len(began) == 2
    assert not harness.dispatcher.workers
    assert not harness.errors


async def test_a_worker_that_never_waits_stops_when_it_is_closed() -> None:
    def handle(item: Item) -> None:
        if item[1] == 2:
            harness.dispatcher.close()

    harness = Harness(handle, concurrency=2)
    for number in range(5):
        harness.submit("a", number)
    await harness.at_rest()
    assert harness.seen["a"] == [0, 1, 2]


# Items that whoever has them begins.


class AtOnce(Harness):
    """Begins items itself where it may, the way the processor does; ``begun`` are those."""

    def __init__(self, handle: Callable[[Item], object], concurrency: int, ranks: Collection[int] = RANKS) -> None:
        super().__init__(handle, concurrency, ranks)
        self.begun: list[Item] = []

    def submit(self, key: str, number: int, rank: int = NORMAL) -> None:
        if key in self.lanes or not self.dispatcher.at_once(rank):
            super().submit(key, number, rank)
            return
        self.begun.append((key, number))
        lane = self.lanes[key] = Lane(key, rank)
        self.dispatcher.go_on(lane, (key, number), self._run((key, number)))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    concurrency=st.integers(1, 24),
    lanes=st.lists(st.tuples(st.sampled_from(RANKS), st.integers(1, 8)), min_size=1, max_size=40),
    cancels=st.booleans(),
)
async def test_items_begun_at_once_keep_lane_order_and_limits(
    seed: int, concurrency: int, lanes: list[tuple[int, int]], cancels: bool
) -> None:
    rng = random.Random(seed)
    below_high, most_low = limits(concurrency)
    cancelled = 0

    async def handle(item: Item) -> None:
        nonlocal cancelled
        lows = harness.running_of[LOW]
        assert harness.running <= concurrency
        assert lows <= most_low
        assert lows + harness.running_of[NORMAL] <= below_high
        try:
            for _ in range(rng.randrange(5)):
                await asyncio.sleep(0)
        except asyncio.CancelledError:
            cancelled += 1
            raise

    harness = AtOnce(handle, concurrency)
    items = [(f"lane{place}", rank, number) for place, (rank, count) in enumerate(lanes) for number in range(count)]
    items.sort(key=lambda one: (one[2], rng.random()))
    for key, rank, number in items:
        harness.submit(key, number, rank)
        if cancels and rng.random() < 0.1:
            chosen = f"lane{rng.randrange(len(lanes))}"
            await harness.dispatcher.cancel(lambda item, chosen=chosen: item[0] == chosen, 1.0)  # type: ignore[misc]
        elif rng.random() < 0.3:
            await asyncio.sleep(0)
    async with asyncio.timeout(10):
        while harness.done + cancelled < len(items):  # noqa: ASYNC110 - what is cancelled sets no event
            await asyncio.sleep(0)
    await harness.at_rest()
    assert harness.errors == []
    assert all(numbers == sorted(numbers) for numbers in harness.seen.values())
    assert not harness.lanes
    assert not harness.dispatcher.workers


async def test_nothing_is_begun_at_once_where_something_is_ready_or_no_place_is_left() -> None:
    release = asyncio.Event()

    async def wait(_: Item) -> None:
        await release.wait()

    harness = AtOnce(wait, concurrency=16)
    for number in range(13):
        harness.submit(f"low{number}", number, LOW)
    for number in range(3):
        harness.submit(f"normal{number}", number, NORMAL)
    assert harness.begun == [(f"low{number}", number) for number in range(12)], "a low one is ready, which goes first"
    harness.submit("high", 0, HIGH)
    assert len(harness.begun) == 12
    release.set()
    await harness.until(17)
    await harness.at_rest()
    harness.submit("high", 1, HIGH)
    assert harness.begun[-1] == ("high", 1)
    harness.dispatcher.close()
    assert not harness.dispatcher.at_once(HIGH)


@pytest.mark.parametrize("closed", [False, True])
async def test_an_item_that_is_cancelled_before_its_task_took_a_step_hears_of_it(closed: bool) -> None:
    ended: list[Item] = []

    async def forever(item: Item) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(item)

    harness = AtOnce(forever, concurrency=2)
    harness.submit("lane", 0)
    harness.submit("lane", 1)
    if closed:
        harness.dispatcher.close()
    await harness.dispatcher.cancel(lambda item: item == ("lane", 0), 1.0)
    await harness.at_rest()
    assert ended == [("lane", 0)]
    assert harness.dispatcher.workers == set() if closed else harness.running == 1
    if not closed:
        await harness.dispatcher.cancel(lambda _: True, 1.0)
        await harness.at_rest()
        assert not harness.lanes


async def test_a_begun_item_that_ends_without_a_wait_spares_the_next_one_its_cancellation() -> None:
    harness = AtOnce(lambda _: None, concurrency=2)
    harness.submit("lane", 0)
    harness.submit("lane", 1)
    await harness.dispatcher.cancel(lambda item: item == ("lane", 0), 1.0)
    await harness.until(2)
    assert harness.seen == {"lane": [0, 1]}
    await harness.at_rest()
    assert not harness.dispatcher.workers
