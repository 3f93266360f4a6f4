"""Kafka as the benchmarks use it: create topics, fill them, watch what is committed, read it back.

In: bootstrap servers. Out: topics, and :class:`Watcher`, which samples how far read_committed readers can see without
reading anything, so that watching costs next to nothing.
"""

import time
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from confluent_kafka import (
    OFFSET_BEGINNING,
    Consumer,
    IsolationLevel,
    KafkaError,
    KafkaException,
    Producer,
    TopicPartition,
)
from confluent_kafka.admin import AdminClient, OffsetSpec

from magnatronic.broker.topics import TopicSpec, create_topics
from schemas.codec import Codec
from schemas.metadata import Envelope
from schemas.record import Record
from schemas.topics import key_of

__all__ = ["Output", "committed_counts", "make_topics", "produce", "read_between", "stable_offsets"]

_DRAIN_TIMEOUT_S = 30.0
_LEADER_TIMEOUT_S = 10.0
_NO_LEADER_YET = (
    KafkaError.NOT_LEADER_FOR_PARTITION,
    KafkaError.LEADER_NOT_AVAILABLE,
    KafkaError.UNKNOWN_TOPIC_OR_PART,
    KafkaError._UNKNOWN_PARTITION,
)


@dataclass(frozen=True, slots=True)
class Output:
    """A record that read_committed readers see."""

    partition: int
    offset: int
    key: bytes
    record: Record


def make_topics(bootstrap_servers: str, names: Iterable[str], partitions: int) -> None:
    """Create the topics that don't exist yet, with LogAppendTime as the platform's have."""
    specs = [TopicSpec(name, partitions, {"message.timestamp.type": "LogAppendTime"}) for name in names]
    create_topics({"bootstrap.servers": bootstrap_servers}, specs, replication_factor=1)


def produce(bootstrap_servers: str, topic: str, envelopes: Iterable[Envelope]) -> int:
    """Write ``envelopes`` to ``topic`` by their record keys; how many there were."""
    producer = Producer(
        {
            "bootstrap.servers": bootstrap_servers,
            "linger.ms": 50,
            "partitioner": "murmur2_random",
            "queue.buffering.max.messages": 1_000_000,
            "enable.idempotence": True,
        }
    )
    codec = Codec()
    failed: list[Any] = []

    def delivered(error: Any, _: Any) -> None:
        if error is not None:
            failed.append(error)

    count = 0
    for envelope in envelopes:
        encoded = codec.encode(envelope.event, envelope.metadata)
        headers: Any = encoded.headers
        producer.produce(topic, encoded.value, key_of(envelope.event), headers=headers, on_delivery=delivered)
        count += 1
        if count % 5000 == 0:
            producer.poll(0)
    left = producer.flush(60)
    if failed or left:
        raise RuntimeError(f"{len(failed) + left} of {count} records were not written to {topic}: {failed[:1]}")
    return count


def stable_offsets(admin: AdminClient, topic: str, partitions: int) -> list[int]:
    """The last stable offset of each partition: what a read_committed reader can reach."""
    wanted = {TopicPartition(topic, number): OffsetSpec.latest() for number in range(partitions)}
    deadline = time.monotonic() + _LEADER_TIMEOUT_S
    while True:
        found = admin.list_offsets(wanted, isolation_level=IsolationLevel.READ_COMMITTED, request_timeout=10)
        try:
            return [found[place].result().offset for place in wanted]
        except KafkaException as error:
            # A topic that was just created has its leaders a moment later.
            if error.args[0].code() not in _NO_LEADER_YET or time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def read_between(bootstrap_servers: str, topic: str, start: Sequence[int], end: Sequence[int]) -> list[Output]:
    """Every record that read_committed readers see from offsets ``start`` up to ``end``, by partition number."""
    consumer = Consumer(
        {
            "bootstrap.servers": bootstrap_servers,
            "group.id": "bench-reader",
            "isolation.level": "read_committed",
            "enable.auto.commit": False,
            "enable.partition.eof": False,
            "fetch.wait.max.ms": 50,
        }
    )
    open_ends = {number: stop for number, stop in enumerate(end) if stop > start[number]}
    outputs: list[Output] = []
    try:
        if open_ends:
            consumer.assign([TopicPartition(topic, number, start[number] or OFFSET_BEGINNING) for number in open_ends])
        deadline = time.monotonic() + _DRAIN_TIMEOUT_S
        while open_ends:
            for message in consumer.consume(5000, timeout=0.1):
                if message.error() is not None:
                    raise RuntimeError(f"reading {topic} failed: {message.error()}")
                if message.offset() < open_ends.get(message.partition(), -1):
                    record = Record.from_message(message)
                    outputs.append(Output(record.partition, record.offset, record.key or b"", record))
            # Control records at the end are never handed out; the position passes them all the same.
            for place in consumer.position([TopicPartition(topic, number) for number in open_ends]):
                if place.offset >= open_ends[place.partition]:
                    del open_ends[place.partition]
            if time.monotonic() > deadline:
                raise RuntimeError(f"{topic} could not be read to its end within {_DRAIN_TIMEOUT_S:g} s: {open_ends}")
    finally:
        consumer.close()
    return outputs


def committed_counts(outputs: Sequence[Output], samples: Sequence[Sequence[int]]) -> list[int]:
    """How many of ``outputs`` lay below each sample of last stable offsets."""
    partitions = len(samples[0]) if samples else 0
    offsets: list[list[int]] = [[] for _ in range(partitions)]
    for output in outputs:
        offsets[output.partition].append(output.offset)
    for one in offsets:
        one.sort()
    return [sum(bisect_left(offsets[number], end) for number, end in enumerate(sample)) for sample in samples]
