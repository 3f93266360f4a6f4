"""Whatever bytes and headers arrive: an event or a DecodeError, soon, and in little memory."""

import contextlib
import json
import time
import tracemalloc
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.avro_generation import parsed_schema, shipped_types
from schemas.avro_reader import MAX_VALUES, compile_reader
from schemas.avro_schema import MAX_NODES, RecordType, Schema, parse
from schemas.codec import MAX_BYTES, Codec
from schemas.errors import (
    DecodeError,
    InvalidEventError,
    MalformedError,
    TooLargeError,
    TrailingBytesError,
    TruncatedError,
    UnknownSchemaError,
    UnsafeSchemaError,
)
from schemas.events import Citation, Claim, Evidence, StepCompleted, TaskSubmitted
from schemas.metadata import Envelope, Metadata
from schemas.record import Header, Record
from schemas.topics import MAX_MESSAGE_BYTES

MAX_SECONDS = 0.050
MAX_MEMORY = 64 * 1024 * 1024

CODEC = Codec()
META = Metadata("i", "/clients/test", "t1", datetime(2026, 1, 1, tzinfo=UTC), "cause", "t1")
SUBMITTED = CODEC.encode(TaskSubmitted(task_id="t1", objective="ask", parameters={"k": "v"}), META)
COMPLETED = CODEC.encode(
    StepCompleted(
        task_id="t1",
        step_id="t1/1",
        attempt=1,
        capability="research",
        objective="o",
        answer="a",
        claims=(Claim(text="c", chunk_ids=("x", "y")),),
        citations=(Citation(marker=1, chunk_id="x", document_id="d", title="t", quote="q"),),
        evidence=(Evidence(chunk_id="x", document_id="d", title="t", text="passage", score=0.5),),
    ),
    META,
)
FRAME = SUBMITTED.value[:5]


def record_of(value: bytes | None, headers: Sequence[Header] = (), timestamp_ms: int = 0) -> Record:
    return Record("tasks.normal", 2, 77, timestamp_ms, b"t1", value, headers)


def varint(value: int) -> bytes:
    zigzag, out = (value << 1) ^ (value >> 63), bytearray()
    while zigzag > 127:
        out.append(zigzag & 127 | 128)
        zigzag >>= 7
    return bytes([*out, zigzag])


def refused(codec: Codec, record: Record, expected: type[DecodeError]) -> str:
    """Decode what must fail: within the bounds, with a short message that names the place."""
    fastest = float("inf")
    for _ in range(3):
        # The thread's own time: what else the machine does is no cost of the record.
        started = time.thread_time()
        with pytest.raises(expected) as caught:
            codec.decode(record)
        fastest = min(fastest, time.thread_time() - started)
    assert type(caught.value) is expected
    tracemalloc.start()
    try:
        with pytest.raises(expected):
            codec.decode(record)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert fastest < MAX_SECONDS
    assert peak < MAX_MEMORY
    message = str(caught.value)
    assert message.startswith("tasks.normal[2]@77: ")
    assert len(message) < 700
    return message


