"""Kafka client settings, each with its reason.

In: the base settings (bootstrap.servers and security) from the composition root, a group and a slot. Out: librdkafka
settings for a processor's consumer and transactional producer, for a changelog reader and for a plain producer.
"""

from collections.abc import Mapping
from typing import Any, Final

from confluent_kafka import KafkaError

__all__ = [
    "LEADERLESS",
    "MAX_MESSAGE_BYTES",
    "consumer_settings",
    "guest_settings",
    "instance_id",
    "passes",
    "producer_settings",
    "reader_settings",
    "transactional_ids",
    "transactional_settings",
]

_PASSING: Final = frozenset(
    {
        KafkaError._PARTITION_EOF,
        KafkaError._ALL_BROKERS_DOWN,
        KafkaError._TRANSPORT,
        KafkaError._RESOLVE,
        KafkaError._TIMED_OUT,
        KafkaError.NOT_LEADER_FOR_PARTITION,
        KafkaError.LEADER_NOT_AVAILABLE,
        # Every client of this kind asks for its group's coordinator; one that joins no group needs no right on one.
        KafkaError.GROUP_AUTHORIZATION_FAILED,
    }
)

LEADERLESS: Final = frozenset(
    {
        KafkaError.LEADER_NOT_AVAILABLE,
        KafkaError.NOT_LEADER_FOR_PARTITION,
        KafkaError.FENCED_LEADER_EPOCH,
        KafkaError.UNKNOWN_LEADER_EPOCH,
        KafkaError.OFFSET_NOT_AVAILABLE,  # a new leader does not yet know how far the log was replicated (KIP-207)
        KafkaError.UNKNOWN_TOPIC_OR_PART,
        KafkaError._UNKNOWN_PARTITION,
        KafkaError._UNKNOWN_TOPIC,
        KafkaError._NOENT,  # list_offsets' "No leaders found"
    }
)
"""What a broker says of a topic that was created a moment ago, or of a partition whose leader has just gone."""

MAX_MESSAGE_BYTES: Final = 8_454_144
"""The largest message of any topic: dead-letters' (schemas.topics). Each topic's own limit is held by the processor."""

_COMMON: Final[Mapping[str, Any]] = {
    # The default backs off from 100 ms up to 10 s: a broker's restart would cost seconds after it is back.
    "reconnect.backoff.ms": 20,
    "reconnect.backoff.max.ms": 1000,
    # Idle connections are closed by brokers all the time; that is no news.
    "log.connection.close": False,
}

_STRATEGY: Final = "cooperative-sticky"
"""Only what moves is revoked; the other partitions go on through a rebalance."""

_PRODUCER: Final[Mapping[str, Any]] = {
    **_COMMON,
    # Java's default partitioner: a stock Java client puts a task into the same partition (docs/decisions/0003).
    "partitioner": "murmur2_random",
    # No loss, repeat or reordering through retries.
    "enable.idempotence": True,
    # librdkafka checks sizes before it sends; topics have their own, smaller limits.
    "message.max.bytes": MAX_MESSAGE_BYTES,
    # librdkafka may hold 1 GiB by default; a transaction is far smaller, and many producers share a process.
    "queue.buffering.max.kbytes": 65_536,
    "linger.ms": 5,
    # Avro of similar events shrinks to a third at little cost; the broker stores batches as they come.
    "compression.type": "lz4",
}


def passes(error: KafkaError) -> bool:
    """Whether a consumer gets over it by itself: it reconnects for ever. A partition's end counts too."""
    return bool(error.retriable()) or error.code() in _PASSING


def instance_id(group: str, slot: int | str) -> str:
    """``<group>-<slot>``: the static member's id and the first transactional id, the same after a restart.

    That lets the restarted process fence its own last life at once and get the same partitions back without a
    rebalance, instead of waiting for timeouts.
    """
    return f"{group}-{slot}"


