"""Reads the log from Kafka: committed records, from any position to each last stable offset.

In: librdkafka settings and a selection. Out: batches of :class:`~schemas.record.Record` values. Ends are asked for
once, at the beginning, so that a read ends on a system that goes on writing. Under read_committed a partition's end is
its last stable offset; control records and aborted transactions leave gaps in the offsets, so a partition is through
when a record at or past its end comes, or the broker says that there is none. Memory is bounded by the client's fetch
queue, whatever the length of the log.
"""

import time
from collections.abc import Collection, Iterator, Mapping
from datetime import timedelta
from typing import Any, Final

from confluent_kafka import (
    TIMESTAMP_CREATE_TIME,
    Consumer,
    IsolationLevel,
    KafkaError,
    KafkaException,
    Message,
    TopicPartition,
)
from confluent_kafka.admin import AdminClient, OffsetSpec

from replay.errors import LogReadError, LogTruncatedError
from replay.log import ALL, Batch, Log, Progress, wanted_spans
from replay.selection import Place, Selection, Span, milliseconds
from schemas.record import Record
from schemas.topics import all_topics

__all__ = ["KafkaLog"]

_PASSING: Final = frozenset(
    {
        # The client connects again by itself; a read that gets nothing for too long ends by that.
        KafkaError._TRANSPORT,
        KafkaError._ALL_BROKERS_DOWN,
        KafkaError._RESOLVE,
        KafkaError._TIMED_OUT,
        # Every consumer asks for its group's coordinator; this one joins no group, and needs no right on one.
        KafkaError.GROUP_AUTHORIZATION_FAILED,
    }
)

_BATCH: Final = 1000
_TIMEOUT_S: Final = 10.0
_RETRY_S: Final = 0.2
_MILLISECOND: Final = timedelta(milliseconds=1)
_POLL_S: Final = 0.5

_GONE: Final = "retention has deleted what was before; an archive may have it (--from FOLDER)"

_CLIENT: Final[Mapping[str, Any]] = {
    "reconnect.backoff.ms": 20,
    "reconnect.backoff.max.ms": 1000,
    "log.connection.close": False,
}

_CONSUMER: Final[Mapping[str, Any]] = {
    **_CLIENT,
    # Required by the client, but never joined: partitions are assigned by hand and nothing is committed.
    "group.id": "magnatronic-replay",
    "isolation.level": "read_committed",
    "enable.auto.commit": False,
    "enable.partition.eof": True,
    # What retention deletes while it is being read is an error, and no silent gap.
    "auto.offset.reset": "error",
    # By default 64 MiB are fetched ahead, and as the client's objects they take more; it is no quicker for it.
    "queued.max.messages.kbytes": 4096,
    "queued.min.messages": 20_000,
    "fetch.message.max.bytes": 524_288,
    # By default a full queue stops fetching for a second.
    "fetch.queue.backoff.ms": 5,
    "fetch.wait.max.ms": 50,
}


