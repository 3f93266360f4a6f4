"""The committer with a transactor that records what it commits, and aborts as told."""

import asyncio
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import pytest
from confluent_kafka import TopicPartition
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.record import Record
from streams.background import Background
from streams.changelog import Restored
from streams.committer import Committer
from streams.errors import RecordRejectedError, TransactionAbortedError
from streams.offsets import OffsetTracker, decode_finished, encode_finished
from streams.partition import Entry, Partition, Work
from streams.state import StateStore
from streams.stats import Stats
from streams.transactor import Outgoing


def partition(number: int = 0, *, topic: str = "work.normal", limit: int = 4095) -> Partition:
    tracker = OffsetTracker(0, limit=limit)
    return Partition(topic, number, tracker, StateStore(), f"{topic}.changelog", Restored())


def work(of: Partition, offset: int, *messages: bytes) -> Work:
    assert of.tracker.begin(offset)
    made = Work(of, Record(of.topic, of.number, offset, 0, b"k", b"v"), 0.0)
    made.messages = [message(value) for value in messages]
    made.bytes = sum(map(len, messages))
    return made


def message(value: bytes, topic: str = "out") -> Outgoing:
    return topic, b"k", value, None, -1


class Transactions:
    """``aborts``: which commits, by number from 0, are aborted. ``refused``: a value that is never taken. ``takes_s``:
    how long each takes.
    """

    def __init__(self, aborts: Sequence[int] = (), refused: bytes = b"", takes_s: float = 0.0) -> None:
        self._takes_s = takes_s
        self.committed: list[tuple[list[bytes], list[TopicPartition]]] = []
        self.calls = 0
        self._aborts, self._refused = set(aborts), refused

    def commit(
        self, messages: Sequence[Outgoing], offsets: Sequence[TopicPartition], group: Any, *, diagnose: bool = False
    ) -> None:
        assert group == "member"
        number, self.calls = self.calls, self.calls + 1
        time.sleep(self._takes_s)
        values = [message[2] or b"" for message in messages]
        if number in self._aborts:
            raise TransactionAbortedError("told to")
        if self._refused and self._refused in values:
            raise RecordRejectedError(values.index(self._refused), "too large")
        self.committed.append((values, list(offsets)))

    @property
    def values(self) -> list[bytes]:
        return [value for values, _ in self.committed for value in values]


class Rig:
    def __init__(self, transactions: Transactions, ranks: Sequence[int] = (1,)) -> None:
        self.transactions = transactions
        self.member: str | None = "member"
        self.settled: dict[int, int] = defaultdict(int)
        self.full: list[tuple[int, bool]] = []
        self.journals: dict[int, list[Entry]] = {}
        self.stats = Stats()
        self._thread = Background("test-commit")
        self.committer = Committer(
            "test",
            transactions,  # type: ignore[arg-type]
            self._thread,
            group=lambda: self.member,
            settle=self._settle,
            journal=lambda work: self.journals[id(work)].pop(0) if self.journals.get(id(work)) else None,
            refused=self._refused,
            room=lambda partition: self.full.append((partition.number, partition.full)),
            stats=self.stats,
            interval_s=0.0,
            ranks=ranks,
        )

    def _settle(self, count: int, rank: int) -> None:
        self.settled[rank] += count

    def _refused(self, entry: Entry, at: int, error: str) -> None:
        entry.messages[at] = message(b"letter")

    async def commit(self, seconds: float = 5.0) -> None:
        """Until nothing is pending."""
        running = asyncio.create_task(self.committer.run())
        self.committer.wake()
        try:
            async with asyncio.timeout(seconds):
                while self.committer.pending:
                    await self.committer.through(0.01)
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            self._thread.close()


async def test_entries_commit_in_order_each_with_its_partitions_offset() -> None:
    rig = Rig(Transactions(), ranks=(1, 2))
    one, two = partition(0), partition(1, topic="work.low")
    for entry in (work(one, 0, b"a"), work(two, 0, b"b"), work(one, 1, b"c"), Entry(two, [message(b"d")])):
        rig.committer.add(entry)
    await rig.commit()
    assert rig.transactions.values == [b"a", b"c", b"b", b"d"]
    ((_, offsets),) = rig.transactions.committed
    assert {(place.topic, place.partition): place.offset for place in offsets} == {
        ("work.normal", 0): 2,
        ("work.low", 1): 1,
    }
    assert rig.settled == {1: 2, 2: 1}
    assert one.uncommitted == two.uncommitted == 0


