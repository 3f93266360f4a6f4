"""ClickHouse made again beside the one in use: a second database, and tables that change places.

In: the ClickHouse that is in use. Out: a :class:`~sinks.rebuild.Projection`. The shadow database ``<database>_rebuild``
is made by the same DDL and fed by the same sink as the one in use, with offsets of its own. EXCHANGE TABLES switches
over: views name tables, so each query sees the old rows or the new ones. A comment on the table that was made here goes
along with it, and tells after SIGKILL which of the two is in use.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import ClassVar, Final

from sinks.clickhouse.client import ClickHouse
from sinks.clickhouse.comparing import STRETCH, compare_table, shared_columns
from sinks.clickhouse.writer import DDL, ClickHouseSink
from sinks.comparison import Comparison
from sinks.rebuild import Projection, Stage
from sinks.sink import Offsets, SinkRecord

__all__ = ["ClickHouseProjection"]

_MARK: Final = "made by a rebuild that is not finished, with DDL "
_STAY: Final = ["sink_offsets", "forgotten_subjects"]
"""Tables that each database keeps: what they say holds for whatever rows stand beside them."""
_DROP: Final = "SYNC SETTINGS max_table_size_to_drop = 0"


class ClickHouseProjection(Projection):
    """``clickhouse`` stays its owner's to close; :meth:`close` closes the shadow's connections."""

    name: ClassVar[str] = "clickhouse"
    by_offset: ClassVar[bool] = True
    follows: ClassVar[bool] = True

    def __init__(self, clickhouse: ClickHouse, topics: Sequence[str] | None = None) -> None:
        self._live = clickhouse
        self._live_sink = ClickHouseSink(clickhouse, topics)
        self.topics = self._live_sink.topics
        self._database = f"{clickhouse.database}_rebuild"
        self._beside: ClickHouse | None = None
        self._shadow_sink: ClickHouseSink | None = None
        self._switched = False

    def close(self) -> None:
        """Let go of the shadow's connections."""
        if self._beside is not None:
            self._beside.close()
        self._beside = self._shadow_sink = None

    @property
    def _shadow(self) -> ClickHouse:
        if self._beside is None:
            self._beside = self._live.beside(self._database)
        return self._beside

    @property
    def _sink(self) -> ClickHouseSink:
        if self._shadow_sink is None:
            self._shadow_sink = ClickHouseSink(self._shadow, self.topics)
        return self._shadow_sink

    def prepare(self) -> Stage:
        """See :meth:`sinks.rebuild.Projection.prepare`."""
        self._live_sink.open()
        mark = _MARK + _fingerprint()
        live, shadow = self._comments(self._live.database), self._comments(self._database)
        if self._made_here(live):
            if shadow:
                # It died on the way through the tables, or after them.
                self.switch()
                return Stage.SWITCHED
            self._unmark()
        elif shadow and set(shadow.values()) == {mark}:
            return Stage.RESUMED
        self.discard()
        self._sink.open()
        for table in self._tables():
            self._shadow.command(f"ALTER TABLE {table} MODIFY COMMENT '{mark}'")
        return Stage.NEW

    def _comments(self, database: str) -> dict[str, str]:
        """The comments of a database's tables of rows."""
        rows = self._live.read(
            "SELECT name, comment FROM system.tables "
            "WHERE database = {database:String} AND engine LIKE '%MergeTree' AND NOT has({stay:Array(String)}, name)",
            {"database": database, "stay": _STAY},
        )
        return dict(rows)

    def _tables(self) -> list[str]:
        return sorted(self._comments(self._database))

    @staticmethod
    def _made_here(comments: Mapping[str, str]) -> list[str]:
        return [table for table, comment in comments.items() if comment.startswith(_MARK)]

    def _unmark(self) -> None:
        for table in self._made_here(self._comments(self._live.database)):
            self._live.command(f"ALTER TABLE {table} MODIFY COMMENT ''")

    def position(self) -> Offsets:
        """See :meth:`sinks.rebuild.Projection.position`."""
        return self._sink.offsets()

    def stands_at(self) -> Offsets:
        """See :meth:`sinks.rebuild.Projection.stands_at`."""
        return self._live_sink.offsets()

    def feed(self, batch: Sequence[SinkRecord], offsets: Offsets) -> None:
        """See :meth:`sinks.rebuild.Projection.feed`."""
        if self._switched:
            # The live sink keeps its own offsets; ours stay where they are, so that a crash reads the same once more.
            self._live_sink.write(batch, {})
        else:
            self._sink.write(batch, offsets)

    def rows_before(self, starts: Mapping[tuple[str, int], int]) -> Mapping[tuple[str, int], int]:
        """See :meth:`sinks.rebuild.Projection.rows_before`."""
        at = self.position()
        found = {}
        for (topic, partition), start in starts.items():
            stretch = {"topic": topic, "partition": partition, "first": at.get((topic, partition), 0), "end": start}
            ((rows,),) = self._live.read(f"SELECT count() FROM event_log FINAL WHERE {STRETCH}", stretch)
            if rows:
                found[topic, partition] = rows
        return found

    def carry(self, starts: Mapping[tuple[str, int], int]) -> int:
        """See :meth:`sinks.rebuild.Projection.carry`."""
        at, carried = self.position(), 0
        columns = ", ".join(f"`{column}`" for column in shared_columns(self._live, self._shadow, "event_log")[0])
        for (topic, partition), rows in self.rows_before(starts).items():
            start = starts[topic, partition]
            stretch = {"topic": topic, "partition": partition, "first": at.get((topic, partition), 0), "end": start}
            self._live.command(
                f"INSERT INTO {self._database}.event_log ({columns}) "
                f"SELECT {columns} FROM event_log FINAL WHERE {STRETCH}",
                stretch,
            )
            self._sink.write((), {(topic, partition): start})
            carried += rows
        return carried

    def compare(self, since: Offsets, until: Offsets, on_progress: Callable[[int, int], None]) -> list[Comparison]:
        """See :meth:`sinks.rebuild.Projection.compare`."""
        return compare_table(self._live, self._shadow, "event_log", since, until, on_progress)

    def switch(self) -> None:
        """See :meth:`sinks.rebuild.Projection.switch`."""
        for table in self._made_here(self._comments(self._database)):
            self._live.command(f"EXCHANGE TABLES {self._live.database}.{table} AND {self._database}.{table}")
        self._switched = True

    def finish(self, *, keep: bool) -> str:
        """See :meth:`sinks.rebuild.Projection.finish`."""
        kept = []
        if keep:
            stamp = datetime.now(UTC).strftime("%Y%m%d_%H%M%S")
            for table in self._tables():
                name = f"{table}_until_{stamp}"
                self._live.command(f"RENAME TABLE {self._database}.{table} TO {self._live.database}.{name}")
                kept.append(f"{self._live.database}.{name}")
        # In this order: as long as the mark is there, the next run knows that all is done but this.
        self.discard()
        self._unmark()
        return ", ".join(kept)

    def discard(self) -> None:
        """See :meth:`sinks.rebuild.Projection.discard`."""
        self.close()
        for table in self._tables():
            self._live.command(f"DROP TABLE {self._database}.{table} {_DROP}")
        self._live.command(f"DROP DATABASE IF EXISTS {self._database} SYNC")


def _fingerprint() -> str:
    """Of the DDL: a shadow that an earlier release began is no use to this one."""
    texts = [path.read_bytes() for path in sorted(DDL.glob("*.sql"))]
    return hashlib.sha256(b"\0".join(texts)).hexdigest()[:16]
