"""Restores from a real Kafka: what compaction, transactions and missing topics do to them."""

import random
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest
from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, Producer, TopicPartition
from confluent_kafka.admin import ConfigResource, NewTopic

from schemas.record import Record
from streams.changelog import (
    OWNER_KEY,
    Parked,
    Restored,
    Timer,
    effect_key,
    owner_value,
    parked_key,
    parked_message,
    run_key,
    run_value,
    state_key,
    timer_key,
    timer_value,
)
from streams.errors import ClusterError, MissingTopicError, RestoreCancelledError, StateError
from streams.kafka import reader_settings, transactional_settings
from streams.restore import restore
from streams.state import CHANGELOG_CONFIG, changelog_topic, ensure_changelogs

if TYPE_CHECKING:
    from tests.conftest import KafkaForTests

INPUT = "tasks.normal"
Written = tuple[bytes, bytes | None] | tuple[bytes, bytes | None, Sequence[tuple[str, bytes | None]]]


class Changelog:
    """A changelog, and the transactional producer of its owner."""

    def __init__(self, kafka: "KafkaForTests", partitions: int = 1, config: Mapping[str, str] | None = None) -> None:
        self.kafka = kafka
        self.topic = kafka.topic("changelog", partitions, {**CHANGELOG_CONFIG, **(config or {})})
        self.producer = Producer(transactional_settings(kafka.config, self.topic, 0))
        self.producer.init_transactions(30)

    def begin(self, *records: Written, partition: int = 0) -> None:
        """Write ``records`` in a transaction, and see to it that they are there; it stays open."""
        self.producer.begin_transaction()
        for key, value, *headers in records:
            given: Any = headers[0] if headers else []
            self.producer.produce(self.topic, value, key, partition, headers=given)
        assert self.producer.flush(30) == 0

    def write(self, *records: Written, partition: int = 0) -> None:
        self.begin(*records, partition=partition)
        self.producer.commit_transaction(30)

    def restore(self, *numbers: int, timeout_s: float = 20, cancelled: threading.Event | None = None) -> list[Restored]:
        places = [(self.topic, INPUT, number) for number in numbers or (0,)]
        found = restore(self.kafka.config, places, timeout_s=timeout_s, cancelled=cancelled or threading.Event())
        assert found.keys() == {(self.topic, number) for number in numbers or (0,)}
        return list(found.values())


def as_written(parked: Parked) -> Written:
    _, key, value, headers, _ = parked_message("changelog", parked)
    assert key is not None
    assert headers is not None
    return key, value, headers


@contextmanager
def aside(call: Callable[[], Any]) -> Iterator["Future[Any]"]:
    """The call, running in a thread."""
    with ThreadPoolExecutor(1) as threads:
        yield threads.submit(call)


def test_the_last_state_of_a_lane_counts_and_a_tombstone_ends_it(kafka: "KafkaForTests") -> None:
    log = Changelog(kafka)
    log.write((state_key("a"), b"1"), (state_key("b"), b"1"), (state_key("c/d"), b"1"))
    log.write((state_key("a"), b"2"), (state_key("b"), None), (state_key("gone"), None))
    log.write((state_key("b"), b"3"), (state_key("a"), None), (state_key("ä\x1f"), b""))
    (found,) = log.restore()
    assert found == Restored(states={"b": b"3", "c/d": b"1", "ä\x1f": b""})


