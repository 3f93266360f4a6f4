"""What the ClickHouse sink's files say must match the event models, and rows must match the table."""

import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pytest

import sinks.clickhouse
from schemas.events import EVENT_TYPES, ChunkEmbedded, DeadLettered, Event, StepFailed, TaskFailed
from schemas.metadata import Envelope, Metadata
from schemas.record import Record
from sinks.clickhouse import named_queries
from sinks.clickhouse.rows import SCHEMA, payload_json, to_table
from sinks.sink import SinkRecord

FOLDER = Path(sinks.clickhouse.__file__).parent
NOW = datetime(2026, 3, 1, tzinfo=UTC)


def _views() -> list[tuple[str, str]]:
    """Each SELECT over ``event_log`` in the DDL: the file it stands in, and its text."""
    found: list[tuple[str, str]] = []
    for path in sorted((FOLDER / "ddl").glob("*.sql")):
        parts = re.split(r"\bSELECT\b", path.read_text(encoding="utf-8"))[1:]
        found.extend((path.name, part) for part in parts if "PREWHERE type" in part)
    return found


@pytest.mark.parametrize(("file", "select"), _views())
def test_views_name_event_types_and_fields_that_exist(file: str, select: str) -> None:
    types = set(re.findall(r"'(magnatronic\.\w+\.\w+)'", select.partition("PREWHERE")[2]))
    assert types
    assert types <= set(EVENT_TYPES)
    fields = set(re.findall(r"JSON(?:Extract\w*|Length)\(payload, '(\w+)'", select))
    known = {field for name in types for field in EVENT_TYPES[name].model_fields}
    assert fields <= known, f"{file} reads fields that no such event has"


def test_there_are_views_to_check() -> None:
    assert len(_views()) >= 8


def test_the_table_has_the_columns_that_rows_have() -> None:
    ddl = (FOLDER / "ddl" / "0001_event_log.sql").read_text(encoding="utf-8")
    columns = re.findall(r"^    (\w+) ", ddl.partition("(\n")[2].partition("\n)")[0], re.MULTILINE)
    assert columns == SCHEMA.names


def test_every_query_has_a_title_and_ends_in_its_statement() -> None:
    for query in named_queries():
        assert query.title
        assert query.sql.startswith("SELECT")
        assert not query.sql.endswith(";")


def _record(value: bytes | None = b"v") -> Record:
    return Record("tasks.high", 1, 5, 1_000, None, value, [("ce_dataschema", b"s"), ("ce_dataschema", b"second")])


def _row(event: Event, source: str = "/agents/overseer@2") -> dict[str, Any]:
    envelope = Envelope(event, Metadata("i", source, "s", NOW))
    table = to_table([SinkRecord(_record(), envelope)])
    assert table.schema.equals(SCHEMA)
    (row,) = table.to_pylist()
    return dict(row)


def test_the_agent_is_the_one_that_an_event_names_else_its_source() -> None:
    failed = StepFailed(task_id="t", step_id="t/1", attempt=1, error_type="E", message="m")
    assert _row(failed)["agent"] == "overseer"
    assert _row(failed, "/clients/somebody")["agent"] == ""
    place: dict[str, Any] = {"source_topic": "x", "source_partition": 0, "source_offset": 0, "source_timestamp": NOW}
    letter = DeadLettered(**place, agent="researcher", error_type="E", error="e")
    assert _row(letter)["agent"] == "researcher"


def test_a_step_that_may_be_missing_is_an_empty_text() -> None:
    assert _row(TaskFailed(task_id="t", objective="o", reason="r"))["step_id"] == ""
    assert _row(TaskFailed(task_id="t", objective="o", reason="r", step_id="t/2"))["step_id"] == "t/2"


def test_an_undecodable_record_keeps_its_bytes() -> None:
    table = to_table([SinkRecord(_record(b"\xff"), None, "TruncatedError: x"), SinkRecord(_record(None), None, "e")])
    first, second = table.to_pylist()
    assert (first["raw"], first["error"], first["type"], first["payload"]) == (b"\xff", "TruncatedError: x", "", "")
    assert (second["raw"], second["value_bytes"]) == (b"", 0)


def test_nothing_makes_an_empty_table() -> None:
    assert to_table([]).schema.equals(SCHEMA)
    assert to_table([]).num_rows == 0


def test_bytes_in_a_payload_are_base64_and_vectors_a_digest() -> None:
    place: dict[str, Any] = {"source_topic": "x", "source_partition": 0, "source_offset": 0, "source_timestamp": NOW}
    letter = DeadLettered(**place, value=b"\xff\x00", agent="a", error_type="E", error="e")
    assert DeadLettered.model_validate_json(payload_json(letter)) == letter
    fields: dict[str, Any] = {"document_id": "d", "ordinal": 0, "title": "t", "text": "x", "tokens": 1}
    chunk = ChunkEmbedded(chunk_id="c", **fields, model="m", model_version="1", vector=(0.6, 0.8))
    payload = orjson.loads(payload_json(chunk))
    digest = payload.pop("vector")
    assert digest["dimensions"] == 2
    assert payload == {name: value for name, value in chunk.model_dump().items() if name != "vector"}
    assert len(payload_json(chunk)) < 400


def test_low_cardinality_columns_are_dictionaries() -> None:
    row = to_table([SinkRecord(_record(), None, "e")] * 3)
    assert pa.types.is_dictionary(row.column("topic").type)
