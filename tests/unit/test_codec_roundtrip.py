"""Every event type comes back from its bytes as it went in, and other implementations read the same bytes alike."""

import io
import json
import math
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import fastavro
import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from schemas.avro_generation import avro_schema, parsed_schema, shipped_types
from schemas.avro_schema import (
    ArrayType,
    EnumType,
    FixedType,
    MapType,
    Primitive,
    RecordType,
    Schema,
    UnionType,
    fingerprint,
)
from schemas.codec import Codec, Encoded
from schemas.errors import EncodeError, EventTooLargeError, RegistryError
from schemas.events import (
    ChunkEmbedded,
    Citation,
    DeadLettered,
    DocumentSubmitted,
    Event,
    Priority,
    StepCompleted,
    StepFailed,
    TaskSubmitted,
)
from schemas.metadata import Metadata, deterministic_id
from schemas.record import Record
from schemas.registry import Manifest, ManifestIds

CODEC = Codec()
MODELS = list(shipped_types().values())
NOW = datetime(2026, 3, 4, 5, 6, 7, 89, tzinfo=UTC)
META = Metadata(deterministic_id("one"), "/agents/tester@1", "t1", NOW, deterministic_id("zero"), "t1")


def record_of(encoded: Encoded, **changes: Any) -> Record:
    place: dict[str, Any] = {"topic": "tasks.normal", "partition": 3, "offset": 14, "timestamp_ms": 1_700_000_000_123}
    return Record(**(place | {"key": b"t1", "value": encoded.value, "headers": encoded.headers} | changes))


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
TIMES = st.datetimes(datetime(1, 1, 2), datetime(9999, 12, 30), timezones=st.just(UTC))
PRIMITIVE_VALUES: dict[str, st.SearchStrategy[Any]] = {
    "boolean": st.booleans(),
    "long": st.integers(-(1 << 63), (1 << 63) - 1),
    "float": st.floats(width=32, allow_nan=False),
    "double": st.floats(allow_nan=False),
    "bytes": st.binary(max_size=20),
    "string": TEXTS,
}


def values(schema: Schema) -> st.SearchStrategy[Any]:
    """Plain values of a schema, as a model's constructor takes them."""
    match schema:
        case Primitive(kind="long", logical="timestamp-micros"):
            return TIMES
        case Primitive():
            return PRIMITIVE_VALUES[schema.kind]
        case EnumType():
            return st.sampled_from(schema.symbols)
        case ArrayType():
            return st.lists(values(schema.items), max_size=3).map(tuple)
        case MapType():
            return st.dictionaries(TEXTS, values(schema.values), max_size=3)
        case UnionType():
            return st.none() | values(schema.branches[1])
        case RecordType():
            return st.fixed_dictionaries({field.name: values(field.type) for field in schema.fields})
        case FixedType():
            raise AssertionError("no model has a fixed")


def valid(model: type[Event]) -> st.SearchStrategy[Event]:
    """Events of a type; fields whose model asks for text, or a number from 0, get that."""
    special: dict[type[Event], dict[str, st.SearchStrategy[Any]]] = {
        TaskSubmitted: {"task_id": TEXTS.filter(bool), "objective": TEXTS.filter(bool)},
        DocumentSubmitted: {"document_id": TEXTS.filter(bool)},
        DeadLettered: {"attempts": st.integers(0, 100)},
    }
    schema = parsed_schema(model)
    parts = {field.name: values(field.type) for field in schema.fields} | special.get(model, {})
    return st.fixed_dictionaries(parts).map(lambda fields: model(**fields))


