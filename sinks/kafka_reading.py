"""What a sink's runner needs of Kafka: its consumer's settings, where partitions end, and which errors stay.

In: librdkafka settings. Out: settings for the consumer, ends of partitions, and :class:`~sinks.errors.LogError` where
trying again does not help.
"""

from collections.abc import Collection, Mapping
from typing import Any, Final

from confluent_kafka import (
    OFFSET_BEGINNING,
    Consumer,
    IsolationLevel,
    KafkaError,
    KafkaException,
    TopicPartition,
)
from confluent_kafka.admin import AdminClient, OffsetSpec

from sinks.errors import LogError

__all__ = ["LogEnds", "Place", "cannot_read", "consumer_settings", "read_from", "stays"]

Place = tuple[str, int]
"""A topic and a partition's number."""

_CONSUMER: Final[Mapping[str, Any]] = {
    "enable.auto.commit": False,
    # The store's offset decides where to start; one that the log doesn't hold must be noticed, not jumped over.
    "auto.offset.reset": "error",
    "isolation.level": "read_committed",
    "enable.partition.eof": True,
    "partition.assignment.strategy": "cooperative-sticky",
    "max.poll.interval.ms": 600_000,
    # One of several consumers in a process: the defaults would let each hold 64 MiB.
    "queued.max.messages.kbytes": 8_192,
    "queued.min.messages": 10_000,
    "fetch.max.bytes": 8_388_608,
    "fetch.wait.max.ms": 100,
    "fetch.error.backoff.ms": 50,
    # A full queue is looked at again after a second by default.
    "fetch.queue.backoff.ms": 10,
    "retry.backoff.ms": 10,
}

_NO_RIGHT: Final = frozenset({KafkaError.TOPIC_AUTHORIZATION_FAILED, KafkaError.GROUP_AUTHORIZATION_FAILED})
_STAYS: Final = frozenset(
    {
        *_NO_RIGHT,
        KafkaError.CLUSTER_AUTHORIZATION_FAILED,
        KafkaError._INVALID_ARG,
    }
)
"""Errors of the cluster that trying again does not mend. A refused login is none: clusters in trouble refuse some."""


def consumer_settings(kafka: Mapping[str, Any], group: str, instance: str | None) -> dict[str, Any]:
    """The settings of a consumer of ``group``; with ``instance`` a static member, ``<group>-<instance>``."""
    settings = {**kafka, **_CONSUMER, "group.id": group, "client.id": group}
    if instance is not None:
        settings["group.instance.id"] = f"{group}-{instance}"
    return settings


def stays(error: KafkaError) -> bool:
    """Whether trying again does not help."""
    return bool(error.fatal()) or error.code() in _STAYS


def cannot_read(sink: str, group: str, what: str, error: KafkaError) -> LogError:
    """What is raised for an error that stays."""
    said = f"sink {sink} can't read {what}: {error.str()}"
    if error.code() in _NO_RIGHT:
        said += f"; its user needs READ on its topics and on group {group} (docs/security.md); nothing is lost"
    return LogError(said)


def read_from(consumer: Consumer, positions: Mapping[Place, int]) -> None:
    """Go on reading at ``positions``; 0 is the beginning.

    seek() is refused for a partition whose offset was out of range, and resume() alone goes wrong: librdkafka counts an
    end-of-partition event as a record, so that after one it would go on one record too far.
    """
    consumer.incremental_unassign([TopicPartition(topic, partition) for topic, partition in positions])
    consumer.incremental_assign(
        [
            TopicPartition(topic, partition, position or OFFSET_BEGINNING)
            for (topic, partition), position in positions.items()
        ]
    )


class LogEnds:
    """Asks where partitions end, open transactions included."""

    def __init__(self, kafka: Mapping[str, Any]) -> None:
        self._kafka = dict(kafka)
        self._admin: AdminClient | None = None

    def of(self, places: Collection[Place]) -> dict[Place, int]:
        """The end of each partition.

        Raises:
            LogError: the cluster doesn't answer; it is retryable.
        """
        if not places:
            return {}
        if self._admin is None:
            self._admin = AdminClient(self._kafka)
        latest = OffsetSpec.latest()
        try:
            futures = self._admin.list_offsets(
                {TopicPartition(topic, partition): latest for topic, partition in places},
                isolation_level=IsolationLevel.READ_UNCOMMITTED,
                request_timeout=10,
            )
            return {(at.topic, at.partition): int(future.result().offset) for at, future in futures.items()}
        except KafkaException as error:
            raise LogError(f"the ends of the topics can't be read: {error.args[0].str()}", retryable=True) from error
