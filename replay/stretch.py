"""Reads what an audit needs into a spool: the stretch's groups of records, whole, wherever else in the log they lie.

In: a log, its spans, what is to be audited. Out: a :class:`~replay.spool.Spool`, and the hash of what was read of each
partition. A group is a record key with what its events caused: outputs with other keys and dead letters go to their
cause's group. Steps of a stretch need the states before it, so the groups are read from their beginning; where only a
part is meant, a first pass over that part finds out which groups they are.
"""

import struct
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any, Final

from replay.findings import record_hash
from replay.log import Log
from replay.report import SpanHash
from replay.selection import Place, Selection, Span
from replay.spool import Spool, group_hash, seldom_collecting
from replay.steps import Station
from schemas.codec import Codec
from schemas.errors import SchemaError
from schemas.events import DeadLettered, StepCancelled
from schemas.record import Record
from schemas.topics import all_topics, topic_of

__all__ = ["Progress", "Scope", "SpooledRecord", "read_stretch", "record_of"]

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much it is in all."""

_DEAD_LETTERS: Final = topic_of(DeadLettered).name
_EFFECTS: Final = topic_of(StepCancelled).name
_PLACED: Final = struct.Struct(">qq32s")
_KEYED_AS_CAUSE: Final = frozenset({"task_id", "document_id"})
"""Key fields whose events have the same key as what caused them."""


@dataclass(frozen=True, slots=True)
class Scope:
    """What is to be audited: of the steps of ``stations`` those whose input record ``selection`` takes, handled by one
    of its ``agents`` where it names some.
    """

    selection: Selection
    stations: tuple[Station, ...]

    @property
    def is_all(self) -> bool:
        """Whether every step is meant."""
        return self.inputs == Selection() and not self.selection.agents

    @property
    def inputs(self) -> Selection:
        """Which records the steps' inputs are."""
        return replace(self.selection, agents=frozenset())

    def topics(self) -> frozenset[str]:
        """All topics that the steps read and write."""
        found = {_DEAD_LETTERS, _EFFECTS}
        for station in self.stations:
            found |= station.topics
            for kind in station.agent.emits:
                found.update(topic_of(kind).names())
        return frozenset(found)

    def unread_topics(self) -> frozenset[str]:
        """Topics of outputs that no agent reads."""
        return self.topics() - self.read_topics() - {_DEAD_LETTERS, _EFFECTS}

    def read_topics(self) -> frozenset[str]:
        """The topics that agents read."""
        return frozenset(topic for station in self.stations for topic in station.topics)


def read_stretch(
    log: Log,
    spans: Mapping[Place, Span],
    scope: Scope,
    codec: Codec,
    spool: Spool,
    on_progress: Progress,
) -> list[SpanHash]:
    """Read ``spans`` and put every record of the groups that ``scope`` means into ``spool``.

    An item is (topic, partition, offset, timestamp_ms, key, value, headers, hash); :func:`record_of` reads it.
    """
    route = _router(scope, codec)
    wanted = None if scope.is_all else _wanted(log, spans, scope, route, on_progress)
    hashes = {place: _Hash() for place in spans}

    def progress(done: int, total: int) -> None:
        on_progress("reading", done, total)

    add, last, group = spool.add, None, b""
    with seldom_collecting():
        for batch in log.read(Selection(spans=spans), on_progress=progress):
            for record in batch.records:
                name = route(record)
                if wanted is not None and name not in wanted:
                    continue
                if name != last:
                    last, group = name, group_hash(name)
                topic, partition, offset, at = record.topic, record.partition, record.offset, record.timestamp_ms
                value = record.value
                hashed = record_hash(topic, record.key, value, record.headers)
                hashes[topic, partition].add(offset, at, hashed)
                item = (topic, partition, offset, at, record.key, value, record.headers, hashed)
                add(group, item, len(value or b""))
    return [hashes[place].of(place, span) for place, span in sorted(spans.items())]


def _wanted(
    log: Log, spans: Mapping[Place, Span], scope: Scope, route: Callable[[Record], bytes], on_progress: Progress
) -> Collection[bytes]:
    """The groups of the steps that are meant."""
    inputs, topics = scope.inputs, scope.read_topics()
    if inputs == Selection(tasks=inputs.tasks):
        return frozenset(task.encode() for task in inputs.tasks)
    stretch = {
        place: _both(span, span if inputs.spans is None else inputs.spans.get(place, (0, 0)))
        for place, span in spans.items()
        if place[0] in topics and (not inputs.topics or place[0] in inputs.topics)
    }

    def progress(done: int, total: int) -> None:
        on_progress("looking for the steps", done, total)

    chosen = replace(inputs, topics=frozenset(), spans=stretch)
    return {route(record) for batch in log.read(chosen, on_progress=progress) for record in batch.records}


def _both(one: Span, other: Span) -> Span:
    start = max(one[0], other[0])
    return start, max(start, min(one[1], other[1]))


def _router(scope: Scope, codec: Codec) -> Callable[[Record], bytes]:
    """What group a record belongs to."""
    topics = all_topics()
    foreign = {
        name for name, topic in topics.items() if topic.key not in _KEYED_AS_CAUSE and name not in scope.read_topics()
    }

    def route(record: Record) -> bytes:
        topic = record.topic
        if topic not in foreign:
            return record.key or b""
        if topic == _DEAD_LETTERS:
            try:
                event = codec.decode(record).event
            except SchemaError:
                return record.key or b""
            return (event.key or b"") if isinstance(event, DeadLettered) else record.key or b""
        for name, value in record.headers:
            if name == "ce_correlationid":
                return value or record.key or b""
        return record.key or b""

    return route


class _Hash:
    """The hash of a partition's records."""

    __slots__ = ("_digest", "records")

    def __init__(self) -> None:
        self._digest = sha256()
        self.records = 0

    def add(self, offset: int, timestamp_ms: int, hashed: str) -> None:
        self._digest.update(_PLACED.pack(offset, timestamp_ms, bytes.fromhex(hashed)))
        self.records += 1

    def of(self, place: Place, span: Span) -> SpanHash:
        return SpanHash(*place, *span, self.records, self._digest.hexdigest())


class SpooledRecord(Record):
    """A record whose hash was taken when it was read."""

    __slots__ = ("hashed",)
    hashed: str


def record_of(item: tuple[Any, ...]) -> SpooledRecord:
    """The record of a spooled item."""
    record = SpooledRecord(*item[:7])
    record.hashed = item[7]
    return record
