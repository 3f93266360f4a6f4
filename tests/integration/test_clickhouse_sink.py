"""The ClickHouse sink on a real Kafka: what is committed arrives, once, whatever dies on the way."""

import json
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar

import pytest
from confluent_kafka import Consumer, Producer, TopicPartition

from schemas.codec import Codec
from schemas.events import StepFailed, TaskSubmitted
from schemas.metadata import Metadata, deterministic_id
from sinks.clickhouse import ClickHouse, ClickHouseSink
from sinks.errors import HistoryLostError, SinkError, StoreError
from sinks.runner import SinkRunner
from sinks.sink import Offsets, Sink, SinkRecord

CODEC = Codec()


def encoded(task: str, *, size: int = 0) -> dict[str, Any]:
    event = TaskSubmitted(task_id=task, objective="find out " + "x" * size)
    metadata = Metadata(deterministic_id(task), "/clients/test", task, _now(), correlation_id=task)
    made = CODEC.encode(event, metadata)
    return {"key": task.encode(), "value": made.value, "headers": made.headers}


def _now() -> datetime:
    return datetime.now(UTC)


def transactional(kafka: Any) -> Producer:
    producer = Producer({**kafka.config, "transactional.id": kafka.unique("tx"), "retry.backoff.ms": 1, "linger.ms": 1})
    producer.init_transactions(30)
    return producer


def produce(producer: Producer, topic: str, tasks: Sequence[str], *, partitions: int, commit: bool = True) -> None:
    producer.begin_transaction()
    for number, task in enumerate(tasks):
        producer.produce(topic, partition=number % partitions, **encoded(task))
    if commit:
        producer.commit_transaction(30)
    else:
        producer.flush(30)
        producer.abort_transaction(30)


def committed_records(kafka: Any, topic: str, partitions: int) -> set[tuple[int, int, str]]:
    """What a plain read_committed consumer sees: partition, offset and key."""
    settings = {**kafka.config, "group.id": kafka.unique("check"), "isolation.level": "read_committed"}
    consumer = Consumer({**settings, "enable.partition.eof": True, "enable.auto.commit": False})
    consumer.assign([TopicPartition(topic, partition, 0) for partition in range(partitions)])
    ended: set[int] = set()
    seen: set[tuple[int, int, str]] = set()
    while len(ended) < partitions:
        for message in consumer.consume(1_000, 1.0):
            if message.error() is not None:
                ended.add(message.partition())
            else:
                seen.add((message.partition(), message.offset(), (message.key() or b"").decode()))
    consumer.close()
    return seen


@pytest.fixture
def clickhouse(tmp_path: Path) -> Iterator[ClickHouse]:
    with ClickHouse(tmp_path / "clickhouse", max_rows=1_000_000) as opened:
        yield opened


def runner_for(kafka: Any, sink: Sink, **settings: Any) -> SinkRunner:
    defaults: dict[str, Any] = {"group": kafka.unique("sink"), "linger_s": 0.05, "instance": "0"}
    return SinkRunner(sink, codec=CODEC, kafka=kafka.config, **{**defaults, **settings})


def test_what_is_committed_arrives_and_what_is_aborted_does_not(kafka: Any, clickhouse: ClickHouse) -> None:
    topic = kafka.topic("tasks", partitions=3)
    producer = transactional(kafka)
    produce(producer, topic, [f"a{n}" for n in range(50)], partitions=3)
    produce(producer, topic, [f"aborted{n}" for n in range(50)], partitions=3, commit=False)
    runner = runner_for(kafka, ClickHouseSink(clickhouse, [topic]))
    assert runner.lag() is None
    runner.start()
    try:
        assert runner.wait_caught_up(30)
        assert clickhouse.query("SELECT count() FROM events").rows == [(50,)]
        produce(producer, topic, [f"b{n}" for n in range(10)], partitions=3)
        plain = Producer(kafka.config)
        for value in (b"garbage", b"", None, b"\x00\x00\x00\x00\x01\xff"):
            plain.produce(topic, value=value, key=b"bad", partition=1)
        plain.flush(30)
        produce(producer, topic, ["late"], partitions=3, commit=False)
        assert runner.wait_caught_up(30)
        assert runner.lag() == {(topic, 0): 0, (topic, 1): 0, (topic, 2): 0}
        assert runner.caught_up()
        rows = clickhouse.query("SELECT partition, offset, key FROM event_log").rows
        assert len(rows) == 64
        assert set(rows) == committed_records(kafka, topic, 3)
        undecodable = clickhouse.query("SELECT raw FROM events WHERE error != '' ORDER BY offset").rows
        assert len(undecodable) == 4
        assert undecodable[0] == ("garbage",)
        assert runner.records_written == 64
    finally:
        runner.stop()
    assert runner.error is None
    with pytest.raises(SinkError, match="not running"):
        runner.wait_caught_up(1)


