"""A made-up stretch of the log: events put down one after another, each at its time, and read as any log is."""

from collections.abc import Collection, Iterator, Mapping
from datetime import UTC, datetime, timedelta

from replay.log import ALL, Batch, Log, Progress
from replay.selection import Place, Selection, Span
from schemas.codec import Codec
from schemas.events import Event, Priority
from schemas.metadata import REDRIVE_HEADER, Envelope, Metadata, deterministic_id
from schemas.record import Record
from schemas.topics import key_of, topic_name

BEGAN = datetime(2026, 1, 1, tzinfo=UTC)
CODEC = Codec()


class Tape:
    """Grows by :meth:`add`. Times are given in milliseconds after :data:`BEGAN`."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self._ids: dict[int, str] = {}

    def add(
        self,
        event: Event,
        at: int,
        *,
        by: str = "/clients/test",
        cause: Record | str | None = None,
        about: str = "",
        id_: str = "",
    ) -> Record:
        """``event`` appended ``at`` ms, written ``by`` a source in answer to ``cause``; ``about`` correlates."""
        metadata = Metadata(
            id=id_ or deterministic_id("tape", len(self.records)),
            source=by if by.startswith("/") else f"/agents/{by}",
            subject=key_of(event),
            time=BEGAN + timedelta(milliseconds=at),
            causation_id=self.id_of(cause) if isinstance(cause, Record) else cause or "",
            correlation_id=about or str(event.__dict__.get("task_id", "")),
        )
        return self.put(Envelope(event, metadata), at)

    def put(self, envelope: Envelope, at: int) -> Record:
        """An envelope as it is."""
        encoded = CODEC.encode(envelope.event, envelope.metadata)
        topic = topic_name(envelope.event, Priority.NORMAL)
        return self.raw(topic, key_of(envelope.event).encode(), encoded.value, at, tuple(encoded.headers))

    def raw(
        self, topic: str, key: bytes, value: bytes | None, at: int, headers: tuple[tuple[str, bytes | None], ...] = ()
    ) -> Record:
        """Bytes as they are."""
        offset = sum(record.topic == topic for record in self.records)
        when = int(BEGAN.timestamp() * 1000) + at
        record = Record(topic, 0, offset, when, key, value, headers)
        self.records.append(record)
        return record

    def again(self, record: Record, at: int, agent: str) -> Record:
        """``record`` sent again for ``agent``."""
        headers = (*record.headers, (REDRIVE_HEADER, agent.encode()))
        return self.raw(record.topic, record.key or b"", record.value, at, headers)

    def id_of(self, record: Record) -> str:
        """The event id of a record."""
        return CODEC.decode(record).metadata.id

    def log(self) -> "TapeLog":
        """What was put down so far."""
        return TapeLog(tuple(self.records))


class TapeLog(Log):
    """A log in memory, for histories that a test makes up."""

    def __init__(self, records: tuple[Record, ...]) -> None:
        self._records = records

    def spans(self, topics: Collection[str] = ()) -> dict[Place, Span]:
        spans: dict[Place, Span] = {}
        for record in self._records:
            if not topics or record.topic in topics:
                spans[record.topic, record.partition] = 0, record.offset + 1
        return spans

    def read(
        self,
        selection: Selection = ALL,
        *,
        start: Mapping[Place, int] | None = None,
        on_progress: Progress | None = None,
    ) -> Iterator[Batch]:
        for record in self._records:
            first = (start or {}).get((record.topic, record.partition), 0)
            if record.offset >= first and selection.takes(record):
                yield Batch((record,), {(record.topic, record.partition): record.offset + 1})
        if on_progress is not None:
            on_progress(len(self._records), len(self._records))

    def close(self) -> None:
        pass