def test_every_kind_comes_back(kafka: "KafkaForTests") -> None:
    log = Changelog(kafka)
    timer = Timer("lane", "deadline", datetime(2026, 3, 4, 5, 6, 7, 891_234, tzinfo=UTC), "s", "corr", "cause", "00-1")
    own = [("traceparent", b"00-1"), ("parked-key", b"hostile"), ("empty", b""), ("none", None), ("empty", b"2")]
    first = Parked(Record(INPUT, 0, 17, 1_700_000_000_123, b"key", b"\x00raw", tuple(own)), 2, 1_700_000_009_999)
    second = Parked(Record(INPUT, 0, 9, 5, None, b"", ()), 1, 7)
    third = Parked(Record(INPUT, 0, 30, 5, b"", b"v", ()), 1, 7)
    log.write(
        as_written(first),
        as_written(third),
        (effect_key("e/1", 10), b"tenth", [("ce_id", b"x")]),
        (effect_key("e/1", 2), b"second", [("ce_id", b"y"), ("ce_subject", b"task")]),
        (effect_key("other", 0), b"gone"),
        (timer_key("lane", "deadline"), b"an earlier setting"),
        (timer_key("lane", "cancelled"), timer_value(timer)),
        (parked_key(40), b"gone"),
        (run_key(5), run_value(1)),
        (run_key(6), run_value(1)),
        (OWNER_KEY, owner_value(0)),
        (state_key("lane"), b"{}"),
    )
    log.write(
        as_written(second),
        (effect_key("other", 0), None),
        (timer_key("lane", "deadline"), timer_value(timer)),
        (timer_key("lane", "cancelled"), None),
        (parked_key(40), None),
        (run_key(5), run_value(2)),
        (run_key(6), None),
        (OWNER_KEY, owner_value(2)),
    )
    (found,) = log.restore()
    assert found.states == {"lane": b"{}"}
    assert found.timers == [timer]
    assert found.parked == [second, first, third]
    assert (found.runs, found.deaths) == ({5: 2}, 2)
    effects = found.effects.pop("e/1")
    assert not found.effects
    assert [(effect.value, list(effect.headers)) for effect in effects] == [
        (b"second", [("ce_id", b"y"), ("ce_subject", b"task")]),
        (b"tenth", [("ce_id", b"x")]),
    ]
    log.write((OWNER_KEY, None))
    assert log.restore()[0].deaths is None


def test_partitions_come_each_with_its_own(kafka: "KafkaForTests") -> None:
    log, other = Changelog(kafka, 3), Changelog(kafka, 2)
    log.write((state_key("a"), b"0"), partition=0)
    log.write((state_key("a"), b"2"), (OWNER_KEY, owner_value(1)), partition=2)
    other.write((state_key("a"), b"other"), partition=1)
    places = [(log.topic, INPUT, 0), (log.topic, INPUT, 1), (log.topic, INPUT, 2), (other.topic, "tasks.high", 1)]
    found = restore(kafka.config, places, timeout_s=20, cancelled=threading.Event())
    assert found == {
        (log.topic, 0): Restored(states={"a": b"0"}),
        (log.topic, 1): Restored(),
        (log.topic, 2): Restored(states={"a": b"2"}, deaths=1),
        (other.topic, 1): Restored(states={"a": b"other"}),
    }
    assert found[log.topic, 1].empty
    assert restore(kafka.config, [], timeout_s=20, cancelled=threading.Event()) == {}


def test_a_large_record_is_taken_and_comes_back(kafka: "KafkaForTests") -> None:
    log = Changelog(kafka)
    large = b"\x01" * 8_400_000
    log.write((effect_key("e", 0), large))
    log.write((state_key("a"), b"1"))
    (found,) = log.restore()
    assert found.effects["e"][0].value == large
    assert found.states == {"a": b"1"}


@pytest.mark.parametrize("committed", [True, False])
def test_an_open_transaction_is_waited_for(kafka: "KafkaForTests", committed: bool) -> None:
    log = Changelog(kafka)
    log.write((state_key("a"), b"before"), (state_key("b"), b"kept"))
    log.begin((state_key("a"), b"after"), (state_key("b"), None))
    with aside(log.restore) as restoring:
        time.sleep(1)
        assert not restoring.done()
        if committed:
            log.producer.commit_transaction(30)
        else:
            log.producer.abort_transaction(30)
        (found,) = restoring.result(10)
    assert found.states == ({"a": b"after"} if committed else {"a": b"before", "b": b"kept"})