BIG = 2_000_000_000
# The widest that a string of the topic's cap gets in Python: one letter past the 16-bit plane makes all take 4 bytes.
WIDE_TEXT = b"a" * (MAX_MESSAGE_BYTES - 40) + "\N{GRINNING FACE}".encode()
WIDE = b"\x04t1" + varint(len(WIDE_TEXT)) + WIDE_TEXT + b"\2\0\0\0" + b"\0"
# magnatronic.tasks.TaskSubmitted: task_id, objective, priority, submitted_by, deadline, parameters
HOSTILE = {
    "empty": (b"", MalformedError),
    "no frame": (FRAME[:4], MalformedError),
    "other magic": (b"\1" + SUBMITTED.value[1:], MalformedError),
    "json": (b'{"task_id": "t1"}', MalformedError),
    "frame alone": (FRAME, TruncatedError),
    "one byte short": (SUBMITTED.value[:-1], TruncatedError),
    "one byte more": (SUBMITTED.value + b"\0", TrailingBytesError),
    "much more": (SUBMITTED.value + bytes(1_000_000), TrailingBytesError),
    "two events": (SUBMITTED.value + SUBMITTED.value, TrailingBytesError),
    "over the cap": (FRAME + bytes(MAX_BYTES), TooLargeError),
    "over the topic's cap": (FRAME + bytes(MAX_MESSAGE_BYTES), TooLargeError),
    "string of 2 GB": (FRAME + varint(BIG) + b"t1", TruncatedError),
    "string of 2**62": (FRAME + varint(1 << 62) + b"t1", TruncatedError),
    "string of negative length": (FRAME + varint(-2) + b"t1", MalformedError),
    "string of -2**63": (FRAME + varint(-(1 << 63)) + b"t1", MalformedError),
    "length without end": (FRAME + b"\xff" * 1_000_000, MalformedError),
    "length of 70 bits": (FRAME + b"\xff" * 9 + b"\x7f", MalformedError),
    "bad utf-8": (FRAME + b"\x04\xff\xfe\x06ask\2\0\0\0", MalformedError),
    "enum index too high": (FRAME + b"\x04t1\x06ask\x06\0\0\0", MalformedError),
    "enum index huge": (FRAME + b"\x04t1\x06ask" + varint(BIG) + b"\0\0\0", MalformedError),
    "enum index negative": (FRAME + b"\x04t1\x06ask\1\0\0\0", MalformedError),
    "union index too high": (FRAME + b"\x04t1\x06ask\2\0\4\0", MalformedError),
    "union index negative": (FRAME + b"\x04t1\x06ask\2\0\1\0", MalformedError),
    "time out of range": (FRAME + b"\x04t1\x06ask\2\0\2" + varint((1 << 63) - 1) + b"\0", MalformedError),
    "time before year 1": (FRAME + b"\x04t1\x06ask\2\0\2" + varint(-(1 << 62)) + b"\0", MalformedError),
    "map of 2 billion": (FRAME + b"\x04t1\x06ask\2\0\0" + varint(BIG), TruncatedError),
    "map of -2 billion": (FRAME + b"\x04t1\x06ask\2\0\0" + varint(-BIG) + b"\0", TruncatedError),
    "map of -2**63": (FRAME + b"\x04t1\x06ask\2\0\0" + varint(-(1 << 63)) + b"\0", TruncatedError),
    "map without end": (FRAME + b"\x04t1\x06ask\2\0\0\2\2a\2b", TruncatedError),
    "map of too many": (FRAME + b"\x04t1\x06ask\2\0\0" + varint(400_000) + bytes(900_000), TooLargeError),
    "map of too many small blocks": (FRAME + b"\x04t1\x06ask\2\0\0" + b"\2\0\0" * 300_000, TooLargeError),
    "wide string": (FRAME + WIDE, TrailingBytesError),
    "empty task_id": (FRAME + b"\0\x06ask\2\0\0\0", InvalidEventError),
}


@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.parametrize("framing", ["header", "stock"])
def test_hostile_bytes(case: str, framing: str) -> None:
    value, expected = HOSTILE[case]
    refused(CODEC, record_of(value, SUBMITTED.headers if framing == "header" else ()), expected)


def test_tombstones_and_unknown_ids() -> None:
    refused(CODEC, record_of(None), MalformedError)
    message = refused(CODEC, record_of(b"\0\x7f\xff\xff\xff" + SUBMITTED.value[5:]), UnknownSchemaError)
    assert "MAGNATRONIC_SCHEMA_REGISTRY_URL" in message


def test_a_zero_count_of_many_bytes_ends_a_map_too() -> None:
    value = FRAME + b"\x04t1\x06ask\2\0\0\2\2k\2v\x80\0"
    assert CODEC.decode(record_of(value)) == CODEC.decode(record_of(SUBMITTED.value))


def test_negative_block_counts_are_legal_avro() -> None:
    value = FRAME + b"\x04t1\x06ask\2\0\0" + varint(-1) + varint(4) + b"\2k\2v\0"
    event = CODEC.decode(record_of(value)).event
    assert event == TaskSubmitted(task_id="t1", objective="ask", parameters={"k": "v"})


def test_the_largest_event_that_is_read_stays_within_bounds() -> None:
    """What is just below the limits is an event, and costs no more than what is refused."""
    count = MAX_VALUES // 2
    parts = [varint(count), b"".join(b"\x0a%05x\0" % n for n in range(count)), b"\0"]
    value = FRAME + b"\x04t1\x06ask\2\0\0" + b"".join(parts)
    tracemalloc.start()
    try:
        assert isinstance(CODEC.decode(record_of(value)), Envelope)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < MAX_MEMORY
    refused(CODEC, record_of(value + b"\0"), TrailingBytesError)


def with_header(name: str, value: bytes | None) -> list[Header]:
    return [*((key, old) for key, old in SUBMITTED.headers if key != name), (name, value)]


