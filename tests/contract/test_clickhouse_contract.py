"""What the ClickHouse sink and its views promise, on the embedded engine always and on a server where Docker is."""

import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import orjson
import pytest

from schemas.codec import Codec
from schemas.errors import DecodeError
from schemas.events import (
    AlertCleared,
    AlertRaised,
    AssessedClaim,
    Assessment,
    ChunkEmbedded,
    DeadLettered,
    DocumentIndexed,
    DocumentRemoved,
    DocumentSubmitted,
    Event,
    LlmCalled,
    PlannedStep,
    PlanProposed,
    Priority,
    Severity,
    StepAssessed,
    StepAssigned,
    StepCompleted,
    StepFailed,
    TaskCompleted,
    TaskExpired,
    TaskFailed,
    TaskSubmitted,
    TextsEmbedded,
    ToolCalled,
)
from schemas.metadata import Metadata, deterministic_id, request_hash
from schemas.record import Header, Record
from schemas.topics import all_topics, key_of, topic_name
from sinks.clickhouse import ClickHouse, ClickHouseSink, named_queries, named_query
from sinks.errors import (
    QueryError,
    QueryTimeoutError,
    StoreBusyError,
    StoreError,
    UnknownQueryError,
    WriteRefusedError,
)
from sinks.sink import SinkRecord

IMAGE = "clickhouse/clickhouse-server:25.8"
START = datetime(2026, 3, 1, 12, tzinfo=UTC)


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
def target(request: pytest.FixtureRequest, tmp_path: Path) -> Path | str:
    return tmp_path / "clickhouse" if request.param == "embedded" else str(request.getfixturevalue("server"))


_databases = iter(range(1_000_000))


@pytest.fixture
def database() -> str:
    return f"contract_{time.time_ns()}_{next(_databases)}"


@pytest.fixture
def clickhouse(target: Path | str, database: str) -> Iterator[ClickHouse]:
    with ClickHouse(target, database=database, max_rows=100) as opened:
        yield opened


@pytest.fixture
def sink(clickhouse: ClickHouse) -> ClickHouseSink:
    made = ClickHouseSink(clickhouse)
    made.open()
    return made


class Log:
    """Makes records as the broker would hand them out, a clock tick of 10 ms apart unless told."""

    def __init__(self) -> None:
        self.codec = Codec()
        self.records: list[SinkRecord] = []
        self._next: dict[str, int] = {}

    def add(self, event: Event, at_ms: int, *, source: str = "/agents/coordinator@1", **metadata: Any) -> SinkRecord:
        topic = topic_name(event, Priority.HIGH)
        encoded = self.codec.encode(
            event,
            Metadata(
                id=deterministic_id(topic, len(self.records)),
                source=source,
                subject=key_of(event),
                time=START + timedelta(milliseconds=at_ms, microseconds=7),
                correlation_id=key_of(event),
                **metadata,
            ),
        )
        return self.raw(topic, encoded.value, encoded.headers, at_ms, key_of(event).encode())

    def raw(
        self, topic: str, value: bytes | None, headers: Sequence[Header], at_ms: int, key: bytes | None
    ) -> SinkRecord:
        offset = self._next.get(topic, 0)
        self._next[topic] = offset + 1
        timestamp = int(START.timestamp() * 1000) + at_ms
        record = Record(topic, 0, offset, timestamp, key, value, headers)
        try:
            made = SinkRecord(record, self.codec.decode(record))
        except DecodeError as error:
            made = SinkRecord(record, None, f"{type(error).__name__}: {error}")
        self.records.append(made)
        return made

    def offsets(self) -> dict[tuple[str, int], int]:
        return {(topic, 0): offset for topic, offset in self._next.items()}


def _llm(task: str, agent: str, tokens: tuple[int, int], cost: float, error: str = "") -> LlmCalled:
    request = orjson.dumps({"purpose": "plan", "messages": []}).decode()
    return LlmCalled(
        **{"task_id": task, "agent": agent, "event_id": "e", "request_hash": request_hash(request)},
        **{"request": request, "started_at": START, "latency_ms": 12.5, "error": error},
        **{"provider": "openai", "model": "m", "prompt_tokens": tokens[0], "completion_tokens": tokens[1]},
        **{"cost_usd": cost, "response": '{"text":"x"}'},
    )