def test_what_is_written_later_is_not_waited_for(kafka: "KafkaForTests") -> None:
    """Only a zombie could: its transaction is fenced, but may be open until its timeout."""
    log = Changelog(kafka, 2)
    log.write((state_key("a"), b"1"))
    log.begin((state_key("a"), b"2"), partition=1)
    started = time.monotonic()
    (found,) = log.restore(0)
    assert time.monotonic() - started < 5
    assert found.states == {"a": b"1"}
    log.producer.abort_transaction(30)


def test_a_transaction_that_stays_open_is_told(kafka: "KafkaForTests") -> None:
    log = Changelog(kafka)
    log.write((state_key("a"), b"1"))
    log.begin((state_key("a"), b"2"))
    with pytest.raises(ClusterError, match=r"nothing came from the changelogs .* for 4 s"):
        log.restore(timeout_s=4)
    log.producer.abort_transaction(30)


def test_a_restore_that_waits_ends_when_it_is_cancelled(kafka: "KafkaForTests") -> None:
    log = Changelog(kafka)
    log.begin((state_key("a"), b"2"))
    cancelled = threading.Event()
    with aside(lambda: log.restore(cancelled=cancelled)) as restoring:
        time.sleep(0.7)
        assert not restoring.done()
        cancelled.set()
        at = time.monotonic()
        with pytest.raises(RestoreCancelledError, match="1 changelog partition"):
            restoring.result(10)
        assert time.monotonic() - at < 1
    log.producer.abort_transaction(30)


def test_a_restore_from_a_silent_broker_ends_when_it_is_cancelled() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        settings = {"bootstrap.servers": f"127.0.0.1:{silent.getsockname()[1]}", "log_level": 0}
        cancelled = threading.Event()
        places = [("changelog", INPUT, 0)]
        with aside(lambda: restore(settings, places, timeout_s=60, cancelled=cancelled)) as restoring:
            time.sleep(0.5)
            assert not restoring.done()
            cancelled.set()
            at = time.monotonic()
            with pytest.raises(RestoreCancelledError):
                restoring.result(10)
            assert time.monotonic() - at < 1


def test_a_restore_is_cancelled_in_the_midst_of_reading(kafka: "KafkaForTests") -> None:
    log = Changelog(kafka)
    for part in range(20):
        log.write(*((state_key(f"{part}/{lane}"), b"x" * 300) for lane in range(5_000)))

    class Soon(threading.Event):
        """Set as soon as it was looked at a few times, which is once a batch."""

        looks = 0

        def is_set(self) -> bool:
            self.looks += 1
            return self.looks > 20

    soon = Soon()
    with pytest.raises(RestoreCancelledError):
        log.restore(cancelled=soon)
    assert soon.looks == 21
    (found,) = log.restore()
    assert len(found.states) == 100_000


def count(kafka: Mapping[str, Any], topic: str) -> int:
    """How many records a reader meets."""
    consumer = Consumer(reader_settings(kafka, "counter"))
    records = 0
    try:
        consumer.assign([TopicPartition(topic, 0, OFFSET_BEGINNING)])
        while True:
            for message in consumer.consume(1000, 1.0):
                error = message.error()
                if error is None:
                    records += 1
                elif error.code() == KafkaError._PARTITION_EOF:
                    return records
                else:
                    raise AssertionError(error)
    finally:
        consumer.close()


