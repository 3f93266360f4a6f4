"""Partitions that nobody has in a stable group, against a real Kafka: how they come about, and that it ends."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Any

import pytest
from confluent_kafka import Consumer, ConsumerGroupState, TopicPartition
from confluent_kafka.admin import NewPartitions

from streams.fetcher import Fetcher
from streams.kafka import consumer_settings, instance_id
from streams.ownerless import OwnerWatch
from tests.support.processors import bench_on

Place = tuple[str, int]


class Member:
    """Owns what it gets, and remembers what it was told."""

    def __init__(self) -> None:
        self.owned: set[Place] = set()
        self.told: list[tuple[str, tuple[Place, ...]]] = []

    def prepare(
        self, consumer: Consumer, partitions: Sequence[TopicPartition], cancelled: threading.Event
    ) -> list[Place]:
        return [(at.topic, at.partition) for at in partitions]

    async def assigned(self, prepared: Sequence[Place]) -> list[TopicPartition]:
        self.owned |= set(prepared)
        self.told.append(("assigned", tuple(prepared)))
        return [TopicPartition(*place, 0) for place in prepared]

    async def revoked(self, partitions: Sequence[Place], *, lost: bool) -> None:
        self.owned -= set(partitions)
        self.told.append(("lost" if lost else "revoked", tuple(partitions)))

    def received(self, messages: Sequence[object]) -> None:
        raise AssertionError("the topics are empty")


@asynccontextmanager
async def member(kafka: Any, group: str, topics: Sequence[str], slot: int) -> AsyncIterator[Member]:
    """A member of the group; at the end it goes without a word, as static members do."""
    listener = Member()
    settings = consumer_settings(kafka.config, group, slot, session_timeout_ms=6000)
    fetcher = Fetcher(settings, topics, listener, max_in_flight=100)
    fetcher.start()
    try:
        yield listener
    finally:
        fetcher.stop()
        await asyncio.wait([fetcher.finished], timeout=15)


@asynccontextmanager
async def watched(kafka: Any, group: str, topics: Sequence[str], slot: int) -> AsyncIterator[None]:
    watch = OwnerWatch(
        instance_id(group, slot), kafka.config, group, topics, away_topic=kafka.topic("away"), interval_s=0.5
    )
    watch.start()
    try:
        yield
    finally:
        watch.stop()


async def until(true: Callable[[], object], timeout_s: float = 30) -> None:
    async with asyncio.timeout(timeout_s):
        while not true():  # noqa: ASYNC110 - what is waited for may be the broker's
            await asyncio.sleep(0.05)


def owned_in(kafka: Any, group: str) -> dict[str, set[Place]] | None:
    """What the group's members have by the broker's word; None while it is not stable."""
    found = kafka.admin.describe_consumer_groups([group])[group].result(20)
    if found.state != ConsumerGroupState.STABLE:
        return None
    return {
        one.group_instance_id or one.member_id: {(at.topic, at.partition) for at in one.assignment.topic_partitions}
        for one in found.members
    }


class DiesBetweenTheRounds:
    """A member that holds still as soon as partitions are taken from it, so that it does not join the second round.

    Nor can it later, when another has its slot. To the broker it is as good as killed.
    """

    def __init__(self, kafka: Any, group: str, topic: str, slot: int) -> None:
        self.joined = threading.Event()
        self.revoking = threading.Event()
        self.replaced = threading.Event()
        self._consumer = Consumer(consumer_settings(kafka.config, group, slot, session_timeout_ms=6000))
        self._topic = topic
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        self._consumer.subscribe([self._topic], on_assign=self._assigned, on_revoke=self._revoked)
        while not self.replaced.is_set():
            self._consumer.poll(0.1)
        self._consumer.close()

    def _assigned(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        consumer.incremental_assign(partitions)
        self.joined.set()

    def _revoked(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        self.revoking.set()
        self.replaced.wait(30)
        consumer.incremental_unassign(partitions)


@asynccontextmanager
async def abandoned(kafka: Any, group: str, topic: str) -> AsyncIterator[tuple[Member, Member]]:
    """Two members of a stable group, of which the second has nothing, though the first does not have all."""
    dying = DiesBetweenTheRounds(kafka, group, topic, 0)
    try:
        await until(dying.joined.is_set)
        async with member(kafka, group, [topic], 1) as second:
            await until(dying.revoking.is_set)
            await until(lambda: owned_in(kafka, group))
            async with member(kafka, group, [topic], 0) as first:
                await until(lambda: first.owned)
                dying.replaced.set()
                dying.thread.join()
                yield first, second
    finally:
        dying.replaced.set()
        dying.thread.join()


async def test_partitions_of_nobody_are_shared_out_and_the_others_stay(
    kafka: Any, caplog: pytest.LogCaptureFixture
) -> None:
    topic, group = kafka.topic("nobodys", partitions=6), kafka.unique("group")
    async with abandoned(kafka, group, topic) as (first, second):
        kept = first.owned.copy()
        await asyncio.sleep(2)
        # Nothing comes of waiting.
        assert owned_in(kafka, group) == {f"{group}-0": kept, f"{group}-1": set()}
        assert len(kept) == 3
        async with watched(kafka, group, [topic], 0), watched(kafka, group, [topic], 1):
            await until(lambda: len(second.owned) == 3)
            assert first.owned == kept
            await until(lambda: owned_in(kafka, group) == {f"{group}-0": kept, f"{group}-1": second.owned})
            # The guest is gone, and what was kept was never taken away.
            assert [places for what, places in first.told if what != "assigned"] == []
            assert [what for what, places in second.told if places] == ["assigned"]
            await asyncio.sleep(2)
    warned = [message for message in caplog.messages if "belong to nobody" in message]
    assert len(warned) == 1
    assert warned[0].startswith(f"{group}-0: ")
    for _, number in second.owned:
        assert f"{topic}[{number}]" in warned[0]


async def test_processors_share_out_what_is_nobodys_and_do_each_event_once(
    kafka: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("streams.processor.OwnerWatch", partial(OwnerWatch, interval_s=1.0))
    bench = bench_on(kafka)
    dying = DiesBetweenTheRounds(kafka, bench.binding.group, bench.topic, 0)
    try:
        await until(dying.joined.is_set)
        async with bench.running(slot=1) as second:
            await until(dying.revoking.is_set)
            await until(lambda: owned_in(kafka, bench.binding.group))
            async with bench.running(slot=0) as first:
                await until(lambda: first.partitions)
                dying.replaced.set()
                for number in range(90):
                    bench.send(f"t{number % 30}", "wait")
                bench.flush()
                await until(lambda: first.stats.events_in + second.stats.events_in >= 90)
                assert len(first.partitions) == 2
                assert len(second.partitions) == 1
                for each in (first, second):
                    assert each.stats.revoked == each.stats.lost == 0
    finally:
        dying.replaced.set()
        dying.thread.join()
    assert bench.results() == {f"t{number}": ["1", "2", "3"] for number in range(30)}
    assert any("belong to nobody" in message for message in caplog.messages)


async def test_what_is_new_while_members_restart_is_shared_out(kafka: Any) -> None:
    topic, new, group = kafka.topic("old", partitions=2), kafka.topic("new", partitions=2), kafka.unique("group")
    async with AsyncExitStack() as stack:
        async with member(kafka, group, [topic], 0) as before, member(kafka, group, [topic], 1) as also_before:
            await until(lambda: len(before.owned) == len(also_before.owned) == 1)
        # Back in their slots within their session, they get what they had, without a rebalance: neither the topic that
        # they did not read before nor the partitions that were added in between.
        kafka.admin.create_partitions([NewPartitions(topic, 4)])[topic].result(20)
        members = [await stack.enter_async_context(member(kafka, group, [topic, new], slot)) for slot in (0, 1)]
        await until(lambda: all(each.owned for each in members))
        await asyncio.sleep(1)
        assert owned_in(kafka, group) == {f"{group}-{slot}": each.owned for slot, each in enumerate(members)}
        assert members[0].owned | members[1].owned == {(topic, 0), (topic, 1)}
        for slot in (0, 1):
            await stack.enter_async_context(watched(kafka, group, [topic, new], slot))
        await until(lambda: sum(len(each.owned) for each in members) == 6)
        assert all(len(each.owned) == 3 for each in members)
        assert not any(what == "lost" for each in members for what, _ in each.told)


async def test_a_group_that_lacks_nothing_is_left_alone(kafka: Any, caplog: pytest.LogCaptureFixture) -> None:
    topic, group = kafka.topic("somebodys", partitions=2), kafka.unique("group")
    async with member(kafka, group, [topic], 0) as first, watched(kafka, group, [topic, "there-is-no-such-topic"], 0):
        await until(lambda: len(first.owned) == 2)
        async with member(kafka, group, [topic], 1) as second:
            await until(lambda: len(second.owned) == 1)
            told = first.told.copy()
            await asyncio.sleep(3)
            assert first.told == told
    assert not caplog.messages
