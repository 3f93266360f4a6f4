"""ClickHouse is made again from the log and compared row by row, on the embedded engine and on a server with Docker."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from schemas.events import LlmCalled, StepFailed, TaskSubmitted
from schemas.metadata import request_hash
from sinks.clickhouse import ClickHouse, ClickHouseProjection, ClickHouseSink
from sinks.comparison import DifferenceKind
from sinks.errors import HistoryLostError, RebuildStoppedError, StoreError
from sinks.rebuild import Phase, Rebuild, RebuildReport
from tests.support.rebuilding import START, MemoryLog

IMAGE = "clickhouse/clickhouse-server:25.8"
TASKS, LIFECYCLE, EFFECTS = "tasks.normal", "tasks.lifecycle.normal", "effects"
TOPICS = (TASKS, LIFECYCLE, EFFECTS)


@pytest.fixture(scope="module")
def server(docker_engine: None) -> Iterator[str]:
    from testcontainers.core.container import DockerContainer

    container = DockerContainer(IMAGE).with_exposed_ports(8123).with_env("CLICKHOUSE_PASSWORD", "secret")
    with container:
        url = f"http://default:secret@{container.get_container_host_ip()}:{container.get_exposed_port(8123)}"
        deadline = time.monotonic() + 60
        while True:
            try:
                ClickHouse(url).close()
                break
            except StoreError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.3)
        yield url


@pytest.fixture(params=["embedded", pytest.param("server", marks=pytest.mark.docker)])
def clickhouse(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ClickHouse]:
    target = tmp_path / "clickhouse" if request.param == "embedded" else str(request.getfixturevalue("server"))
    with ClickHouse(target, database=f"rebuild_{time.time_ns()}", max_rows=100_000) as opened:
        yield opened


class World:
    """A log and the ClickHouse that was fed from it."""

    def __init__(self, clickhouse: ClickHouse) -> None:
        self.log = MemoryLog()
        self.tasks = 0
        self.clickhouse = clickhouse
        self.sink = ClickHouseSink(clickhouse, TOPICS)
        self.sink.open()

    def write(self, count: int) -> None:
        """Append tasks with what follows from them, and undecodable bytes."""
        first, self.tasks = self.tasks, self.tasks + count
        for number in range(first, self.tasks):
            task = f"t{number}"
            self.log.add(TASKS, TaskSubmitted(task_id=task, objective=f"find {number}"), key=task, partition=number % 2)
            request = f'{{"purpose": "plan", "number": {number}}}'
            called = LlmCalled(
                **{"task_id": task, "agent": "decomposer", "event_id": "e", "request_hash": request_hash(request)},
                **{"request": request, "started_at": START, "latency_ms": 12.5, "provider": "x", "model": "m"},
                **{"prompt_tokens": number, "completion_tokens": 1, "cost_usd": 0.25},
            )
            self.log.add(EFFECTS, called, key=task)
            failed = StepFailed(task_id=task, step_id=f"{task}/1", attempt=1, error_type="E", message="no")
            self.log.add(LIFECYCLE, failed, key=task)
        self.log.raw(LIFECYCLE, b"\xff\x00garbage", key=b"\xfe")

    def follow(self) -> None:
        """Feed the sink what it has not seen."""
        self.sink.write(self.log.sink_records(self.sink.offsets()), self.log.ends)

    def rebuild(self, **options: Any) -> RebuildReport:
        projection = ClickHouseProjection(self.clickhouse, TOPICS)
        try:
            return Rebuild(projection, self.log, self.log.codec, **options).run()
        finally:
            projection.close()

    def rows(self) -> list[tuple[Any, ...]]:
        return self.clickhouse.read("SELECT * FROM event_log FINAL ORDER BY topic, partition, offset")

    def databases(self) -> list[str]:
        named = {"like": f"{self.clickhouse.database}%"}
        rows = self.clickhouse.read("SELECT name FROM system.databases WHERE name LIKE {like:String}", named)
        return [name for (name,) in rows]

    def comments(self) -> dict[str, str]:
        rows = self.clickhouse.read(
            "SELECT name, comment FROM system.tables WHERE database = {db:String} AND name LIKE 'event_log%'",
            {"db": self.clickhouse.database},
        )
        return dict(rows)


@pytest.fixture
def world(clickhouse: ClickHouse) -> World:
    made = World(clickhouse)
    made.write(60)
    made.follow()
    return made


def test_what_is_made_again_equals_what_was_there(world: World) -> None:
    before = world.rows()
    offsets = world.sink.offsets()
    phases: list[Phase] = []
    report = world.rebuild(on_progress=lambda phase, done, of: phases.append(phase))
    assert report.equal
    assert report.switched
    assert not report.resumed
    (compared,) = report.compared
    assert compared.table == "event_log"
    assert compared.stored_rows == compared.rebuilt_rows == len(before) == 181
    assert compared.stored_hash == compared.rebuilt_hash != 0
    assert list(dict.fromkeys(phases)) == [Phase.READING, Phase.COMPARING, Phase.SWITCHING, Phase.FINISHING]
    assert world.rows() == before
    assert world.sink.offsets() == offsets
    assert world.databases() == [world.clickhouse.database]
    assert world.comments() == {"event_log": ""}
    world.write(5)
    world.follow()
    assert world.clickhouse.query("SELECT count() FROM tasks").rows == [(65,)]
    assert world.rebuild().equal


def test_a_damaged_a_missing_and_an_invented_row_are_named_and_mended(world: World) -> None:
    good = world.rows()
    clickhouse = world.clickhouse
    row = "SELECT * FROM event_log WHERE topic = '{}' AND offset = {}"
    one, another = row.format(EFFECTS, 3), row.format(LIFECYCLE, 0)
    clickhouse.command(f"INSERT INTO event_log SELECT * REPLACE ('magic' AS payload) FROM ({one})")
    clickhouse.command(f"DELETE FROM event_log WHERE topic = '{TASKS}' AND partition = 1 AND offset = 7")
    # An offset that the log leaves to a transaction's marker.
    clickhouse.command(f"INSERT INTO event_log SELECT * REPLACE (10 AS offset) FROM ({another})")
    damaged = world.rows()
    assert damaged != good
    report = world.rebuild()
    assert not report.equal
    assert not report.switched
    (compared,) = report.compared
    assert (compared.missing, compared.surplus, compared.changed) == (1, 1, 1)
    by_kind = {each.kind: each for each in compared.examples}
    changed = by_kind[DifferenceKind.CHANGED]
    assert changed.place == "event_log effects[0]@3"
    assert changed.field == "payload"
    assert changed.stored == "'magic'"
    assert changed.rebuilt.startswith('\'{"task_id":"t3"')
    assert str(by_kind[DifferenceKind.MISSING]) == "event_log tasks.normal[1]@7 is missing"
    assert by_kind[DifferenceKind.SURPLUS].place == "event_log tasks.lifecycle.normal[0]@10"
    assert world.rows() == damaged, "nothing is changed that was not accepted"

    reads = len(world.log.read_from)
    report = world.rebuild(accept=True)
    assert report.switched
    assert report.resumed
    assert not report.equal
    assert report.records == 0
    assert len(world.log.read_from) == reads, "the shadow was there, so nothing was read again"
    assert world.rows() == good
    assert world.rebuild().equal


def test_an_empty_table_comes_back(world: World) -> None:
    good = world.rows()
    world.clickhouse.command("TRUNCATE TABLE event_log")
    report = world.rebuild(accept=True)
    assert report.compared[0].missing == len(good)
    assert world.rows() == good


def test_queries_and_writes_go_on_all_the_time(world: World) -> None:
    stop, counts, failures = threading.Event(), list[int](), list[Exception]()
    writing = threading.Lock()

    def ask() -> None:
        while not stop.is_set():
            try:
                counts.append(world.clickhouse.query("SELECT count() FROM events").rows[0][0])
            except Exception as error:  # noqa: BLE001 - the test's thread tells it
                failures.append(error)

    def write() -> None:
        while not stop.is_set():
            with writing:
                world.write(3)
                world.follow()
            time.sleep(0.01)

    threads = [threading.Thread(target=ask), threading.Thread(target=write)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(3):
            assert world.rebuild(hold=lambda: writing).equal
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not failures
    assert counts == sorted(counts), "nobody saw fewer rows than before"
    assert len(counts) > 10
    world.follow()
    assert len(world.rows()) == len(world.log.sink_records())
    assert world.rebuild().equal


def test_a_write_that_misses_the_switch_is_not_lost(world: World) -> None:
    """A sink in another process can't be held: its batch may go to the old table, and its offsets be noted after."""
    world.write(10)
    late = world.log.sink_records(world.sink.offsets())
    projection = ClickHouseProjection(world.clickhouse, TOPICS)
    switch = projection.switch

    def switched() -> None:
        world.sink.write(late, {})
        switch()
        world.sink.write((), world.log.ends)

    projection.switch = switched  # type: ignore[method-assign]
    report = Rebuild(projection, world.log, world.log.codec).run()
    projection.close()
    assert report.switched
    assert len(world.rows()) == len(world.log.sink_records())
    assert world.rebuild().equal


