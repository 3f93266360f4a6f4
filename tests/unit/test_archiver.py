"""How an archive is written, over a log in memory: what retention takes meanwhile, and what is read together."""

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import pytest

from replay.archive import Archived, ArchiveLog, Archiver, Gap, Header, Limits, Manifest, archiver, verify
from replay.errors import ArchiveGapError, LogTruncatedError
from replay.log import ALL, Batch, Log, Progress, wanted_spans
from replay.selection import Place, Selection, Span
from schemas.codec import Codec
from schemas.record import Record

CODEC = Codec()
HEADER = Header("main", "cluster", ("t",))
LIMITS = Limits(segment_records=10, group_records=4)


class MemoryLog(Log):
    """A topic with three partitions of ``sizes`` records; every tenth offset is a control record's."""

    def __init__(self, *sizes: int) -> None:
        self._ends = {("t", number): size for number, size in enumerate(sizes)}
        self.begins = dict.fromkeys(self._ends, 0)
        self.on_read: list[Mapping[Place, int]] = []
        """What retention deletes before the next reads: new beginnings, for each read one of them."""
        self.reads = 0

    def close(self) -> None:
        pass

    def grow(self, *more: int) -> None:
        for number, count in enumerate(more):
            self._ends["t", number] += count

    def spans(self, topics: Collection[str] = ()) -> dict[Place, Span]:
        return {place: (min(self.begins[place], end), end) for place, end in self._ends.items()}

    def read(
        self,
        selection: Selection = ALL,
        *,
        start: Mapping[Place, int] | None = None,
        on_progress: Progress | None = None,
    ) -> Iterator[Batch]:
        self.reads += 1
        wanted = wanted_spans(self.spans(), selection, start or {}, "gone")
        if self.on_read:
            self.begins |= self.on_read.pop(0)
        for (topic, number), (first, end) in wanted.items():
            for begin in range(first, end, 3):
                if begin < self.begins[topic, number]:
                    raise LogTruncatedError("deleted while it was read")
                offsets = [offset for offset in range(begin, min(begin + 3, end)) if offset % 10 != 9]
                yield Batch([self.record(number, offset) for offset in offsets], {(topic, number): begin + 3})

    @staticmethod
    def record(number: int, offset: int) -> Record:
        return Record("t", number, offset, offset, b"k", b"%d.%d" % (number, offset), [("a", b"b")])


def archive(log: Log, folder: Path, *, allow_gaps: bool = False, limits: Limits = LIMITS) -> Archived:
    with Archiver(folder, HEADER, log, CODEC, limits=limits, allow_gaps=allow_gaps) as made:
        return made.run()


def offsets(folder: Path) -> dict[int, list[int]]:
    assert verify(folder).problems == ()
    found: dict[int, list[int]] = {}
    with ArchiveLog(folder) as log:
        for batch in log.read():
            for record in batch.records:
                assert record.value == b"%d.%d" % (record.partition, record.offset)
                found.setdefault(record.partition, []).append(record.offset)
    return found


def kept(first: int, end: int) -> list[int]:
    return [offset for offset in range(first, end) if offset % 10 != 9]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_every_record_is_in_one_segment(tmp_path: Path) -> None:
    done = archive(MemoryLog(35, 0, 20), tmp_path)
    assert offsets(tmp_path) == {0: kept(0, 35), 2: kept(0, 20)}
    manifest = Manifest.load(tmp_path)
    assert [segment.records for segment in manifest.segments] == [10, 10, 10, 10, 10, 0]
    assert (done.records, done.segments, manifest.cuts) == (50, 6, 1)
    assert manifest.spans() == {("t", 0): (0, 35), ("t", 1): (0, 0), ("t", 2): (0, 20)}


def test_small_partitions_are_read_together_large_ones_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = MemoryLog(35, 12, 20)
    archive(log, tmp_path / "together")
    assert log.reads == 1
    monkeypatch.setattr(archiver, "_TOGETHER", 32)
    archive(log, tmp_path / "some")
    assert log.reads == 1 + 2
    monkeypatch.setattr(archiver, "_TOGETHER", 20_000)
    monkeypatch.setattr(archiver, "_TOGETHER_BYTES", 50)
    archive(log, tmp_path / "too large")
    assert log.reads == 1 + 2 + 1 + 3
    assert files(tmp_path / "together") == files(tmp_path / "some") == files(tmp_path / "too large")


def test_what_came_meanwhile_is_in_the_next_cut(tmp_path: Path) -> None:
    log = MemoryLog(15, 0, 3)
    archive(log, tmp_path)
    log.grow(20, 4, 0)
    done = archive(log, tmp_path)
    assert done.records == len(kept(15, 35)) + 4
    assert offsets(tmp_path) == {0: kept(0, 35), 1: kept(0, 4), 2: kept(0, 3)}
    assert archive(log, tmp_path).segments == 0


@pytest.mark.parametrize("together", [0, 20_000])
def test_what_retention_takes_while_it_is_read_is_a_gap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, together: int
) -> None:
    monkeypatch.setattr(archiver, "_TOGETHER", together)
    log = MemoryLog(35, 12, 20)
    log.on_read = [{}, {("t", 2): 8}] if not together else [{("t", 2): 8}]
    with pytest.raises(ArchiveGapError, match="t/2 0 to 8"):
        archive(log, tmp_path)
    done = archive(log, tmp_path, allow_gaps=True)
    assert Manifest.load(tmp_path).cuts == 1
    assert done.gaps == (Gap("t", 2, 0, 8),)
    assert offsets(tmp_path) == {0: kept(0, 35), 1: kept(0, 12), 2: kept(8, 20)}
    assert verify(tmp_path, log=log).problems == ()


def test_all_of_a_cut_that_is_gone_and_more(tmp_path: Path) -> None:
    log = MemoryLog(5, 5, 5)
    log.on_read = [{("t", 0): 5}]
    with pytest.raises(ArchiveGapError, match="t/0 0 to 5"):
        archive(log, tmp_path)
    log.grow(10, 0, 0)
    log.begins["t", 0] = 8
    done = archive(log, tmp_path, allow_gaps=True)
    # The first cut ended at 5, so the gap is told by the two cuts that it lies in.
    assert done.gaps == (Gap("t", 0, 0, 5), Gap("t", 0, 5, 8))
    assert offsets(tmp_path) == {0: kept(8, 15), 1: kept(0, 5), 2: kept(0, 5)}


def test_a_log_that_fails_for_ever_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = MemoryLog(5, 5, 5)

    def read(*_: object, **__: object) -> Iterator[Batch]:
        raise LogTruncatedError("gone, it says")

    monkeypatch.setattr(log, "read", read)
    with pytest.raises(LogTruncatedError, match="gone, it says"):
        archive(log, tmp_path, allow_gaps=True)
    assert not list(tmp_path.glob("*.partial"))
