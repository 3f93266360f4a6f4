"""The consumer's thread against a real Kafka: assignments, restores, ranks, and what goes wrong."""

import asyncio
import threading
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from confluent_kafka import OFFSET_BEGINNING, Consumer, Message, Producer, TopicPartition

from streams.dispatch import rank_of
from streams.errors import RestoreCancelledError
from streams.fetcher import Fetcher
from streams.kafka import consumer_settings

Place = tuple[str, int]


class Listener:
    """Owns what it gets, keeps what it receives, settles at once unless told not to. Restores as told."""

    def __init__(self) -> None:
        self.fetcher: Fetcher
        self.owned: set[Place] = set()
        self.told: list[tuple[str, tuple[Place, ...]]] = []
        self.received_of: dict[Place, list[int]] = defaultdict(list)
        self.batches: list[list[Place]] = []
        self.keeping: set[int] = set()
        self.kept: Counter[int] = Counter()
        self.most_kept: Counter[int] = Counter()
        self.start_at: dict[Place, int] = {}
        self.prepare_as: Callable[[Sequence[Place], threading.Event], object] = lambda places, cancelled: None
        self.cancelled_after: list[float] = []
        self.moved = asyncio.Event()
        self.revoked_as: Callable[[bool], Any] | None = None

    def prepare(
        self, consumer: Consumer, partitions: Sequence[TopicPartition], cancelled: threading.Event
    ) -> list[Place]:
        assert not any(at.error for at in consumer.committed(list(partitions), timeout=20))
        places = [(at.topic, at.partition) for at in partitions]
        self.prepare_as(places, cancelled)
        return places

    async def assigned(self, prepared: Sequence[Place]) -> list[TopicPartition]:
        self._tell("assigned", prepared)
        assert self.owned.isdisjoint(prepared)
        self.owned |= set(prepared)
        return [TopicPartition(*place, self.start_at.get(place, OFFSET_BEGINNING)) for place in prepared]

    async def revoked(self, partitions: Sequence[Place], *, lost: bool) -> None:
        self._tell("lost" if lost else "revoked", partitions)
        if self.revoked_as is not None:
            await self.revoked_as(lost)
        self.owned -= set(partitions)
        self.moved.set()

    def received(self, messages: Sequence[Message]) -> None:
        self.batches.append([(str(one.topic()), int(one.partition() or 0)) for one in messages])
        for message, place in zip(messages, self.batches[-1], strict=True):
            assert message.error() is None
            self.received_of[place].append(int(message.offset() or 0))
            if place in self.owned:
                self.start_at[place] = self.received_of[place][-1] + 1
            rank = rank_of(place[0])
            if rank in self.keeping:
                self.kept[rank] += 1
                self.most_kept[rank] = max(self.most_kept[rank], self.kept[rank])
            else:
                self.fetcher.settle(1, rank)
        self.moved.set()

    def give_back(self, rank: int) -> None:
        self.keeping.discard(rank)
        self.fetcher.settle(self.kept.pop(rank, 0), rank)

    def count(self, topic: str) -> int:
        return sum(len(offsets) for place, offsets in self.received_of.items() if place[0] == topic)

    async def until(self, true: Callable[[], object], timeout_s: float = 30) -> None:
        async with asyncio.timeout(timeout_s):
            while not true():
                self.moved.clear()
                try:
                    async with asyncio.timeout(0.05):
                        await self.moved.wait()
                except TimeoutError:
                    pass

    def _tell(self, what: str, places: Sequence[Place]) -> None:
        self.told.append((what, tuple(sorted(places))))
        self.moved.set()


