"""A broker that dies while transactions commit: afterwards every partition can be read to its end."""

import contextlib
import threading
import time
from pathlib import Path

from confluent_kafka import IsolationLevel, KafkaException, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, OffsetSpec

from magnatronic.broker import EmbeddedBroker, TopicSpec, create_topics

TOPIC, PARTITIONS, PRODUCERS, CRASHES = "marked", 20, 8, 2
QUIET = {"log_level": 0}


def commit_until_it_fails(producer: Producer) -> None:
    """One transaction after another, each over all partitions, so that most of the time markers are being written."""
    with contextlib.suppress(KafkaException):
        while True:
            producer.begin_transaction()
            for partition in range(PARTITIONS):
                producer.produce(TOPIC, b"x", partition=partition)
            producer.commit_transaction(2)


def transactional(broker: EmbeddedBroker, number: int) -> Producer:
    producer = Producer(
        {
            "bootstrap.servers": broker.bootstrap_servers,
            "transactional.id": f"committer-{number}",
            "retry.backoff.ms": 1,
            "linger.ms": 0,
            **QUIET,
        }
    )
    producer.init_transactions(30)
    return producer


def unreadable(bootstrap_servers: str) -> set[int]:
    """The partitions whose last stable offset is not their end."""
    admin = AdminClient({"bootstrap.servers": bootstrap_servers, **QUIET})
    places = {TopicPartition(TOPIC, partition): OffsetSpec.latest() for partition in range(PARTITIONS)}
    stable, ends = (
        {
            place.partition: future.result().offset
            for place, future in admin.list_offsets(places, isolation_level=level).items()
        }
        for level in (IsolationLevel.READ_COMMITTED, IsolationLevel.READ_UNCOMMITTED)
    )
    return {partition for partition, end in ends.items() if stable[partition] < end}


def test_no_transaction_hangs_after_a_crash_in_its_commit(tmp_path: Path) -> None:
    broker = EmbeddedBroker(tmp_path / "kafka")
    broker.start()
    create_topics({"bootstrap.servers": broker.bootstrap_servers}, [TopicSpec(TOPIC, PARTITIONS)], replication_factor=1)
    for crash in range(CRASHES):
        committing = [
            threading.Thread(target=commit_until_it_fails, args=[transactional(broker, number)])
            for number in range(PRODUCERS)
        ]
        for thread in committing:
            thread.start()
        time.sleep(1.0 + 0.37 * crash)
        broker.kill()
        broker.start()
        for thread in committing:
            thread.join(30)
        # Each producer's heir ends what the dead one left open; what was being committed must be committed.
        heirs = [transactional(broker, number) for number in range(PRODUCERS)]
        deadline = time.monotonic() + 15
        while hanging := unreadable(broker.bootstrap_servers):
            assert time.monotonic() < deadline, f"crash {crash + 1}: partitions {sorted(hanging)} hang"
            time.sleep(0.2)
        del heirs
    broker.stop()
