"""A data subject who is forgotten: no row of ClickHouse and no file of it says what was personal; all else stays."""

import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from schemas.codec import Codec
from schemas.encryption import SubjectCipher
from schemas.events import (
    ChunkEmbedded,
    Citation,
    Event,
    LlmCalled,
    Priority,
    SubjectForgotten,
    TaskCompleted,
    TaskSubmitted,
)
from schemas.metadata import Metadata
from schemas.record import Record
from schemas.topics import key_of, topic_name
from sinks.clickhouse.client import ClickHouse
from sinks.clickhouse.forgetting import erased_rows, forgotten_among, wait_for_old_files
from sinks.clickhouse.writer import ClickHouseSink
from sinks.decoding import decoded
from sinks.sink import SinkRecord
from tests.support.keys import ADA, BOB, EVE, MemoryKeys

AT = datetime(2026, 1, 1, tzinfo=UTC)
SECRET = "Quorzapple"


class Feed:
    """Records about somebody, in the order in which they were made."""

    def __init__(self) -> None:
        self.keys = MemoryKeys()
        self.records: list[Record] = []
        self._codec = Codec(cipher=SubjectCipher(self.keys))

    def add(self, event: Event, *subjects: str) -> None:
        metadata = Metadata(f"e{len(self.records)}", "/clients/x", key_of(event), AT, data_subjects=subjects)
        value, headers = self._codec.encode(event, metadata)
        topic = topic_name(event, Priority.NORMAL)
        self.records.append(Record(topic, 0, len(self.records), 1, key_of(event).encode(), value, headers))

    def read(self, records: list[Record]) -> list[SinkRecord]:
        """As a process reads them that has remembered no keys yet."""
        codec = Codec(cipher=SubjectCipher(self.keys))
        return [decoded(codec, record) for record in records]


@pytest.fixture
def feed() -> Feed:
    made = Feed()
    for task, subjects in (("ada", (ADA,)), ("both", (ADA, BOB)), ("bob", (BOB,)), ("none", ())):
        said = f"{SECRET} {task}"
        made.add(TaskSubmitted(task_id=task, objective=said, parameters={"who": said}), *subjects)
        made.add(
            LlmCalled(
                task_id=task,
                agent="a",
                event_id="e",
                request_hash="h",
                request=f'{{"q":"{said}"}}',
                response=said,
                started_at=AT,
                latency_ms=2.5,
                provider="p",
                model="m",
                prompt_tokens=7,
                completion_tokens=5,
                cost_usd=0.25,
            ),
            *subjects,
        )
        quote = Citation(marker=1, chunk_id="c", document_id="d", title="t", quote=said)
        made.add(TaskCompleted(task_id=task, objective=said, answer=said, citations=(quote,)), *subjects)
        chunk = ChunkEmbedded(
            chunk_id=f"c-{task}",
            document_id=f"d-{task}",
            ordinal=0,
            title=said,
            text=said,
            tokens=3,
            model="m",
            model_version="1",
            vector=(0.6, 0.8),
        )
        made.add(chunk, *subjects)
    return made


@pytest.fixture
def clickhouse(tmp_path: Path) -> Iterator[ClickHouse]:
    with ClickHouse(tmp_path / "clickhouse") as opened:
        ClickHouseSink(opened).open()
        # Grep sees no text through compression.
        opened.command("ALTER TABLE event_log MODIFY COLUMN payload String CODEC(NONE)")
        yield opened


def write(clickhouse: ClickHouse, records: list[SinkRecord]) -> None:
    ClickHouseSink(clickhouse).write(records, {})


def forget(clickhouse: ClickHouse, feed: Feed, subject: str) -> None:
    feed.keys.forget(subject)
    feed.add(SubjectForgotten(key_id=subject, requested_by="x"))
    write(clickhouse, feed.read(feed.records[-1:]))


def files_with(folder: Path, text: str) -> list[str]:
    return subprocess.run(["grep", "-rla", text, folder], capture_output=True, text=True, check=False).stdout.split()


def rows(clickhouse: ClickHouse) -> dict[str, tuple[object, ...]]:
    found = clickhouse.read("SELECT id, type, payload, erased, data_subjects, blanked FROM event_log FINAL ORDER BY id")
    return {row[0]: row[1:] for row in found}


