"""Proves that an archive is whole: its chain, its files, every record in them and, where it still can, the log itself.

In: an archive's folder; the log that it was made from, and the head hashes that topic ``audit`` has of it, where they
are at hand. Out: :class:`Verified`, with a sentence for everything that is wrong.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from replay.archive.manifest import Manifest, Segment, Stretch
from replay.archive.rows import RAW, RecordsHash, records_of
from replay.archive.segment import file_hash
from replay.errors import ArchiveDamagedError
from replay.log import Log, Progress
from replay.selection import Place, Selection

__all__ = ["Verified", "verify"]


@dataclass(frozen=True, slots=True)
class Verified:
    """What was looked at, and what is wrong with it.

    ``compared`` counts the records that were held against the log, ``gone`` those that the log has no more. ``heads``
    counts the hashes of topic ``audit`` that the chain holds; None where there were none to ask for.
    """

    name: str
    head: str
    segments: int
    records: int
    gaps: int
    problems: tuple[str, ...]
    compared: int | None = None
    gone: int = 0
    heads: int | None = None

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def verify(
    folder: Path,
    *,
    log: Log | None = None,
    heads: Collection[str] | None = None,
    on_progress: Progress | None = None,
) -> Verified:
    """Look through the archive in ``folder``.

    Raises:
        ArchiveError: there is no archive.
        LogReadError: ``log`` can't be read.
    """
    tell = on_progress or (lambda done, total: None)
    try:
        manifest = Manifest.load(folder)
    except ArchiveDamagedError as error:
        return Verified("", "", 0, 0, 0, (str(error),))
    problems = [*_unconnected(manifest)]
    records = sum(segment.records for segment in manifest.segments)
    total, done = records * (1 if log is None else 2), 0
    for segment in manifest.segments:
        problems += _wrong_with(folder, segment)
        done += segment.records
        tell(done, total)
    compared, gone = None, 0
    if log is not None:
        compared = 0
        for place, stretches in _by_place(manifest).items():
            seen, lost, wrong = _against(log, place, stretches)
            compared, gone, problems = compared + seen, gone + lost, problems + wrong
            tell(records + compared + gone, total)
    known = None
    if heads is not None:
        strange = sorted(set(heads) - set(manifest.hashes))
        known = len(set(heads)) - len(strange)
        problems += [f"topic audit names the head {head}, which the manifest does not have" for head in strange]
    return Verified(
        name=manifest.header.name,
        head=manifest.head,
        segments=len(manifest.segments),
        records=records,
        gaps=sum(1 for _ in manifest.gaps()),
        problems=tuple(problems),
        compared=compared,
        gone=gone,
        heads=known,
    )


def _unconnected(manifest: Manifest) -> Iterator[str]:
    """Segments that are not numbered in order, and stretches that do not begin where the one before ended."""
    ends: dict[Place, int] = {}
    for number, segment in enumerate(manifest.segments):
        if segment.number != number:
            yield f"segment {segment.number} stands where {number} should"
        gaps = {(gap.topic, gap.partition): gap for gap in segment.gaps}
        for stretch in segment.stretches:
            end = ends.get(stretch.place, stretch.start)
            if (gap := gaps.get(stretch.place)) is not None and gap.start == end:
                end = gap.end
            if stretch.start != end:
                yield (
                    f"segment {number}: {stretch.topic}/{stretch.partition} begins at {stretch.start}, and the archive "
                    f"had come to {end}"
                )
            ends[stretch.place] = stretch.end


def _wrong_with(folder: Path, segment: Segment) -> list[str]:
    if not segment.file:
        return [f"segment {segment.number} has records and no file"] if segment.records else []
    path = folder / segment.file
    try:
        if (found := file_hash(path)) != segment.sha256:
            return [f"{path} was changed: its SHA-256 is {found}, and the manifest says {segment.sha256}"]
        return [f"{path}: {problem}" for problem in _wrong_rows(path, segment)]
    except (OSError, pa.ArrowException) as error:
        return [f"{path} can't be read: {error}"]


def _wrong_rows(path: Path, segment: Segment) -> Iterator[str]:
    with pq.ParquetFile(path) as file:
        rows = _Rows(file)
        for stretch in segment.stretches:
            found = RecordsHash()
            last = stretch.start - 1
            for batch in rows.next(stretch.records):
                for column, wanted in (("topic", stretch.topic), ("partition", stretch.partition)):
                    if batch.column(column).unique().to_pylist() != [wanted]:
                        yield f"rows of {stretch.topic}/{stretch.partition} say another {column}"
                records = records_of(stretch.place, batch)
                if not all(first.offset < then.offset for first, then in pairwise(records)):
                    yield f"{stretch.topic}/{stretch.partition}: offsets are out of order"
                if records[0].offset <= last or records[-1].offset >= stretch.end:
                    where = f"{stretch.topic}/{stretch.partition}"
                    yield f"{where}: offsets are outside of {stretch.start} to {stretch.end}"
                last = records[-1].offset
                found.add(records)
            if (found.records, found.hexdigest) != (stretch.records, stretch.sha256):
                yield f"{stretch.topic}/{stretch.partition}: the records' hash is another one"
        if rows.left:
            yield f"{rows.left} rows are in no stretch"


class _Rows:
    """A file's rows in order, as many as are asked for, in batches of a row group at most."""

    def __init__(self, file: pq.ParquetFile) -> None:
        self._file = file
        self._group = 0
        self._batch: pa.Table | None = None
        self.left: int = file.metadata.num_rows

    def next(self, count: int) -> Iterator[pa.RecordBatch]:
        while count > 0:
            if self._batch is None or not self._batch.num_rows:
                if self._group == self._file.metadata.num_row_groups:
                    return
                self._batch = self._file.read_row_group(self._group, ["topic", "partition", *RAW])
                self._group += 1
            batch = self._batch.slice(0, count)
            self._batch = self._batch.slice(batch.num_rows)
            count -= batch.num_rows
            self.left -= batch.num_rows
            yield from batch.combine_chunks().to_batches()


def _by_place(manifest: Manifest) -> dict[Place, list[Stretch]]:
    found: dict[Place, list[Stretch]] = {}
    for segment in manifest.segments:
        for stretch in segment.stretches:
            found.setdefault(stretch.place, []).append(stretch)
    return found


def _against(log: Log, place: Place, stretches: list[Stretch]) -> tuple[int, int, list[str]]:
    """Records compared, records that the log has no more, and what is wrong."""
    low, high = log.spans([place[0]]).get(place, (0, 0))
    held = [stretch for stretch in stretches if stretch.start >= low]
    gone = sum(stretch.records for stretch in stretches if stretch.start < low)
    if not held:
        return 0, gone, []
    where = f"{place[0]}/{place[1]}"
    if held[-1].end > high:
        return 0, gone, [f"the log's {where} ends at {high}, and the archive's at {held[-1].end}: another log"]
    hashes = {stretch.start: RecordsHash() for stretch in held}
    todo = iter(held)
    stretch = next(todo)
    for batch in log.read(Selection(spans={place: (stretch.start, held[-1].end)})):
        begin = 0
        for index, record in enumerate(batch.records):
            while record.offset >= stretch.end:
                hashes[stretch.start].add(batch.records[begin:index])
                begin, stretch = index, next(todo)
        hashes[stretch.start].add(batch.records[begin:])
    problems = [
        f"the log has other records than the archive in {where}, {stretch.start} to {stretch.end}"
        for stretch in held
        if hashes[stretch.start].hexdigest != stretch.sha256
    ]
    return sum(stretch.records for stretch in held), gone, problems
