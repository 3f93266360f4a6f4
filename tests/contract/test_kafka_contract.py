"""What Magnatronic relies on from Kafka: the embedded broker always, Apache Kafka's container where Docker is."""

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from confluent_kafka import (
    OFFSET_BEGINNING,
    TIMESTAMP_LOG_APPEND_TIME,
    Consumer,
    KafkaError,
    KafkaException,
    Message,
    Producer,
    TopicPartition,
)
from confluent_kafka.admin import AdminClient, ConfigResource

from magnatronic.broker import EmbeddedBroker, TopicSpec, create_topics
from magnatronic.broker.lock import KAFKA_VERSION
from magnatronic.broker.process import free_ports
from schemas.topics import all_topics
from streams.offsets import METADATA_LIMIT

if TYPE_CHECKING:
    from tests.conftest import KafkaForTests

CHANGELOG = {
    "cleanup.policy": "compact",
    "segment.bytes": str(32 * 1024 * 1024),
    "segment.ms": str(10 * 60 * 1000),
    "min.cleanable.dirty.ratio": "0.1",
}
QUIET = {"log_level": 0}


def _answers(bootstrap_servers: str) -> bool:
    try:
        return bool(
            AdminClient({"bootstrap.servers": bootstrap_servers, "log_level": 0}).list_topics(timeout=1).brokers
        )
    except KafkaException:
        return False


@pytest.fixture(scope="module")
def container(docker_engine: None) -> Iterator[str]:
    """The address of Apache Kafka in a container, by default settings but for the single node."""
    from testcontainers.core.container import DockerContainer

    port = free_ports(1)[0]
    made = DockerContainer(f"apache/kafka:{KAFKA_VERSION}").with_bind_ports(9092, port)
    address = f"{made.get_container_host_ip()}:{port}"
    settings = {
        "KAFKA_NODE_ID": "1",
        "KAFKA_PROCESS_ROLES": "broker,controller",
        "KAFKA_LISTENERS": "PLAINTEXT://:9092,CONTROLLER://:9093",
        "KAFKA_ADVERTISED_LISTENERS": f"PLAINTEXT://{address}",
        "KAFKA_LISTENER_SECURITY_PROTOCOL_MAP": "CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT",
        "KAFKA_CONTROLLER_LISTENER_NAMES": "CONTROLLER",
        "KAFKA_CONTROLLER_QUORUM_VOTERS": "1@localhost:9093",
        "KAFKA_OFFSETS_TOPIC_REPLICATION_FACTOR": "1",
        "KAFKA_TRANSACTION_STATE_LOG_REPLICATION_FACTOR": "1",
        "KAFKA_TRANSACTION_STATE_LOG_MIN_ISR": "1",
        "KAFKA_GROUP_INITIAL_REBALANCE_DELAY_MS": "0",
        "KAFKA_MESSAGE_MAX_BYTES": "8454144",
    }
    for name, value in settings.items():
        made.with_env(name, value)
    with made:
        deadline = time.monotonic() + 90
        while not _answers(address):
            assert time.monotonic() < deadline, made.get_logs()
            time.sleep(0.2)
        yield address