async def test_an_entry_without_an_input_offset_still_sends_its_partitions() -> None:
    rig = Rig(Transactions())
    only = partition()
    running = work(only, 0, b"a")
    rig.journals[id(running)] = [Entry(only, [message(b"effect")], order=0)]
    rig.committer.journal(running)
    await rig.commit()
    ((values, offsets),) = rig.transactions.committed
    assert values == [b"effect"]
    assert [(place.offset, place.metadata) for place in offsets] == [(0, "")]


async def test_an_aborted_transaction_is_made_again_from_the_same_entries() -> None:
    rig = Rig(Transactions(aborts=[0, 1]))
    only = partition()
    told: list[str] = []
    first = work(only, 0, b"a")
    first.committed = lambda: told.append("a")
    rig.committer.add(first)
    rig.committer.add(work(only, 1, b"b"))
    await rig.commit()
    assert rig.transactions.values == [b"a", b"b"]
    assert told == ["a"]
    assert rig.stats.aborted == 2
    assert rig.settled == {1: 2}


async def test_what_belongs_to_a_partition_that_is_gone_is_dropped() -> None:
    rig = Rig(Transactions(aborts=[0]))
    gone, kept = partition(0), partition(1)
    rig.committer.add(work(gone, 0, b"a"))
    rig.committer.add(work(kept, 0, b"b"))

    async def take_away() -> None:
        while not rig.transactions.calls:  # noqa: ASYNC110 - the fake sets no event
            await asyncio.sleep(0.001)
        gone.owned = False

    await asyncio.gather(rig.commit(), take_away())
    assert rig.transactions.values == [b"b"]
    assert [[place.partition for place in offsets] for _, offsets in rig.transactions.committed] == [[1]]
    assert rig.settled == {1: 2}


async def test_nothing_is_committed_without_a_membership() -> None:
    rig = Rig(Transactions())
    rig.member = None
    rig.committer.add(work(partition(), 0, b"a"))

    async def come_back() -> None:
        await asyncio.sleep(0.2)
        assert rig.transactions.calls == 0
        assert rig.committer.trouble
        rig.member = "member"

    await asyncio.gather(rig.commit(), come_back())
    assert rig.transactions.values == [b"a"]
    assert rig.committer.trouble == ""


async def test_a_refused_message_is_replaced_and_the_rest_goes_on() -> None:
    rig = Rig(Transactions(refused=b"huge"))
    only = partition()
    rig.committer.add(work(only, 0, b"a"))
    rig.committer.add(work(only, 1, b"x", b"huge"))
    await rig.commit()
    assert rig.transactions.values == [b"a", b"x", b"letter"]


async def test_a_nearly_full_map_says_so_and_says_when_there_is_room() -> None:
    rig = Rig(Transactions())
    only = partition()
    works = [work(only, offset, b"") for offset in range(14_000)]
    for each in works[1::2]:
        rig.committer.add(each)
    await rig.commit()
    assert rig.full == [(0, True)]
    again = Rig(Transactions())
    again.full = rig.full
    for each in works[::2]:
        again.committer.add(each)
    await again.commit()
    assert rig.full == [(0, True), (0, False)]


