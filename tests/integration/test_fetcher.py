"""The consumer's thread against a real Kafka: assignments, restores, ranks, and what goes wrong."""

import asyncio
import os
import signal
import threading
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaException, Message, Producer, TopicPartition

from magnatronic.broker import EmbeddedBroker
from streams.dispatch import HIGH, LOW, NORMAL, rank_of
from streams.errors import MissingTopicError, RestoreCancelledError
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
        deadline = time.monotonic() + 20
        while True:
            try:
                assert not any(at.error for at in consumer.committed(list(partitions), timeout=1))
                break
            except KafkaException:
                # The coordinator may be another by now, or not be up yet.
                if cancelled.wait(0.1) or time.monotonic() > deadline:
                    raise
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

    @property
    def changes(self) -> list[tuple[str, tuple[Place, ...]]]:
        """What it was told, but for the rebalances that changed nothing for it."""
        return [(what, places) for what, places in self.told if places]

    async def until(self, true: Callable[[], object], timeout_s: float = 30) -> None:
        async with asyncio.timeout(timeout_s):
            while not true():
                if self.fetcher.finished.done():
                    self.fetcher.finished.result()
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
    listener.fetcher = fetcher = options.pop("kind", Fetcher)(settings, topics, listener, **options)
    fetcher.start()
    try:
        yield listener
    finally:
        fetcher.stop()
        async with asyncio.timeout(15):
            await asyncio.wait([fetcher.finished])
    fetcher.finished.result()


def produce(kafka: Any, topic: str, count: int, partition: int = 0, size: int = 100) -> None:
    producer = Producer(
        {**kafka.config, "linger.ms": 20, "queue.buffering.max.messages": 1_000_000, "enable.idempotence": True}
    )
    failed = []

    def delivered(error: object, _: Message) -> None:
        if error is not None:
            failed.append(error)

    for number in range(count):
        producer.produce(topic, b"%d" % number + bytes(size), partition=partition, on_delivery=delivered)
        if number % 10_000 == 0:
            producer.poll(0)
    assert producer.flush(30) == 0
    assert not failed


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


async def test_a_restore_ends_when_its_partition_goes_to_another_member(kafka: Any) -> None:
    topic, group = kafka.topic("fetch", partitions=2), kafka.unique("group")
    produce(kafka, topic, 100)
    produce(kafka, topic, 100, partition=1)
    go = threading.Event()
    listener = Listener()
    calls: list[tuple[Place, ...]] = []
    ended: list[tuple[Place, ...]] = []

    def restore(places: Sequence[Place], cancelled: threading.Event) -> None:
        calls.append(tuple(places))
        try:
            wait_or_cancel(go)(places, cancelled)
        except RestoreCancelledError:
            ended.append(tuple(places))
            raise

    listener.prepare_as = restore
    async with fetching(kafka, group, [topic], listener):
        await listener.until(lambda: calls)
        assert len(calls[0]) == 2
        async with fetching(kafka, group, [topic], slot=1) as second:
            await second.until(lambda: second.count(topic) == 100)
            (moved,) = second.owned
            # Both were restored in one; what stayed is begun anew.
            await listener.until(lambda: len(calls) == 2)
            assert listener.fetcher.restoring == list(calls[1])
            assert calls[1] == tuple(place for place in calls[0] if place != moved)
            assert listener.changes == [("revoked", (moved,))]
            assert ended == [calls[0]]
            go.set()
            await listener.until(lambda: listener.count(topic) == 100)
            assert listener.owned == set(calls[1])
            assert listener.changes == [("revoked", (moved,)), ("assigned", calls[1])]


async def test_rebalances_during_a_restore_leave_it_alone(kafka: Any) -> None:
    topic, group = kafka.topic("fetch", partitions=2), kafka.unique("group")
    go = threading.Event()
    listener = Listener()
    listener.prepare_as = wait_or_cancel(go)
    async with fetching(kafka, group, [topic], listener), fetching(kafka, group, [topic], slot=1) as second:
        await second.until(lambda: len(second.owned) == 1 and len(listener.fetcher.restoring) == 1)
        kept = listener.fetcher.restoring
        # There is nothing for a third member, but the group rebalances at its coming and going.
        async with fetching(kafka, group, [topic], slot=2, settings={"group.instance.id": None}) as third:
            await third.until(lambda: third.told)
        await asyncio.sleep(1)
        assert listener.fetcher.restoring == kept
        go.set()
        await listener.until(lambda: listener.owned == set(kept))
        assert [places for what, places in listener.changes if what == "assigned"] == [tuple(kept)]


async def test_stopping_ends_a_restore(kafka: Any) -> None:
    topic = kafka.topic("fetch")
    listener = Listener()
    listener.prepare_as = wait_or_cancel(threading.Event())
    async with fetching(kafka, kafka.unique("group"), [topic], listener):
        await listener.until(lambda: listener.fetcher.restoring)
        stopping = time.monotonic()
    assert time.monotonic() - stopping < 5
    assert listener.owned == set()
    assert [what for what, _ in listener.told] == ["revoked"]