def test_nothing_is_left_of_one_and_all_of_the_others(clickhouse: ClickHouse, feed: Feed, tmp_path: Path) -> None:
    write(clickhouse, feed.read(feed.records))
    before = rows(clickhouse)
    assert files_with(tmp_path, f"{SECRET} ada")
    forget(clickhouse, feed, ADA)
    assert erased_rows(clickhouse, [ADA, BOB]) == {ADA: 8}
    assert wait_for_old_files(clickhouse, 60)
    assert not files_with(tmp_path, f"{SECRET} ada")
    assert not files_with(tmp_path, f"{SECRET} both")
    after = rows(clickhouse)
    for key, row in before.items():
        touched = ADA in row[3]  # type: ignore[operator]
        assert (after[key] != row) == touched == after[key][2]
    assert files_with(tmp_path, f"{SECRET} bob")
    # What was spent and done can still be counted.
    spent = clickhouse.read("SELECT task_id, tokens, cost_usd, latency_ms, request FROM llm_calls ORDER BY task_id")
    assert spent[0] == ("ada", 12, 0.25, 2.5, "")
    assert spent[1] == ("bob", 12, 0.25, 2.5, f'{{"q":"{SECRET} bob"}}')
    tasks = clickhouse.read("SELECT task_id, objective, status, answer FROM tasks ORDER BY task_id")
    assert tasks[0] == ("ada", "", "completed", "")


def test_what_a_rebuild_makes_of_the_log_is_the_same(clickhouse: ClickHouse, feed: Feed) -> None:
    write(clickhouse, feed.read(feed.records))
    forget(clickhouse, feed, BOB)
    kept = rows(clickhouse)
    clickhouse.command("TRUNCATE TABLE event_log")
    clickhouse.command("TRUNCATE TABLE forgotten_subjects")
    write(clickhouse, feed.read(feed.records))
    assert rows(clickhouse) == kept


def test_records_that_come_again_bring_nothing_back(clickhouse: ClickHouse, feed: Feed) -> None:
    with_keys = feed.read(feed.records)
    write(clickhouse, with_keys)
    forget(clickhouse, feed, ADA)
    forgotten = rows(clickhouse)
    # Read with the keys' help before, written after: by a process that remembers keys, or was stopped in between.
    write(clickhouse, with_keys)
    assert rows(clickhouse) == forgotten
    write(clickhouse, feed.read(feed.records))
    assert rows(clickhouse) == forgotten


def test_the_event_may_come_first_and_twice(clickhouse: ClickHouse, feed: Feed) -> None:
    with_keys = feed.read(feed.records)
    for _ in range(2):
        forget(clickhouse, feed, ADA)
    assert erased_rows(clickhouse, [ADA]) == {ADA: 0}
    write(clickhouse, with_keys)
    assert erased_rows(clickhouse, [ADA]) == {ADA: 8}
    assert forgotten_among(clickhouse, {ADA, BOB, EVE}) == {ADA}
    assert forgotten_among(clickhouse, set()) == set()


def test_in_one_batch_with_all_that_it_is_about(clickhouse: ClickHouse, feed: Feed) -> None:
    batch = feed.read(feed.records)
    feed.add(SubjectForgotten(key_id=ADA, requested_by="x"))
    write(clickhouse, [*batch, *feed.read(feed.records[-1:])])
    said = ", ".join(f"countIf(payload LIKE '%{SECRET} {task}%')" for task in ("ada", "bob"))
    assert clickhouse.read(f"SELECT {said} FROM event_log") == [(0, 4)]


def test_tables_that_a_rebuild_kept_are_not_kept_from_it(clickhouse: ClickHouse, feed: Feed) -> None:
    write(clickhouse, feed.read(feed.records))
    clickhouse.command("CREATE TABLE event_log_until_20260101_000000 AS event_log")
    clickhouse.command("INSERT INTO event_log_until_20260101_000000 SELECT * FROM event_log")
    # And one that is not finished, and perhaps never will be.
    shadow = f"{clickhouse.database}_rebuild"
    clickhouse.command(f"CREATE DATABASE {shadow}")
    clickhouse.command(f"CREATE TABLE {shadow}.event_log AS event_log")
    clickhouse.command(f"INSERT INTO {shadow}.event_log SELECT * FROM event_log")
    forget(clickhouse, feed, ADA)
    assert erased_rows(clickhouse, [ADA]) == {ADA: 24}
    for table in ("event_log_until_20260101_000000", f"{shadow}.event_log"):
        said = f"SELECT countIf(payload LIKE '%{SECRET} ada%') FROM {table}"
        assert clickhouse.read(said) == [(0,)]


def test_a_table_of_an_earlier_release_gains_the_columns(tmp_path: Path, feed: Feed) -> None:
    with ClickHouse(tmp_path / "clickhouse") as opened:
        ClickHouseSink(opened).open()
        for column in ("data_subjects", "erased", "blanked"):
            opened.command("CREATE OR REPLACE VIEW events AS SELECT 1")
            opened.command(f"ALTER TABLE event_log DROP COLUMN {column}")
        ClickHouseSink(opened).open()
        write(opened, feed.read(feed.records))
        forget(opened, feed, ADA)
        assert erased_rows(opened, [ADA]) == {ADA: 8}
        assert opened.read("SELECT count() FROM events WHERE erased") == [(8,)]
