"""Reads topic ``dead-letters``: every letter, what became of it, and the record that it is about.

In: librdkafka settings. Out: :class:`Entry` values, small enough to hold them all, and whole letters one at a time. A
letter that could not hold its record has it read from the topic that it came from.
"""

import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Final, cast

from confluent_kafka import OFFSET_BEGINNING, Consumer, IsolationLevel, KafkaError, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient, OffsetSpec

from magnatronic.errors import ClusterError, WrongInputError
from magnatronic.follow import KAFKA_LOGGER, consumer_settings
from schemas.codec import Codec
from schemas.errors import SchemaError
from schemas.events import DeadLettered, DeadLetterResolved
from schemas.metadata import Metadata
from schemas.record import Record
from schemas.topics import topic_of
from streams.kafka import passes

__all__ = ["DEAD_LETTERS", "Entry", "Filter", "Letter", "LetterReader", "Place", "find"]

DEAD_LETTERS: Final = topic_of(DeadLettered).name

_POLL_S: Final = 0.2
_TIMEOUT_S: Final = 30.0
_SHORT_ID: Final = 8
_SHORTEST_ID: Final = 4
_ERROR_KEPT: Final = 400


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """Whose dead letter of which record: what identifies a letter. As text ``topic:partition:offset@agent``."""

    topic: str
    partition: int
    offset: int
    agent: str

    def __str__(self) -> str:
        return f"{self.topic}:{self.partition}:{self.offset}@{self.agent}"

    @classmethod
    def parse(cls, text: str) -> "Place | None":
        """The place that ``text`` names, or None where it names none."""
        where, at, agent = text.partition("@")
        topic, *numbers = where.split(":")
        if not (at and agent and topic and len(numbers) == 2 and all(number.isdecimal() for number in numbers)):
            return None
        return cls(topic, int(numbers[0]), int(numbers[1]), agent)


@dataclass(frozen=True, slots=True)
class Entry:
    """A dead letter without the record.

    ``time`` is when it was written; ``partition`` and ``offset`` say where in ``dead-letters`` it lies, ``kept``
    whether the record is in it. ``resolved`` is how it was dealt with last, None while it is open; ``resolutions``
    counts how often it was.
    """

    id: str
    place: Place
    time: datetime
    error_type: str
    error: str
    attempts: int
    partition: int
    offset: int
    kept: bool
    correlation_id: str = ""
    resolved: DeadLetterResolved | None = None
    resolved_at: datetime | None = None
    resolutions: int = 0

    @property
    def short_id(self) -> str:
        """What commands take for it: the first digits of the letter's event id."""
        return self.id[:_SHORT_ID]

    def as_dict(self) -> dict[str, Any]:
        """The entry as JSON can hold it."""
        return {
            "id": self.short_id,
            "event_id": self.id,
            "place": str(self.place),
            "time": self.time.isoformat(),
            "agent": self.place.agent,
            "source_topic": self.place.topic,
            "source_partition": self.place.partition,
            "source_offset": self.place.offset,
            "error_type": self.error_type,
            "error": self.error,
            "attempts": self.attempts,
            "resolution": None
            if self.resolved is None
            else {
                "resolution": self.resolved.resolution.value,
                "resolved_by": self.resolved.resolved_by,
                "reason": self.resolved.reason,
                "time": None if self.resolved_at is None else self.resolved_at.isoformat(),
                "times": self.resolutions,
            },
        }


@dataclass(frozen=True, slots=True)
class Filter:
    """Which letters are meant; a field that is None or empty takes all. ``error`` is the error's type, or a part of the
    message, in any case of letters. ``since`` is an aware time.
    """

    agent: str = ""
    topic: str = ""
    error: str = ""
    since: datetime | None = None

    def __call__(self, entry: Entry) -> bool:
        """Whether ``entry`` is meant."""
        said = f"{entry.error_type}\n{entry.error}".casefold()
        return (
            (not self.agent or entry.place.agent == self.agent)
            and (not self.topic or entry.place.topic == self.topic)
            and (not self.error or self.error.casefold() in said)
            and (self.since is None or entry.time >= self.since)
        )


@dataclass(frozen=True, slots=True)
class Letter:
    """A dead letter whole. ``record`` is the record as it was, raw; None where the letter does not hold it and the
    source topic has it no more.
    """

    entry: Entry
    event: DeadLettered
    metadata: Metadata
    record: Record | None