async def test_a_restore_that_fails_stops_the_fetcher_with_its_error(kafka: Any) -> None:
    def fail(places: Sequence[Place], _: threading.Event) -> None:
        raise LookupError(f"no changelog for {places[0][0]}")

    topic = kafka.topic("fetch")
    listener = Listener()
    listener.prepare_as = fail
    with pytest.raises(LookupError, match=topic):
        async with fetching(kafka, kafka.unique("group"), [topic], listener):
            await asyncio.wait([listener.fetcher.finished], timeout=20)


async def test_a_static_member_gets_its_partitions_back_and_restores_them_again(kafka: Any) -> None:
    topic, group = kafka.topic("fetch", partitions=3), kafka.unique("group")
    async with fetching(kafka, group, [topic], slot=1) as other:
        async with fetching(kafka, group, [topic]) as first:
            await first.until(lambda: first.owned and other.owned and len(first.owned | other.owned) == 3)
            had = first.owned.copy()
        told = other.changes
        restored: list[Place] = []
        listener = Listener()
        listener.prepare_as = lambda places, cancelled: restored.extend(places)
        async with fetching(kafka, group, [topic], listener):
            await listener.until(lambda: listener.owned == had)
            assert set(restored) == had
            assert other.changes == told


async def test_a_rank_that_is_full_waits_and_the_others_flow(kafka: Any) -> None:
    name = kafka.unique("fetch")
    topics = {rank: f"{name}.{word}" for rank, word in enumerate(("high", "normal", "low"))}
    kafka.create_topics(list(topics.values()), partitions=2)
    for partition in (0, 1):
        produce(kafka, topics[LOW], 20_000, partition)
    listener = Listener()
    listener.keeping.add(LOW)
    async with fetching(kafka, kafka.unique("group"), list(topics.values()), listener, max_in_flight=800):
        await listener.until(lambda: listener.kept[LOW] == 600)
        for rank in (HIGH, NORMAL):
            produce(kafka, topics[rank], 5000)
        await listener.until(lambda: listener.count(topics[HIGH]) == listener.count(topics[NORMAL]) == 5000)
        assert listener.kept[LOW] == listener.fetcher.in_flight == 600
        # Long after everything that could be fetched was fetched it is still a member, and high records are quick.
        await asyncio.sleep(1.5)
        asked = time.monotonic()
        produce(kafka, topics[HIGH], 1)
        await listener.until(lambda: listener.count(topics[HIGH]) == 5001)
        assert time.monotonic() - asked < 5
        listener.give_back(LOW)
        await listener.until(lambda: listener.count(topics[LOW]) == 40_000)
        assert listener.received_of[topics[LOW], 0] == listener.received_of[topics[LOW], 1] == list(range(20_000))


async def test_a_slow_listener_gets_all_of_it_through_pauses(kafka: Any) -> None:
    topic = kafka.topic("fetch")
    produce(kafka, topic, 3000)
    listener = Listener()
    listener.keeping.add(NORMAL)
    async with fetching(kafka, kafka.unique("group"), [topic], listener, max_in_flight=500):
        while listener.count(topic) < 3000:
            await listener.until(lambda: listener.kept[NORMAL] == 500 or listener.count(topic) == 3000)
            # Longer than the consumer's thread waits before it pauses.
            await asyncio.sleep(0.8)
            listener.give_back(NORMAL)
            listener.keeping.add(NORMAL)
        assert listener.received_of[topic, 0] == list(range(3000))
        assert listener.most_kept[NORMAL] == 500


async def test_draining_hands_out_nothing_more_but_stays_in_the_group(kafka: Any) -> None:
    topic, group = kafka.topic("fetch"), kafka.unique("group")
    produce(kafka, topic, 10)
    async with fetching(kafka, group, [topic]) as listener:
        await listener.until(lambda: listener.count(topic) == 10)
        listener.fetcher.drain()
        produce(kafka, topic, 10)
        await asyncio.sleep(1)
        assert listener.count(topic) == 10
        assert listener.owned == {(topic, 0)}
        assert listener.fetcher.group_metadata() is not None


async def test_a_stuck_loop_loses_its_partitions_and_learns_of_it_before_it_commits(kafka: Any) -> None:
    topic, group = kafka.topic("fetch", partitions=2), kafka.unique("group")
    listener = Listener()
    metadata: list[Any] = []

    async def revoked(_: bool) -> None:
        metadata.append(listener.fetcher.group_metadata())

    other = Consumer(consumer_settings(kafka.config, group, 1, session_timeout_ms=6000))
    over = threading.Event()
    got = threading.Event()

    def poll() -> None:
        other.subscribe([topic])
        while not over.is_set():
            other.poll(0.1)
            if other.assignment():
                got.set()
        other.close()

    async with fetching(kafka, group, [topic], listener, revoke_timeout_s=1.0):
        await listener.until(lambda: len(listener.owned) == 2)
        listener.revoked_as = revoked
        member = threading.Thread(target=poll)
        member.start()
        try:
            # The event loop's thread does nothing else until the other member has a partition.
            assert got.wait(20)
            assert len(listener.owned) == 2
            assert listener.fetcher.group_metadata() is None
            await listener.until(lambda: len(listener.owned) == 1)
            assert [what for what, _ in listener.told].count("lost") == 1
            assert metadata == [None]
            await listener.until(lambda: listener.fetcher.group_metadata() is not None)
        finally:
            over.set()
            member.join()


