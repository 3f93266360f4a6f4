"""Records as rows of ``event_log``.

In: decoded (or undecodable) records. Out: one Arrow table. The payload keeps the whole event but for vectors: 384
floats take 4.5 kB as JSON, nobody asks SQL about them, and Milvus and the topic hold them; in their place stands their
size and SHA-256 (``{"dimensions": 384, "sha256": "..."}``), which is enough to tell whether two are the same.
"""

from array import array
from collections.abc import Sequence
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any, Final

import pyarrow as pa

from schemas.events import ChunkEmbedded, Event, TextsEmbedded
from schemas.personal import blank
from schemas.record import Header
from sinks.sink import SinkRecord

__all__ = ["SCHEMA", "payload_json", "to_table"]

_LOW_CARDINALITY: Final = pa.dictionary(pa.int32(), pa.string())

SCHEMA: Final = pa.schema(
    [
        ("topic", _LOW_CARDINALITY),
        ("partition", pa.uint32()),
        ("offset", pa.uint64()),
        ("timestamp", pa.timestamp("ms", tz="UTC")),
        ("key", pa.binary()),
        ("type", _LOW_CARDINALITY),
        ("id", pa.string()),
        ("source", _LOW_CARDINALITY),
        ("subject", pa.string()),
        ("time", pa.timestamp("us", tz="UTC")),
        ("causation_id", pa.string()),
        ("correlation_id", pa.string()),
        ("traceparent", pa.string()),
        ("dataschema", _LOW_CARDINALITY),
        ("task_id", pa.string()),
        ("step_id", pa.string()),
        ("agent", _LOW_CARDINALITY),
        ("payload", pa.string()),
        ("error", pa.string()),
        ("raw", pa.binary()),
        ("value_bytes", pa.uint64()),
        ("data_subjects", pa.list_(pa.string())),
        ("erased", pa.bool_()),
        ("blanked", pa.string()),
    ]
)
"""The columns of ``event_log``, in order."""

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_EARLIEST: Final = datetime(1900, 1, 1, tzinfo=UTC)
_LATEST: Final = datetime(2262, 1, 1, tzinfo=UTC)
"""What DateTime64 can hold in all its precisions; a producer's clock may say anything."""
_LATEST_MS: Final = int(_LATEST.timestamp() * 1000)
_AGENTS: Final = "/agents/"


def payload_json(event: Event) -> str:
    """``event`` as JSON, with vectors described instead of written out."""
    if isinstance(event, ChunkEmbedded):
        digest = sha256(array("f", event.vector).tobytes()).hexdigest()
        described = f'"vector":{{"dimensions":{len(event.vector)},"sha256":"{digest}"}}'
        return _with(event, "vector", described)
    if isinstance(event, TextsEmbedded):
        described = f'"vectors":{{"bytes":{len(event.vectors)},"sha256":"{sha256(event.vectors).hexdigest()}"}}'
        return _with(event, "vectors", described)
    return event.model_dump_json()


def _with(event: Event, field: str, described: str) -> str:
    text = event.model_dump_json(exclude={field})
    return f"{text[:-1]},{described}}}"


def _header(headers: Sequence[Header], name: str) -> str:
    for key, value in headers:
        if key == name and value is not None:
            return value.decode(errors="replace")
    return ""


def _agent(named: object, source: str) -> str:
    """The agent that an event is of: the one it names, else its source's."""
    if isinstance(named, str) and named:
        return named
    return source[len(_AGENTS) :].partition("@")[0] if source.startswith(_AGENTS) else ""


def to_table(batch: Sequence[SinkRecord]) -> pa.Table:
    """``batch`` as an Arrow table of :data:`SCHEMA`, row by row."""
    rows = [_row(item) for item in batch]
    columns = zip(*rows, strict=True) if rows else [()] * len(SCHEMA)
    return pa.Table.from_arrays(
        [_column(list(values), field.type) for values, field in zip(columns, SCHEMA, strict=True)], schema=SCHEMA
    )


def _column(values: list[Any], kind: pa.DataType) -> pa.Array:
    if pa.types.is_dictionary(kind):
        return pa.array(values, pa.string()).dictionary_encode()
    return pa.array(values, kind)


def _row(item: SinkRecord) -> tuple[Any, ...]:
    record, envelope = item.record, item.envelope
    value = record.value
    size = 0 if value is None else len(value)
    timestamp = min(max(record.timestamp_ms, 0), _LATEST_MS)
    if envelope is None:
        place = (record.topic, record.partition, record.offset, timestamp, record.key or b"")
        schema = _header(record.headers, "ce_dataschema")
        why = item.error, value or b"", size
        return (*place, "", "", "", "", _EPOCH, "", "", "", schema, "", "", "", "", *why, (), False, "")
    event, metadata = envelope.event, envelope.metadata
    # pydantic answers getattr() for a field that a model lacks slowly.
    fields = event.__dict__
    return (
        record.topic,
        record.partition,
        record.offset,
        timestamp,
        record.key or b"",
        event.full_name,
        metadata.id,
        metadata.source,
        metadata.subject,
        min(max(metadata.time, _EARLIEST), _LATEST),
        metadata.causation_id,
        metadata.correlation_id,
        metadata.traceparent,
        _header(record.headers, "ce_dataschema"),
        fields.get("task_id", ""),
        fields.get("step_id") or "",
        _agent(fields.get("agent"), metadata.source),
        payload_json(event),
        "",
        b"",
        size,
        metadata.data_subjects,
        envelope.erased,
        payload_json(blank(event)) if metadata.data_subjects and not envelope.erased else "",
    )
