"""Writes an archive: what the log holds and the archive does not, segment by segment.

In: a log, and what the agents have finished. Out: Parquet files, each sealed by a line in the manifest. A cut is
planned before it is read, and its records are taken in one order (topic, partition, offset), so that a process that is
killed at any moment and started again makes the same files byte for byte: what has no line in the manifest is written
anew.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from filelock import FileLock, Timeout

from replay.archive.manifest import LOCK, Gap, Header, Manifest
from replay.archive.plan import Plan, load_plan, make_plan, save_plan, without_lost
from replay.archive.segment import Limits, SegmentWriter
from replay.errors import ArchiveBusyError, ArchiveError, LogTruncatedError
from replay.finished import Finished
from replay.log import Log, Progress
from replay.selection import Place, Selection, Span
from schemas.codec import Codec
from schemas.record import Record

__all__ = ["Archived", "Archiver"]

_TOGETHER: Final = 20_000
"""Partitions with fewer positions are read at once and sorted in memory: a read of its own for each takes 0.1 s."""

_TOGETHER_BYTES: Final = 64 << 20

_Todo = tuple[Place, Span]


@dataclass(frozen=True, slots=True)
class Archived:
    """What a run added, and the archive's head after it."""

    segments: int
    records: int
    bytes: int
    gaps: tuple[Gap, ...]
    head: str
    total_segments: int
    total_records: int


