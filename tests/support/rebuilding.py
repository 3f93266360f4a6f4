"""A log in memory for rebuilds: records that a codec made, given out as Kafka or an archive would give them.

In: events. Out: :class:`MemoryLog`, a :class:`sinks.rebuild.History` whose beginning and end can be moved.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from schemas.codec import Codec
from schemas.events import Event
from schemas.metadata import Metadata, deterministic_id
from schemas.record import Header, Record
from sinks.decoding import decoded
from sinks.sink import Offsets, SinkRecord

START = datetime(2026, 3, 1, 12, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Piece:
    """A batch of a read."""

    records: Sequence[Record]
    positions: Mapping[tuple[str, int], int]


class MemoryLog:
    """Partitions with ``gap`` offsets of control records after every tenth record, as transactions leave them."""

    def __init__(self, *, batch: int = 7) -> None:
        self.codec = Codec()
        self.records: dict[tuple[str, int], list[Record]] = {}
        self.begins: dict[tuple[str, int], int] = {}
        self.ends: dict[tuple[str, int], int] = {}
        self.read_from: list[dict[tuple[str, int], tuple[int, int]]] = []
        self._batch = batch

    def add(self, topic: str, event: Event, *, key: str, partition: int = 0) -> Record:
        """Append ``event``."""
        number = sum(map(len, self.records.values()))
        encoded = self.codec.encode(
            event,
            Metadata(
                id=deterministic_id(topic, number),
                source="/agents/test@1",
                subject=key,
                time=START + timedelta(milliseconds=number, microseconds=7),
                correlation_id=key,
            ),
        )
        return self.raw(topic, encoded.value, encoded.headers, key=key.encode(), partition=partition)

    def raw(
        self, topic: str, value: bytes | None, headers: Sequence[Header] = (), *, key: bytes, partition: int = 0
    ) -> Record:
        """Append a record of bytes."""
        place = topic, partition
        offset = self.ends.get(place, 0)
        records = self.records.setdefault(place, [])
        record = Record(topic, partition, offset, int(START.timestamp() * 1000) + offset, key, value, headers)
        records.append(record)
        self.ends[place] = offset + (2 if len(records) % 10 == 0 else 1)
        return record

    def sink_records(self, since: Offsets | None = None) -> list[SinkRecord]:
        """All records from ``since`` on, as a sink takes them."""
        return [
            decoded(self.codec, record)
            for place, records in self.records.items()
            for record in records
            if record.offset >= (since or {}).get(place, 0)
        ]

    def spans(self, topics: Sequence[str]) -> dict[tuple[str, int], tuple[int, int]]:
        """As Kafka would say."""
        return {
            place: (self.begins.get(place, 0), self.ends[place]) for place in sorted(self.ends) if place[0] in topics
        }

    def read(self, spans: Mapping[tuple[str, int], tuple[int, int]]) -> Iterator[Piece]:
        """One partition after the other."""
        self.read_from.append(dict(spans))
        positions = {place: first for place, (first, _) in spans.items()}
        for place, (first, end) in spans.items():
            assert self.begins.get(place, 0) <= first <= end <= self.ends[place]
            meant = [record for record in self.records[place] if first <= record.offset < end]
            for at in range(0, len(meant), self._batch):
                some = meant[at : at + self._batch]
                positions[place] = some[-1].offset + 1
                yield Piece(some, dict(positions))
            positions[place] = end
        yield Piece((), dict(positions))
