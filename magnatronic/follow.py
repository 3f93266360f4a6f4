"""Follows the log live: one consumer for any number of readers.

In: librdkafka settings and topics. Out: to each subscription, the committed records it asked for, decoded, in the order
of each partition. The consumer starts at offsets that were read beforehand, so whatever is produced after
:meth:`Follower.start` has returned is seen: a caller who subscribes first and submits then misses nothing.
"""

import logging
import queue
import threading
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, Self
from uuid import uuid4

from confluent_kafka import OFFSET_BEGINNING, Consumer, IsolationLevel, KafkaError, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient, OffsetSpec

from magnatronic.errors import ClusterError
from schemas.codec import Codec
from schemas.errors import SchemaError
from schemas.events import Event
from schemas.metadata import Metadata
from schemas.record import Record
from streams.kafka import passes

__all__ = ["KAFKA_LOGGER", "Follower", "Observed", "Subscription", "consumer_settings", "observe", "read_stored"]

KAFKA_LOGGER: Final = logging.getLogger("magnatronic.kafka")
"""What librdkafka has to say; without it, it writes to standard error."""

_POLL_S: Final = 0.1
_BATCH: Final = 1000
_METADATA_TIMEOUT_S: Final = 10.0


@dataclass(frozen=True, slots=True)
class Observed:
    """A record of the log as a person watches it.

    ``event`` and ``metadata`` are None, and ``error`` says why, where the bytes don't decode. ``time`` is the broker's
    append time.
    """

    topic: str
    partition: int
    offset: int
    time: datetime
    key: str
    event: Event | None
    metadata: Metadata | None
    error: str = ""

    @property
    def type(self) -> str:
        """The event's type, such as ``StepAssigned``; ``?`` where the bytes don't decode."""
        return "?" if self.event is None else type(self.event).__name__

    def as_dict(self) -> dict[str, Any]:
        """The record as JSON can hold it."""
        return {
            "topic": self.topic,
            "partition": self.partition,
            "offset": self.offset,
            "time": self.time.isoformat(),
            "key": self.key,
            "type": self.type,
            "id": "" if self.metadata is None else self.metadata.id,
            "source": "" if self.metadata is None else self.metadata.source,
            "causation_id": "" if self.metadata is None else self.metadata.causation_id,
            "event": None if self.event is None else self.event.model_dump(mode="json"),
            "error": self.error,
        }


def observe(record: Record, codec: Codec) -> Observed:
    """``record``, decoded where it can be."""
    try:
        envelope = codec.decode(record)
        event, metadata, error = envelope.event, envelope.metadata, ""
    except SchemaError as failure:
        event, metadata, error = None, None, str(failure)
    return Observed(
        record.topic,
        record.partition,
        record.offset,
        datetime.fromtimestamp(record.timestamp_ms / 1000, UTC),
        (record.key or b"").decode(errors="replace"),
        event,
        metadata,
        error,
    )