class Cluster:
    """A Kafka to hold the contract against, with unique names and short-lived clients."""

    def __init__(self, config: dict[str, Any], session: "KafkaForTests") -> None:
        self.config = config
        self.unique = session.unique

    def topic(self, prefix: str, partitions: int = 1, config: dict[str, str] | None = None) -> str:
        name = self.unique(prefix)
        settings = {"message.timestamp.type": "LogAppendTime", **(config or {})}
        create_topics(self.config, [TopicSpec(name, partitions, settings)], replication_factor=1)
        return name

    def producer(self, transactional_id: str | None = None, more: Mapping[str, Any] | None = None) -> Producer:
        identity = transactional_id or self.unique("tx")
        settings = {"transactional.id": identity, "transaction.timeout.ms": 10_000, "retry.backoff.ms": 1}
        producer = Producer({**self.config, "log_level": 2, **settings, **(more or {})})
        producer.init_transactions(30)
        return producer

    def consumer(
        self, group: str | None = None, isolation: str = "read_committed", more: Mapping[str, Any] | None = None
    ) -> Consumer:
        settings = {"group.id": group or self.unique("group"), "isolation.level": isolation, **(more or {})}
        return Consumer(
            {
                **self.config,
                "log_level": 2,
                "enable.auto.commit": False,
                "auto.offset.reset": "earliest",
                "fetch.wait.max.ms": 50,
                **settings,
            }
        )

    def read(self, topic: str, isolation: str = "read_committed") -> list[Message]:
        """Everything in partition 0 that a reader of this isolation level may see now."""
        consumer = self.consumer(isolation=isolation, more={"enable.partition.eof": True})
        try:
            consumer.assign([TopicPartition(topic, 0, OFFSET_BEGINNING)])
            found = []
            deadline = time.monotonic() + 20
            while time.monotonic() < deadline:
                message = consumer.poll(1)
                if message is None:
                    continue
                error = message.error()
                if error is None:
                    found.append(message)
                elif error.code() == KafkaError._PARTITION_EOF:
                    return found
                else:
                    raise KafkaException(error)
            raise AssertionError(f"the end of {topic} was not reached")
        finally:
            consumer.close()

    def join(self, group: str, topic: str) -> Consumer:
        """A member of ``group`` that has its partitions."""
        consumer = self.consumer(group, more={"session.timeout.ms": 6000})
        consumer.subscribe([topic])
        deadline = time.monotonic() + 20
        while not consumer.assignment():
            assert time.monotonic() < deadline, "no assignment"
            consumer.poll(0.1)
        return consumer

    def committed(self, group: str, topic: str) -> TopicPartition:
        consumer = self.consumer(group)
        try:
            return consumer.committed([TopicPartition(topic, 0)], timeout=20)[0]
        finally:
            consumer.close()


@pytest.fixture(params=["embedded", pytest.param("container", marks=pytest.mark.docker)])
def cluster(request: pytest.FixtureRequest, kafka: "KafkaForTests") -> Cluster:
    if request.param == "embedded":
        return Cluster(kafka.config, kafka)
    return Cluster({"bootstrap.servers": request.getfixturevalue("container")}, kafka)


def _values(messages: list[Message]) -> list[bytes | None]:
    return [message.value() for message in messages]


def _send_offsets_and_commit(producer: Producer, offsets: list[TopicPartition], metadata: Any) -> None:
    producer.send_offsets_to_transaction(offsets, metadata, 20)
    producer.commit_transaction(20)


def test_a_transaction_is_seen_whole_or_not_at_all(cluster: Cluster) -> None:
    one, two = cluster.topic("one"), cluster.topic("two")
    producer = cluster.producer()
    producer.begin_transaction()
    producer.produce(one, b"a")
    producer.produce(two, b"b")
    producer.flush(20)
    assert _values(cluster.read(one, "read_uncommitted")) == [b"a"]
    assert _values(cluster.read(one)) == []
    producer.commit_transaction(20)
    assert _values(cluster.read(one)) == [b"a"]
    assert _values(cluster.read(two)) == [b"b"]

    producer.begin_transaction()
    producer.produce(one, b"never")
    producer.produce(two, b"never")
    producer.flush(20)
    producer.abort_transaction(20)
    assert _values(cluster.read(one)) == [b"a"]
    assert _values(cluster.read(two)) == [b"b"]


def test_the_last_stable_offset_stands_before_an_open_transaction(cluster: Cluster) -> None:
    """Restore reads a changelog up to here, and must neither wait for, nor read past, what is still open."""
    topic = cluster.topic("changelog", config=CHANGELOG)
    open_one, quick = cluster.producer(), cluster.producer()
    quick.begin_transaction()
    quick.produce(topic, b"v", b"k")
    quick.commit_transaction(20)
    open_one.begin_transaction()
    open_one.produce(topic, b"open", b"k")
    open_one.flush(20)
    consumer = cluster.consumer()
    try:
        _, stable = consumer.get_watermark_offsets(TopicPartition(topic, 0), timeout=20)
        open_one.commit_transaction(20)
        # The commit returns when it is decided; the markers are written right after.
        deadline = time.monotonic() + 20
        while (afterwards := consumer.get_watermark_offsets(TopicPartition(topic, 0), timeout=20)[1]) == stable:
            assert time.monotonic() < deadline
    finally:
        consumer.close()
    assert stable == 2  # the record and its commit marker
    assert afterwards == 4


