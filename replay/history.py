"""All that the log holds of one task, or of one document.

In: a log and an id. Out: :class:`TaskHistory`: every record with that key, decoded where it can be, the orders to stop
its steps, the dead letters of its records and what became of them, in the order in which they were appended.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final, Literal

from replay.errors import UnknownTaskError
from replay.log import Log, Progress
from replay.recorded import redriven_for
from replay.selection import Selection
from schemas.codec import Codec
from schemas.errors import SchemaError
from schemas.events import DeadLettered, DeadLetterResolved, Event, StepCancelRequested, TaskSubmitted
from schemas.metadata import Envelope
from schemas.record import Record
from schemas.topics import TOPICS, topic_of

__all__ = ["Entry", "Kind", "TaskHistory", "decoded", "read_history"]

Kind = Literal["task", "document"]

_EFFECTS: Final = "effects"
_SUBMISSIONS: Final = frozenset(topic_of(TaskSubmitted).names())
_MARGIN: Final = timedelta(hours=1)
"""How far before a task's submission its records are looked for: brokers' clocks differ, and orders can overtake it.
A task of today is then found without reading years of others'."""
_CONTROL: Final = topic_of(StepCancelRequested).name
_DEAD_LETTERS: Final = topic_of(DeadLettered).name


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """A record of the log and what it says; ``envelope`` is None, and ``error`` says why, where it does not decode."""

    record: Record
    envelope: Envelope | None
    error: str = ""

    @property
    def time(self) -> datetime:
        """When the broker appended it."""
        return datetime.fromtimestamp(self.record.timestamp_ms / 1000, UTC)

    @property
    def event(self) -> Event | None:
        """What it says."""
        return None if self.envelope is None else self.envelope.event

    @property
    def type(self) -> str:
        """The event's class name; ``?`` where the bytes don't decode."""
        return "?" if self.envelope is None else type(self.envelope.event).__name__

    @property
    def id(self) -> str:
        """The event's id, empty where the bytes don't decode."""
        return "" if self.envelope is None else self.envelope.metadata.id

    @property
    def source(self) -> str:
        """Who wrote it: ``/agents/<name>@<version>`` or ``/clients/<name>``; empty where the bytes don't decode."""
        return "" if self.envelope is None else self.envelope.metadata.source

    @property
    def place(self) -> str:
        """Where it lies: ``topic[partition]@offset``."""
        return f"{self.record.topic}[{self.record.partition}]@{self.record.offset}"

    @property
    def erased(self) -> bool:
        """Whether its personal fields can't be read any more, and are blank."""
        return self.envelope is not None and self.envelope.erased

    @property
    def redriven_for(self) -> str:
        """The agent that a dead letter's record was sent again for; empty for all others."""
        return redriven_for(self.record)


@dataclass(frozen=True, slots=True)
class TaskHistory:
    """``entries`` are in order of append time, those of a partition in order of offset."""

    id: str
    kind: Kind
    entries: tuple[Entry, ...]

    def until(self, time: datetime) -> "TaskHistory":
        """What had been appended by ``time``, itself included."""
        return TaskHistory(self.id, self.kind, tuple(entry for entry in self.entries if entry.time <= time))

    @property
    def records(self) -> list[tuple[Record, Envelope]]:
        """What decodes, as :func:`replay.decide.redecide` takes it."""
        return [(entry.record, entry.envelope) for entry in self.entries if entry.envelope is not None]


def decoded(record: Record, codec: Codec) -> Entry:
    """The record with what it says, where it decodes."""
    try:
        return Entry(record, codec.decode(record))
    except SchemaError as error:
        return Entry(record, None, str(error))


def read_history(log: Log, id_: str, codec: Codec, *, on_progress: Progress | None = None) -> TaskHistory:
    """Everything the log holds of the task with this id or, where there is none, of the document.

    Raises:
        UnknownTaskError: no record of a task or document has the id as its key.
        LogReadError: the log could not be read.
    """
    held = frozenset(topic for topic, _ in log.spans())  # an archive need not hold all topics
    kind: Kind = "task"
    of_tasks = held & _topics("task_id")
    found = _keyed(log, id_, codec, of_tasks & _SUBMISSIONS)
    since = min((entry.time for entry in found), default=None)
    if since is not None:
        since -= _MARGIN
    found += _keyed(log, id_, codec, of_tasks - _SUBMISSIONS, since, on_progress)
    if all(entry.record.topic == _EFFECTS for entry in found):
        # Effects of documents have the same topic and a document's key.
        found += _keyed(log, id_, codec, held & _topics("document_id"), None, on_progress)
        kind = "document"
    if not found:
        raise UnknownTaskError(
            f"the log holds no task {id_!r}, and no document of this id; "
            '`magnatronic query "select * from tasks"` lists tasks, `magnatronic trace --memory` documents'
        )
    return TaskHistory(
        id_, kind, in_order([*found, *_beside(log, id_, found, codec, held & {_CONTROL, _DEAD_LETTERS}, since)])
    )


def in_order(entries: Sequence[Entry]) -> tuple[Entry, ...]:
    """By append time, those of a partition by offset even where a broker's clock stepped back."""
    latest: dict[tuple[str, int], int] = {}
    timed = []
    for entry in sorted(entries, key=lambda entry: entry.record.offset):
        place = entry.record.topic, entry.record.partition
        latest[place] = max(latest.get(place, 0), entry.record.timestamp_ms)
        timed.append((latest[place], entry))
    timed.sort(key=lambda item: item[0])
    return tuple(entry for _, entry in timed)


def _topics(key: str) -> frozenset[str]:
    return frozenset(name for topic in TOPICS if topic.key == key for name in topic.names())


def _keyed(
    log: Log,
    id_: str,
    codec: Codec,
    topics: frozenset[str],
    since: datetime | None = None,
    on_progress: Progress | None = None,
) -> list[Entry]:
    selection = Selection(topics=topics, tasks=frozenset((id_,)), since=since)
    batches = log.read(selection, on_progress=on_progress) if topics else ()
    return [decoded(record, codec) for batch in batches for record in batch.records]


def _beside(
    log: Log, id_: str, found: Sequence[Entry], codec: Codec, topics: frozenset[str], since: datetime | None
) -> list[Entry]:
    """What concerns the task under other keys: orders to stop, dead letters of its records, what became of them."""
    places = {(entry.record.topic, entry.record.partition, entry.record.offset) for entry in found}
    beside = []
    for batch in log.read(Selection(topics=topics, since=since)) if topics else ():
        for record in batch.records:
            if record.topic == _CONTROL and dict(record.headers).get("ce_correlationid") != id_.encode():
                continue
            entry = decoded(record, codec)
            match entry.event:
                case StepCancelRequested(task_id=task_id) if task_id == id_:
                    beside.append(entry)
                case DeadLettered() | DeadLetterResolved() as letter:
                    if (letter.source_topic, letter.source_partition, letter.source_offset) in places:
                        beside.append(entry)
    return beside