@asynccontextmanager
async def fetching(
    kafka: Any, group: str, topics: Sequence[str], listener: Listener | None = None, *, slot: int = 0, **options: Any
) -> AsyncIterator[Listener]:
    """A running fetcher on ``topics``; at the end it must stop within seconds, and without an error."""
    listener = listener or Listener()
    changes = options.pop("settings", {})
    settings = {**consumer_settings(kafka.config, group, slot, session_timeout_ms=6000), **changes}
    options.setdefault("max_in_flight", 1000)
    listener.fetcher = fetcher = Fetcher(settings, topics, listener, **options)
    fetcher.start()
    try:
        yield listener
    finally:
        fetcher.stop()
        async with asyncio.timeout(15):
            await asyncio.wait([fetcher.finished])
    fetcher.finished.result()


def produce(kafka: Any, topic: str, count: int, partition: int = 0, size: int = 100) -> None:
    producer = Producer({**kafka.config, "linger.ms": 20, "queue.buffering.max.messages": 1_000_000})
    for number in range(count):
        producer.produce(topic, b"%d" % number + bytes(size), partition=partition)
        if number % 10_000 == 0:
            producer.poll(0)
    assert producer.flush(30) == 0


def wait_or_cancel(go: threading.Event) -> Callable[[Sequence[Place], threading.Event], None]:
    """A restore that takes until ``go``, and ends at once when it is cancelled."""

    def restore(_: Sequence[Place], cancelled: threading.Event) -> None:
        while not go.wait(0.01):
            if cancelled.is_set():
                raise RestoreCancelledError("cancelled")

    return restore


async def test_everything_is_handed_out_in_order(kafka: Any) -> None:
    topic = kafka.topic("fetch", partitions=2)
    for partition in (0, 1):
        produce(kafka, topic, 20_000, partition)
    async with fetching(kafka, kafka.unique("group"), [topic]) as listener:
        await listener.until(lambda: listener.count(topic) == 40_000)
        assert listener.received_of == {(topic, partition): list(range(20_000)) for partition in (0, 1)}
        assert listener.fetcher.in_flight == 0
        assert listener.fetcher.high_watermark(topic, 0) == 20_000
        assert listener.fetcher.group_metadata() is not None
    assert listener.owned == set()
    assert [what for what, _ in listener.told] == ["assigned", "revoked"]
    assert listener.fetcher.group_metadata() is None


async def test_a_group_without_partitions_for_it_is_joined_all_the_same(kafka: Any) -> None:
    topic, group = kafka.topic("fetch"), kafka.unique("group")
    async with fetching(kafka, group, [topic]) as first:
        await first.until(lambda: first.owned)
        async with fetching(kafka, group, [topic], slot=1) as second:
            await second.until(lambda: second.told)
            assert second.told == [("assigned", ())]


async def test_other_partitions_flow_while_one_is_restored(kafka: Any) -> None:
    topic, other = kafka.topic("fetch"), kafka.topic("fetch")
    go = threading.Event()
    produce(kafka, topic, 10)
    produce(kafka, other, 10)
    group = kafka.unique("group")

    # A second member's coming and going splits the assignment into two: one restored long ago, one restored now.
    listener = Listener()
    async with fetching(kafka, group, [topic, other], listener):
        await listener.until(lambda: len(listener.owned) == 2)
        async with fetching(kafka, group, [topic, other], slot=1, settings={"group.instance.id": None}) as second:
            await second.until(lambda: second.owned)
            await listener.until(lambda: len(listener.owned) == 1)
            (moved,) = second.owned
            (stayed,) = listener.owned
            listener.prepare_as = wait_or_cancel(go)
        await listener.until(lambda: listener.fetcher.restoring == [moved])
        before = len(listener.received_of[stayed])
        produce(kafka, stayed[0], 5000)
        await listener.until(lambda: len(listener.received_of[stayed]) == before + 5000)
        assert listener.owned == {stayed}
        restored = time.monotonic()
        go.set()
        await listener.until(lambda: moved in listener.owned)
        produce(kafka, moved[0], 1)
        await listener.until(lambda: 10 in listener.received_of[moved])
        assert time.monotonic() - restored < 2
    assert listener.owned == set()
