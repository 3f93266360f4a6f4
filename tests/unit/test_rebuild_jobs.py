"""Jobs of a running system, and the log after an archive, as a rebuild reads them."""

import asyncio
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import pytest

from magnatronic.jobs import Jobs, JobState, Tell
from magnatronic.rebuild import LogAfterArchive
from replay.archive import ArchiveLog
from replay.log import Batch, Log
from replay.selection import Place, Selection, Span
from schemas.record import Record


def wait_for(condition: Callable[[], bool]) -> None:
    for _ in range(500):
        if condition():
            return
        threading.Event().wait(0.01)
    raise AssertionError("it did not come")


def test_a_job_tells_how_far_it_is_and_what_came_of_it() -> None:
    jobs, go = Jobs(), threading.Event()

    def work(tell: Tell, _: threading.Event) -> dict[str, Any]:
        tell("reading", 3, 10)
        assert go.wait(5)
        return {"rows": 10}

    job = jobs.begin("rebuild x", {"accept": True}, work)
    assert jobs.begin("rebuild x", {}, work) is job, "one of a name at a time"
    wait_for(lambda: job.as_dict()["done"] == 3)
    assert jobs.running() == [job]
    assert job.as_dict() | {"seconds": 0} == {
        **{"job": "rebuild x", "number": 1, "arguments": {"accept": True}, "state": "running", "phase": "reading"},
        **{"done": 3, "of": 10, "seconds": 0, "result": None, "error": ""},
    }
    go.set()
    wait_for(lambda: job.state is JobState.DONE)
    assert job.as_dict()["result"] == {"rows": 10}
    assert jobs.running() == []
    assert jobs.begin("rebuild x", {}, work) is not job
    assert jobs.get("another") is None


def test_a_job_that_fails_says_why(caplog: pytest.LogCaptureFixture) -> None:
    def work(_: Tell, __: threading.Event) -> dict[str, Any]:
        raise ValueError("the store is away")

    jobs = Jobs()
    job = jobs.begin("x", {}, work)
    wait_for(lambda: job.state is JobState.FAILED)
    assert job.as_dict()["error"] == "the store is away"


def test_stopping_ends_what_runs() -> None:
    def work(_: Tell, stopping: threading.Event) -> dict[str, Any]:
        assert stopping.wait(5)
        return {}

    jobs = Jobs()
    job = jobs.begin("x", {}, work)
    asyncio.run(jobs.stop())
    assert job.state is JobState.DONE


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
        return {place: span for place, span in self._spans.items() if not topics or place[0] in cast(list[str], topics)}

    def read(self, selection: Selection) -> Iterator[Batch]:
        positions = {place: first for place, (first, _) in (selection.spans or {}).items()}
        for place, (first, end) in (selection.spans or {}).items():
            assert self._spans[place][0] <= first <= end <= self._spans[place][1]
            for offset in range(first, end):
                positions[place] = offset + 1
                yield Batch([Record(*place, offset, 0, None, None)], dict(positions))


def after(log: FakeLog, archive: FakeLog | None) -> LogAfterArchive:
    return LogAfterArchive(cast(Log, log), cast(ArchiveLog, archive))


A, B = ("a", 0), ("b", 0)


def test_an_archive_gives_what_the_log_has_forgotten() -> None:
    history = after(FakeLog({A: (5, 9), B: (0, 3)}), FakeLog({A: (0, 7), ("other", 0): (0, 1)}))
    assert history.spans(["a", "b"]) == {A: (0, 9), B: (0, 3)}
    batches = list(history.read({A: (1, 9), B: (0, 2)}))
    read = [(record.topic, record.offset) for batch in batches for record in batch.records]
    assert read == [*(("a", offset) for offset in range(1, 9)), ("b", 0), ("b", 1)]
    assert all(batch.positions.keys() == {A, B} for batch in batches), "progress is told of all partitions"
    assert batches[-1].positions == {A: 9, B: 2}


@pytest.mark.parametrize(
    ("archive", "span"),
    [
        (None, (5, 9)),
        (FakeLog({A: (0, 4)}), (5, 9)),
        (FakeLog({A: (0, 5)}), (0, 9)),
        (FakeLog({A: (0, 7)}, (Gap("a", 0, 0, 3),)), (3, 9)),
        (FakeLog({A: (0, 7)}, (Gap("a", 0, 2, 6),)), (5, 9)),
        (FakeLog({B: (0, 7)}), (5, 9)),
    ],
    ids=["none", "ends too early", "ends in time", "lacks its beginning", "lacks what comes next", "another topic's"],
)
def test_only_an_archive_without_a_gap_before_the_log_counts(archive: FakeLog | None, span: Span) -> None:
    assert after(FakeLog({A: (5, 9)}), archive).spans(["a"]) == {A: span}