def test_log_append_time_overrules_the_producers_clock(cluster: Cluster) -> None:
    topic = cluster.topic("times")
    producer = Producer({**cluster.config, "log_level": 2})
    before = time.time() * 1000
    for number in range(5):
        producer.produce(topic, str(number).encode(), timestamp=1000)
        producer.flush(20)
    kinds, times = zip(*(message.timestamp() for message in cluster.read(topic)), strict=True)
    assert set(kinds) == {TIMESTAMP_LOG_APPEND_TIME}
    assert list(times) == sorted(times)
    assert before - 1000 <= times[0] <= time.time() * 1000 + 1000


def test_offsets_commit_with_the_output_and_not_without_it(cluster: Cluster) -> None:
    source, target = cluster.topic("source"), cluster.topic("target")
    group = cluster.unique("group")
    consumer = cluster.join(group, source)
    producer = cluster.producer()
    try:
        for ends, offset in (("abort", 3), ("commit", 5)):
            producer.begin_transaction()
            producer.produce(target, ends.encode())
            producer.send_offsets_to_transaction(
                [TopicPartition(source, 0, offset)], consumer.consumer_group_metadata(), 20
            )
            if ends == "abort":
                producer.abort_transaction(20)
                assert cluster.committed(group, source).offset < 0
            else:
                producer.commit_transaction(20)
        assert cluster.committed(group, source).offset == 5
        assert _values(cluster.read(target)) == [b"commit"]
    finally:
        consumer.close()


def test_a_stale_member_is_fenced_by_its_offsets_and_only_by_them(cluster: Cluster) -> None:
    """Why every transaction sends offsets: after a rebalance the old owner's commit must fail."""
    source, target = cluster.topic("source"), cluster.topic("target")
    group = cluster.unique("group")
    old = cluster.join(group, source)
    stale = old.consumer_group_metadata()
    old.close()
    new = cluster.join(group, source)
    producer = cluster.producer()
    try:
        producer.begin_transaction()
        producer.produce(target, b"zombie")
        with pytest.raises(KafkaException) as caught:
            _send_offsets_and_commit(producer, [TopicPartition(source, 0, 9)], stale)
        error = caught.value.args[0]
        assert error.code() in (
            KafkaError.UNKNOWN_MEMBER_ID,
            KafkaError.ILLEGAL_GENERATION,
            KafkaError.FENCED_INSTANCE_ID,
        )
        assert error.txn_requires_abort()
        producer.abort_transaction(20)
        assert _values(cluster.read(target)) == []
        assert cluster.committed(group, source).offset < 0

        producer.begin_transaction()
        producer.produce(target, b"without offsets")
        producer.commit_transaction(20)
        assert _values(cluster.read(target)) == [b"without offsets"]
    finally:
        new.close()


def test_a_second_producer_of_the_same_id_fences_the_first(cluster: Cluster) -> None:
    target = cluster.topic("target")
    identity = cluster.unique("slot")
    first = cluster.producer(identity)
    first.begin_transaction()
    first.produce(target, b"first")
    first.flush(20)
    second = cluster.producer(identity)
    with pytest.raises(KafkaException) as caught:
        first.commit_transaction(20)
    assert caught.value.args[0].fatal()
    second.begin_transaction()
    second.produce(target, b"second")
    second.commit_transaction(20)
    assert _values(cluster.read(target)) == [b"second"]