def consumer_settings(kafka: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a consumer that is assigned by hand, commits nothing, and sees committed records only."""
    return {
        **kafka,
        "group.id": f"client-{uuid4()}",  # librdkafka wants one; it is never joined
        "isolation.level": "read_committed",
        "enable.auto.commit": False,
        "auto.offset.reset": "earliest",
        "fetch.wait.max.ms": 50,
        "queued.max.messages.kbytes": 16_384,
        "log_level": 2,
    }


def _partitions(consumer: Consumer, topics: Collection[str]) -> list[TopicPartition]:
    try:
        known = consumer.list_topics(timeout=_METADATA_TIMEOUT_S).topics
    except KafkaException as error:
        raise ClusterError(f"no answer from Kafka: {error.args[0].str()}") from error
    missing = sorted(set(topics) - known.keys())
    if missing:
        raise ClusterError(
            f"the cluster has no topic {', '.join(missing)}, or hides it from this user: "
            "`magnatronic up` creates the topics, docs/security.md has the rights"
        )
    return [TopicPartition(topic, number) for topic in sorted(topics) for number in sorted(known[topic].partitions)]


class Subscription:
    """One reader's share of what a follower sees: records with one of ``keys``, or all where it is None."""

    def __init__(self, follower: "Follower", topics: Collection[str], keys: Collection[bytes] | None) -> None:
        self.topics = frozenset(topics)
        self.keys = None if keys is None else frozenset(keys)
        self._follower = follower
        self._records: queue.SimpleQueue[Record | ClusterError] = queue.SimpleQueue()

    def put(self, item: Record | ClusterError) -> None:
        """Called by the follower's thread."""
        self._records.put(item)

    def next(self, timeout: float) -> Observed | None:
        """The next record, or None when none came within ``timeout`` seconds.

        Raises:
            ClusterError: the follower has failed.
        """
        record = self.next_record(timeout)
        return None if record is None else observe(record, self._follower.codec)

    def next_record(self, timeout: float) -> Record | None:
        """As :meth:`next`, without decoding."""
        try:
            item = self._records.get(timeout=max(timeout, 0.0))
        except queue.Empty:
            return None
        if isinstance(item, ClusterError):
            raise item
        return item

    def close(self) -> None:
        """No more records, please."""
        self._follower.unsubscribe(self)

    def __enter__(self) -> Self:
        """Nothing to do: it is subscribed since it was made."""
        return self

    def __exit__(self, *_: object) -> None:
        """Unsubscribes."""
        self.close()


class Follower:
    """A thread with one consumer at the end of ``topics``, feeding any number of subscriptions."""

    def __init__(self, kafka: Mapping[str, Any], topics: Collection[str], codec: Codec) -> None:
        self.codec = codec
        self._kafka = kafka
        self._topics = frozenset(topics)
        self._lock = threading.Lock()
        self._by_key: dict[bytes, list[Subscription]] = defaultdict(list)
        self._of_all: list[Subscription] = []
        self._stop = threading.Event()
        self._failure: ClusterError | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> Self:
        """Fix where to read from, and read from there on.

        Raises:
            ClusterError: the cluster can't be reached, or lacks a topic.
        """
        consumer = Consumer(consumer_settings(self._kafka), logger=KAFKA_LOGGER)
        try:
            consumer.assign(_ends(self._kafka, _partitions(consumer, self._topics)))
        except BaseException:
            consumer.close()
            raise
        self._thread = threading.Thread(target=self._run, args=(consumer,), name="log follower", daemon=True)
        self._thread.start()
        return self

    def subscribe(
        self, *, topics: Collection[str] | None = None, keys: Collection[bytes] | None = None
    ) -> Subscription:
        """From now on, records of ``topics`` (default: all that are followed) with one of ``keys`` (default: any)."""
        subscription = Subscription(self, self._topics if topics is None else topics, keys)
        with self._lock:
            if self._failure is not None:
                raise self._failure
            if subscription.keys is None:
                self._of_all.append(subscription)
            else:
                for key in subscription.keys:
                    self._by_key[key].append(subscription)
        return subscription

    def unsubscribe(self, subscription: Subscription) -> None:
        """Forget ``subscription``."""
        with self._lock:
            if subscription in self._of_all:
                self._of_all.remove(subscription)
            for key in subscription.keys or ():
                left = [other for other in self._by_key.get(key, ()) if other is not subscription]
                if left:
                    self._by_key[key] = left
                else:
                    self._by_key.pop(key, None)

    def close(self) -> None:
        """Stop reading."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self, consumer: Consumer) -> None:
        try:
            while not self._stop.is_set():
                for message in _poll(consumer):
                    error = message.error()
                    if error is None:
                        self._dispatch(message)
                    elif not passes(error):
                        raise KafkaException(error)
        except KafkaException as error:
            self._fail(ClusterError(f"following the log: {error.args[0].str()}"))
        finally:
            consumer.close()

    def _dispatch(self, message: Any) -> None:
        with self._lock:
            readers = self._by_key.get(message.key()) or ()
            if readers or self._of_all:
                record = Record.from_message(message)
                for subscription in (*readers, *self._of_all):
                    if record.topic in subscription.topics:
                        subscription.put(record)

    def _fail(self, failure: ClusterError) -> None:
        with self._lock:
            self._failure = failure
            everyone = {*self._of_all, *(reader for readers in self._by_key.values() for reader in readers)}
        for subscription in everyone:
            subscription.put(failure)


def read_stored(
    kafka: Mapping[str, Any], topics: Collection[str], *, accept: Callable[[Any], bool], then: bool = False
) -> Iterator[Record | None]:
    """Committed records of ``topics`` from their beginning, where ``accept(message)``; None once the end was reached.

    With ``then`` it goes on after the end, yielding None whenever nothing comes for a moment; otherwise it ends there.

    Raises:
        ClusterError: the cluster can't be reached, or lacks a topic.
    """
    consumer = Consumer({**consumer_settings(kafka), "enable.partition.eof": True}, logger=KAFKA_LOGGER)
    try:
        waiting = {(place.topic, place.partition) for place in _partitions(consumer, topics)}
        consumer.assign([TopicPartition(topic, number, OFFSET_BEGINNING) for topic, number in waiting])
        caught_up = False
        while True:
            messages = _poll(consumer)
            for message in messages:
                error = message.error()
                if error is None:
                    if accept(message):
                        yield Record.from_message(message)
                elif error.code() == KafkaError._PARTITION_EOF:
                    waiting.discard((message.topic(), message.partition()))
                elif not passes(error):
                    raise ClusterError(f"reading the log: {error.str()}")
            if not waiting and (not caught_up or not messages):
                caught_up = True
                yield None
                if not then:
                    return
    finally:
        consumer.close()


def _poll(consumer: Consumer) -> list[Any]:
    """What there is, after a wait for the first message only: ``consume`` by itself waits for a full batch."""
    first = consumer.poll(_POLL_S)
    return [] if first is None else [first, *consumer.consume(_BATCH, timeout=0)]


def _ends(kafka: Mapping[str, Any], places: list[TopicPartition]) -> list[TopicPartition]:
    """``places`` with the offsets where each ends now; one request, however many there are."""
    admin = AdminClient(dict(kafka), logger=KAFKA_LOGGER)
    asked = admin.list_offsets(
        {TopicPartition(place.topic, place.partition): OffsetSpec.latest() for place in places},
        isolation_level=IsolationLevel.READ_COMMITTED,
        request_timeout=_METADATA_TIMEOUT_S,
    )
    try:
        return [TopicPartition(place.topic, place.partition, future.result().offset) for place, future in asked.items()]
    except KafkaException as error:
        raise ClusterError(f"no answer from Kafka: {error.args[0].str()}") from error