@pytest.mark.parametrize("when", list(Phase))
def test_stopped_anywhere_the_next_run_goes_on(world: World, when: Phase) -> None:
    """An error thrown from where progress is told stands for the process's end there: nothing is tidied up."""
    good = world.rows()
    world.clickhouse.command(f"DELETE FROM event_log WHERE topic = '{TASKS}' AND partition = 1 AND offset = 7")

    def die(phase: Phase, done: int, of: int) -> None:
        if phase is when and (phase is not Phase.READING or done):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        world.rebuild(accept=True, on_progress=die)
    report = world.rebuild(accept=True)
    assert report.resumed
    assert report.switched
    assert world.rows() == good
    assert world.databases() == [world.clickhouse.database]
    assert world.comments() == {"event_log": ""}
    assert world.rebuild().equal


def test_the_end_between_exchange_and_drop_does_not_bring_the_old_rows_back(world: World) -> None:
    good = world.rows()
    world.clickhouse.command(f"DELETE FROM event_log WHERE topic = '{TASKS}' AND partition = 1 AND offset = 7")
    projection = ClickHouseProjection(world.clickhouse, TOPICS)

    def die() -> None:
        raise KeyboardInterrupt

    projection._unmark = die  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        Rebuild(projection, world.log, world.log.codec, accept=True).run()
    assert world.rows() == good
    assert list(world.comments().values()) != [""]
    report = world.rebuild()
    assert report.equal
    assert world.rows() == good
    assert world.comments() == {"event_log": ""}


