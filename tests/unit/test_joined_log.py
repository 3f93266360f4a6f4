"""An archive and the log after it, read as one: what each gives, and which archives count."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import pytest

from replay.archive import ArchiveLog
from replay.errors import LogTruncatedError
from replay.joined import JoinedLog
from replay.log import Batch, Log
from replay.selection import Place, Selection, Span
from schemas.record import Record


@dataclass(frozen=True)
class Gap:
    topic: str
    partition: int
    start: int
    end: int


class FakeLog:
    """Holds an offset for each position of its spans."""

    def __init__(self, spans: Mapping[Place, Span], gaps: tuple[Gap, ...] = ()) -> None:
        self._spans = dict(spans)
        self.gaps = gaps

    def spans(self, topics: object = ()) -> dict[Place, Span]:
        return {place: span for place, span in self._spans.items() if not topics or place[0] in cast(set[str], topics)}

    def read(self, selection: Selection, **_: Any) -> Iterator[Batch]:
        positions = {place: first for place, (first, _) in (selection.spans or {}).items()}
        for place, (first, end) in (selection.spans or {}).items():
            assert self._spans[place][0] <= first <= end <= self._spans[place][1]
            for offset in range(first, end):
                positions[place] = offset + 1
                yield Batch([Record(*place, offset, 0, None, None)], dict(positions))


def joined(log: FakeLog, archive: FakeLog) -> JoinedLog:
    return JoinedLog(cast(ArchiveLog, archive), cast(Log, log))


A, B = ("a", 0), ("b", 0)


def test_an_archive_gives_what_the_log_has_forgotten() -> None:
    log = joined(FakeLog({A: (5, 9), B: (0, 3)}), FakeLog({A: (0, 7), ("other", 0): (0, 1)}))
    assert log.spans(["a", "b"]) == {A: (0, 9), B: (0, 3)}
    told: list[tuple[int, int]] = []
    batches = list(log.read(Selection(spans={A: (1, 9), B: (0, 2)}), on_progress=lambda *far: told.append(far)))
    read = [(record.topic, record.offset) for batch in batches for record in batch.records]
    assert read == [*(("a", offset) for offset in range(1, 9)), ("b", 0), ("b", 1)]
    assert all(batch.positions.keys() == {A, B} for batch in batches)
    assert batches[-1].positions == {A: 9, B: 2}
    assert told[-1] == (10, 10)
    again = list(log.read(Selection(spans={A: (1, 9), B: (0, 2)}), start=batches[5].positions))
    assert [record.offset for batch in again for record in batch.records] == [7, 8, 0, 1]


def test_what_neither_holds_is_refused() -> None:
    log = joined(FakeLog({A: (5, 9)}), FakeLog({A: (2, 7)}))
    assert list(log.read(Selection(spans={A: (4, 4)})))[-1].positions == {A: 4}
    with pytest.raises(LogTruncatedError, match="reach back"):
        list(log.read(Selection(spans={A: (1, 9)})))


@pytest.mark.parametrize(
    ("archive", "span"),
    [
        (FakeLog({A: (0, 4)}), (5, 9)),
        (FakeLog({A: (0, 5)}), (0, 9)),
        (FakeLog({A: (0, 7)}, (Gap("a", 0, 0, 3),)), (3, 9)),
        (FakeLog({A: (0, 7)}, (Gap("a", 0, 2, 6),)), (5, 9)),
        (FakeLog({B: (0, 7)}), (5, 9)),
    ],
    ids=["ends too early", "ends in time", "lacks its beginning", "lacks what comes next", "another topic's"],
)
def test_only_an_archive_without_a_gap_before_the_log_counts(archive: FakeLog, span: Span) -> None:
    assert joined(FakeLog({A: (5, 9)}), archive).spans(["a"]) == {A: span}