BAD_HEADERS: list[tuple[str, bytes, type[DecodeError]]] = [
    ("ce_dataschema", b"", MalformedError),
    ("ce_dataschema", b"\xff\xff", MalformedError),
    ("ce_dataschema", b"magnatronic.tasks.TaskSubmitted", MalformedError),
    ("ce_dataschema", b"/1234", MalformedError),
    ("ce_dataschema", b"magnatronic.tasks.TaskSubmitted/0000", UnknownSchemaError),
    ("ce_dataschema", b"x/" + b"y" * 900_000, UnknownSchemaError),
    ("ce_specversion", b"0.3", MalformedError),
    ("ce_type", b"magnatronic.tasks.TaskFailed", MalformedError),
    ("ce_time", b"yesterday", MalformedError),
    ("ce_time", b"2026-01-01T00:00:00", MalformedError),
    ("ce_time", b"0001-01-01T00:00:00+23:00", MalformedError),
    ("ce_time", b"9" * 900_000, MalformedError),
    ("ce_id", b"\xff", MalformedError),
    ("ce_source", b"\xff" * 900_000, MalformedError),
    ("ce_subject", b"\xc3", MalformedError),
    ("ce_causationid", b"\xff", MalformedError),
    ("ce_correlationid", b"\xff", MalformedError),
    ("traceparent", b"\xff", MalformedError),
]


def test_many_small_parts_are_refused_or_read_soon() -> None:
    """The dearest way to fill the budget: nested records, each with a block of its own, then an error at the end."""
    claim = b"\0\2\0\0"
    for count, expected in ((MAX_VALUES // 5, TruncatedError), (MAX_VALUES // 5 + 1, TooLargeError)):
        body = b"\0\0\2\0\0\0\0" + varint(count) + claim * count + b"\0"
        refused(CODEC, record_of(COMPLETED.value[:5] + body), expected)


@pytest.mark.parametrize(("name", "value", "expected"), BAD_HEADERS, ids=lambda part: repr(part)[:40])
def test_bad_headers(name: str, value: bytes, expected: type[DecodeError]) -> None:
    refused(CODEC, record_of(SUBMITTED.value, with_header(name, value)), expected)


def test_a_header_without_a_value_is_one_that_is_missing() -> None:
    decoded = CODEC.decode(record_of(SUBMITTED.value, with_header("ce_causationid", None)))
    assert decoded.metadata.causation_id == ""


def test_a_timestamp_that_is_no_time() -> None:
    refused(CODEC, record_of(SUBMITTED.value, timestamp_ms=1 << 62), MalformedError)


class Given:
    """Schema ids as a registry would have them, from a dict."""

    def __init__(self, schemas: dict[int, str]) -> None:
        self._schemas = schemas

    def id_of(self, schema: RecordType) -> int:
        raise NotImplementedError

    def schema_of(self, schema_id: int) -> Schema | None:
        text = self._schemas.get(schema_id)
        return None if text is None else parse(text)


def submitted_with(*fields: dict[str, Any]) -> str:
    """TaskSubmitted as some foreign producer might have it: with more fields."""
    own = [{"name": name, "type": "string"} for name in ("task_id", "objective")]
    return json.dumps({"type": "record", "name": "magnatronic.tasks.TaskSubmitted", "fields": [*own, *fields]})


def nested(depth: int) -> Any:
    kind: Any = "int"
    for _ in range(depth):
        kind = {"type": "array", "items": kind}
    return kind


def doubling(levels: int, leaf: str) -> list[dict[str, Any]]:
    """Records that each hold the one before twice: few lines, 2**levels leaves."""
    fields = []
    for level in range(levels):
        inner = leaf if level == 0 else f"x.L{level - 1}"
        kind = {"type": "record", "name": f"x.L{level}", "fields": [{"name": n, "type": inner} for n in "ab"]}
        fields.append({"name": f"f{level}", "type": kind})
    return fields


EMPTY = {"type": "record", "name": "x.Empty", "fields": []}
LOOP = {"type": "record", "name": "x.Loop", "fields": [{"name": "next", "type": ["null", "x.Loop"]}]}
UNSAFE = {
    "array of null": submitted_with({"name": "x", "type": {"type": "array", "items": "null"}}),
    "array of empty records": submitted_with({"name": "x", "type": {"type": "array", "items": EMPTY}}),
    "array of empty fixed": submitted_with(
        {"name": "x", "type": {"type": "array", "items": {"type": "fixed", "name": "x.F", "size": 0}}}
    ),
    "recursive record": submitted_with({"name": "x", "type": LOOP}),
    "deep nesting": submitted_with({"name": "x", "type": nested(60)}),
    "deeper nesting": submitted_with({"name": "x", "type": nested(300)}),
    "deepest nesting": '{"type":"array","items":' * 100_000,
    "nesting beyond Python's blocks": submitted_with({"name": "x", "type": nested(12)}),
    "billion nulls": submitted_with(*doubling(30, "null")),
    "billion longs": submitted_with(*doubling(30, "long")),
    "many fields": submitted_with(*({"name": f"f{n}", "type": "int"} for n in range(MAX_NODES))),
    "huge text": submitted_with({"name": "x", "type": "int", "doc": "d" * 2_000_000}),
    "no json": "{",
    "no schema": "17",
    "unknown reference": submitted_with({"name": "x", "type": "x.Missing"}),
    "code in a name": submitted_with({"name": "x'): import os #", "type": "int"}),
    "another type": '{"type": "record", "name": "magnatronic.tasks.NoSuch", "fields": []}',
    "no record": '"string"',
    "incompatible": json.dumps({"type": "record", "name": "magnatronic.tasks.TaskSubmitted", "fields": []}),
}


@pytest.mark.parametrize("case", UNSAFE)
def test_hostile_schemas(case: str) -> None:
    """A registry, unlike the manifest, may hold anything."""
    body = b"\x04t1\x06ask" + varint(BIG) + b"\0" * 20
    refused(Codec(Given({9: UNSAFE[case]})), record_of(b"\0\0\0\0\x09" + body), UnknownSchemaError)


def test_two_billion_nulls_in_a_map_have_keys_to_count() -> None:
    schema = submitted_with({"name": "x", "type": {"type": "map", "values": "null"}})
    record = record_of(b"\0\0\0\0\x09\x04t1\x06ask" + varint(BIG) + b"\0" * 20)
    refused(Codec(Given({9: schema})), record, TruncatedError)


@pytest.mark.parametrize(
    "source",
    [
        '["int", "int"]',
        '["int", ["null"]]',
        "[]",
        '{"type": "enum", "name": "E", "symbols": []}',
        '{"type": "enum", "name": "E", "symbols": ["A", "A"]}',
        '{"type": "enum", "name": "E", "symbols": ["A"], "default": "B"}',
        '{"type": "enum", "name": "E", "symbols": [1]}',
        '{"type": "fixed", "name": "F", "size": -1}',
        '{"type": "fixed", "name": "F", "size": 9999999999}',
        '{"type": "fixed", "name": "F"}',
        '{"type": "record", "name": "1R", "fields": []}',
        '{"type": "record", "name": "int", "fields": []}',
        '{"type": "record", "fields": []}',
        '{"type": "record", "name": "R"}',
        '{"type": "record", "name": "R", "fields": [1]}',
        '{"type": "record", "name": "R", "fields": [{"name": "a", "type": "int"}, {"name": "a", "type": "int"}]}',
        '{"type": "record", "name": "R", "fields": [{"name": "a", "type": {"type": "fixed", "name": "R", "size": 1}}]}',
        "{}",
        "null",
    ],
)
def test_what_is_no_avro_schema(source: str) -> None:
    with pytest.raises(UnsafeSchemaError):
        parse(source)


def test_names_resolve_as_avro_has_it() -> None:
    schema = parse(
        """{"type": "record", "name": "R", "namespace": "x", "fields": [
            {"name": "a", "type": {"type": "fixed", "name": "F", "size": 2}},
            {"name": "b", "type": "F"}, {"name": "c", "type": "x.F"},
            {"name": "d", "type": {"type": "fixed", "name": "F", "namespace": "y", "size": 1}},
            {"name": "e", "type": {"type": {"type": "string", "avro.java.string": "String"}}}]}"""
    )
    assert compile_reader(schema)(b"aabbccd\2e", 0) == {"a": b"aa", "b": b"bb", "c": b"cc", "d": b"d", "e": "e"}


MUTATIONS = st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), min_size=1, max_size=6)