def test_waiting_sees_at_once_what_was_committed_before(kafka: Any, clickhouse: ClickHouse) -> None:
    topic = kafka.topic("tasks", partitions=4)
    producer = transactional(kafka)
    runner = runner_for(kafka, ClickHouseSink(clickhouse, [topic]), linger_s=60.0)
    runner.start()
    try:
        assert runner.wait_caught_up(30)
        for turn in range(5):
            produce(producer, topic, [f"{turn}-{n}" for n in range(8)], partitions=4)
            began = time.monotonic()
            assert runner.wait_caught_up(30)
            assert time.monotonic() - began < 30, "waiting took as long as lingering"
            assert clickhouse.query("SELECT count() FROM events").rows == [(8 * (turn + 1),)]
    finally:
        runner.stop()


def test_stopping_writes_what_was_read_and_starting_again_goes_on(kafka: Any, clickhouse: ClickHouse) -> None:
    topic = kafka.topic("tasks", partitions=2)
    producer = transactional(kafka)
    for turn in range(3):
        produce(producer, topic, [f"{turn}-{n}" for n in range(20)], partitions=2)
        sink = ClickHouseSink(clickhouse, [topic])
        runner = runner_for(kafka, sink, group=f"{topic}-group")
        runner.start()
        assert runner.wait_caught_up(30)
        runner.stop()
        assert runner.records_written == 20
        assert sum(sink.offsets().values()) == 20 * (turn + 1) + 2 * (turn + 1)
    assert clickhouse.query("SELECT count(), uniqExact(key) FROM event_log").rows == [(60, 60)]


def test_the_stores_offsets_win_over_the_groups(kafka: Any, tmp_path: Path) -> None:
    topic = kafka.topic("tasks")
    producer = transactional(kafka)
    produce(producer, topic, [f"{n}" for n in range(30)], partitions=1)
    for folder in ("first", "second"):  # the second store is empty, the group is not
        with ClickHouse(tmp_path / folder) as clickhouse:
            runner = runner_for(kafka, ClickHouseSink(clickhouse, [topic]), group=f"{topic}-group")
            runner.start()
            assert runner.wait_caught_up(30)
            runner.stop()
            assert clickhouse.query("SELECT count() FROM event_log").rows == [(30,)]


SINK_PROCESS = """
import json, sys, time
from sinks.clickhouse import ClickHouse, ClickHouseSink
from sinks.runner import SinkRunner
from schemas.codec import Codec
folder, topic, group, kafka = sys.argv[1:5]
with ClickHouse(folder) as clickhouse:
    runner = SinkRunner(ClickHouseSink(clickhouse, [topic]), codec=Codec(), kafka=json.loads(kafka), group=group,
                        instance="0", linger_s=0.01, batch_size=200)
    runner.start()
    while runner.error is None:
        print(runner.records_written, flush=True)
        time.sleep(0.02)
raise SystemExit(str(runner.error))
"""


