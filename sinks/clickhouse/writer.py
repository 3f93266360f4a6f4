"""The ClickHouse sink: every topic's records into ``event_log``.

In: batches from a runner. Out: rows keyed by topic, partition and offset, then the offsets in ``sink_offsets``. A batch
that is written twice (the process died between data and offsets) replaces its own rows, and every view reads them
once: exactly once in effect.
"""

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import ClassVar, Final

import pyarrow as pa

from schemas.events import SubjectForgotten
from schemas.topics import all_topics
from sinks.clickhouse.client import ClickHouse
from sinks.clickhouse.forgetting import erase, forgotten_among
from sinks.clickhouse.rows import to_table
from sinks.sink import Offsets, Sink, SinkRecord

__all__ = ["DDL", "ClickHouseSink"]

DDL: Final = Path(__file__).with_name("ddl")


class ClickHouseSink(Sink):
    """Feeds ``clickhouse``, which stays its owner's to close."""

    name: ClassVar[str] = "clickhouse"

    def __init__(self, clickhouse: ClickHouse, topics: Sequence[str] | None = None) -> None:
        self.topics = tuple(all_topics()) if topics is None else tuple(topics)
        self._clickhouse = clickhouse

    def open(self) -> None:
        """Create the tables and views that are missing, and bring the views up to date."""
        for path in sorted(DDL.glob("*.sql")):
            for statement in _statements(path.read_text(encoding="utf-8")):
                self._clickhouse.command(statement)

    def offsets(self) -> Offsets:
        """How far ``sink_offsets`` says this sink has come."""
        rows = self._clickhouse.read(
            "SELECT topic, partition, max(next_offset) FROM sink_offsets WHERE sink = {sink:String} GROUP BY ALL",
            {"sink": self.name},
        )
        return {(topic, partition): next_offset for topic, partition, next_offset in rows}

    def write(self, batch: Sequence[SinkRecord], offsets: Offsets) -> None:
        """Insert the rows as one Arrow block, blank those about people who were forgotten, then note the offsets."""
        if batch:
            self._clickhouse.insert("event_log", to_table(batch))
            self._forget(batch)
        if offsets:
            self._clickhouse.insert("sink_offsets", self._offset_rows(offsets))

    def _forget(self, batch: Sequence[SinkRecord]) -> None:
        about: set[str] = set()
        forgotten: set[str] = set()
        for item in batch:
            if item.envelope is None:
                continue
            if isinstance(item.envelope.event, SubjectForgotten):
                forgotten.add(item.envelope.event.key_id)
            elif item.envelope.metadata.data_subjects and not item.envelope.erased:
                about.update(item.envelope.metadata.data_subjects)
        if late := forgotten_among(self._clickhouse, about):
            forgotten |= late
        if forgotten:
            erase(self._clickhouse, forgotten)

    def _offset_rows(self, offsets: Offsets) -> pa.Table:
        count = len(offsets)
        return pa.table(
            {
                "sink": pa.array([self.name] * count),
                "topic": pa.array([topic for topic, _ in offsets]),
                "partition": pa.array([partition for _, partition in offsets], pa.uint32()),
                "next_offset": pa.array(list(offsets.values()), pa.uint64()),
                "updated_at": pa.array([datetime.now(UTC)] * count, pa.timestamp("ms", tz="UTC")),
            }
        )

    def close(self) -> None:
        """Nothing is held back: each write is in the store when it returns."""


def _statements(sql: str) -> list[str]:
    """The statements of a DDL file: each ends with ``;`` at the end of a line."""
    return [part.strip() for part in sql.split(";\n") if part.strip()]