@settings(max_examples=1500, deadline=1000)
@given(
    st.sampled_from([SUBMITTED, COMPLETED]),
    MUTATIONS,
    st.integers(0, 40),
    st.binary(max_size=12),
    st.booleans(),
)
def test_mutated_bytes_are_an_event_or_a_decode_error(
    encoded: Any, mutations: list[tuple[int, int]], cut: int, insert: bytes, stock: bool
) -> None:
    value = bytearray(encoded.value)
    for place, byte in mutations:
        value[place % len(value)] = byte
    middle = mutations[0][0] % len(value)
    value[middle : middle + cut] = insert
    try:
        envelope = CODEC.decode(record_of(bytes(value), () if stock else encoded.headers))
    except DecodeError:
        return
    # Compared as bytes, as a mutation can make a NaN, which equals nothing.
    again = CODEC.encode(envelope.event, META)
    assert CODEC.encode(CODEC.decode(record_of(again.value)).event, META) == again


READERS = {name: compile_reader(parsed_schema(model)) for name, model in shipped_types().items()}


@settings(max_examples=1000, deadline=1000)
@given(st.binary(max_size=200), st.sampled_from(sorted(READERS)))
def test_random_bytes_are_a_value_or_a_decode_error(data: bytes, name: str) -> None:
    read = READERS[name]
    with contextlib.suppress(DecodeError):
        read(data, 0)
