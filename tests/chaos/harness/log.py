"""Reading what the cluster holds: topics to their end under read_committed, committed offsets, last stable offsets.

In: client settings and topic names. Out: records in the order of their partitions, and numbers. Every read has a bound:
what never comes to an end is itself a finding.
"""

import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

from confluent_kafka import Consumer, IsolationLevel, KafkaError, KafkaException, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, OffsetSpec

from schemas.record import Record
from streams.kafka import reader_settings
from streams.offsets import decode_finished
from tests.chaos.harness.checks import ChaosError

__all__ = ["Committed", "LogView", "Place"]

Place = tuple[str, int]

_QUIET: Final = {"log_level": 0}


class Committed:
    """What a group has put behind it in a partition: all before ``offset``, and some past it."""

    __slots__ = ("_finished_until", "_unfinished", "offset")

    def __init__(self, offset: int, metadata: str) -> None:
        self.offset = max(offset, 0)
        unfinished, self._finished_until = decode_finished(self.offset, metadata)
        self._unfinished = frozenset(unfinished)

    def __contains__(self, offset: int) -> bool:
        return offset < self.offset or (offset < self._finished_until and offset not in self._unfinished)

    def count(self) -> int:
        """How many offsets are done."""
        return max(self.offset, self._finished_until) - len(self._unfinished)


class LogView:
    """A reader of a cluster."""

    def __init__(self, bootstrap_servers: str) -> None:
        self._config: dict[str, Any] = {"bootstrap.servers": bootstrap_servers}
        self._admin = AdminClient({**self._config, **_QUIET})
        self._groups: dict[str, Consumer] = {}

    def topics(self) -> dict[str, int]:
        """Every topic, internal ones too, and its number of partitions."""
        return {name: len(topic.partitions) for name, topic in self._admin.list_topics(timeout=20).topics.items()}

    def committed(self, group: str, places: Iterable[Place], timeout_s: float = 30.0) -> dict[Place, Committed]:
        """The group's committed offsets. It does not wait for open transactions.

        Raises:
            KafkaException: the cluster did not answer in time.
        """
        consumer = self._groups.get(group)
        if consumer is None:
            settings = {**self._config, **_QUIET, "group.id": group, "isolation.level": "read_uncommitted"}
            consumer = self._groups[group] = Consumer(settings)
        asked = [TopicPartition(topic, partition) for topic, partition in places]
        found = {}
        for place in consumer.committed(asked, timeout=timeout_s):
            if place.error is not None:
                raise KafkaException(place.error)
            found[place.topic, place.partition] = Committed(place.offset, place.metadata or "")
        return found

    def assigned_to(self, group: str, instance: str) -> set[Place]:
        """The partitions that a static member of the group has now."""
        described = self._admin.describe_consumer_groups([group], request_timeout=10)[group].result(15)
        return {
            (place.topic, place.partition)
            for member in described.members
            if member.group_instance_id == instance and member.assignment is not None
            for place in member.assignment.topic_partitions
        }

    def hanging(self) -> dict[Place, tuple[int, int]]:
        """The partitions of all topics that can't be read to their end: last stable offset and end of each."""
        places = [TopicPartition(topic, number) for topic, count in self.topics().items() for number in range(count)]
        asked = {place: OffsetSpec.latest() for place in places}
        stable, ends = (
            {
                (place.topic, place.partition): future.result(20).offset
                for place, future in self._admin.list_offsets(asked, isolation_level=level, request_timeout=15).items()
            }
            for level in (IsolationLevel.READ_COMMITTED, IsolationLevel.READ_UNCOMMITTED)
        )
        return {place: (stable[place], end) for place, end in ends.items() if stable[place] < end}

    def wait_readable(self, timeout_s: float) -> float:
        """Wait until every partition can be read to its end; how long that took, in seconds.

        Raises:
            ChaosError: transactions hang.
        """
        started = time.monotonic()
        while hanging := self.hanging():
            if time.monotonic() - started > timeout_s:
                raise ChaosError(f"after {timeout_s:g} s transactions hang (stable offset, end): {hanging}")
            time.sleep(0.2)
        return time.monotonic() - started

    def abort_open(self, transactional_ids: Iterable[str]) -> None:
        """End what dead producers left open, as their heirs will."""
        for transactional_id in transactional_ids:
            heir = Producer({**self._config, **_QUIET, "transactional.id": transactional_id, "retry.backoff.ms": 1})
            heir.init_transactions(60)

    def read(self, topic: str, timeout_s: float = 30.0, *, since: Mapping[int, int] | None = None) -> Iterator[Record]:
        """Every committed record of ``topic``, partitions in turn as they come; ``since`` gives offsets to begin at.

        To be called when nobody writes any more: ``timeout_s`` bounds the wait for something to come.

        Raises:
            ChaosError: nothing came for so long, and it was not the end.
        """
        deadline = time.monotonic() + timeout_s
        consumer = Consumer({**reader_settings(self._config, "chaos-reader"), **_QUIET})
        try:
            waiting = set(consumer.list_topics(topic, timeout=20).topics[topic].partitions)
            consumer.assign([TopicPartition(topic, number, (since or {}).get(number, 0)) for number in waiting])
            while waiting:
                if time.monotonic() > deadline:
                    raise ChaosError(f"{topic}, partitions {sorted(waiting)}: nothing came for {timeout_s:g} s")
                first = consumer.poll(0.2)
                if first is not None:
                    deadline = time.monotonic() + timeout_s
                for message in [] if first is None else [first, *consumer.consume(5000, 0)]:
                    error = message.error()
                    if error is None:
                        yield Record.from_message(message)
                    elif error.code() == KafkaError._PARTITION_EOF:
                        waiting.discard(message.partition())
                    elif not error.retriable():
                        raise KafkaException(error)
        finally:
            consumer.close()

    def close(self) -> None:
        for consumer in self._groups.values():
            consumer.close()
        self._groups.clear()