def consumer_settings(
    kafka: Mapping[str, Any], group: str, slot: int | str, *, session_timeout_ms: int = 10_000
) -> dict[str, Any]:
    """The settings of a processor's consumer."""
    return {
        **_COMMON,
        **kafka,
        "group.id": group,
        "group.instance.id": instance_id(group, slot),
        "client.id": instance_id(group, slot),
        "partition.assignment.strategy": _STRATEGY,
        # Offsets go with the transaction, never beside it.
        "enable.auto.commit": False,
        "enable.auto.offset.store": False,
        # Events of open and aborted transactions are not there. It also makes fetching committed offsets wait for
        # open transactions, which a new owner's restore depends on.
        "isolation.level": "read_committed",
        # A new group starts with all that was ever asked for.
        "auto.offset.reset": "earliest",
        # How long a dead process's partitions wait, when it doesn't come back itself.
        "session.timeout.ms": session_timeout_ms,
        "heartbeat.interval.ms": max(100, session_timeout_ms // 4),
        # A long poll; data ends it at once. It bounds how long a newly assigned partition waits for the poll that is
        # under way (one a broker connection).
        "fetch.wait.max.ms": 100,
        # By default a full local queue stops fetching for 1 s, a gap of thousands of events.
        "fetch.queue.backoff.ms": 5,
        # Prefetch of 64 MiB a consumer is the default; many processors live in one process, and 4 MiB hold
        # what a processor does in a tenth of a second.
        "queued.max.messages.kbytes": 4096,
        "queued.min.messages": 10_000,
        # Of one partition in one answer; a larger message comes all the same. Answers of megabytes would keep an
        # urgent record waiting, and are thrown away when their partition is paused.
        "fetch.message.max.bytes": 262_144,
        # A topic that was deleted is noticed at the next look, after 5 minutes by default.
        "topic.metadata.refresh.interval.ms": 10_000,
        # A partition that just lost its leader is asked again quickly.
        "fetch.error.backoff.ms": 50,
        "allow.auto.create.topics": False,
    }


def guest_settings(kafka: Mapping[str, Any], name: str, *, group: str | None = None) -> dict[str, Any]:
    """The settings of a client that looks at a group for ``name``, or, given ``group``, joins that for a moment."""
    # What is wrong with the cluster the processor's own clients say; a new one each time would say it each time.
    settings = {**_COMMON, "log_level": 2, **kafka, "client.id": f"{name}-guest"}
    if group is not None:
        # No static member: it leaves the group when it is closed, and is soon forgotten when it can't.
        settings |= {
            "group.id": group,
            "session.timeout.ms": 6000,
            "partition.assignment.strategy": _STRATEGY,
            "enable.auto.commit": False,
            "allow.auto.create.topics": False,
        }
    return settings


def transactional_ids(group: str, slot: int | str) -> tuple[str, ...]:
    """The transactional ids of a processor, whose producers take turns (:mod:`streams.transactor`)."""
    own = instance_id(group, slot)
    return own, f"{own}/2"


def transactional_settings(
    kafka: Mapping[str, Any], group: str, slot: int | str, transactional_id: str | None = None
) -> dict[str, Any]:
    """The settings of one of a processor's transactional producers; None for the first one."""
    return {
        **_PRODUCER,
        **kafka,
        "transactional.id": transactional_id or transactional_ids(group, slot)[0],
        "client.id": instance_id(group, slot),
        # Records wait until their partition is part of the transaction, and fill a batch meanwhile.
        "linger.ms": 0,
        # A dead producer's open transaction holds up read_committed readers, and the restore of its partitions, at
        # most this long. The default is a minute.
        "transaction.timeout.ms": 10_000,
        # A call that sends offsets ignores its timeout, and waits for ever when the group's coordinator has gone from
        # the cluster's metadata (librdkafka's issues 5456 and 5511): it asks for the new one only when a connection to
        # some other broker changes its state. A connection that is closed for idleness is such a change. The price is
        # that a producer with nothing to do for so long connects again.
        "connections.max.idle.ms": 3_000,
        # librdkafka answers CONCURRENT_TRANSACTIONS, which follows each commit, by waiting this long: with the
        # default of 100 a transaction takes 101 ms, with 1 it takes 3.
        "retry.backoff.ms": 1,
    }


def producer_settings(kafka: Mapping[str, Any], client_id: str) -> dict[str, Any]:
    """The settings of a plain idempotent producer."""
    return {**_PRODUCER, **kafka, "client.id": client_id}


def reader_settings(kafka: Mapping[str, Any], client_id: str) -> dict[str, Any]:
    """The settings of a changelog reader: partitions by hand, nothing committed, end of partition told."""
    return {
        **_COMMON,
        **kafka,
        # Required by the client, but never joined.
        "group.id": client_id,
        "client.id": client_id,
        "enable.auto.commit": False,
        "isolation.level": "read_committed",
        "enable.partition.eof": True,
        "auto.offset.reset": "earliest",
        "fetch.wait.max.ms": 20,
        "fetch.queue.backoff.ms": 5,
        "queued.max.messages.kbytes": 16_384,
    }