def test_killed_again_and_again_it_loses_and_doubles_nothing(kafka: Any, tmp_path: Path) -> None:
    topic, partitions = kafka.topic("tasks", partitions=4), 4
    producer = transactional(kafka)
    folder = tmp_path / "clickhouse"
    chance = random.Random(7)
    stop = threading.Event()

    def feed() -> None:
        for turn in range(80):
            tasks = [f"{turn}-{n}" for n in range(100)]
            produce(producer, topic, tasks, partitions=partitions, commit=turn % 5 != 3)
            if stop.is_set():
                return

    feeder = threading.Thread(target=feed)
    feeder.start()
    command = [sys.executable, "-c", SINK_PROCESS, str(folder), topic, f"{topic}-group", json.dumps(kafka.config)]
    killed_while_writing = 0
    try:
        for _ in range(3):
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
                assert process.stdout is not None
                wanted = chance.randrange(1, 1_500)
                for line in process.stdout:
                    if int(line) >= wanted or (int(line) > 0 and not feeder.is_alive()):
                        killed_while_writing += 1
                        break
                process.send_signal(signal.SIGKILL)
    finally:
        stop.set()
        feeder.join(60)
    assert killed_while_writing == 3
    with ClickHouse(folder, max_rows=1_000_000) as clickhouse:
        runner = runner_for(kafka, ClickHouseSink(clickhouse, [topic]), group=f"{topic}-group")
        runner.start()
        assert runner.wait_caught_up(60)
        runner.stop()
        rows = clickhouse.query("SELECT partition, offset, key FROM events").rows
    expected = committed_records(kafka, topic, partitions)
    assert len(rows) == len(expected)
    assert set(rows) == expected


class FailingStore(ClickHouseSink):
    """A store that is down for its first writes, before or after the data is in it."""

    name: ClassVar[str] = "clickhouse"

    def __init__(self, clickhouse: ClickHouse, topics: Sequence[str], fail: Callable[[int], None]) -> None:
        super().__init__(clickhouse, topics)
        self.writes = 0
        self._fail = fail

    def write(self, batch: Sequence[SinkRecord], offsets: Offsets) -> None:
        self.writes += 1
        if self.writes % 2:
            self._fail(self.writes)
        super().write(batch, {})
        self._fail(self.writes)
        super().write((), offsets)


def test_a_store_that_is_down_is_waited_for_and_misses_nothing(kafka: Any, clickhouse: ClickHouse) -> None:
    """Reading stops while the store is down and goes on at the same place, the end of a partition included."""
    topic = kafka.topic("tasks", partitions=2)
    producer = transactional(kafka)
    down = threading.Event()

    def fail(write: int) -> None:
        if down.is_set():
            raise StoreError("the store is down", retryable=True)

    sink = FailingStore(clickhouse, [topic], fail)
    runner = runner_for(kafka, sink, backoff_s=(0.05, 0.1))
    runner.start()
    try:
        produce(producer, topic, [f"{n}" for n in range(100)], partitions=2)
        assert runner.wait_caught_up(30)
        for turn in range(3):
            down.set()
            failing = sink.writes
            produce(producer, topic, [f"{turn}a{n}" for n in range(50)], partitions=1)
            while sink.writes < failing + 2:
                time.sleep(0.01)
            produce(producer, topic, [f"{turn}b{n}" for n in range(50)], partitions=2)
            down.clear()
            assert runner.wait_caught_up(30)
    finally:
        runner.stop()
    assert runner.error is None
    rows = clickhouse.query("SELECT partition, offset, key FROM events").rows
    assert len(rows) == 400
    assert set(rows) == committed_records(kafka, topic, 2)


def test_an_error_that_stays_is_told_to_who_waits(kafka: Any, clickhouse: ClickHouse) -> None:
    topic = kafka.topic("tasks")
    told: list[BaseException] = []

    def fail(write: int) -> None:
        raise StoreError("the disk is full of holes")

    runner = runner_for(kafka, FailingStore(clickhouse, [topic], fail), on_error=told.append)
    runner.start()
    produce(transactional(kafka), topic, ["t"], partitions=1)
    with pytest.raises(SinkError, match="full of holes"):
        runner.wait_caught_up(30)
    assert isinstance(runner.error, StoreError)
    assert told == [runner.error]
    runner.stop()
    assert ClickHouseSink(clickhouse).offsets() == {}