def history() -> Log:
    """Task t1 completes after one step is sent back, t2 fails with its step, t3 expires, t4 is open."""
    log = Log()
    worker, overseer = "/agents/researcher@3", "/agents/overseer@1"
    common: dict[str, Any] = {"capability": "research", "objective": "find out"}
    for task, at in (("t1", 0), ("t2", 1), ("t3", 2), ("t4", 3)):
        submitted = TaskSubmitted(task_id=task, objective=f"question {task}", priority=Priority.HIGH, submitted_by="u")
        log.add(submitted, at, source="/clients/test")
    plan = tuple(PlannedStep(step_id=f"t1/{n}", **common) for n in (1, 2))
    log.add(PlanProposed(task_id="t1", objective="question t1", steps=plan), 10)
    log.add(_llm("t1", "decomposer", (100, 20), 0.25), 11)
    log.add(_llm("t1", "researcher", (50, 5), 0.5), 12)
    log.add(_llm("t2", "researcher", (7, 0), 0.0, "RateLimited: slow down"), 12)
    log.add(StepAssigned(task_id="t1", step_id="t1/1", **common), 20)
    done: dict[str, Any] = {"task_id": "t1", "step_id": "t1/1", "attempt": 1, "answer": "42 [1]"}
    log.add(StepCompleted(**done, **common), 120, source=worker)
    claim = AssessedClaim(text="42", lexical_similarity=0.1, grounded=False)
    verdict = {**done, "decision": Assessment.REVISE, "groundedness": 0.25, "claims": (claim,), "finding": "cite"}
    log.add(StepAssessed(**verdict), 150, source=overseer)
    log.add(StepAssigned(task_id="t1", step_id="t1/1", revision=1, finding="cite", **common), 160)
    log.add(StepCompleted(**done, revision=1, **common), 360, source=worker)
    log.add(StepAssessed(**done, revision=1, decision=Assessment.ACCEPT, groundedness=1.0), 400, source=overseer)
    log.add(TaskCompleted(task_id="t1", objective="question t1", answer="42", groundedness=0.9, steps=2), 1_000)
    log.add(StepAssigned(task_id="t2", step_id="t2/1", **common), 30)
    failed = StepFailed(task_id="t2", step_id="t2/1", attempt=1, error_type="Timeout", message="too slow")
    log.add(failed, 530, source=worker)
    log.add(TaskFailed(task_id="t2", objective="question t2", reason="step t2/1: too slow", step_id="t2/1"), 531)
    log.add(TaskExpired(task_id="t3", objective="question t3", deadline=START), 702)
    tool: dict[str, Any] = {"task_id": "t1", "agent": "executor", "event_id": "e", "request_hash": "h", "request": "{}"}
    log.add(ToolCalled(**tool, started_at=START, latency_ms=3.0, tool="grep", side_effects=True, result="[]"), 40)
    return log


def _dicts(clickhouse: ClickHouse, sql: str) -> list[dict[str, Any]]:
    result = clickhouse.query(sql)
    return [dict(zip(result.columns, row, strict=True)) for row in result.rows]


def test_every_topic_is_asked_for(clickhouse: ClickHouse) -> None:
    assert set(ClickHouseSink(clickhouse).topics) == set(all_topics())


