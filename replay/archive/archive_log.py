"""Reads the log from an archive: the same records as from Kafka, whatever the topics have forgotten since.

In: an archive's folder and a selection. Out: batches of :class:`~schemas.record.Record` values. The manifest says which
rows of which file are of which partition, and row groups carry the least and greatest offset and time, so that what is
not meant is not read; of the others, the small columns that can tell are read first. Memory is bounded by a row group.
"""

import functools
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from replay.archive.manifest import Gap, Manifest, Segment, Stretch
from replay.archive.rows import RAW, records_of
from replay.errors import ArchiveDamagedError, LogReadError, LogTruncatedError
from replay.finished import Finished
from replay.log import ALL, Batch, Log, Progress, wanted_spans
from replay.selection import Place, Selection, Span, full_names, milliseconds, topics_with
from schemas.record import Record

__all__ = ["ArchiveLog"]

_LARGEST: Final = (1 << 63) - 1
_TIMESTAMP: Final = 3
"""The place of the column in the file: no nested one is before it."""


class ArchiveLog(Log):
    """The archive in ``folder``.

    Raises:
        ArchiveError: there is none.
        ArchiveDamagedError: its manifest was changed, or a file is missing or of another size.
    """

    def __init__(self, folder: Path) -> None:
        self.manifest = Manifest.load(folder)
        self._folder = folder
        self._spans = self.manifest.spans()
        self._gaps = tuple(self.manifest.gaps())
        for segment in self.manifest.segments:
            if segment.file:
                _check_file(folder / segment.file, segment)

    @property
    def gaps(self) -> tuple[Gap, ...]:
        """What the log had lost before it was archived. A span that holds some of it can't be read."""
        return self._gaps

    def close(self) -> None:
        """Nothing is held open between reads."""

    def handled(self) -> dict[str, Finished]:
        """By the agents' names what each had finished when the last cut was made; all of that is in the archive."""
        for segment in reversed(self.manifest.segments):
            if segment.cut:
                return {agent: Finished.from_json(value) for agent, value in segment.finished.items()}
        return {}

    def spans(self, topics: Collection[str] = ()) -> dict[Place, Span]:
        """See :meth:`replay.log.Log.spans`. Without ``topics`` all that is archived."""
        held = {topic for topic, _ in self._spans}
        if missing := sorted(set(topics) - held):
            raise LogReadError(
                f"the archive in {self._folder} holds no topic {', '.join(missing)}; "
                f"there are: {', '.join(sorted(held)) or 'none yet'}"
            )
        return {place: span for place, span in sorted(self._spans.items()) if not topics or place[0] in topics}

    def read(
        self,
        selection: Selection = ALL,
        *,
        start: Mapping[Place, int] | None = None,
        on_progress: Progress | None = None,
    ) -> Iterator[Batch]:
        """See :meth:`replay.log.Log.read`. In order of the segments: within a cut, one partition after another."""
        topics = selection.topics
        if selection.spans is not None:
            named = {topic for topic, _ in selection.spans}
            topics = frozenset(named & topics) if topics else frozenset(named)
            if not topics:
                return
        wanted = wanted_spans(
            self.spans(topics), selection, start or {}, f"the archive in {self._folder} was begun there"
        )
        if selection.spans is not None:
            self._refuse_gaps(wanted)
        yield from _Reading(self._folder, self.manifest.segments, wanted, selection).batches(on_progress)

    def _refuse_gaps(self, wanted: Mapping[Place, Span]) -> None:
        for gap in self._gaps:
            first, end = wanted.get((gap.topic, gap.partition), (0, 0))
            if first < gap.end and gap.start < end:
                raise LogTruncatedError(
                    f"the archive in {self._folder} lacks offsets {gap.start} to {gap.end} of {gap.topic}/"
                    f"{gap.partition}: retention had deleted them before they were archived; ask for the rest"
                )


def _check_file(path: Path, segment: Segment) -> None:
    size = path.stat().st_size if path.is_file() else None
    if size != segment.bytes:
        said = "is missing" if size is None else f"has {size} bytes"
        raise ArchiveDamagedError(
            f"{path} {said}, and the manifest says {segment.bytes} bytes; restore it from a copy of the archive"
        )