def test_stopping_does_not_wait_for_a_dead_store_for_ever(kafka: Any, clickhouse: ClickHouse) -> None:
    topic = kafka.topic("tasks")

    def fail(write: int) -> None:
        raise StoreError("the store is down", retryable=True)

    sink = FailingStore(clickhouse, [topic], fail)
    runner = runner_for(kafka, sink, backoff_s=(0.05, 0.1))
    runner.start()
    produce(transactional(kafka), topic, ["t"], partitions=1)
    assert not runner.wait_caught_up(3)
    runner.stop(timeout_s=0.5)
    assert isinstance(runner.error, StoreError)
    assert sink.offsets() == {}


def test_a_log_that_was_made_anew_is_noticed(kafka: Any, clickhouse: ClickHouse) -> None:
    topic = kafka.topic("tasks")
    produce(transactional(kafka), topic, ["t"], partitions=1)
    sink = ClickHouseSink(clickhouse, [topic])
    sink.open()
    sink.write((), {(topic, 0): 1_000})
    runner = runner_for(kafka, sink)
    runner.start()
    deadline = time.monotonic() + 30
    while runner.error is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert isinstance(runner.error, HistoryLostError)
    assert "1000" in str(runner.error)
    runner.stop()


def test_records_that_retention_took_are_gone_past(kafka: Any, clickhouse: ClickHouse) -> None:
    topic = kafka.topic("tasks")
    producer = transactional(kafka)
    produce(producer, topic, [f"{n}" for n in range(20)], partitions=1)
    sink = ClickHouseSink(clickhouse, [topic])
    sink.open()
    sink.write((), {(topic, 0): 2})
    for future in kafka.admin.delete_records([TopicPartition(topic, 0, 15)]).values():
        future.result(30)
    runner = runner_for(kafka, sink)
    runner.start()
    try:
        assert runner.wait_caught_up(30)
        assert clickhouse.query("SELECT min(offset), count() FROM events").rows == [(15, 5)]
    finally:
        runner.stop()


class Listing(Sink):
    """Keeps records in a list, and offsets in a dict that several runners share."""

    name: ClassVar[str] = "listing"

    def __init__(self, topics: Sequence[str], store: dict[tuple[str, int], int], seen: list[tuple[int, int]]) -> None:
        self.topics = tuple(topics)
        self.store = store
        self.seen = seen
        self.calls: set[int] = set()

    def open(self) -> None:
        self.calls.add(threading.get_ident())

    def offsets(self) -> Offsets:
        self.calls.add(threading.get_ident())
        return dict(self.store)

    def write(self, batch: Sequence[SinkRecord], offsets: Offsets) -> None:
        self.calls.add(threading.get_ident())
        self.seen.extend((item.record.partition, item.record.offset) for item in batch)
        self.store.update(offsets)

    def close(self) -> None:
        self.calls.add(threading.get_ident())


class Interrupted(Listing):
    """Something is written whenever its runner asks where it stands, which it does amid each rebalance."""

    def __init__(self, topics: Sequence[str], write: Callable[[], None]) -> None:
        super().__init__(topics, {}, [])
        self.written = 0
        self._produce = write

    def offsets(self) -> Offsets:
        if self.store:
            self._produce()
            self.written += 1
        return super().offsets()


def test_a_rebalance_after_the_end_of_a_partition_skips_nothing(kafka: Any) -> None:
    topic, other = kafka.topic("tasks", partitions=2), kafka.topic("tasks", partitions=1)
    producer = transactional(kafka)
    sink = Interrupted([topic], lambda: produce(producer, topic, ["x", "y"], partitions=2))
    group = f"{topic}-group"
    first = runner_for(kafka, sink, group=group, instance=None)
    first.start()
    try:
        produce(producer, topic, [f"a{n}" for n in range(20)], partitions=2)
        assert first.wait_caught_up(30)
        time.sleep(0.5)  # all ends of partitions were heard of
        second = runner_for(kafka, Listing([other], {}, []), group=group, instance=None)
        second.start()
        try:
            assert second.wait_caught_up(40)
        finally:
            second.stop()
        assert first.wait_caught_up(30)
    finally:
        first.stop()
    assert sink.written > 0
    expected = [(partition, offset) for partition, offset, _ in committed_records(kafka, topic, 2)]
    assert sorted(sink.seen) == sorted(expected)


