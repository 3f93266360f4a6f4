"""Which records of the log are meant: by topic, time, offsets, task, agent, event type and correlation id.

In: what a person or a program asks for. Out: :class:`Selection`, whose questions are answered by a record's place,
time, key and headers alone, so that what is not meant is never decoded. Pure: no Kafka, no files.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Final

from schemas.events import EVENT_TYPES
from schemas.record import Record
from schemas.topics import all_topics

__all__ = ["Place", "Selection", "Span", "Spans", "full_names", "milliseconds", "topics_with"]

Place = tuple[str, int]
"""A topic's name and a partition's number."""

Span = tuple[int, int]
"""``[from, to)`` of consumer positions. Transactions leave gaps in between, and at the end."""

Spans = Mapping[Place, Span]

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND: Final = timedelta(milliseconds=1)


@dataclass(frozen=True, slots=True)
class Selection:
    """A part of the log; a field that is empty selects all.

    ``topics`` are names of Kafka topics, ``since`` and ``until`` aware times: append time in ``[since, until)``.
    ``spans`` are offset ranges; partitions not named there are not read. ``tasks`` are record keys. ``agents`` are
    names of those who wrote a record, of any version. ``event_types`` are class names or full names; a record that
    does not say its type (stock producers write no CloudEvents headers) is taken where its topic carries the type.
    """

    topics: frozenset[str] = frozenset()
    since: datetime | None = None
    until: datetime | None = None
    spans: Spans | None = None
    tasks: frozenset[str] = frozenset()
    agents: frozenset[str] = frozenset()
    event_types: frozenset[str] = frozenset()
    correlation_ids: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        for name, time in (("since", self.since), ("until", self.until)):
            if time is not None and time.tzinfo is None:
                raise ValueError(f"{name} {time} has no time zone; use an aware datetime")

    def takes(self, record: Record) -> bool:
        """Whether ``record`` is meant, by place, time, key and headers, without decoding it."""
        if self.topics and record.topic not in self.topics:
            return False
        if self.spans is not None:
            first, end = self.spans.get((record.topic, record.partition), (0, 0))
            if not first <= record.offset < end:
                return False
        filtered = self.filter()
        return filtered is None or filtered(record)

    def filter(self) -> Callable[[Record], bool] | None:
        """What remains to be asked of a record of the selection's topics and spans: None where all are meant."""
        tests = [
            *self._by_time(),
            *([_by_key(frozenset(task.encode() for task in self.tasks))] if self.tasks else ()),
            *([_by_headers(self)] if self.agents or self.event_types or self.correlation_ids else ()),
        ]
        if len(tests) < 2:
            return tests[0] if tests else None
        return lambda record: all(test(record) for test in tests)

    def _by_time(self) -> list[Callable[[Record], bool]]:
        if self.since is None and self.until is None:
            return []
        first = None if self.since is None else milliseconds(self.since)
        end = None if self.until is None else milliseconds(self.until)
        return [
            lambda record: (
                (first is None or record.timestamp_ms >= first) and (end is None or record.timestamp_ms < end)
            )
        ]


def milliseconds(time: datetime) -> int:
    """``time`` (aware) in milliseconds since the epoch, rounded up: the first that a record can bear from then on."""
    return -((_EPOCH - time) // _MILLISECOND)


def _by_key(keys: frozenset[bytes]) -> Callable[[Record], bool]:
    return lambda record: record.key in keys


def _by_headers(selection: Selection) -> Callable[[Record], bool]:
    agents = frozenset(agent.encode() for agent in selection.agents)
    correlations = frozenset(each.encode() for each in selection.correlation_ids)
    types = frozenset(name.encode() for name in full_names(selection.event_types))
    topics = topics_with(selection.event_types)

    def takes(record: Record) -> bool:
        headers = dict(record.headers)
        if agents and _agent_of(headers.get("ce_source") or b"") not in agents:
            return False
        if types:
            kind = headers.get("ce_type")
            if (kind not in types) if kind is not None else (record.topic not in topics):
                return False
        if correlations:
            correlation = headers.get("ce_correlationid")
            if not correlation and not headers.get("ce_id"):
                correlation = record.key  # as the codec does with records of stock producers
            return correlation in correlations
        return True

    return takes


def topics_with(names: Collection[str]) -> frozenset[str]:
    """The topics that carry one of these event types."""
    types = full_names(names)
    return frozenset(
        name for name, topic in all_topics().items() if any(kind.full_name in types for kind in topic.events)
    )


def full_names(names: Collection[str]) -> frozenset[str]:
    """Full names of the types: a class name stands for every type that is called so."""
    known = {kind.__name__: name for name, kind in EVENT_TYPES.items()}
    return frozenset(known.get(name, name) for name in names)


@lru_cache(maxsize=4096)
def _agent_of(source: bytes) -> bytes:
    return source.removeprefix(b"/agents/").partition(b"@")[0] if source.startswith(b"/agents/") else b""
