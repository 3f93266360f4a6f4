"""Follows a topic in a thread of its own: what it holds since a time, then what comes. No group, no offsets.

In: librdkafka settings, a topic, and how far back to begin. Out: calls in the thread with the events that decode, each
partition's in their order. What a process has forgotten it reads again when it starts, so a projection of the topic
needs no store. A record may be told twice, after trouble with Kafka.
"""

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any, Final, NamedTuple, Self
from uuid import uuid4

from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, KafkaException, Message, TopicPartition

from schemas.codec import Codec
from schemas.errors import SchemaError, UnavailableError
from schemas.metadata import Envelope
from schemas.record import Record
from streams.kafka import passes, reader_settings

__all__ = ["Heard", "Projection", "Tail", "offsets_since"]

_BATCH: Final = 1000
_POLL_S: Final = 0.1
_RETRY_S: Final = 1.0
_METADATA_S: Final = 3.0
"""Who stops it waits so long at most. What is not answered by then is asked again."""
log = logging.getLogger(__name__)


def offsets_since(
    consumer: Consumer, places: Sequence[TopicPartition], since: timedelta, *, timeout_s: float
) -> list[TopicPartition]:
    """``places`` with the offset of the first record that is no older than ``since``, or the end where none is. Blocks,
    for ``timeout_s`` seconds a question at most.

    Raises:
        KafkaException: the cluster did not answer, or not for every partition.
    """
    since_ms = int((time.time() - since.total_seconds()) * 1000)
    # The ends first: what is appended between the two questions is then found by one of them.
    ends = {
        (place.topic, place.partition): consumer.get_watermark_offsets(place, timeout=timeout_s)[1] for place in places
    }
    asked = [TopicPartition(place.topic, place.partition, since_ms) for place in places]
    found: list[TopicPartition] = consumer.offsets_for_times(asked, timeout=timeout_s)
    for place in found:
        if place.error is not None:
            raise KafkaException(place.error)
        if place.offset < 0:  # no record is that young
            place.offset = ends[place.topic, place.partition]
    return found


class Heard(NamedTuple):
    """An event, and when the broker appended it: milliseconds since the epoch."""

    envelope: Envelope
    at_ms: int


class Tail:
    """Calls ``on_heard`` with the topic's events, those that lie there at once together.

    ``since`` bounds how old the first records are, None begins at the beginning. It waits for a topic that is not
    there, and for brokers that are away, for as long as it takes.
    """

    def __init__(
        self,
        kafka: Mapping[str, Any],
        codec: Codec,
        topic: str,
        on_heard: Callable[[Sequence[Heard]], None],
        *,
        since: timedelta | None = None,
    ) -> None:
        self._kafka = kafka
        self._codec = codec
        self._topic = topic
        self._on_heard = on_heard
        self._since = since
        self._stop = threading.Event()
        self._caught_up = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"{topic} reader", daemon=True)

    @property
    def caught_up(self) -> bool:
        """Whether all that the topic held at the start was told."""
        return self._caught_up.is_set()

    @property
    def stopping(self) -> bool:
        """Whether it was told to stop: a call that is under way may end early then."""
        return self._stop.is_set()

    def wait_caught_up(self, timeout_s: float) -> bool:
        """Wait until it is caught up; whether it is."""
        return self._caught_up.wait(timeout_s)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """Stop; no call is made after it returns."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self._read()
            except KafkaException as error:
                log.info("%s can't be read, and is tried again: %s", self._topic, error.args[0].str())
            except Exception:
                log.exception("%s can't be read, and is tried again", self._topic)
            self._stop.wait(_RETRY_S)

    def _read(self) -> None:
        consumer = Consumer(reader_settings(self._kafka, f"{self._topic}-{uuid4()}"))
        try:
            waiting = self._assign(consumer)
            while not self._stop.is_set():
                first = consumer.poll(_POLL_S)
                heard: list[Heard] = []
                for message in [] if first is None else [first, *consumer.consume(_BATCH - 1, 0)]:
                    error = message.error()
                    if error is None:
                        heard += self._decoded(message)
                    elif error.code() == KafkaError._PARTITION_EOF:
                        waiting.discard(message.partition())
                    elif not passes(error):
                        raise KafkaException(error)
                if heard and not self._stop.is_set():
                    self._on_heard(heard)
                if not waiting:
                    self._caught_up.set()
        finally:
            with suppress(RuntimeError):
                consumer.close()

    def _assign(self, consumer: Consumer) -> set[int]:
        """Begin where ``since`` says; the partitions whose end is not reached yet."""
        topic = consumer.list_topics(self._topic, timeout=_METADATA_S).topics[self._topic]
        if topic.error is not None:
            raise KafkaException(topic.error)
        places = [TopicPartition(self._topic, number, OFFSET_BEGINNING) for number in topic.partitions]
        if self._since is not None:
            places = offsets_since(consumer, places, self._since, timeout_s=_METADATA_S)
        consumer.assign(places)
        return set(topic.partitions)

    def _decoded(self, message: Message) -> list[Heard]:
        record = Record.from_message(message)
        try:
            return [Heard(self._codec.decode(record), record.timestamp_ms)]
        except UnavailableError as error:
            # The bytes may be fine; they are read again when the registry answers.
            raise KafkaException(KafkaError(KafkaError._FAIL, str(error))) from error
        except SchemaError as error:
            log.warning("%s@%s is passed over: %s", self._topic, record.offset, error)
            return []


class Projection(ABC):
    """What a process knows from following a topic: subclasses take its events in and answer from them.

    ``kafka`` holds librdkafka settings; ``since`` is as :class:`Tail` takes it.
    """

    def __init__(self, kafka: Mapping[str, Any], codec: Codec, topic: str, *, since: timedelta | None = None) -> None:
        self._tail = Tail(kafka, codec, topic, self._hear_all, since=since)

    @abstractmethod
    def hear(self, envelope: Envelope, at_ms: int) -> None:
        """Take one event of the topic in; for the reading thread."""

    def _hear_all(self, heard: Sequence[Heard]) -> None:
        for envelope, at_ms in heard:
            self.hear(envelope, at_ms)

    def start(self) -> None:
        """Begin to read."""
        self._tail.start()

    def stop(self) -> None:
        """Stop reading."""
        self._tail.stop()

    def __enter__(self) -> Self:
        """Begins to read."""
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stops reading."""
        self.stop()

    def wait_caught_up(self, timeout_s: float) -> bool:
        """Wait until what the topic held at the start is known; whether it is."""
        return self._tail.wait_caught_up(timeout_s)