class LateFetcher(Fetcher):
    """Its thread does not get to poll for a while when its session has timed out."""

    late = False

    def _on_lost(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        self.late = True
        time.sleep(3)
        super()._on_lost(consumer, partitions)


async def test_a_broker_out_of_reach_costs_the_partitions_only_for_as_long(kafka: Any, tmp_path: Path) -> None:
    # A client whose session has timed out sends heartbeats without its member id until it is told that its partitions
    # are given up. A broker that is back by then fences it for that.
    async def slowly(_: bool) -> None:
        await asyncio.sleep(3)

    # Whether it still knows the member then is chance, so several try.
    quick, slow, late = ["quick"], ["slow-1", "slow-2", "slow-3"], ["late-1", "late-2", "late-3"]
    with EmbeddedBroker(tmp_path) as broker:
        kafka = type(kafka)(broker.bootstrap_servers)
        async with AsyncExitStack() as stack:
            listeners: dict[str, Listener] = {}
            for name in quick + slow + late:
                kafka.create_topics(name)
                produce(kafka, name, 100)
                kind = LateFetcher if name in late else Fetcher
                listeners[name] = await stack.enter_async_context(fetching(kafka, name, [name], kind=kind))
                if name in slow:
                    listeners[name].revoked_as = slowly
            for name, listener in listeners.items():
                await listener.until(lambda: listener.count(name) == 100)  # noqa: B023 - it is awaited here
            os.kill(broker.pid, signal.SIGSTOP)
            try:
                # Their sessions time out on this side too.
                for name, listener in listeners.items():
                    if name in late:
                        await listener.until(lambda: listener.fetcher.late)  # type: ignore[attr-defined]  # noqa: B023
                    else:
                        await listener.until(lambda: ("lost", ((name, 0),)) in listener.told)  # noqa: B023
                assert listeners["quick"].owned == set()
            finally:
                os.kill(broker.pid, signal.SIGCONT)
            back = time.monotonic()
            for name, listener in listeners.items():
                await asyncio.to_thread(produce, kafka, name, 100)
                await listener.until(lambda: listener.count(name) == 200)  # noqa: B023
                assert listener.received_of[name, 0] == list(range(200))
                assert [what for what, _ in listener.changes] == ["assigned", "lost", "assigned"]
            assert time.monotonic() - back < 20


async def test_a_client_without_brokers_is_replaced(kafka: Any, caplog: pytest.LogCaptureFixture) -> None:
    topic, group = kafka.topic("fetch"), kafka.unique("group")
    produce(kafka, topic, 100)
    async with fetching(kafka, group, [topic]) as listener:
        await listener.until(lambda: listener.count(topic) == 100)
        # Its statistics are as this client's are when it has forgotten its brokers; that needs two answers that cross.
        for _ in range(2):
            listener.fetcher._count_brokers(
                '{"brokers": {":0/internal": {"source": "internal"}, "GroupCoordinator": {"source": "logical"}}}'
            )
        produce(kafka, topic, 100)
        await listener.until(lambda: listener.count(topic) == 200, timeout_s=15)
        assert listener.received_of[topic, 0] == list(range(200))
        assert [what for what, _ in listener.changes] == ["assigned", "lost", "assigned"]
        # The real ones, of several rounds, say that there is one.
        await asyncio.sleep(7)
        assert [what for what, _ in listener.changes] == ["assigned", "lost", "assigned"]
    assert sum("forgotten every broker" in message for message in caplog.messages) == 1


async def test_a_topic_that_is_deleted_is_named(kafka: Any) -> None:
    topic, other = kafka.topic("fetch"), kafka.topic("fetch")
    produce(kafka, topic, 10)
    soon = {"topic.metadata.refresh.interval.ms": 1000}
    with pytest.raises(MissingTopicError) as caught:  # noqa: PT012 - it is raised at the end
        async with fetching(kafka, kafka.unique("group"), [topic, other], settings=soon) as listener:
            await listener.until(lambda: listener.count(topic) == 10)
            kafka.admin.delete_topics([topic])[topic].result(20)
            await asyncio.wait([listener.fetcher.finished], timeout=30)
    assert topic in str(caught.value)
    assert "create the topic" in str(caught.value)
    assert listener.owned == set()


async def test_a_topic_that_comes_a_moment_later_is_read(kafka: Any) -> None:
    topic, late = kafka.topic("fetch"), kafka.unique("fetch")
    async with fetching(kafka, kafka.unique("group"), [topic, late]) as listener:
        await listener.until(lambda: listener.owned)
        kafka.create_topics(late)
        produce(kafka, late, 10)
        await listener.until(lambda: listener.count(late) == 10)