class Archiver:
    """Writes the archive in ``folder``; one process at a time. Use it as a context manager.

    ``codec`` decodes the payloads; with :class:`~replay.archive.rows.LeftSealed` for its cipher, personal fields stay
    out of them. ``finished`` is asked what each agent has finished, before the log is asked for its ends. With
    ``allow_gaps``, what retention has deleted is noted in the manifest, and is no error.

    Raises:
        ArchiveBusyError: another process writes it.
        ArchiveError: the archive in the folder is another one: of another cluster, name or topics.
    """

    def __init__(
        self,
        folder: Path,
        header: Header,
        log: Log,
        codec: Codec,
        *,
        finished: Callable[[], Mapping[str, Finished]] = dict,
        limits: Limits | None = None,
        allow_gaps: bool = False,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._log = log
        self._codec = codec
        self._finished = finished
        self._limits = limits or Limits()
        self._allow_gaps = allow_gaps
        self._lock = FileLock(folder / LOCK)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise ArchiveBusyError(f"another process writes the archive in {folder}; let it end, or stop it") from None
        try:
            self.manifest = self._manifest(header)
        except BaseException:
            self._lock.release()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def _manifest(self, header: Header) -> Manifest:
        if not Manifest.exists(self._folder):
            return Manifest.create(self._folder, header)
        manifest = Manifest.load(self._folder)
        manifest.repair()
        if manifest.header != header:
            raise ArchiveError(
                f"the archive in {self._folder} is that of {_told(manifest.header)}, and this would be "
                f"{_told(header)}; take another folder, or the same cluster, name and topics"
            )
        return manifest

    def run(self, on_progress: Progress | None = None) -> Archived:
        """Finish the cut that an earlier run has begun, then archive all that the log holds now.

        Raises:
            ArchiveGapError: retention deleted what was to be archived, and gaps are not allowed.
            LogReadError: the log can't be read.
            RegistryError: the registry did not answer.
        """
        before = len(self.manifest.segments)
        if (begun := load_plan(self._folder, self.manifest.cuts)) is not None:
            self._cut(begun, on_progress)
        # What was finished first: all of it is then in the cut.
        finished = {agent: each.as_json() for agent, each in sorted(self._finished().items())}
        plan = make_plan(self.manifest, self._log.spans(self.manifest.header.topics), finished, self._allow_gaps)
        if self._has_news(plan):
            save_plan(self._folder, plan)
            self._cut(plan, on_progress)
        added = self.manifest.segments[before:]
        return Archived(
            segments=len(added),
            records=sum(each.records for each in added),
            bytes=sum(each.bytes for each in added),
            gaps=tuple(gap for each in added for gap in each.gaps),
            head=self.manifest.head,
            total_segments=len(self.manifest.segments),
            total_records=sum(each.records for each in self.manifest.segments),
        )

    def _has_news(self, plan: Plan) -> bool:
        known = self.manifest.spans()
        if any(place not in known or known[place][1] < end for place, end in plan.ends.items()):
            return True
        last = next((each.finished for each in reversed(self.manifest.segments) if each.cut), {})
        return plan.finished != last

    def _cut(self, plan: Plan, on_progress: Progress | None) -> None:
        while True:
            held = self._log.spans(self.manifest.header.topics)
            now = without_lost(plan, self.manifest, held, self._allow_gaps)
            if now != plan:
                plan = now
                save_plan(self._folder, plan)
            try:
                self._write(plan, on_progress or (lambda done, total: None))
                return
            except LogTruncatedError:
                if self._log.spans(self.manifest.header.topics) == held:
                    raise  # nothing was deleted meanwhile: to begin again would not help

    def _write(self, plan: Plan, on_progress: Progress) -> None:
        archived = {place: end for place, (_, end) in self.manifest.spans().items()}
        gaps = {(gap.topic, gap.partition): gap for gap in plan.gaps}
        todo: list[_Todo] = []
        for place, end in plan.ends.items():
            start = max(plan.starts[place], archived.get(place, 0))
            if place in gaps and gaps[place].start == start:
                start = gaps[place].end
            else:
                gaps.pop(place, None)
            if start < end or place not in archived or place in gaps:
                todo.append((place, (start, end)))
        total = sum(plan.ends[place] - plan.starts[place] for place in plan.ends)
        done = total - sum(end - start for _, (start, end) in todo)
        segment = self._segment()
        try:
            for place, (start, end), read in self._in_order(todo):
                segment.begin(place, start, gap=gaps.get(place), keep=place not in archived)
                for records in read:
                    for record in records:
                        segment.add(record)
                        if segment.full:
                            position = segment.end()
                            self.manifest.append(segment.seal())
                            segment = self._segment()
                            segment.begin(place, position)
                    done += len(records)
                    on_progress(min(done, total), total)
                segment.end(end)
            self.manifest.append(segment.seal(cut=True, finished=plan.finished))
            on_progress(total, total)
        except BaseException:
            segment.abandon()
            raise

    def _segment(self) -> SegmentWriter:
        return SegmentWriter(self._folder, len(self.manifest.segments), self._codec, self._limits)

    def _in_order(self, todo: Sequence[_Todo]) -> Iterator[tuple[Place, Span, Iterator[Sequence[Record]]]]:
        """Each partition with its records, in batches."""
        rest = list(todo)
        while rest:
            taken, positions = 0, 0
            while taken < len(rest):
                start, end = rest[taken][1]
                positions += end - start
                if taken and positions > _TOGETHER:
                    break
                taken += 1
            group, rest = rest[:taken], rest[taken:]
            found = self._together(group) if len(group) > 1 else None
            for place, span in group:
                if found is not None:
                    yield place, span, iter([found[place]])
                else:
                    yield place, span, self._alone(place, span)

    def _alone(self, place: Place, span: Span) -> Iterator[Sequence[Record]]:
        if span[0] < span[1]:
            for batch in self._log.read(Selection(spans={place: span})):
                yield batch.records

    def _together(self, group: Sequence[_Todo]) -> dict[Place, list[Record]] | None:
        """All records of some partitions; None where they are too large for that."""
        found: dict[Place, list[Record]] = {place: [] for place, _ in group}
        size = 0
        for batch in self._log.read(Selection(spans={place: span for place, span in group if span[0] < span[1]})):
            for record in batch.records:
                found[record.topic, record.partition].append(record)
                size += len(record.value or b"")
            if size > _TOGETHER_BYTES:
                return None
        return found


def _told(header: Header) -> str:
    topics = ", ".join(header.topics) or "all event topics"
    return f"cluster {header.cluster or '(unnamed)'}, name {header.name!r}, {topics}"