def test_told_to_stop_it_says_that_it_goes_on_later(world: World) -> None:
    stopping = threading.Event()
    stopping.set()
    with pytest.raises(RebuildStoppedError, match="goes on"):
        world.rebuild(stopping=stopping)
    assert world.rebuild().resumed


def test_what_the_log_no_longer_holds_is_said_before_anything_is_made(world: World) -> None:
    good = world.rows()
    world.log.begins[EFFECTS, 0] = 20
    with pytest.raises(
        HistoryLostError, match=r"effects\[0\] begins at offset 20 and 19 records of it are older.*--from"
    ):
        world.rebuild()
    assert world.databases() == [world.clickhouse.database]
    report = world.rebuild(carry=True)
    assert report.equal
    assert report.carried == 19
    assert world.rows() == good


def test_what_was_in_use_can_be_kept(world: World) -> None:
    world.clickhouse.command(f"DELETE FROM event_log WHERE topic = '{TASKS}' AND partition = 1 AND offset = 7")
    report = world.rebuild(accept=True, keep=True)
    assert report.kept.startswith(f"{world.clickhouse.database}.event_log_until_")
    rows = world.clickhouse.query(f"SELECT count() FROM {report.kept}").rows
    assert rows == [(len(world.rows()) - 1,)]
    assert world.rebuild().equal


def test_a_shadow_of_another_release_is_begun_anew(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(phase: Phase, done: int, of: int) -> None:
        if phase is Phase.COMPARING:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("sinks.clickhouse.shadow._fingerprint", lambda: "older")
        with pytest.raises(KeyboardInterrupt):
            world.rebuild(on_progress=die)
    report = world.rebuild()
    assert report.equal
    assert not report.resumed
