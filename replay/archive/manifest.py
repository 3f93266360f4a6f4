"""The manifest of an archive: which segments there are, in a chain of hashes.

In and out: ``manifest.jsonl`` in the archive's folder, one line of canonical JSON an entry, each with the SHA-256 of
itself, which covers that of the entry before it. The first line names the archive, the others are segments: a Parquet
file, its hash, for each partition the span of consumer positions and the hash over its records, and on the last segment
of a cut, what each agent had finished by then. A line that a crash has cut short is taken back.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

import orjson

from replay.errors import ArchiveDamagedError, ArchiveError
from replay.selection import Place, Span
from schemas.metadata import canonical_json

__all__ = ["FORMAT", "LOCK", "Gap", "Header", "Manifest", "Segment", "Stretch", "sync_folder"]

FORMAT: Final = 1
_NAME: Final = "manifest.jsonl"

LOCK: Final = "archive.lock"
"""Held by the process that writes the archive."""


@dataclass(frozen=True, slots=True)
class Header:
    """What an archive is: ``name`` tells archives of a cluster apart, ``topics`` empty are all event topics."""

    name: str
    cluster: str
    topics: tuple[str, ...] = ()
    format: int = FORMAT


@dataclass(frozen=True, slots=True)
class Stretch:
    """``[start, end)`` of a partition's consumer positions, and the records there with the hash over them."""

    topic: str
    partition: int
    start: int
    end: int
    records: int
    sha256: str

    @property
    def place(self) -> Place:
        """The topic and the partition."""
        return self.topic, self.partition


@dataclass(frozen=True, slots=True)
class Gap:
    """``[start, end)`` of a partition that the log no longer held when it was to be archived."""

    topic: str
    partition: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Segment:
    """A file of records, sorted by topic, partition and offset, with ``stretches`` in the same order.

    ``first_ms`` and ``last_ms`` bound the append times. ``file`` is empty where no record was there. ``cut`` is set on
    the last segment of a cut through the log; ``finished`` says what each agent had finished when that was made.
    """

    number: int
    file: str
    bytes: int
    sha256: str
    records: int
    first_ms: int
    last_ms: int
    stretches: tuple[Stretch, ...]
    gaps: tuple[Gap, ...] = ()
    cut: bool = False
    finished: Mapping[str, Any] = field(default_factory=dict)

    @property
    def content(self) -> str:
        """The hash over the records, whatever file they are in: over those of all stretches."""
        return sha256(canonical_json([asdict(stretch) for stretch in self.stretches]).encode()).hexdigest()


class Manifest:
    """The manifest of the archive in ``folder``, read and, if wanted, written on."""

    def __init__(self, folder: Path, header: Header, hashes: list[str], segments: list[Segment]) -> None:
        self.folder = folder
        self.header = header
        self.segments = segments
        self.hashes = hashes
        """The hash of every entry, the header's first."""

    @property
    def head(self) -> str:
        """The hash of the last entry: it vouches for all before it."""
        return self.hashes[-1]

    @property
    def cuts(self) -> int:
        """How many cuts are complete."""
        return sum(segment.cut for segment in self.segments)

    def spans(self) -> dict[Place, Span]:
        """For each partition, where the archive begins and ends."""
        found: dict[Place, Span] = {}
        for segment in self.segments:
            for stretch in segment.stretches:
                first, _ = found.get(stretch.place, (stretch.start, 0))
                found[stretch.place] = first, stretch.end
        return found

    def gaps(self) -> Iterator[Gap]:
        """All that is missing in between."""
        for segment in self.segments:
            yield from segment.gaps

    @classmethod
    def exists(cls, folder: Path) -> bool:
        """Whether there is an archive in ``folder``."""
        try:
            with (folder / _NAME).open("rb") as file:
                return file.readline().endswith(b"\n")  # else a crash has cut the first line short
        except FileNotFoundError:
            return False

    @classmethod
    def create(cls, folder: Path, header: Header) -> "Manifest":
        """A new archive's.

        Raises:
            ArchiveError: the folder holds something else.
        """
        if strange := sorted({path.name for path in folder.iterdir()} - {_NAME, LOCK}):
            raise ArchiveError(f"{folder} is no archive, and holds {strange[0]}; take a new or an empty folder")
        made = cls(folder, header, [], [])
        (folder / _NAME).unlink(missing_ok=True)
        made._append(asdict(header))
        sync_folder(folder)
        return made

    @classmethod
    def load(cls, folder: Path) -> "Manifest":
        """The manifest in ``folder``, its chain checked.

        Raises:
            ArchiveError: there is none.
            ArchiveDamagedError: a line was changed, removed or put in.
        """
        path = folder / _NAME
        try:
            raw = path.read_bytes()
        except OSError as error:
            raise ArchiveError(
                f"{folder} holds no archive ({error.strerror}); `magnatronic archive --to` makes one"
            ) from None
        header: Header | None = None
        hashes: list[str] = []
        segments: list[Segment] = []
        for number, line in enumerate(raw.split(b"\n")[:-1], 1):  # what no newline ends was cut short
            where = f"{path}, line {number}"
            try:
                entry = orjson.loads(line)
                said = entry.pop("hash")
                if entry.pop("previous") != (hashes[-1] if hashes else ""):
                    raise ArchiveDamagedError(
                        f"{where} does not follow the line before it; a line was changed or is missing"
                    )
                if said != _hash_of(hashes[-1] if hashes else "", entry):
                    raise ArchiveDamagedError(f"{where} was changed: its hash is another one")
                if header is None:
                    header = _header(entry, where)
                else:
                    segments.append(_segment(entry))
            except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
                raise ArchiveDamagedError(f"{where} can't be read: {error}") from None
            hashes.append(said)
        if header is None:
            raise ArchiveError(f"{path} is empty; remove it, and `magnatronic archive --to` makes a new archive")
        return cls(folder, header, hashes, segments)

    def append(self, segment: Segment) -> None:
        """Add ``segment``; when this returns, it is on the disk."""
        self._append(asdict(segment))
        self.segments.append(segment)

    def repair(self) -> None:
        """Take back a line that a crash has cut short."""
        path = self.folder / _NAME
        with path.open("rb+") as file:
            raw = file.read()
            whole = raw.rfind(b"\n") + 1
            if whole < len(raw):
                file.truncate(whole)
                os.fsync(file.fileno())

    def _append(self, entry: dict[str, Any]) -> None:
        previous = self.hashes[-1] if self.hashes else ""
        made = _hash_of(previous, entry)
        line = orjson.dumps({**entry, "previous": previous, "hash": made}) + b"\n"
        with (self.folder / _NAME).open("ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self.hashes.append(made)


def sync_folder(folder: Path) -> None:
    """See to it that the names of the folder's files are on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _hash_of(previous: str, entry: Mapping[str, Any]) -> str:
    return sha256(f"{previous}\n{canonical_json(entry)}".encode()).hexdigest()


def _header(entry: dict[str, Any], where: str) -> Header:
    if entry.get("format") != FORMAT:
        raise ArchiveError(f"{where} is of format {entry.get('format')}, and this release reads format {FORMAT}")
    return Header(**{**entry, "topics": tuple(entry["topics"])})


def _segment(entry: dict[str, Any]) -> Segment:
    stretches = tuple(Stretch(**each) for each in entry["stretches"])
    return Segment(**{**entry, "stretches": stretches, "gaps": tuple(Gap(**each) for each in entry["gaps"])})
