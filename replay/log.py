"""Reads the log: the committed records of topics, from their beginning to where they stand when the read starts.

In: librdkafka settings, topics, and the keys of interest. Out: :class:`~schemas.record.Record` values, in offset order
within each partition. Memory is bounded by the client's fetch queue, whatever the length of the log.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Any
from uuid import uuid4

from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, KafkaException, TopicPartition

from replay.errors import LogReadError
from schemas.record import Record

__all__ = ["read_log"]

_BATCH = 1000
_METADATA_TIMEOUT_S = 10.0


def read_log(
    kafka: Mapping[str, Any],
    topics: Collection[str],
    *,
    keys: Collection[bytes] | None = None,
    idle_timeout_s: float = 30.0,
) -> Iterator[Record]:
    """Every committed record of ``topics``, or only those with one of ``keys``, up to each last stable offset.

    ``kafka`` holds librdkafka settings: bootstrap.servers and security. A partition ends where the broker reports its
    end, which under read_committed is the last stable offset; control records leave gaps in the offsets.

    Raises:
        LogReadError: the cluster can't be reached, a topic is missing, or nothing came for ``idle_timeout_s`` seconds.
    """
    consumer = Consumer(
        {
            **kafka,
            "group.id": f"replay-{uuid4()}",  # never joined: partitions are assigned by hand and nothing is committed
            "isolation.level": "read_committed",
            "enable.auto.commit": False,
            "enable.partition.eof": True,
            "auto.offset.reset": "earliest",
            "queued.max.messages.kbytes": 16_384,
        }
    )
    try:
        yield from _read(consumer, topics, keys, idle_timeout_s)
    except KafkaException as error:
        raise LogReadError(f"reading {', '.join(sorted(topics))}: {error.args[0].str()}") from error
    finally:
        consumer.close()


def _read(
    consumer: Consumer, topics: Collection[str], keys: Collection[bytes] | None, idle_timeout_s: float
) -> Iterator[Record]:
    remaining = _partitions(consumer, topics)
    consumer.assign([TopicPartition(topic, partition, OFFSET_BEGINNING) for topic, partition in remaining])
    while remaining:
        first = consumer.poll(idle_timeout_s)  # `consume` by itself would wait until a batch is full
        messages = [] if first is None else [first, *consumer.consume(_BATCH, timeout=0)]
        if not messages:
            waiting = ", ".join(f"{topic}/{partition}" for topic, partition in sorted(remaining))
            raise LogReadError(f"nothing came for {idle_timeout_s:g} s, and these are not at their end: {waiting}")
        for message in messages:
            error = message.error()
            if error is None:
                if keys is None or message.key() in keys:
                    yield Record.from_message(message)
            elif error.code() == KafkaError._PARTITION_EOF:
                remaining.discard((message.topic(), message.partition()))
            # Every consumer asks for its group's coordinator; this one joins no group, and needs no right on one.
            elif not error.retriable() and error.code() != KafkaError.GROUP_AUTHORIZATION_FAILED:
                raise KafkaException(error)


def _partitions(consumer: Consumer, topics: Collection[str]) -> set[tuple[str, int]]:
    known = consumer.list_topics(timeout=_METADATA_TIMEOUT_S).topics
    missing = sorted(set(topics) - known.keys())
    if missing:
        raise LogReadError(
            f"the cluster has no topic {', '.join(missing)}, or hides it from this user: "
            "`magnatronic up` creates the topics, docs/security.md has the rights"
        )
    return {(topic, partition) for topic in topics for partition in known[topic].partitions}