def test_runners_share_partitions_and_hand_them_over(kafka: Any) -> None:
    topic, partitions = kafka.topic("tasks", partitions=6), 6
    producer = transactional(kafka)
    store: dict[tuple[str, int], int] = {}
    seen: list[tuple[int, int]] = []
    group = f"{topic}-group"
    sinks = [Listing([topic], store, seen) for _ in range(2)]
    first, second = (runner_for(kafka, sink, group=group, instance=None) for sink in sinks)
    first.start()
    try:
        produce(producer, topic, [f"a{n}" for n in range(600)], partitions=partitions)
        assert first.wait_caught_up(30)
        second.start()
        deadline = time.monotonic() + 40
        while len(second.lag() or ()) != 3 and time.monotonic() < deadline:
            produce(producer, topic, [f"x{n}" for n in range(6)], partitions=partitions)
            time.sleep(0.05)
        assert (len(first.lag() or ()), len(second.lag() or ())) == (3, 3)
        produce(producer, topic, [f"b{n}" for n in range(600)], partitions=partitions)
        assert first.wait_caught_up(30)
        assert second.wait_caught_up(30)
    finally:
        second.stop()
        first.stop()
    expected = {(partition, offset) for partition, offset, _ in committed_records(kafka, topic, partitions)}
    assert set(seen) == expected
    assert len(seen) == len(expected), "handed over after a flush, so nothing is read twice"
    assert all(len(sink.calls) == 1 for sink in sinks), "a sink is called by one thread only"


def test_large_records_pass_a_small_batch(kafka: Any, clickhouse: ClickHouse) -> None:
    topic = kafka.topic("tasks", config={"max.message.bytes": "8000000"})
    producer = Producer({**kafka.config, "message.max.bytes": 8_000_000})
    for number in range(12):
        producer.produce(topic, **encoded(f"t{number}", size=900_000))
        producer.flush(30)
    runner = runner_for(kafka, ClickHouseSink(clickhouse, [topic]), batch_bytes=2_000_000)
    runner.start()
    try:
        assert runner.wait_caught_up(30)
        assert clickhouse.query("SELECT count(), min(length(payload)) > 900000 FROM events").rows == [(12, 1)]
    finally:
        runner.stop()


def test_no_cluster_is_an_error_that_callers_see(clickhouse: ClickHouse) -> None:
    sink = ClickHouseSink(clickhouse, ["tasks"])
    runner = SinkRunner(sink, codec=CODEC, kafka={"bootstrap.servers": "127.0.0.1:9"})
    runner.start()
    try:
        assert not runner.wait_caught_up(1)
        assert runner.error is None
    finally:
        runner.stop()


def test_a_stopped_runner_leaves_no_thread_behind(kafka: Any, clickhouse: ClickHouse) -> None:
    runner = runner_for(kafka, ClickHouseSink(clickhouse, [kafka.topic("tasks")]))
    runner.start()
    assert runner.wait_caught_up(30)
    runner.stop()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("sink-")]
    with pytest.raises(RuntimeError, match="started already"):
        runner.start()


def test_an_event_of_another_kind_is_no_surprise(kafka: Any, clickhouse: ClickHouse) -> None:
    """Several types share a topic; the sink takes what comes."""
    topic = kafka.topic("mixed")
    producer = transactional(kafka)
    producer.begin_transaction()
    producer.produce(topic, **encoded("t1"))
    failed = StepFailed(task_id="t1", step_id="t1/1", attempt=1, error_type="E", message="m")
    made = CODEC.encode(failed, Metadata("i", "/agents/researcher@1", "t1", _now()))
    producer.produce(topic, key=b"t1", value=made.value, headers=made.headers)
    producer.commit_transaction(30)
    runner = runner_for(kafka, ClickHouseSink(clickhouse, [topic]))
    runner.start()
    try:
        assert runner.wait_caught_up(30)
        assert clickhouse.query("SELECT types, records FROM topics").rows == [(2, 2)]
    finally:
        runner.stop()