def test_an_event_is_kept_whole(sink: ClickHouseSink, clickhouse: ClickHouse) -> None:
    log = Log()
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    event = StepFailed(task_id="t", step_id="t/1", attempt=2, error_type="E", message='quote " and ü\n\x00')
    log.add(event, 1_234, source="/agents/researcher@3", causation_id="because", traceparent=trace)
    sink.write(log.records, log.offsets())
    (row,) = _dicts(clickhouse, "SELECT * FROM events")
    stored = log.records[0]
    assert stored.envelope is not None
    assert StepFailed.model_validate_json(row.pop("payload")) == event
    assert row == {
        **{"topic": "tasks.lifecycle.high", "partition": 0, "offset": 0, "key": "t", "subject": "t"},
        **{"timestamp": START + timedelta(milliseconds=1_234), "time": stored.envelope.metadata.time},
        **{"type": "magnatronic.tasks.StepFailed", "id": stored.envelope.metadata.id, "source": "/agents/researcher@3"},
        **{"causation_id": "because", "correlation_id": "t", "traceparent": trace, "task_id": "t", "step_id": "t/1"},
        **{"agent": "researcher", "error": "", "raw": "", "value_bytes": len(stored.record.value or b"")},
        **{"data_subjects": [], "erased": False},
        "dataschema": dict(stored.record.headers)["ce_dataschema"].decode(),  # type: ignore[union-attr]
    }


def test_undecodable_bytes_are_kept_with_the_error(sink: ClickHouseSink, clickhouse: ClickHouse) -> None:
    log = Log()
    log.raw("tasks.high", b"garbage", [], 0, None)
    log.raw("tasks.high", None, [("ce_type", b"\xff"), ("ce_dataschema", b"\xff/1")], 1, b"\xfe\x00")
    log.raw("tasks.high", b"", [], 10**17, b"k")
    sink.write(log.records, log.offsets())
    rows = _dicts(clickhouse, "SELECT offset, error, raw, hex(key) AS key, type, payload, value_bytes FROM events")
    assert [row["error"].partition(":")[0] for row in rows] == ["MalformedError"] * 3
    assert [(row["raw"], row["value_bytes"]) for row in rows] == [("garbage", 7), ("", 0), ("", 0)]
    assert [row["key"] for row in rows] == ["", "FE00", "6B"]
    assert {(row["type"], row["payload"]) for row in rows} == {("", "")}
    assert _dicts(clickhouse, "SELECT records, undecodable, types FROM topics") == [
        {"records": 3, "undecodable": 3, "types": 0}
    ]


@pytest.mark.parametrize("when", [datetime(1, 1, 1, tzinfo=UTC), datetime(9999, 12, 31, tzinfo=UTC)])
def test_a_clock_that_is_far_off_blocks_nothing(sink: ClickHouseSink, clickhouse: ClickHouse, when: datetime) -> None:
    log = Log()
    event = TaskSubmitted(task_id="t", objective="o")
    encoded = log.codec.encode(event, Metadata(id="i", source="/clients/x", subject="t", time=when))
    log.raw("tasks.high", encoded.value, encoded.headers, 0, b"t")
    assert log.records[0].envelope is not None
    sink.write(log.records, log.offsets())
    assert clickhouse.query("SELECT toYear(time) FROM events").rows[0][0] in (1900, 2262)


def test_vectors_are_described_not_stored(sink: ClickHouseSink, clickhouse: ClickHouse) -> None:
    log = Log()
    chunk: dict[str, Any] = {"document_id": "d", "ordinal": 0, "title": "T", "text": "body", "tokens": 1}
    version: dict[str, Any] = {"model": "minilm", "model_version": "1"}
    log.add(ChunkEmbedded(chunk_id="c1", **chunk, **version, vector=(0.5, -0.25)), 0)
    log.add(ChunkEmbedded(chunk_id="c2", **chunk, **version, vector=(0.5, -0.5)), 0)
    effect: dict[str, Any] = {
        "task_id": "d",
        "agent": "embedder",
        "event_id": "e",
        "request_hash": "h",
        "request": "[]",
    }
    embedded = TextsEmbedded(
        **effect, **version, dimensions=2, count=1, vectors=b"\x00" * 8, started_at=START, latency_ms=1.0
    )
    log.add(embedded, 0)
    sink.write(log.records, log.offsets())
    payloads = [orjson.loads(row["payload"]) for row in _dicts(clickhouse, "SELECT payload FROM events ORDER BY ALL")]
    effects, first, second = sorted(payloads, key=lambda payload: payload.get("chunk_id", ""))
    assert first["vector"]["dimensions"] == 2
    assert len(first["vector"]["sha256"]) == 64
    assert first["vector"]["sha256"] != second["vector"]["sha256"]
    assert effects["vectors"]["bytes"] == 8
    assert first["text"] == "body"