class KafkaLog(Log):
    """The log of a cluster. ``kafka`` holds librdkafka settings: bootstrap.servers and security.

    A read that gets nothing for ``idle_timeout_s`` seconds fails. ``clock_step`` is how far a broker's clock may step
    back: records past the end of a stretch by time are looked at as long as they are no later than that.
    """

    def __init__(
        self,
        kafka: Mapping[str, Any],
        *,
        idle_timeout_s: float = 30.0,
        clock_step: timedelta = timedelta(hours=1),
    ) -> None:
        self._kafka = dict(kafka)
        self._idle_timeout_s = idle_timeout_s
        self._clock_step = clock_step
        self._timeout_s = min(_TIMEOUT_S, idle_timeout_s)
        self._admin: AdminClient | None = None

    def close(self) -> None:
        """Let go of the connection that asks for offsets."""
        self._admin = None

    def spans(self, topics: Collection[str] = ()) -> dict[Place, Span]:
        """See :meth:`replay.log.Log.spans`."""
        wanted = topics or all_topics()
        try:
            places = self._places(wanted)
            # Ends first: what retention deletes in between makes a span shorter, never negative.
            ends = self._offsets(places, OffsetSpec.latest())
            starts = self._offsets(places, OffsetSpec.earliest())
        except KafkaException as error:
            raise _unreadable(wanted, error) from error
        return {place: (min(starts[place], ends[place]), ends[place]) for place in sorted(places)}

    def read(
        self,
        selection: Selection = ALL,
        *,
        start: Mapping[Place, int] | None = None,
        on_progress: Progress | None = None,
    ) -> Iterator[Batch]:
        """See :meth:`replay.log.Log.read`."""
        topics = selection.topics
        if selection.spans is not None:
            named = {topic for topic, _ in selection.spans}
            topics = frozenset(named & topics) if topics else frozenset(named)
            if not topics:
                return
        held = self.spans(topics)
        wanted = wanted_spans(held, selection, start or {}, _GONE)
        consumer = Consumer({**_CONSUMER, **self._kafka})
        try:
            ends = self._by_time(consumer, wanted, selection)
            yield from _Reading(consumer, wanted, ends, selection, self._idle_timeout_s).batches(on_progress)
        except KafkaException as error:
            raise _unreadable(topics or all_topics(), error) from error
        finally:
            consumer.close()

    def _places(self, topics: Collection[str]) -> set[Place]:
        known = self._asked().list_topics(timeout=self._timeout_s).topics
        missing = sorted(topic for topic in topics if topic not in known)
        if missing:
            raise LogReadError(
                f"the cluster has no topic {', '.join(missing)}, or hides it from this user: "
                "`magnatronic up` creates the topics, docs/security.md has the rights"
            )
        return {(topic, partition) for topic in topics for partition in known[topic].partitions}

    def _offsets(self, places: Collection[Place], which: OffsetSpec) -> dict[Place, int]:
        found: dict[Place, int] = {}
        deadline = time.monotonic() + self._idle_timeout_s
        while left := [place for place in places if place not in found]:
            asked = self._asked().list_offsets(
                {TopicPartition(*place): which for place in left},
                isolation_level=IsolationLevel.READ_COMMITTED,
                request_timeout=self._timeout_s,
            )
            for partition, future in asked.items():
                try:
                    found[partition.topic, partition.partition] = future.result().offset
                except KafkaException as error:
                    # A partition that has just lost its leader gets another one.
                    if not error.args[0].retriable() or time.monotonic() > deadline:
                        raise
            if len(found) < len(places):
                time.sleep(_RETRY_S)
        return found

    def _asked(self) -> AdminClient:
        if self._admin is None:
            self._admin = AdminClient({**_CLIENT, **self._kafka})
        return self._admin

    def _by_time(self, consumer: Consumer, wanted: dict[Place, Span], selection: Selection) -> dict[Place, int]:
        """Moves the spans' beginnings in ``wanted`` up to ``since``; where each partition can be left for ``until``.

        The beginning is exact: Kafka finds the first offset that is dated ``since`` or later, so all before it is
        earlier. Past the first record of ``until`` there can be earlier ones, where a clock stepped back.
        """
        if selection.since is not None:
            for place, offset in self._first_at(consumer, wanted, milliseconds(selection.since)).items():
                first, end = wanted[place]
                wanted[place] = max(first, min(offset, end)), end
        if selection.until is None:
            return {}
        return self._first_at(consumer, wanted, milliseconds(selection.until) + self._clock_step // _MILLISECOND)

    def _first_at(self, consumer: Consumer, wanted: Mapping[Place, Span], at_ms: int) -> dict[Place, int]:
        at_ms = max(at_ms, 0)  # negative ones mean something else to Kafka
        asked = [TopicPartition(*place, at_ms) for place, (first, end) in wanted.items() if first < end]
        found = consumer.offsets_for_times(asked, timeout=self._timeout_s) if asked else []
        for each in found:
            if each.error is not None:
                raise KafkaException(each.error)
        # Negative where no record is that late.
        return {
            (each.topic, each.partition): each.offset if each.offset >= 0 else wanted[each.topic, each.partition][1]
            for each in found
        }


def _unreadable(topics: Collection[str], error: KafkaException) -> LogReadError:
    return LogReadError(f"reading {', '.join(sorted(topics))}: {error.args[0].str()}")


class _Reading:
    """One read: which partitions are still under way, and where each stands."""

    def __init__(
        self,
        consumer: Consumer,
        wanted: Mapping[Place, Span],
        until: Mapping[Place, int],
        selection: Selection,
        idle_timeout_s: float,
    ) -> None:
        self._consumer = consumer
        self._last = {place: end for place, (_, end) in wanted.items()}
        self._positions = {place: first for place, (first, _) in wanted.items()}
        # A record of each is looked at in any case: it tells whether the broker or its producer has dated it.
        self._ends = {place: min(end, max(first + 1, until.get(place, end))) for place, (first, end) in wanted.items()}
        self._by_time = bool(until)
        self._takes = selection.filter()
        self._idle_timeout_s = idle_timeout_s
        self._said = ""

    def batches(self, on_progress: Progress | None) -> Iterator[Batch]:
        begun = sum(self._positions.values())
        total = sum(self._last.values()) - begun
        for place in [place for place, end in self._ends.items() if self._positions[place] >= end]:
            self._finish(place)
        if not self._ends:
            yield Batch((), dict(self._positions))
        else:
            self._consumer.assign([TopicPartition(*place, self._positions[place]) for place in self._ends])
        while self._ends:
            records = self._records()
            yield Batch(records, dict(self._positions))
            if on_progress is not None:
                on_progress(sum(self._positions.values()) - begun, total)

    def _records(self) -> list[Record]:
        records = []
        takes, ends, positions = self._takes, self._ends, self._positions
        for message in self._messages():
            if message.error() is not None:
                self._hear(message)
                continue
            record = Record.from_message(message)
            place = record.topic, record.partition
            end = ends.get(place)
            if end is None:
                continue  # of a partition that is through; its fetches were under way
            if self._by_time and message.timestamp()[0] == TIMESTAMP_CREATE_TIME:
                # Its producer dated it, so what comes after it can be of any time.
                end = ends[place] = self._last[place]
            offset = record.offset
            if offset < end:
                positions[place] = offset + 1
                if takes is None or takes(record):
                    records.append(record)
            if offset + 1 >= end:
                self._finish(place)
                self._consumer.pause([TopicPartition(*place)])
        return records

    def _messages(self) -> list[Message]:
        deadline = time.monotonic() + self._idle_timeout_s
        while (first := self._consumer.poll(_POLL_S)) is None:  # `consume` by itself would wait until a batch is full
            if time.monotonic() > deadline:
                waiting = ", ".join(f"{topic}/{partition}" for topic, partition in sorted(self._ends))
                raise LogReadError(
                    f"nothing came for {self._idle_timeout_s:g} s{self._said}, and these are not at their end: "
                    f"{waiting}; is a broker down?"
                )
        return [first, *self._consumer.consume(_BATCH, timeout=0)]

    def _finish(self, place: Place) -> None:
        del self._ends[place]
        self._positions[place] = self._last[place]

    def _hear(self, message: Message) -> None:
        error: KafkaError = message.error()
        topic, partition = message.topic(), message.partition()
        if error.code() == KafkaError._PARTITION_EOF:
            if message.offset() >= self._ends.get((topic, partition), message.offset() + 1):
                self._finish((topic, partition))
        elif error.code() == KafkaError._AUTO_OFFSET_RESET:
            raise LogTruncatedError(
                f"{topic}/{partition} no longer holds offset {self._positions.get((topic, partition))}: {error.str()}; "
                f"{_GONE}"
            )
        elif not error.retriable() and error.code() not in _PASSING:
            raise KafkaException(error)
        elif error.code() != KafkaError.GROUP_AUTHORIZATION_FAILED:
            self._said = f" ({error.str()})"
