import asyncio

import pytest

from streams.changelog import Restored
from streams.lease import Lease
from streams.offsets import OffsetTracker
from streams.partition import Entry, Partition
from streams.state import StateStore


class Scene:
    """A lease with a clock and a committer of its own."""

    def __init__(self) -> None:
        self.now = 100.0
        self.added: list[Entry] = []
        self.lease = Lease(self.added.append, now=lambda: self.now)
        self.partition = Partition("t", 0, OffsetTracker(0), StateStore(None, {}), "c", Restored())

    def commit(self) -> None:
        for entry in self.added:
            assert entry.committed is not None
            entry.committed()
        self.added.clear()

    async def held_at_once(self) -> bool:
        holding = asyncio.create_task(self.lease.hold(self.partition))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        if holding.done():
            return True
        holding.cancel()
        return False


@pytest.fixture
async def scene() -> Scene:
    scene = Scene()
    holding = asyncio.create_task(scene.lease.hold(scene.partition))
    await asyncio.sleep(0)
    assert not holding.done()
    scene.commit()
    await holding
    return scene


async def test_no_commit_is_needed_while_the_process_runs(scene: Scene) -> None:
    for _ in range(5):
        scene.now += 0.9
        assert await scene.held_at_once()
    assert scene.added == []


async def test_after_a_pause_each_partition_needs_a_commit_first(scene: Scene) -> None:
    scene.now += 1.1
    holding = [asyncio.create_task(scene.lease.hold(scene.partition)) for _ in range(3)]
    await asyncio.sleep(0)
    assert [(entry.partition, entry.messages, entry.offset) for entry in scene.added] == [(scene.partition, [], -1)] * 3
    scene.commit()
    await asyncio.gather(*holding)
    assert await scene.held_at_once()


async def test_a_pause_while_the_commit_is_under_way_needs_another_one(scene: Scene) -> None:
    scene.now += 5
    holding = asyncio.create_task(scene.lease.hold(scene.partition))
    await asyncio.sleep(0)
    scene.now += 5
    scene.commit()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert not holding.done()
    scene.commit()
    await holding


async def test_the_loop_s_turns_tell_a_pause_from_a_wait(scene: Scene) -> None:
    keeping = asyncio.create_task(scene.lease.keep())
    await asyncio.sleep(0)
    scene.now += 0.9
    await asyncio.sleep(0.3)
    scene.now += 0.9
    assert await scene.held_at_once()
    keeping.cancel()


async def test_who_is_cancelled_while_it_waits_disturbs_nobody(scene: Scene) -> None:
    scene.now += 5
    assert not await scene.held_at_once()
    scene.commit()