def test_compaction_changes_nothing(kafka: "KafkaForTests") -> None:
    small = {"segment.bytes": str(1024 * 1024), "min.cleanable.dirty.ratio": "0.01", "max.compaction.lag.ms": "100"}
    log = Changelog(kafka, config=small)
    expected: dict[str, bytes] = {}
    written = 0
    for part in range(40):
        records: list[Written] = []
        for number in range(400):
            lane = f"lane-{(part * 7 + number) % 600}"
            if number % 9 == part % 9:
                records.append((state_key(lane), None))
                expected.pop(lane, None)
            else:
                # What does not shrink, so that segments fill.
                expected[lane] = f"{part}-{number}-".encode() + bytes(random.choices(range(256), k=320))
                records.append((state_key(lane), expected[lane]))
        records.append((run_key(part % 3), run_value(part)))
        written += len(records)
        log.write(*records)
    assert log.restore()[0].states == expected
    deadline = time.monotonic() + 60
    while count(kafka.config, log.topic) > written / 2:
        assert time.monotonic() < deadline, "nothing was compacted"
        time.sleep(0.5)
    (found,) = log.restore()
    assert found.states == expected
    assert found.runs == {0: 39, 1: 37, 2: 38}


def test_what_is_no_changelog_record_is_told_with_its_place(kafka: "KafkaForTests") -> None:
    log = Changelog(kafka)
    log.write((state_key("a"), b"1"), (b"task-1", b"{}"))
    with pytest.raises(StateError, match=r"\[0\]@1: key b'task-1' .*no such kind"):
        log.restore()


def test_a_record_without_key_is_told_with_its_place(kafka: "KafkaForTests") -> None:
    topic = kafka.topic("no-changelog")
    producer = Producer(kafka.config)
    producer.produce(topic, b"v")
    assert producer.flush(30) == 0
    with pytest.raises(StateError, match=r"no-changelog.*\[0\]@0 has no key"):
        restore(kafka.config, [(topic, INPUT, 0)], timeout_s=20, cancelled=threading.Event())


def test_a_restore_waits_for_the_leader_of_a_new_changelog(kafka: "KafkaForTests") -> None:
    changelog = kafka.unique("late")
    places = [(changelog, INPUT, number) for number in range(3)]
    with aside(lambda: restore(kafka.config, places, timeout_s=20, cancelled=threading.Event())) as restoring:
        time.sleep(0.3)
        assert not restoring.done()
        kafka.admin.create_topics([NewTopic(changelog, 3, 1)])[changelog].result(30)
        assert restoring.result(20) == {(changelog, number): Restored() for number in range(3)}


def test_a_changelog_that_stays_away_is_told(kafka: "KafkaForTests") -> None:
    with pytest.raises(ClusterError, match="changelogs can't be read"):
        restore(kafka.config, [("nowhere", INPUT, 0)], timeout_s=0.5, cancelled=threading.Event())


def test_changelogs_are_made_beside_their_inputs(kafka: "KafkaForTests") -> None:
    one, two, group = kafka.topic("in", 3), kafka.topic("in"), kafka.unique("group")
    ensure_changelogs(kafka.config, group, [one, two])
    ensure_changelogs(kafka.config, group, [one, two])
    restore(
        kafka.config,
        [(changelog_topic(group, each), each, 0) for each in (one, two)],
        timeout_s=20,
        cancelled=threading.Event(),
    )
    known = kafka.admin.list_topics(timeout=30).topics
    assert len(known[changelog_topic(group, one)].partitions) == 3
    assert len(known[changelog_topic(group, two)].partitions) == 1
    resource = ConfigResource(ConfigResource.Type.TOPIC, changelog_topic(group, one))
    settings = kafka.admin.describe_configs([resource])[resource].result(30)
    assert {name: settings[name].value for name in CHANGELOG_CONFIG} == dict(CHANGELOG_CONFIG)


def test_a_changelog_with_other_partitions_than_its_input_is_told(kafka: "KafkaForTests") -> None:
    topic, group = kafka.topic("in", 3), kafka.unique("group")
    kafka.create_topics(changelog_topic(group, topic), 2)
    with pytest.raises(StateError, match=r"has 3 partitions and .* 2; keys would no longer find"):
        ensure_changelogs(kafka.config, group, [topic])


def test_a_missing_input_is_told(kafka: "KafkaForTests") -> None:
    with pytest.raises(MissingTopicError, match="reads nowhere, which the cluster lacks"):
        ensure_changelogs(kafka.config, "group", [kafka.topic("in"), "nowhere"])