METADATA = st.builds(
    Metadata,
    id=TEXTS.filter(bool),
    source=TEXTS.filter(bool),
    subject=TEXTS.filter(bool),
    time=TIMES,
    causation_id=TEXTS,
    correlation_id=TEXTS,
    traceparent=st.just("") | st.just("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),
)


@pytest.mark.parametrize("model", MODELS, ids=lambda m: m.__name__)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(data=st.data())
def test_every_event_type_round_trips(model: type[Event], data: st.DataObject) -> None:
    event, metadata = data.draw(valid(model)), data.draw(METADATA)
    encoded = CODEC.encode(event, metadata)
    assert CODEC.encode(event, metadata) == encoded
    envelope = CODEC.decode(record_of(encoded))
    assert envelope.event == event
    assert type(envelope.event) is model
    assert envelope.metadata == metadata
    # The independent reader, by the committed schema: the bytes are Avro, and mean the same.
    theirs: Any = fastavro.schemaless_reader(io.BytesIO(encoded.value[5:]), avro_schema(model), None)
    assert model(**theirs) == event


@pytest.mark.parametrize("model", MODELS, ids=lambda m: m.__name__)
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(data=st.data())
def test_what_another_writer_wrote_is_read(model: type[Event], data: st.DataObject) -> None:
    event = data.draw(valid(model))
    encoded = CODEC.encode(event, META)
    out = io.BytesIO(encoded.value[:5])
    out.seek(5)
    fastavro.schemaless_writer(out, avro_schema(model), event.model_dump())
    assert CODEC.decode(record_of(encoded, value=out.getvalue())).event == event


def test_the_bytes_and_headers_of_a_known_event() -> None:
    event = TaskSubmitted(
        task_id="t1", objective="ask", priority=Priority.HIGH, parameters={"b": "2", "a": "1"}, deadline=NOW
    )
    metadata = Metadata("id-1", "/clients/x", "t1", NOW, "cause", "t1", "00-00000000000000000000000000000001-01-01")
    value, headers = CODEC.encode(event, metadata)
    schema_id = ManifestIds().id_of(parsed_schema(TaskSubmitted))
    micros = (NOW - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)
    out = io.BytesIO()
    fastavro.schemaless_writer(out, {"type": "long"}, micros)
    assert value == (
        b"\0" + schema_id.to_bytes(4, "big") + b"\x04t1\x06ask\0\0\2" + out.getvalue() + b"\x04\x02a\x021\x02b\x022\0"
    )
    assert headers == [
        ("ce_specversion", b"1.0"),
        ("ce_type", b"magnatronic.tasks.TaskSubmitted"),
        ("ce_source", b"/clients/x"),
        ("ce_id", b"id-1"),
        ("ce_time", b"2026-03-04T05:06:07.000089Z"),
        ("ce_dataschema", f"magnatronic.tasks.TaskSubmitted/{fingerprint(parsed_schema(TaskSubmitted))}".encode()),
        ("ce_subject", b"t1"),
        ("ce_causationid", b"cause"),
        ("ce_correlationid", b"t1"),
        ("content-type", b"application/avro"),
        ("traceparent", b"00-00000000000000000000000000000001-01-01"),
    ]


def test_the_order_of_a_map_does_not_change_the_bytes() -> None:
    one = TaskSubmitted(task_id="t", objective="o", parameters={"a": "1", "b": "2"})
    other = TaskSubmitted(task_id="t", objective="o", parameters={"b": "2", "a": "1"})
    assert CODEC.encode(one, META) == CODEC.encode(other, META)


def test_times_of_other_zones_are_told_in_utc() -> None:
    event = StepFailed(task_id="t", step_id="s", attempt=1, error_type="E", message="m")
    east = NOW.astimezone(timezone(timedelta(hours=5, minutes=30)))
    encoded = CODEC.encode(event, Metadata("i", "/s", "t", east))
    assert dict(encoded.headers)["ce_time"] == b"2026-03-04T05:06:07.000089Z"
    headers = [*encoded.headers, ("ce_time", b"2026-03-04T10:36:07.000089+05:30")]
    assert CODEC.decode(record_of(encoded, headers=headers)).metadata.time == NOW


def test_empty_attributes_are_left_out() -> None:
    event = StepFailed(task_id="t", step_id="s", attempt=1, error_type="E", message="m")
    encoded = CODEC.encode(event, Metadata("i", "/s", "t", NOW))
    assert not {"ce_causationid", "ce_correlationid", "traceparent"} & {name for name, _ in encoded.headers}
    assert CODEC.decode(record_of(encoded)).metadata == Metadata("i", "/s", "t", NOW)


def test_a_stock_producers_record_gets_metadata_by_its_place() -> None:
    event = TaskSubmitted(task_id="t9", objective="o")
    record = record_of(CODEC.encode(event, META), headers=())
    envelope = CODEC.decode(record)
    assert envelope.event == event
    assert envelope.metadata == Metadata(
        id=deterministic_id("tasks.normal", 3, 14),
        source="/clients/unknown",
        subject="t1",
        time=datetime(2023, 11, 14, 22, 13, 20, 123_000, tzinfo=UTC),
        correlation_id="t9",
    )
    assert CODEC.decode(record) == envelope
    for key in (None, b"\xff\xfe"):
        assert CODEC.decode(record_of(CODEC.encode(event, META), headers=(), key=key)).metadata.subject == "t9"


def test_vectors_of_float32_and_large_events() -> None:
    vector = tuple(math.sin(n) for n in range(384))
    chunk = ChunkEmbedded(
        chunk_id="c",
        document_id="d",
        ordinal=0,
        title="",
        text="x",
        tokens=1,
        model="m",
        model_version="1",
        vector=vector,
    )
    encoded = CODEC.encode(chunk, META)
    assert len(encoded.value) < 384 * 4 + 60
    back = CODEC.decode(record_of(encoded)).event
    assert isinstance(back, ChunkEmbedded)
    assert back.vector == pytest.approx(vector, abs=1e-7)
    assert CODEC.encode(back, META) == encoded
    document = DocumentSubmitted(document_id="d", title="t", text="é" * 500_000)
    assert CODEC.decode(record_of(CODEC.encode(document, META))).event == document


def unchecked(kind: type[Event], /, **fields: Any) -> Event:
    return kind.model_construct(**fields)


@pytest.mark.parametrize(
    "event",
    [
        unchecked(TaskSubmitted, task_id=5, objective="o"),
        unchecked(TaskSubmitted, objective="o"),
        unchecked(TaskSubmitted, task_id="t", objective="o", priority="urgent"),
        unchecked(TaskSubmitted, task_id="\ud800", objective="o"),
        unchecked(StepFailed, task_id="t", step_id="s", attempt=1 << 64, error_type="E", message="m"),
        unchecked(StepFailed, task_id="t", step_id="s", attempt="1", error_type="E", message="m"),
        unchecked(
            ChunkEmbedded,
            chunk_id="c",
            document_id="d",
            ordinal=0,
            title="",
            text="",
            tokens=1,
            model="",
            model_version="",
            vector=(1e300,),
        ),
    ],
)
def test_events_that_were_not_validated_do_not_reach_the_log(event: Event) -> None:
    with pytest.raises(EncodeError, match=r"magnatronic\.\w+\.\w+ of .* can't be encoded"):
        CODEC.encode(event, META)


@pytest.mark.parametrize(
    "metadata",
    [
        Metadata("i", "/s", "t", datetime(2026, 1, 1)),
        Metadata("\ud800", "/s", "t", NOW),
        Metadata("i", None, "t", NOW),  # type: ignore[arg-type]
    ],
)
def test_metadata_that_can_not_be_told(metadata: Metadata) -> None:
    with pytest.raises(EncodeError):
        CODEC.encode(TaskSubmitted(task_id="t", objective="o"), metadata)


def test_what_no_reader_would_take_is_not_written() -> None:
    small = Codec(max_bytes=1700)
    assert small.encode(TaskSubmitted(task_id="t", objective="o" * 80), META)
    with pytest.raises(EventTooLargeError, match="over the cap of 1700; emit less"):
        small.encode(TaskSubmitted(task_id="t", objective="o" * 800), META)
    with pytest.raises(EventTooLargeError, match="over the cap of 1048576"):
        CODEC.encode(DocumentSubmitted(document_id="d", title="t", text="x" * 1_048_000), META)
    letter = DeadLettered(
        source_topic="t",
        source_partition=0,
        source_offset=0,
        source_timestamp=NOW,
        value=bytes(8 * 1_048_576),
        agent="a",
        error_type="E",
        error="e",
    )
    assert CODEC.decode(record_of(CODEC.encode(letter, META))).event == letter
    empty = Citation(marker=1, chunk_id="", document_id="", title="", quote="")
    many = StepCompleted(
        task_id="t", step_id="s", attempt=1, capability="c", objective="o", answer="a", citations=(empty,) * 10_000
    )
    with pytest.raises(EventTooLargeError, match="more than 65536 values"):
        CODEC.encode(many, META)
    assert CODEC.encode(many.model_copy(update={"citations": (empty,) * 8_000}), META)


def test_a_type_without_a_committed_schema_has_no_id() -> None:
    with pytest.raises(RegistryError, match="python -m schemas"):
        Codec(ManifestIds(Manifest(()))).encode(TaskSubmitted(task_id="t", objective="o"), META)


def test_ids_can_be_had_before_the_first_event() -> None:
    with pytest.raises(RegistryError, match="TaskSubmitted is not in the schema manifest"):
        Codec(ManifestIds(Manifest(()))).prepare(TaskSubmitted, StepFailed)
    codec = Codec()
    codec.prepare(*MODELS)
    codec.prepare(TaskSubmitted)
    event = TaskSubmitted(task_id="t", objective="o")
    assert codec.encode(event, META) == CODEC.encode(event, META)


def test_json_of_a_decoded_event_is_that_of_the_original() -> None:
    event = TaskSubmitted(task_id="t", objective="o", deadline=NOW)
    back = CODEC.decode(record_of(CODEC.encode(event, META))).event
    assert orjson.loads(back.model_dump_json()) == json.loads(event.model_dump_json())