def find(entries: Sequence[Entry], text: str) -> Entry:
    """The letter that ``text`` names: the first digits of its event id (four at least), or its place.

    Raises:
        WrongInputError: there is none, or several.
    """
    if (place := Place.parse(text)) is not None:
        found = [entry for entry in entries if entry.place == place]
    else:
        found = [entry for entry in entries if len(text) >= _SHORTEST_ID and entry.id.startswith(text.lower())]
    if not found:
        raise WrongInputError(f"there is no dead letter {text}; `magnatronic dlq list` shows those that are open")
    if len(found) > 1:
        places = ", ".join(str(entry.place) for entry in found[:3])
        raise WrongInputError(f"{text} is the beginning of {len(found)} ids: {places}; say it in full")
    return found[0]


class LetterReader:
    """Reads the dead letters of a cluster. ``kafka`` holds librdkafka settings."""

    def __init__(self, kafka: Mapping[str, Any], codec: Codec) -> None:
        self._kafka = dict(kafka)
        self._codec = codec

    def entries(self) -> list[Entry]:
        """Every letter, oldest first, with what became of it. What is committed when it is called is in it.

        Raises:
            ClusterError: the cluster can't be reached, or has no such topic.
        """
        found: dict[Place, Entry] = {}
        for record in self._read():
            try:
                envelope = self._codec.decode(record)
            except SchemaError as error:
                KAFKA_LOGGER.warning("%s[%d]@%d: %s", record.topic, record.partition, record.offset, error)
                continue
            event = envelope.event
            if isinstance(event, DeadLettered):
                entry = _entry(record, envelope.metadata, event)
                # Written again for the same record (its group went back to it), the letter is open again.
                if (earlier := found.pop(entry.place, None)) is not None:
                    entry = replace(entry, resolutions=earlier.resolutions)
                found[entry.place] = entry
            elif isinstance(event, DeadLetterResolved):
                place = Place(event.source_topic, event.source_partition, event.source_offset, event.agent)
                if (entry_ := found.get(place)) is not None:
                    found[place] = replace(
                        entry_, resolved=event, resolved_at=_time(record), resolutions=entry_.resolutions + 1
                    )
        return list(found.values())

    def _read(self) -> Iterator[Record]:
        """All that is in ``dead-letters`` now. A transaction that is open is waited for: what was committed after it
        was begun would not be seen yet.
        """
        with self._consumer(eof=True) as consumer:
            ends = self._ends(consumer)
            waiting = {number for number, end in ends.items() if end > 0}
            consumer.assign([TopicPartition(DEAD_LETTERS, number, OFFSET_BEGINNING) for number in waiting])
            deadline = time.monotonic() + _TIMEOUT_S
            while waiting:
                for message in _poll(consumer):
                    error = message.error()
                    deadline = time.monotonic() + _TIMEOUT_S if error is None else deadline
                    if error is None:
                        yield Record.from_message(message)
                    elif error.code() != KafkaError._PARTITION_EOF:
                        _raise_unless_passing(error)
                    elif message.offset() >= ends[message.partition()]:
                        waiting.discard(message.partition())
                if time.monotonic() > deadline:
                    raise ClusterError(f"{DEAD_LETTERS} did not come to its end in {_TIMEOUT_S:g} s; is a broker down?")

    @contextmanager
    def _consumer(self, *, eof: bool) -> Iterator[Consumer]:
        consumer = Consumer({**consumer_settings(self._kafka), "enable.partition.eof": eof}, logger=KAFKA_LOGGER)
        try:
            yield consumer
        except KafkaException as error:
            raise ClusterError(f"dead letters can't be read: {error.args[0].str()}") from error
        finally:
            consumer.close()

    def partitions(self, topics: Collection[str]) -> dict[str, Collection[int]]:
        """The partitions of each topic, none where the cluster has no such topic.

        Raises:
            ClusterError: the cluster can't be reached.
        """
        with self._consumer(eof=False) as consumer:
            known = consumer.list_topics(timeout=_TIMEOUT_S).topics
        return {topic: known[topic].partitions.keys() if topic in known else () for topic in topics}

    def _ends(self, consumer: Consumer) -> dict[int, int]:
        topic = consumer.list_topics(timeout=_TIMEOUT_S).topics.get(DEAD_LETTERS)
        if topic is None:
            raise ClusterError(
                f"the cluster has no topic {DEAD_LETTERS}, or hides it from this user: "
                "`magnatronic up` creates the topics, docs/security.md has the rights"
            )
        admin = AdminClient(self._kafka, logger=KAFKA_LOGGER)
        asked = admin.list_offsets(
            {TopicPartition(DEAD_LETTERS, number): OffsetSpec.latest() for number in topic.partitions},
            isolation_level=IsolationLevel.READ_UNCOMMITTED,
            request_timeout=_TIMEOUT_S,
        )
        return {place.partition: future.result().offset for place, future in asked.items()}

    def whole(self, entry: Entry) -> Letter:
        """The whole letter.

        Raises:
            ClusterError: it can't be read.
        """
        return next(self.letters([entry]))

    def letters(self, entries: Collection[Entry]) -> Iterator[Letter]:
        """The whole letters of ``entries``, in the order of the log.

        Raises:
            ClusterError: one can't be read.
        """
        wanted = {(entry.partition, entry.offset): entry for entry in entries}
        starts: dict[int, int] = {}
        for partition, offset in wanted:
            starts[partition] = min(offset, starts.get(partition, offset))
        with self._consumer(eof=False) as consumer:
            consumer.assign([TopicPartition(DEAD_LETTERS, partition, offset) for partition, offset in starts.items()])
            deadline = time.monotonic() + _TIMEOUT_S
            while wanted:
                for message in _poll(consumer):
                    if (error := message.error()) is not None:
                        _raise_unless_passing(error)
                        continue
                    deadline = time.monotonic() + _TIMEOUT_S
                    entry = wanted.pop((message.partition(), message.offset()), None)
                    if entry is not None:
                        yield self._whole(entry, Record.from_message(message))
                if wanted and time.monotonic() > deadline:
                    missing = next(iter(wanted.values()))
                    raise ClusterError(f"dead letter {missing.short_id} could not be read in {_TIMEOUT_S:g} s")

    def _whole(self, entry: Entry, record: Record) -> Letter:
        envelope = self._codec.decode(record)
        event = cast(DeadLettered, envelope.event)
        source: Record | None
        if entry.kept:
            place, written = entry.place, int(event.source_timestamp.timestamp() * 1000)
            headers = tuple(zip(event.header_names, event.header_values, strict=True))
            source = Record(place.topic, place.partition, place.offset, written, event.key, event.value, headers)
        else:
            source = self.source(entry.place)
        return Letter(entry, event, envelope.metadata, source)

    def source(self, place: Place) -> Record | None:
        """The record where it was; None where it is no more."""
        with self._consumer(eof=True) as consumer:
            known = consumer.list_topics(timeout=_TIMEOUT_S).topics.get(place.topic)
            if known is None or place.partition not in known.partitions:
                return None
            consumer.assign([TopicPartition(place.topic, place.partition, place.offset)])
            deadline = time.monotonic() + _TIMEOUT_S
            while time.monotonic() < deadline:
                message = consumer.poll(_POLL_S)
                if message is None:
                    continue
                error = message.error()
                if error is None:
                    return Record.from_message(message) if message.offset() == place.offset else None
                if error.code() == KafkaError._PARTITION_EOF:
                    return None
                _raise_unless_passing(error)
        raise ClusterError(f"{place.topic}[{place.partition}]@{place.offset} could not be read in {_TIMEOUT_S:g} s")


def _time(record: Record) -> datetime:
    return datetime.fromtimestamp(record.timestamp_ms / 1000, UTC)


def _entry(record: Record, metadata: Metadata, event: DeadLettered) -> Entry:
    # Topics, agents and kinds of errors are few, letters may be many.
    place = Place(sys.intern(event.source_topic), event.source_partition, event.source_offset, sys.intern(event.agent))
    return Entry(
        metadata.id,
        place,
        _time(record),
        sys.intern(event.error_type),
        event.error[:_ERROR_KEPT],
        event.attempts,
        record.partition,
        record.offset,
        # An event always has headers: a letter without them and without a value was too large to hold its record.
        kept=bool(event.value) or bool(event.header_names),
        correlation_id=metadata.correlation_id,
    )


def _poll(consumer: Consumer) -> list[Any]:
    first = consumer.poll(_POLL_S)
    return [] if first is None else [first, *consumer.consume(1000, timeout=0)]


def _raise_unless_passing(error: KafkaError) -> None:
    if not passes(error):
        raise KafkaException(error)
