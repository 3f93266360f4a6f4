import asyncio
from collections.abc import Callable
from typing import Any, cast

import pytest

from schemas.record import Record
from streams.changelog import Restored, run_key
from streams.handling import Handling
from streams.offsets import OffsetTracker
from streams.partition import LIFE, Entry, Partition, Work
from streams.state import StateStore
from streams.suspects import Suspects


class Stub:
    """Stands for what handles an event: runs end as the test says."""

    def __init__(self, *ends: float | Exception | None) -> None:
        self.ends = list(ends)
        self.began = 0
        self.begun = asyncio.Event()
        self.crashes: list[int] = []

    async def handle(self, _: Work) -> float | None:
        self.began += 1
        self.begun.set()
        end = self.ends.pop(0)
        await asyncio.sleep(0)
        if isinstance(end, Exception):
            await asyncio.sleep(60)
        return cast("float | None", end)

    async def crashed(self, _: Work, runs: int) -> None:
        self.crashes.append(runs)


class Log:
    """Commits at once, and keeps what a changelog would: the runs by key."""

    def __init__(self) -> None:
        self.runs: dict[Any, bytes] = {}

    def add(self, entry: Entry) -> None:
        for _, key, value, _, _ in entry.messages:
            if value is None:
                self.runs.pop(key, None)
            else:
                assert key is not None
                self.runs[key] = value
        if entry.committed is not None:
            entry.committed()


def work_at(offset: int, **restored: Any) -> Work:
    partition = Partition("t", 0, OffsetTracker(0), StateStore(None, {}), "changelog", Restored(deaths=0, **restored))
    return Work(partition, Record("t", 0, offset, 0, b"k", b"", ()), 0.0)


def suspects_of(stub: Stub, add: Callable[[Entry], None], work: Work) -> Suspects:
    suspects = Suspects(cast(Handling, stub), add, max_crashes=3, max_in_flight=10)
    suspects.suspect(work.partition)
    return suspects


async def test_runs_that_end_without_a_death_are_taken_back() -> None:
    stub, log, work = Stub(0.1, 0.1, 0.1, 0.1, 0.1, None), Log(), work_at(5)
    suspects = suspects_of(stub, log.add, work)
    for wait_s in (*[0.1] * 5, None):
        assert not log.runs
        assert await suspects.run(work) == wait_s
    assert stub.began == 6
    assert not stub.crashes
    assert log.runs == {run_key(5): b"1"}, "the one that finished is tombstoned with its results"


@pytest.mark.parametrize(("owned", "left"), [(True, b"1"), (False, b"2")])
async def test_a_run_that_is_taken_away_counts_only_where_nothing_may_be_committed_any_more(
    owned: bool, left: bytes
) -> None:
    stub, log, work = Stub(Exception()), Log(), work_at(5, runs={5: 1})
    suspects = suspects_of(stub, log.add, work)
    running = asyncio.create_task(suspects.run(work))
    await stub.begun.wait()
    assert log.runs == {run_key(5): b"2"}
    work.partition.owned = owned
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert log.runs == {run_key(5): left}


async def test_an_event_that_was_running_too_often_is_not_run_again() -> None:
    stub, log, work = Stub(), Log(), work_at(5, runs={5: 3})
    assert await suspects_of(stub, log.add, work).run(work) is None
    assert (stub.began, stub.crashes) == (0, [3])


def test_a_partition_that_came_back_to_its_process_had_no_death() -> None:
    def again(life: str) -> Partition:
        restored = Restored(deaths=1, life=life, runs={5: 2, 6: 1})
        return Partition("t", 0, OffsetTracker(0), StateStore(None, {}), "changelog", restored)

    mine, another = again(LIFE), again("another")
    assert (mine.deaths, mine.runs) == (1, {5: 1, 6: 0}), "6 stays known: its count is to be deleted in the changelog"
    assert (another.deaths, another.runs) == (2, {5: 2, 6: 1})
