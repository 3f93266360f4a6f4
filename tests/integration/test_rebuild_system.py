"""``magnatronic rebuild`` on a real system: damage found and mended, SIGKILL in the middle, queries all the time."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient

from magnatronic.control import call
from magnatronic.errors import WrongInputError
from magnatronic.roles import AGENT_ROLES
from schemas.codec import Codec
from schemas.events import AccessDecided
from schemas.metadata import Metadata, deterministic_id
from sinks.clickhouse import ClickHouse
from streams.state import changelog_topic
from tests.integration.conftest import magnatronic

if TYPE_CHECKING:
    from tests.integration.conftest import UpProcess

RECORDS = 15_000


def decide(servers: str, count: int) -> None:
    """Put decisions about access into the log, which nobody but the sink reads."""
    codec, producer = Codec(), Producer({"bootstrap.servers": servers, "linger.ms": 20})
    for number in range(count):
        event = AccessDecided(source="test", principal=f"user{number}", action="read", resource="x", allowed=True)
        metadata = Metadata(deterministic_id("decision", number), "/clients/test", "test", datetime.now(UTC))
        encoded = codec.encode(event, metadata)
        while True:
            try:
                producer.produce("audit", key=b"test", value=encoded.value, headers=list(encoded.headers))
                break
            except BufferError:
                producer.poll(0.1)
    assert producer.flush(60) == 0


def finished(data_dir: Path, job: dict[str, Any], *, until: str = "", timeout_s: float = 60) -> dict[str, Any]:
    """The job when it is over, or has begun with phase ``until``."""
    deadline = time.monotonic() + timeout_s
    while job["state"] == "running" and not (until and job["phase"] == until and job["done"]):
        assert time.monotonic() < deadline, job
        time.sleep(0.01)
        job = call(data_dir, "job", job=job["job"])
    return job


def rebuilt(data_dir: Path, projection: str = "clickhouse", **options: Any) -> dict[str, Any]:
    job = finished(data_dir, call(data_dir, "rebuild", projection=projection, **options))
    assert job["state"] == "done", job
    result: dict[str, Any] = job["result"]
    return result


@contextmanager
def asking(data_dir: Path, sql: str) -> Iterator[list[int]]:
    """Ask ``sql``, a number, again and again meanwhile; the answers. Whatever goes wrong is raised in the end."""
    stop, answers, failures = threading.Event(), list[int](), list[Exception]()

    def ask() -> None:
        while not stop.is_set():
            try:
                answers.append(call(data_dir, "query", sql=sql, wait=False)["rows"][0][0])
            except Exception as error:  # noqa: BLE001 - the test's thread raises it
                failures.append(error)
                return

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield answers
    finally:
        stop.set()
        thread.join()
    if failures:
        raise failures[0]


def test_clickhouse_is_made_again_though_it_is_killed_on_the_way(
    up_on: "Callable[[Path], UpProcess]", system_on: Any, tmp_path: Path, corpus: Path
) -> None:
    data_dir = tmp_path / "data"
    up = up_on(data_dir)
    decide(up.start()["bootstrap_servers"], RECORDS)
    run = system_on(up).run
    assert run("ingest", str(corpus)).returncode == 0
    assert run("ask", "What is a widget?").returncode == 0
    assert call(data_dir, "catch_up", timeout=60)
    count = "SELECT count() FROM events WHERE topic = 'audit'"
    with asking(data_dir, count) as answers:
        report = rebuilt(data_dir)
    assert report["equal"]
    assert report["switched"]
    assert set(answers) == {RECORDS}
    assert up.stop()[0] == 0

    with ClickHouse(data_dir / "clickhouse") as clickhouse:
        good = clickhouse.read("SELECT count(), sum(cityHash64(*)) FROM event_log FINAL WHERE topic = 'audit'")
        clickhouse.command("DELETE FROM event_log WHERE topic = 'audit' AND offset = 17")
        row = "SELECT * FROM event_log WHERE topic = 'audit' AND offset = 4"
        clickhouse.command(f"INSERT INTO event_log SELECT * REPLACE ('{{}}' AS payload) FROM ({row})")
    up.start()
    done = run("rebuild", "clickhouse")
    assert done.returncode == 1, done.stderr
    assert "event_log audit[0]@17 is missing" in done.stdout
    assert 'event_log audit[0]@4: payload is \'{}\', by the log \'{"source":"test"' in done.stdout
    assert "--accept" in done.stdout
    assert run("rebuild", "clickhouse", "--discard").returncode == 0

    began = call(data_dir, "rebuild", projection="clickhouse", accept=True)
    again = call(data_dir, "rebuild", projection="clickhouse", accept=True)
    assert began["number"] == again["number"], "there is one at a time"
    job = finished(data_dir, began, until="reading the log")
    assert job["state"] == "running", "killed too late"
    assert "rebuild clickhouse" in [each["job"] for each in up.status()["jobs"]]
    up.kill()

    up.start()
    with pytest.raises(WrongInputError, match="no job"):
        call(data_dir, "job", job="rebuild clickhouse")
    report = rebuilt(data_dir, accept=True)
    assert report["resumed"]
    assert report["switched"]
    assert 0 < report["records"] < RECORDS
    assert sum(each["missing"] + each["changed"] for each in report["compared"]) == 2
    done = run("rebuild", "clickhouse")
    assert done.returncode == 0, done.stderr
    assert "Both are the same" in done.stdout
    assert run("ask", "What is a gadget?").returncode == 0
    assert up.stop()[0] == 0
    with ClickHouse(data_dir / "clickhouse") as clickhouse:
        mended = clickhouse.read("SELECT count(), sum(cityHash64(*)) FROM event_log FINAL WHERE topic = 'audit'")
        assert mended == good
        assert clickhouse.read("SELECT name FROM system.databases WHERE name LIKE '%rebuild%'") == []


def test_index_and_state_are_made_again_while_questions_are_answered(
    up_on: "Callable[[Path], UpProcess]", system_on: Any, tmp_path: Path, corpus: Path
) -> None:
    data_dir = tmp_path / "data"
    up = up_on(data_dir)
    up.start()
    run = system_on(up).run
    assert run("ingest", str(corpus)).returncode == 0
    assert call(data_dir, "catch_up", timeout=60)
    done = run("rebuild", "milvus")
    assert done.returncode == 0, done.stderr
    assert "Both are the same" in done.stdout
    assert "Ada Lamp" in run("ask", "Who invented widgets?").stdout
    done = run("rebuild", "state")
    assert done.returncode == 0, done.stdout + done.stderr
    for agent in AGENT_ROLES:
        assert f"{agent}: " in done.stdout
    assert done.stdout.count("Both are the same") == len(AGENT_ROLES)
    up.kill()

    bootstrap = up.start()["bootstrap_servers"]
    (corpus / "doodads.txt").write_text("A doodad is a lamp that glows in the rain. Doodads were made in Sussex.\n")
    assert run("ingest", str(corpus)).returncode == 0
    answer = run("ask", "Where were doodads made?")
    assert "Sussex" in answer.stdout, answer.stderr
    report = rebuilt(data_dir, "milvus")
    assert report["equal"]
    assert report["switched"]
    assert report["compared"][0]["stored_rows"] > 4
    assert "1901" in run("ask", "When were widgets invented?").stdout

    # Whoever deletes a changelog takes the agent's memory: the system ends, and does not start with less.
    lost = changelog_topic("magnatronic.coordinator", "tasks.lifecycle.normal")
    admin = AdminClient({"bootstrap.servers": bootstrap})
    admin.delete_topics([lost])[lost].result(30)
    run("submit", "What is a gizmo?")
    code, said = up.end()
    assert code == 1
    assert lost in said
    again = magnatronic("up", "--data-dir", str(data_dir))
    assert again.returncode == 1
    assert "magnatronic rebuild state --agent coordinator" in again.stderr
    done = run("rebuild", "state", "--agent", "coordinator")
    assert done.returncode == 0, done.stderr
    assert "was lost" in done.stdout
    assert "were written again" in done.stdout
    up.start()
    done = run("query", "SELECT status FROM tasks WHERE objective = 'What is a gizmo?'", "--json")
    deadline = time.monotonic() + 30
    while "completed" not in done.stdout and time.monotonic() < deadline:
        time.sleep(0.2)
        done = run("query", "SELECT status FROM tasks WHERE objective = 'What is a gizmo?'", "--json")
    assert "completed" in done.stdout
    done = run("rebuild", "state", "--agent", "coordinator")
    assert "Both are the same" in done.stdout, done.stdout
    assert up.stop()[0] == 0