class _Reading:
    """One read: which partitions' spans are wanted, and where each stands."""

    def __init__(
        self, folder: Path, segments: Collection[Segment], wanted: Mapping[Place, Span], selection: Selection
    ) -> None:
        self._folder = folder
        self._segments = segments
        self._wanted = wanted
        self._positions = {place: first for place, (first, _) in wanted.items()}
        self._takes = selection.filter()
        self._selection = selection
        self._columns = _columns(selection)
        self._first_ms = -1 if selection.since is None else milliseconds(selection.since)
        self._end_ms = _LARGEST if selection.until is None else milliseconds(selection.until)

    def batches(self, on_progress: Progress | None) -> Iterator[Batch]:
        begun = sum(self._positions.values())
        total = sum(end for _, end in self._wanted.values()) - begun
        told: dict[Place, int] = {}
        for records in self._records():
            told = dict(self._positions)
            yield Batch(records, told)
            if on_progress is not None:
                on_progress(sum(told.values()) - begun, total)
        if told != self._positions:
            yield Batch((), dict(self._positions))
            if on_progress is not None:
                on_progress(total, total)

    def _records(self) -> Iterator[list[Record]]:
        for segment in self._segments:
            yield from self._of_segment(segment)
        # What is left are gaps, and what the archive was told to be empty.
        for place, (_, end) in self._wanted.items():
            self._move(place, end)

    def _of_segment(self, segment: Segment) -> Iterator[list[Record]]:
        rows = 0
        parts: list[tuple[Stretch, int]] = []
        for stretch in segment.stretches:
            if self._left(stretch) and stretch.records:
                parts.append((stretch, rows))
            elif self._left(stretch):
                self._move(stretch.place, stretch.end)
            rows += stretch.records
        if parts and segment.first_ms < self._end_ms and segment.last_ms >= self._first_ms:
            yield from self._of_file(segment, parts)
        elif parts:
            for stretch, _ in parts:
                self._move(stretch.place, stretch.end)

    def _left(self, stretch: Stretch) -> bool:
        first, end = self._wanted.get(stretch.place, (0, 0))
        return first < stretch.end and stretch.start < end

    def _move(self, place: Place, position: int) -> None:
        self._positions[place] = max(self._positions[place], min(position, self._wanted[place][1]))

    def _of_file(self, segment: Segment, parts: list[tuple[Stretch, int]]) -> Iterator[list[Record]]:
        path = self._folder / segment.file
        try:
            with pq.ParquetFile(path, memory_map=False) as file:
                begin = 0
                for group in range(file.metadata.num_row_groups):
                    count = file.metadata.row_group(group).num_rows
                    here = [
                        (stretch, max(first, begin) - begin, min(first + stretch.records, begin + count) - begin)
                        for stretch, first in parts
                        if first < begin + count and begin < first + stretch.records
                    ]
                    if here:
                        records = self._of_group(file, group, here)
                        for stretch, first in parts:
                            if begin < first + stretch.records <= begin + count:
                                self._move(stretch.place, stretch.end)
                        yield records
                    begin += count
        except (OSError, pa.ArrowException) as error:
            raise ArchiveDamagedError(
                f"{path} can't be read: {error}; `magnatronic archive verify` tells more, a copy of the archive helps"
            ) from error

    def _of_group(self, file: pq.ParquetFile, group: int, here: list[tuple[Stretch, int, int]]) -> list[Record]:
        """The records of one row group: of ``here``, stretches with their first and last row, what is wanted."""
        bounds = file.metadata.row_group(group).column(_TIMESTAMP).statistics
        if bounds.min_raw >= self._end_ms or bounds.max_raw < self._first_ms:
            return []
        picked: pa.Array | None = None
        if self._columns:
            picked = _mask(self._selection, file.read_row_group(group, list(self._columns)))
            if not pc.any(picked).as_py():
                return []
        table = file.read_row_group(group, list(RAW))
        records: list[Record] = []
        for stretch, low, high in here:
            part = table.slice(low, high - low)
            mask = None if picked is None else picked.slice(low, high - low)
            offsets = part.column("offset")
            self._move(stretch.place, offsets[-1].as_py() + 1)
            first, end = self._wanted[stretch.place]
            if first > stretch.start or end < stretch.end:
                within = pc.and_(pc.greater_equal(offsets, first), pc.less(offsets, end))
                mask = within if mask is None else pc.and_(within, mask)
            if mask is not None:
                part = part.filter(mask)
            for batch in part.combine_chunks().to_batches():
                found = records_of(stretch.place, batch)
                records += found if self._takes is None else filter(self._takes, found)
        return records


def _columns(selection: Selection) -> tuple[str, ...]:
    """The small columns that tell of a row whether it can be meant."""
    named = {
        "key": selection.tasks or selection.correlation_ids,
        "event_type": selection.event_types,
        "topic": selection.event_types,
        "source": selection.agents,
        "correlation_id": selection.correlation_ids,
    }
    return tuple(column for column, asked in named.items() if asked)


def _mask(selection: Selection, table: pa.Table) -> pa.ChunkedArray:
    """Which rows can be meant: all that are, and some that the selection's own filter then leaves out."""
    tests = []
    if selection.tasks:
        tests.append(_among(table, "key", [task.encode() for task in selection.tasks]))
    if selection.event_types:
        tests.append(
            pc.or_(
                _among(table, "event_type", full_names(selection.event_types)),
                _among(table, "topic", topics_with(selection.event_types)),
            )
        )
    if selection.agents:
        sources = table.column("source").cast(pa.string())
        found = [pc.fill_null(pc.starts_with(sources, f"/agents/{agent}"), False) for agent in selection.agents]
        tests.append(functools.reduce(pc.or_, found))
    if selection.correlation_ids:
        tests.append(
            pc.or_(
                _among(table, "correlation_id", selection.correlation_ids),
                _among(table, "key", [each.encode() for each in selection.correlation_ids]),
            )
        )
    return functools.reduce(pc.and_, tests)


def _among(table: pa.Table, column: str, values: Collection[Any]) -> pa.ChunkedArray:
    cells = table.column(column)
    if pa.types.is_dictionary(cells.type):
        cells = cells.cast(pa.string())
    return pc.is_in(cells, value_set=pa.array(values, cells.type))