async def test_a_map_that_an_earlier_owner_left_full_stops_nothing_before_its_gaps_are_fetched() -> None:
    """What was fetched again is what makes room: held back, it would never come."""
    rig = Rig(Transactions())
    only = partition()
    only.tracker = OffsetTracker(0, encode_finished(0, range(0, 14_000, 2), 14_000))
    rig.committer.add(Entry(only, [message(b"owner")]))
    await rig.commit()
    assert rig.full == []
    again = Rig(Transactions())
    again.full = rig.full
    for offset in range(0, 14_000, 2):
        assert only.tracker.begin(offset)
    again.committer.add(Entry(only, [message(b"timer")]))
    await again.commit()
    assert rig.full == [(0, True)], "it is full, and all of it was fetched"


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_whatever_is_held_back_every_entry_commits_once_and_each_lane_in_order(data: st.DataObject) -> None:
    """With a map that has room for little. An event's entries are its journal, its parking and its end."""
    count = data.draw(st.integers(1, 60))
    lanes = data.draw(st.lists(st.integers(0, 6), min_size=count, max_size=count))
    aborts = data.draw(st.lists(st.integers(0, 12), max_size=4))
    only = partition(limit=data.draw(st.integers(6, 24)))
    works = [work(only, offset) for offset in range(count)]
    expected: dict[int, list[bytes]] = defaultdict(list)
    queues: dict[int, list[Entry]] = defaultdict(list)
    for number, lane in enumerate(lanes):
        parked, journalled = data.draw(st.booleans()), data.draw(st.booleans())
        end = works[number]
        steps: list[Entry] = []
        if journalled:
            steps.append(Entry(only, [message(b"%d journal" % number)], order=number))
        if parked:
            steps.append(Entry(only, [message(b"%d parked" % number)], offset=number, order=number, settles=1))
            end.offset, end.settles = -1, 0
        end.messages = [message(b"%d end" % number)]
        for step in [*steps, end]:
            queues[lane].append(step)
            expected[lane].append(step.messages[0][2] or b"")

    async def run() -> Transactions:
        transactions = Transactions(aborts=aborts)
        rig = Rig(transactions)
        # The lanes' entries finish in any order between them, in their own order within.
        open_lanes = [lane for lane in queues if queues[lane]]
        while open_lanes:
            lane = data.draw(st.sampled_from(open_lanes))
            rig.committer.add(queues[lane].pop(0))
            open_lanes = [lane for lane in queues if queues[lane]]
        await rig.commit(60)
        assert rig.settled == {1: count}
        return transactions

    transactions = asyncio.run(run())
    seen: dict[int, list[bytes]] = defaultdict(list)
    for value in transactions.values:
        seen[lanes[int(value.split()[0])]].append(value)
    assert seen == expected
    (last,) = transactions.committed[-1][1]
    assert (last.offset, last.metadata) == (count, "")
    for values, (place,) in transactions.committed:
        unfinished, until = decode_finished(place.offset, place.metadata)
        for value in values:
            offset, kind = value.split()
            if kind == b"parked" or (kind == b"end" and works[int(offset)].offset >= 0):
                assert int(offset) < place.offset or (int(offset) < until and int(offset) not in unfinished)


@pytest.mark.parametrize("bound", ["messages", "bytes"])
async def test_a_transaction_has_bounds(bound: str) -> None:
    rig = Rig(Transactions())
    only = partition()
    size, count = (1, 25_000) if bound == "messages" else (100_000, 400)
    for offset in range(count):
        rig.committer.add(work(only, offset, b"x" * size))
    await rig.commit(30)
    assert len(rig.transactions.values) == count
    assert len(rig.transactions.committed) == 3


async def test_an_urgent_result_waits_for_no_large_transaction() -> None:
    rig = Rig(Transactions(), ranks=(0, 1, 2))
    low, high = partition(0, topic="work.low"), partition(0, topic="work.high")
    for offset in range(5000):
        rig.committer.add(work(low, offset, b"low"))
    rig.committer.add(work(high, 0, b"high"))
    for offset in range(1, 3000):
        rig.committer.add(work(high, offset, b"more"))
    await rig.commit()
    first, _ = rig.transactions.committed[0]
    assert first[0] == b"high"
    assert first.count(b"low") == 125, "and the low ones go on beside"
    assert rig.transactions.values.count(b"low") == 5000


async def test_where_transactions_take_long_the_others_fill_them() -> None:
    rig = Rig(Transactions(takes_s=0.04), ranks=(0, 2))
    low = partition(0, topic="work.low")
    for offset in range(4000):
        rig.committer.add(work(low, offset, b"low"))
    await rig.commit()
    sizes = [len(values) for values, _ in rig.transactions.committed]
    assert sizes[0] == 125
    assert max(sizes) > 250
    assert max(sizes) <= 2000
    assert sum(sizes) == 4000


async def test_few_others_go_with_an_urgent_result() -> None:
    rig = Rig(Transactions(), ranks=(0, 2))
    low, high = partition(0, topic="work.low"), partition(0, topic="work.high")
    for offset in range(1000):
        rig.committer.add(work(low, offset, b"low"))
    rig.committer.add(work(high, 0, b"high"))
    await rig.commit()
    first, second = (values for values, _ in rig.transactions.committed[:2])
    assert first == [b"high"] + [b"low"] * 100
    assert second == [b"low"] * 125
    assert rig.transactions.values.count(b"low") == 1000