def test_a_batch_written_twice_shows_once(sink: ClickHouseSink, clickhouse: ClickHouse) -> None:
    log = history()
    sink.write(log.records, log.offsets())
    before = [clickhouse.query(f"SELECT * FROM {view} ORDER BY ALL").rows for view in VIEWS]
    sink.write(log.records[5:], log.offsets())
    sink.write(log.records[:9], log.offsets())
    assert [clickhouse.query(f"SELECT * FROM {view} ORDER BY ALL").rows for view in VIEWS] == before
    assert clickhouse.query("SELECT count() FROM events").rows == [(len(log.records),)]
    clickhouse.command("OPTIMIZE TABLE event_log FINAL")
    assert clickhouse.query("SELECT count() FROM event_log").rows == [(len(log.records),)]


VIEWS = ("events", "tasks", "steps", "llm_calls", "tool_calls", "documents", "dead_letters", "alerts", "topics")


def test_a_crash_between_data_and_offsets_loses_and_doubles_nothing(
    target: Path | str, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = history()
    with ClickHouse(target, database=database) as first:
        sink = ClickHouseSink(first)
        sink.open()
        half = len(log.records) // 2
        sink.write(log.records[:half], {("tasks.high", 0): 2})

        def die(offsets: Any) -> Any:
            raise KeyboardInterrupt

        monkeypatch.setattr(sink, "_offset_rows", die)
        with pytest.raises(KeyboardInterrupt):
            sink.write(log.records[half:], log.offsets())
    with ClickHouse(target, database=database) as second:
        sink = ClickHouseSink(second)
        sink.open()
        assert sink.offsets() == {("tasks.high", 0): 2}
        sink.write(log.records, log.offsets())
        assert sink.offsets() == log.offsets()
        assert second.query("SELECT count(), uniqExact(topic, offset) FROM events").rows == [(len(log.records),) * 2]
        assert second.query("SELECT sum(tokens) FROM llm_calls").rows == [(182,)]


def test_offsets_never_go_back(sink: ClickHouseSink) -> None:
    assert sink.offsets() == {}
    sink.write([], {("a", 0): 5, ("a", 1): 9})
    sink.write([], {("a", 0): 3})
    sink.write([], {("b", 0): 2**40})
    assert sink.offsets() == {("a", 0): 5, ("a", 1): 9, ("b", 0): 2**40}


def test_tasks(sink: ClickHouseSink, clickhouse: ClickHouse) -> None:
    log = history()
    sink.write(log.records, log.offsets())
    rows = {row["task_id"]: row for row in _dicts(clickhouse, "SELECT * FROM tasks")}
    assert {task: row["status"] for task, row in rows.items()} == {
        **{"t1": "completed", "t2": "failed", "t3": "expired", "t4": "submitted"},
    }
    assert rows["t1"] == {
        **{"task_id": "t1", "objective": "question t1", "priority": "high", "status": "completed", "steps": 2},
        **{"submitted_at": START, "finished_at": START + timedelta(seconds=1), "duration_ms": 1_000},
        **{"answer": "42", "groundedness": 0.9, "llm_calls": 2, "tokens": 175, "cost_usd": 0.75, "reason": ""},
        "submitted_by": "u",
    }
    assert (rows["t2"]["reason"], rows["t2"]["duration_ms"]) == ("step t2/1: too slow", 530)
    assert (rows["t3"]["reason"], rows["t3"]["duration_ms"]) == ("the deadline passed", 700)
    assert (rows["t4"]["finished_at"], rows["t4"]["duration_ms"], rows["t4"]["groundedness"]) == (None, None, None)


def test_steps(sink: ClickHouseSink, clickhouse: ClickHouse) -> None:
    log = history()
    sink.write(log.records, log.offsets())
    first, second, failed = _dicts(clickhouse, "SELECT * FROM steps ORDER BY step_id, attempt, revision")
    assert first == {
        **{"task_id": "t1", "step_id": "t1/1", "capability": "research", "objective": "find out"},
        **{"attempt": 1, "revision": 0, "status": "sent back", "agent": "researcher", "decision": "revise"},
        **{"assigned_at": START + timedelta(milliseconds=20), "completed_at": START + timedelta(milliseconds=120)},
        **{"assessed_at": START + timedelta(milliseconds=150), "work_ms": 100, "duration_ms": 130},
        **{"groundedness": 0.25, "reason": "cite"},
    }
    assert (second["status"], second["revision"], second["work_ms"], second["duration_ms"]) == ("accepted", 1, 200, 240)
    assert (failed["status"], failed["reason"], failed["agent"]) == ("failed", "Timeout: too slow", "researcher")
    assert (failed["work_ms"], failed["duration_ms"], failed["completed_at"]) == (500, 500, None)
    assert failed["groundedness"] is None


def test_calls(sink: ClickHouseSink, clickhouse: ClickHouse) -> None:
    log = history()
    sink.write(log.records, log.offsets())
    calls = _dicts(clickhouse, "SELECT * FROM llm_calls ORDER BY at, agent, task_id")
    assert [(call["agent"], call["tokens"], call["cost_usd"], call["error"]) for call in calls] == [
        ("decomposer", 120, 0.25, ""),
        ("researcher", 55, 0.5, ""),
        ("researcher", 7, 0.0, "RateLimited: slow down"),
    ]
    assert {(call["provider"], call["model"], call["purpose"], call["latency_ms"]) for call in calls} == {
        ("openai", "m", "plan", 12.5)
    }
    (tool,) = _dicts(clickhouse, "SELECT * FROM tool_calls")
    assert (tool["tool"], tool["side_effects"], tool["result"]) == ("grep", 1, "[]")


def test_documents_and_dead_letters(sink: ClickHouseSink, clickhouse: ClickHouse) -> None:
    log = Log()
    version = {"content_hash": "h", "model": "m", "model_version": "1"}
    log.add(DocumentSubmitted(document_id="d1", title="old", text="x"), 0)
    log.add(DocumentSubmitted(document_id="d1", title="new", text="y", source="a.md"), 10)
    log.add(DocumentIndexed(document_id="d1", chunk_ids=("a", "b", "c"), **version), 20)
    log.add(DocumentSubmitted(document_id="d2", title="gone", text="x"), 30)
    log.add(DocumentRemoved(document_id="d2"), 40)
    log.add(DocumentIndexed(document_id="d2", chunk_ids=(), **version), 50)
    letter = DeadLettered(
        **{"source_topic": "tasks.high", "source_partition": 1, "source_offset": 7, "source_timestamp": START},
        **{"value": b"\xff\x00", "agent": "decomposer", "error_type": "KeyError", "error": "'x'", "attempts": 3},
    )
    log.add(letter, 60)
    sink.write(log.records, log.offsets())
    first, second = _dicts(clickhouse, "SELECT * FROM documents ORDER BY document")
    assert (first["title"], first["chunks"], first["removed"], first["source"]) == ("new", 3, 0, "a.md")
    assert first["indexed_at"] == START + timedelta(milliseconds=20)
    assert (second["chunks"], second["removed"]) == (0, 1)
    (dead,) = _dicts(clickhouse, "SELECT * FROM dead_letters")
    assert (dead["source_offset"], dead["error_type"], dead["attempts"], dead["agent"]) == (
        7,
        "KeyError",
        3,
        "decomposer",
    )


def test_an_alert_is_one_row_however_often_it_was_told(sink: ClickHouseSink, clickhouse: ClickHouse) -> None:
    log = Log()

    def raised(alert_id: str, rule: str) -> AlertRaised:
        return AlertRaised(
            source="retriever",
            alert_id=alert_id,
            rule=rule,
            severity=Severity.CRITICAL,
            message="it waits",
            value=50.0,
            threshold=45.0,
        )

    cleared = AlertCleared(source="retriever", alert_id="1", rule="stall")
    told = (raised("1", "stall"), raised("1", "stall"), cleared, raised("1", "stall"), cleared, raised("2", "latency"))
    for number, event in enumerate(told):
        log.add(event, 10 * number)
    sink.write(log.records, log.offsets())
    first, second = _dicts(clickhouse, "SELECT * FROM alerts ORDER BY alert_id")
    assert (first["raised_at"], first["cleared_at"]) == (START, START + timedelta(milliseconds=20))
    assert (first["rule"], first["source"], first["severity"]) == ("stall", "retriever", "critical")
    assert (first["message"], first["value"], first["threshold"]) == ("it waits", 50.0, 45.0)
    assert (second["rule"], second["cleared_at"]) == ("latency", None)


def test_named_queries_answer(sink: ClickHouseSink, clickhouse: ClickHouse) -> None:
    log = history()
    sink.write(log.records, log.offsets())
    answers = {query.name: clickhouse.query(query.sql) for query in named_queries()}
    assert all(query.title and not query.title.startswith("-") for query in named_queries())
    assert answers["slowest-steps"].rows[0][1] == "t2/1"
    assert answers["cost-by-model"].rows == [("openai", "m", 3, 1, 157, 25, 0.75, 12.5, 12.5)]
    assert answers["groundedness-by-agent"].rows == [("researcher", "research", 2, 0.625, 0.25, 1, 1, 0)]
    assert [row[0] for row in answers["open-tasks"].rows] == ["t4"]
    assert [row[:3] for row in answers["failure-reasons"].rows] == [
        *[("step", "Timeout: too slow", 1), ("step", "cite", 1)],
        *[("task", "step t2/1: too slow", 1), ("task", "the deadline passed", 1)],
    ]
    assert answers["cost-by-task"].rows[0][0] == "t1"
    assert len(answers["step-timings"].rows) == 3
    assert answers["latency-by-capability"].rows[0][:2] == ("research", 3)
    assert {row[0] for row in answers["topics"].rows} == {topic for topic, _ in log.offsets()}


def test_an_unknown_query_name_lists_the_known() -> None:
    with pytest.raises(UnknownQueryError, match="slowest-steps"):
        named_query("slowest")


@pytest.mark.parametrize(
    "sql",
    [
        "DROP TABLE event_log",
        "INSERT INTO event_log (topic) VALUES ('x')",
        "TRUNCATE TABLE event_log",
        "ALTER TABLE event_log DELETE WHERE 1",
        "CREATE TABLE x (a Int8) ENGINE = Memory",
        "SET readonly = 0",
        "SELECT 1 SETTINGS readonly = 0",
        "SELECT 1 SETTINGS max_execution_time = 0",
        "SELECT * FROM url('http://127.0.0.1:9/', 'CSV', 'a String')",
        "SELECT * FROM file('/etc/passwd', 'LineAsString')",
        "SELECT file('/etc/passwd')",
        "SELECT `file` /* */ ('/etc/passwd')",
        "DESCRIBE TABLE file('/etc/passwd')",
        "EXPLAIN SELECT file('/etc/passwd')",
        "SELECT * FROM S3('http://127.0.0.1:9/bucket/key', 'CSV', 'a String')",
        "SELECT * FROM python('import os')",
        "SELECT * FROM remote('127.0.0.1:9', 'system', 'one')",
        "SELECT * FROM executable('x.sh', 'CSV', 'a String')",
        "SELECT * FROM fileCluster('default', '/etc/passwd', 'LineAsString')",
        "SELECT 1 INTO /* hidden */ OUTFILE '/tmp/never-written'",
        "SYSTEM SHUTDOWN",
        "USE system",
    ],
)
def test_a_query_that_is_more_than_a_read_is_refused(sink: ClickHouseSink, clickhouse: ClickHouse, sql: str) -> None:
    with pytest.raises(WriteRefusedError):
        clickhouse.query(sql)
    assert not Path("/tmp/never-written").exists()
    assert clickhouse.query("SELECT count() FROM event_log").rows == [(0,)]


@pytest.mark.parametrize(
    "sql",
    [
        *(
            "SELECT 'INTO OUTFILE' AS `file(`",
            "WITH 1 AS x SELECT x;",
            "(SELECT 1) UNION ALL (SELECT 2)",
            "SHOW TABLES",
        ),
        *(
            "DESCRIBE TABLE tasks",
            "EXPLAIN SELECT 1",
            "EXISTS TABLE tasks",
            "-- why\nSELECT 1 -- so",
            "FROM tasks SELECT *",
        ),
    ],
)
def test_reads_are_answered(sink: ClickHouseSink, clickhouse: ClickHouse, sql: str) -> None:
    assert clickhouse.query(sql).columns


def test_what_is_wrong_with_a_query_is_said_in_one_line(sink: ClickHouseSink, clickhouse: ClickHouse) -> None:
    for sql, said in (
        ("SELECT nope FROM tasks", "nope"),
        ("SELECT * FROM nowhere", "nowhere"),
        ("SELEKT 1", "Syntax error"),
        ("SELECT 1; SELECT 2", "Multi-statements"),
        ("SELECT 1 FORMAT JSON", "FORMAT"),
        (" ; ", "empty"),
    ):
        with pytest.raises(QueryError, match=said) as raised:
            clickhouse.query(sql)
        assert "\n" not in str(raised.value)
        assert "DB::Exception" not in str(raised.value)


def test_a_query_has_its_limits(sink: ClickHouseSink, clickhouse: ClickHouse) -> None:
    many = clickhouse.query("SELECT number FROM numbers(100000)")
    assert (len(many.rows), many.truncated, many.types) == (100, True, ("UInt64",))
    exact = clickhouse.query("SELECT number FROM numbers(100)")
    assert (len(exact.rows), exact.truncated) == (100, False)


def test_a_query_has_its_time(target: Path | str, database: str) -> None:
    with ClickHouse(target, database=database, timeout_s=0.5) as clickhouse:
        began = time.monotonic()
        with pytest.raises(QueryTimeoutError, match=r"longer than 0\.5 s"):
            clickhouse.query("SELECT count() FROM numbers(1000000000000) WHERE cityHash64(number) = 1")
        assert time.monotonic() - began < 30


def test_a_query_has_its_memory(target: Path | str, database: str) -> None:
    with ClickHouse(target, database=database, memory_bytes=32 * 1024 * 1024) as clickhouse:
        with pytest.raises(QueryError, match="MEMORY_LIMIT"):
            clickhouse.query("SELECT length(groupArray(number)) FROM numbers(20000000)")
        assert clickhouse.query("SELECT 1").rows == [(1,)]


def test_an_empty_answer_still_has_columns(sink: ClickHouseSink, clickhouse: ClickHouse) -> None:
    result = clickhouse.query("SELECT task_id, duration_ms FROM tasks WHERE task_id = {t:String}", {"t": "x"})
    assert (result.columns, result.types, result.rows) == (
        ("task_id", "duration_ms"),
        ("String", "Nullable(Int64)"),
        [],
    )


def test_opening_again_keeps_what_is_there(target: Path | str, database: str) -> None:
    log = history()
    for _ in range(2):
        with ClickHouse(target, database=database) as clickhouse:
            sink = ClickHouseSink(clickhouse)
            sink.open()
            sink.write(log.records, log.offsets())
            assert clickhouse.query("SELECT count() FROM events").rows == [(len(log.records),)]


def test_a_write_that_cannot_work_is_not_worth_retrying(clickhouse: ClickHouse) -> None:
    log = history()
    with pytest.raises(StoreError, match="event_log") as raised:
        ClickHouseSink(clickhouse).write(log.records, log.offsets())
    assert not raised.value.retryable


def test_a_second_folder_in_one_process_is_refused(tmp_path: Path) -> None:
    with ClickHouse(tmp_path / "one"), pytest.raises(StoreBusyError, match="already holds"):
        ClickHouse(tmp_path / "two")


def test_an_unreachable_server_is_worth_retrying() -> None:
    with pytest.raises(StoreError, match=r"127\.0\.0\.1") as raised:
        ClickHouse("http://user:secret@127.0.0.1:9")
    assert raised.value.retryable
    assert "secret" not in str(raised.value)
