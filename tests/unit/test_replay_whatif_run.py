"""Many tasks at once: what is read, kept, gone on with and reported."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson
import pytest

from agents.context import Ports
from agents.prompts import PROMPTS
from replay.errors import WhatIfError
from replay.log import ALL, Batch, Log, Progress
from replay.selection import Place, Selection, Span
from replay.whatif.budget import Budget
from replay.whatif.calls import CallLog
from replay.whatif.changes import Changes
from replay.whatif.fleet import LocalFleet
from replay.whatif.folder import Folder
from replay.whatif.loading import choose, histories
from replay.whatif.page import report_page
from replay.whatif.result import Status, TaskResult
from replay.whatif.run import Report, Setup, run
from schemas.codec import Codec
from schemas.events import TaskCancelRequested, TaskSubmitted
from schemas.record import Record
from tests.support.recording import START_MS, Happening
from tests.support.whatif import QUESTIONS, Corpus, Embedding, Model, fleet_of, posts_of, recorded

CHANGED = Changes(prompts={"answer": "Answer in one sentence."}, ask="model")


class ListLog(Log):
    """Records in memory."""

    def __init__(self, records: Sequence[Record]) -> None:
        self.records = records

    def spans(self, topics: Collection[str] = ()) -> dict[Place, Span]:
        return {(record.topic, record.partition): (0, 10**9) for record in self.records}

    def read(
        self,
        selection: Selection = ALL,
        *,
        start: Mapping[Place, int] | None = None,
        on_progress: Progress | None = None,
    ) -> Iterator[Batch]:
        yield Batch([record for record in self.records if selection.takes(record)], {})

    def close(self) -> None:
        pass


async def log_of(count: int) -> ListLog:
    """So many tasks, a second apart, the first of them still open, and one that was cancelled."""
    records: list[Record] = []
    for number in range(count):
        task_id = f"task-{number}"
        asked = [Happening(TaskCancelRequested(task_id=task_id, requested_by="me"), 70)] if number == 3 else []
        made = await recorded(
            QUESTIONS[number % len(QUESTIONS)], task_id, happenings=asked, start_ms=START_MS + number * 1000
        )
        records += made[:2] if number == 0 else made
    return ListLog([_moved(record, number) for number, record in enumerate(records)])


def _moved(record: Record, number: int) -> Record:
    return Record(record.topic, record.partition, number, record.timestamp_ms, record.key, record.value, record.headers)


def setup(changes: Changes, llm: Model | None = None, **budget: Any) -> Setup:
    agents = fleet_of(PROMPTS.with_texts(changes.prompts))
    return Setup(
        changes=changes,
        fleet=LocalFleet(agents, Codec()),
        posts=posts_of(agents),
        ports=Ports(llm=llm, memory=Corpus(), embedding=Embedding()),
        codec=Codec(),
        budget=Budget(**budget),
        estimate=lambda request: (1000, 0.001),
        at_once=3,
    )


def manifest(tasks: Sequence[str], changes: Changes) -> dict[str, Any]:
    return {"id": "x", "told": changes.told(), "changes": changes.as_dict(), "open": 0, "unknown": (), "tasks": tasks}


async def ran(folder: Path, log: Log, changes: Changes = CHANGED, llm: Model | None = None, **budget: Any) -> Report:
    tasks = choose(log).tasks
    with Folder(folder) as place:
        told = place.manifest(lambda: manifest(tasks, changes))
        return await run(place, told, tasks, lambda left: histories(log, left), setup(changes, llm, **budget))


async def test_the_tasks_that_are_meant_are_chosen() -> None:
    log = await log_of(6)
    every = choose(log)
    assert every.tasks == tuple(f"task-{number}" for number in range(1, 6))
    assert (every.open, every.unknown, every.since_ms) == (1, (), START_MS + 1000)
    assert choose(log, limit=2).tasks == ("task-4", "task-5")
    since = datetime.fromtimestamp(START_MS / 1000 + 2, UTC)
    until = datetime.fromtimestamp(START_MS / 1000 + 4, UTC)
    assert choose(log, since=since, until=until).tasks == ("task-2", "task-3")
    named = choose(log, tasks=["task-2", "nobody"])
    assert (named.tasks, named.unknown) == (("task-2",), ("nobody",))


async def test_a_task_s_history_has_all_of_it_and_nothing_else() -> None:
    log = await log_of(4)
    codec = Codec()
    found = dict(histories(log, ["task-3", "task-2"], since_ms=START_MS + 2000))
    assert list(found) == ["task-3", "task-2"]
    for task_id, records in found.items():
        events = [codec.decode(record).event for record in records]
        assert {getattr(event, "task_id", None) for event in events} == {task_id}
        assert sum(isinstance(event, TaskSubmitted) for event in events) == 1
    assert "control" in {record.topic for record in found["task-3"]}


async def test_unchanged_tasks_are_the_same(tmp_path: Path) -> None:
    report = await ran(tmp_path / "w", await log_of(9), Changes())
    assert report.complete
    assert report.totals.by_status == {"same": 8}
    assert report.totals.made == 0
    assert report.totals.before == report.totals.after


async def test_what_is_finished_is_not_done_again(tmp_path: Path) -> None:
    log = await log_of(9)
    llm = Model()
    first = await ran(tmp_path / "w", log, llm=llm)
    made = len(llm.requests)
    assert made == first.totals.made > 8
    again = await ran(tmp_path / "w", log, llm=llm)
    assert (again, len(llm.requests)) == (first, made)
    # Without results, but with the calls that were paid for, it is the same.
    for path in (tmp_path / "w" / "tasks").glob("*.json"):
        path.unlink()
    assert (await ran(tmp_path / "w", log, llm=llm)) == first
    assert len(llm.requests) == made


async def test_a_budget_ends_it_and_more_goes_on(tmp_path: Path) -> None:
    log = await log_of(9)
    llm = Model()
    short = await ran(tmp_path / "w", log, llm=llm, max_usd=0.0045)
    assert not short.complete
    assert "over $0.0045" in short.exhausted
    assert len(llm.requests) == 4
    assert short.totals.by_status["budget"] > 0
    assert short.totals.tasks == 8
    done = await ran(tmp_path / "w", log, llm=llm, max_usd=1.0)
    assert done.complete
    assert len(llm.requests) == done.totals.made
    assert done.totals.spent_usd == pytest.approx(0.001 * done.totals.made)


async def test_the_page_shows_both_sides_and_no_markup_of_others(tmp_path: Path) -> None:
    changes = Changes(prompts={"answer": "<script>alert(1)</script>"}, ask="model")
    llm = Model(change=lambda request, text: text.replace("fast", "<b>slow</b>"))
    report = await ran(tmp_path / "w", await log_of(6), changes, llm)
    page = report_page(report)
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "<b>slow" not in page
    assert "You answer questions from numbered passages" in page
    assert orjson.loads(orjson.dumps(report.as_dict()))["totals"]["tasks"] == 5


async def test_what_can_t_be_read_is_left_out(tmp_path: Path) -> None:
    log = await log_of(3)
    broken = ListLog(
        [
            Record(each.topic, each.partition, each.offset, each.timestamp_ms, each.key, b"\x00nonsense", each.headers)
            if each.key == b"task-2" and each.topic == "effects"
            else each
            for each in log.records
        ]
    )
    report = await ran(tmp_path / "w", broken, Changes())
    assert {result.task_id: result.status for result in report.results} == {
        "task-1": Status.SAME,
        "task-2": Status.LEFT_OUT,
    }
    assert "can't be read" in report.results[1].why


async def test_a_torn_last_call_is_dropped_and_a_damaged_one_refused(tmp_path: Path) -> None:
    await ran(tmp_path / "w", await log_of(4), llm=Model())
    path = tmp_path / "w" / "calls.jsonl"
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    path.write_bytes(whole[:-20])
    calls = CallLog(path, Codec())
    assert len(calls) == len(lines) - 1
    calls.close()
    assert path.read_bytes() == b"".join(lines[:-1])
    path.write_bytes(lines[0].replace(b"extractive", b"extractivf").replace(b"task", b"tusk") + lines[1])
    with pytest.raises(WhatIfError, match="is damaged at byte 0"):
        CallLog(path, Codec())


def test_one_process_at_a_time_has_the_folder(tmp_path: Path) -> None:
    with Folder(tmp_path / "w") as folder:
        with pytest.raises(WhatIfError, match="another process runs this what-if"), Folder(tmp_path / "w"):
            pass
        folder.keep(TaskResult("a task/with ünusual \x00 id", Status.SAME))
    with Folder(tmp_path / "w") as again:
        assert again.result("a task/with ünusual \x00 id") == TaskResult("a task/with ünusual \x00 id", Status.SAME)
        assert again.result("another") is None