def test_offset_metadata_comes_back_up_to_its_limit(cluster: Cluster) -> None:
    source = cluster.topic("source")
    group = cluster.unique("group")
    consumer = cluster.join(group, source)
    producer = cluster.producer()
    full = "".join(chr(33 + number % 90) for number in range(METADATA_LIMIT))
    try:
        producer.begin_transaction()
        offsets = [TopicPartition(source, 0, 7, full)]
        producer.send_offsets_to_transaction(offsets, consumer.consumer_group_metadata(), 20)
        producer.commit_transaction(20)
        found = cluster.committed(group, source)
        assert (found.offset, found.metadata) == (7, full)

        producer.begin_transaction()
        offsets = [TopicPartition(source, 0, 8, full + "x")]
        with pytest.raises(KafkaException) as caught:
            _send_offsets_and_commit(producer, offsets, consumer.consumer_group_metadata())
        assert caught.value.args[0].code() == KafkaError.OFFSET_METADATA_TOO_LARGE
        producer.abort_transaction(20)
        assert cluster.committed(group, source).offset == 7
    finally:
        consumer.close()


def test_reading_committed_offsets_waits_for_an_open_transaction(cluster: Cluster) -> None:
    """Else a new owner would start from offsets that its predecessor's commit is about to move."""
    source = cluster.topic("source")
    group = cluster.unique("group")
    consumer = cluster.join(group, source)
    producer = cluster.producer()
    reader = cluster.consumer(group)
    try:
        producer.begin_transaction()
        metadata = consumer.consumer_group_metadata()
        producer.send_offsets_to_transaction([TopicPartition(source, 0, 4)], metadata, 20)
        with pytest.raises(KafkaException) as caught:
            reader.committed([TopicPartition(source, 0)], timeout=1)
        assert caught.value.args[0].code() in (KafkaError._TIMED_OUT, KafkaError.UNSTABLE_OFFSET_COMMIT)
        producer.commit_transaction(20)
        assert reader.committed([TopicPartition(source, 0)], timeout=20)[0].offset == 4
    finally:
        reader.close()
        consumer.close()


def test_a_changelogs_settings_are_taken(cluster: Cluster) -> None:
    topic = cluster.topic("changelog", config=CHANGELOG)
    admin = AdminClient({**cluster.config, "log_level": 2})
    answer = next(iter(admin.describe_configs([ConfigResource(ConfigResource.Type.TOPIC, topic)]).values())).result(20)
    assert {name: answer[name].value for name in CHANGELOG} == CHANGELOG


def test_the_largest_dead_letter_fits(cluster: Cluster) -> None:
    limit = max(topic.max_message_bytes for topic in all_topics().values())
    topic = cluster.topic("dead-letters", config={"max.message.bytes": str(limit)})
    producer = cluster.producer(more={"message.max.bytes": limit})
    value = bytes(8 * 1024 * 1024)
    producer.begin_transaction()
    producer.produce(topic, value)
    producer.commit_transaction(20)
    assert [len(found or b"") for found in _values(cluster.read(topic))] == [len(value)]


def test_what_is_committed_survives_a_crash_of_the_broker(tmp_path: Path, kafka: "KafkaForTests") -> None:
    """Embedded only: nobody SIGKILLs the container. An open transaction's records must not come back as committed."""
    broker = EmbeddedBroker(tmp_path / "kafka").start()
    try:
        before = Cluster({"bootstrap.servers": broker.bootstrap_servers}, kafka)
        topic = before.topic("kept")
        open_one, quick = before.producer("open", QUIET), before.producer("quick", QUIET)
        quick.begin_transaction()
        quick.produce(topic, b"committed")
        quick.commit_transaction(20)
        open_one.begin_transaction()
        open_one.produce(topic, b"open")
        open_one.flush(20)
        broker.kill()
        open_one.purge()
        del open_one, quick

        broker.start()
        after = Cluster({"bootstrap.servers": broker.bootstrap_servers}, kafka)
        # The same slot starts again, which ends what its crashed self left open.
        after.producer("open", QUIET)
        assert _values(after.read(topic)) == [b"committed"]
    finally:
        broker.stop()
