"""Writes one segment's file: records in order, row group by row group, and what the manifest says of them.

In: stretches of partitions and their records, sorted by topic, partition and offset. Out: a Parquet file (zstd) under
its final name, on the disk, and a :class:`~replay.archive.manifest.Segment`. Until then its name ends in ``.partial``,
and whoever finds such a file writes it anew.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

import pyarrow.parquet as pq

from replay.archive.manifest import Gap, Segment, Stretch, sync_folder
from replay.archive.rows import SCHEMA, RecordsHash, Rows
from replay.selection import Place
from schemas.codec import Codec
from schemas.record import Record

__all__ = ["Limits", "SegmentWriter", "file_hash"]

_CHUNK: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Limits:
    """How much a file and a row group hold at most; the record that passes a limit is still in."""

    segment_records: int = 250_000
    segment_bytes: int = 256 << 20
    group_records: int = 10_000
    group_bytes: int = 16 << 20


@dataclass(slots=True)
class _Open:
    """The stretch that is being written, and its records that are not hashed yet."""

    place: Place
    start: int
    position: int
    keep: bool
    hash: RecordsHash = field(default_factory=RecordsHash)
    pending: list[Record] = field(default_factory=list)

    def settle(self) -> None:
        self.hash.add(self.pending)
        self.pending = []


class SegmentWriter:
    """Segment ``number`` of the archive in ``folder``: :meth:`begin`, :meth:`add`, :meth:`end` for each partition."""

    def __init__(self, folder: Path, number: int, codec: Codec, limits: Limits) -> None:
        self.number = number
        self._folder = folder
        self._path = folder / f"{number:06d}.parquet"
        self._partial = folder / f"{number:06d}.parquet.partial"
        self._codec = codec
        self._limits = limits
        self._rows = Rows(codec)
        self._writer: pq.ParquetWriter | None = None
        self._open: _Open | None = None
        self._stretches: list[Stretch] = []
        self._gaps: list[Gap] = []
        self._records = self._bytes = 0
        self._first_ms, self._last_ms = 1 << 62, 0

    @property
    def full(self) -> bool:
        """Whether the next record belongs into another segment."""
        return self._records >= self._limits.segment_records or self._bytes >= self._limits.segment_bytes

    def begin(self, place: Place, position: int, *, gap: Gap | None = None, keep: bool = False) -> None:
        """A partition's stretch from ``position`` on. With ``keep`` it is told though it may be empty."""
        if gap is not None:
            self._gaps.append(gap)
        self._open = _Open(place, position, position, keep or gap is not None)

    def add(self, record: Record) -> None:
        """The partition's next record.

        Raises:
            RegistryError: the registry did not answer.
        """
        assert self._open is not None
        before = self._rows.bytes
        self._rows.add(record)
        self._open.pending.append(record)
        self._open.position = record.offset + 1
        self._records += 1
        self._bytes += self._rows.bytes - before
        self._first_ms, self._last_ms = (
            min(self._first_ms, record.timestamp_ms),
            max(self._last_ms, record.timestamp_ms),
        )
        if len(self._rows) >= self._limits.group_records or self._rows.bytes >= self._limits.group_bytes:
            self._flush()

    def end(self, position: int | None = None) -> int:
        """The partition's stretch ends at ``position``, or behind its last record; returned."""
        assert self._open is not None
        open_, self._open = self._open, None
        open_.settle()
        end = open_.position if position is None else position
        if open_.start < end or open_.keep:
            self._stretches.append(Stretch(*open_.place, open_.start, end, open_.hash.records, open_.hash.hexdigest))
        return end

    def seal(self, *, cut: bool = False, finished: Mapping[str, Any] | None = None) -> Segment:
        """Put the file on the disk under its name; the manifest's entry for it."""
        self._flush()
        name, size, digest = "", 0, ""
        if self._writer is not None:
            self._writer.close()
            with self._partial.open("rb") as file:
                os.fsync(file.fileno())
            size, digest = self._partial.stat().st_size, file_hash(self._partial)
            self._partial.replace(self._path)
            sync_folder(self._folder)
            name = self._path.name
        return Segment(
            number=self.number,
            file=name,
            bytes=size,
            sha256=digest,
            records=self._records,
            first_ms=self._first_ms if self._records else 0,
            last_ms=self._last_ms,
            stretches=tuple(self._stretches),
            gaps=tuple(self._gaps),
            cut=cut,
            finished=finished or {},
        )

    def abandon(self) -> None:
        """Let go of the half-written file."""
        if self._writer is not None:
            self._writer.close()
            self._partial.unlink(missing_ok=True)

    def _flush(self) -> None:
        if self._open is not None:
            self._open.settle()
        if not len(self._rows):
            return
        if self._writer is None:
            self._writer = pq.ParquetWriter(
                self._partial,
                SCHEMA,
                compression="zstd",
                # Ids and payloads hardly repeat; topics, names, types and sources do.
                use_dictionary=[
                    "topic",
                    "headers.list.element.name",
                    "headers.list.element.value",
                    "event_type",
                    "source",
                ],
                write_statistics=["topic", "partition", "offset", "timestamp", "event_type", "source"],
            )
        batch = self._rows.take()
        self._writer.write_batch(batch, row_group_size=batch.num_rows)


def file_hash(path: Path) -> str:
    """The SHA-256 (hex) of a file.

    Raises:
        OSError: it can't be read.
    """
    digest = sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
