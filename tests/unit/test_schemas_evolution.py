"""Old versions are read by Avro's resolution, or by upcasters where that is not enough."""

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest

from schemas.avro_generation import parsed_schema
from schemas.avro_schema import RecordType, fingerprint, parse
from schemas.codec import Codec
from schemas.errors import InvalidEventError, UnknownSchemaError
from schemas.events import EVENT_TYPES, Event, Value
from schemas.metadata import Metadata
from schemas.record import Record
from schemas.registry import Manifest
from schemas.upcasters import Upcasters, prune

META = Metadata("i", "/clients/test", "k", datetime(2026, 1, 1, tzinfo=UTC))


class Town(Value):
    """Where somebody lives."""

    name: str


@pytest.fixture(autouse=True)
def own_types() -> Iterator[None]:
    before = dict(EVENT_TYPES)
    yield
    EVENT_TYPES.clear()
    EVENT_TYPES.update(before)


def greeted() -> Any:
    class Greeted(Event, family="examples"):
        """Somebody was greeted."""

        first: str = ""
        last: str = ""
        age: int = 0
        town: Town | None = None

    return Greeted


def version(*fields: tuple[str, Any], name: str = "magnatronic.examples.Greeted") -> RecordType:
    listed = [{"name": field, "type": kind} for field, kind in fields]
    schema = parse({"type": "record", "name": name, "fields": listed})
    assert isinstance(schema, RecordType)
    return schema


def record(schema: RecordType, body: bytes) -> Record:
    name = f"{schema.name}/{fingerprint(schema)}".encode()
    return Record("t", 0, 1, 0, b"k", b"\0\0\0\0\1" + body, [("ce_dataschema", name)])


def town_v1(name: str) -> dict[str, Any]:
    fields = [{"name": "name", "type": "string"}, {"name": "zip", "type": "int"}]
    return {"type": "record", "name": name, "fields": fields}


V1 = version(("name", "string"))
V2 = version(("name", "string"), ("age", "int"), ("town", ["null", town_v1("x.Town")]))


def test_without_upcasters_avro_resolves() -> None:
    model = greeted()
    manifest = Manifest(()).with_schema(V1).with_schema(V2).with_schema(parsed_schema(model))
    codec = Codec(manifest=manifest, upcasters=Upcasters())
    assert codec.decode(record(V1, b"\6Ada")).event == model()
    read = codec.decode(record(V2, b"\6Ada\x48\2\x0cLondon\x0e")).event
    assert read == model(age=36, town=Town(name="London"))


def test_upcasters_run_in_order_and_from_the_writers_version_on() -> None:
    model = greeted()
    manifest = Manifest(()).with_schema(V1).with_schema(V2).with_schema(parsed_schema(model))
    upcasters = Upcasters()
    calls = []

    @upcasters.upcaster("magnatronic.examples.Greeted", 2)
    def split_name(values: dict[str, Any]) -> dict[str, Any]:
        calls.append(2)
        first, _, last = values.pop("name").partition(" ")
        return values | {"first": first, "last": last}

    @upcasters.upcaster("magnatronic.examples.Greeted", 1)
    def add_age(values: dict[str, Any]) -> dict[str, Any]:
        calls.append(1)
        return values | {"age": 36}

    codec = Codec(manifest=manifest, upcasters=upcasters)
    assert codec.decode(record(V1, b"\x18Ada Lovelace")).event == model(first="Ada", last="Lovelace", age=36)
    assert calls == [1, 2]
    read = codec.decode(record(V2, b"\x18Ada Lovelace\x48\2\x0cLondon\x0e")).event
    assert read == model(first="Ada", last="Lovelace", age=36, town=Town(name="London"))
    assert calls == [1, 2, 2]
    current = model(first="Ada")
    encoded = codec.encode(current, META)
    assert codec.decode(Record("t", 0, 1, 0, b"k", encoded.value, encoded.headers)).event == current
    assert calls == [1, 2, 2]


def test_a_type_that_was_renamed_is_read_as_the_new_one() -> None:
    model = greeted()
    old = version(("who", "string"), name="magnatronic.examples.Hello")
    manifest = Manifest(()).with_schema(old).with_schema(V1).with_schema(parsed_schema(model))
    upcasters = Upcasters()
    upcasters.rename("magnatronic.examples.Hello", "magnatronic.examples.Greeted")
    upcasters.upcaster("magnatronic.examples.Hello", 1)(lambda values: {"name": values["who"]})
    upcasters.upcaster("magnatronic.examples.Greeted", 1)(lambda values: {"first": values["name"]})
    codec = Codec(manifest=manifest, upcasters=upcasters)
    for headers in ([], [("ce_type", b"magnatronic.examples.Hello")]):
        written = record(old, b"\6Ada")
        read = codec.decode(Record("t", 0, 1, 0, b"k", written.value, [*written.headers, *headers])).event
        assert read == model(first="Ada")
    with pytest.raises(UnknownSchemaError, match="no such event"):
        Codec(manifest=manifest, upcasters=Upcasters()).decode(record(old, b"\6Ada"))


def test_upcasters_are_registered_once_and_renames_end() -> None:
    upcasters = Upcasters()
    upcasters.upcaster("a", 1)(lambda values: values)
    with pytest.raises(ValueError, match="already"):
        upcasters.upcaster("a", 1)(lambda values: values)
    upcasters.rename("a", "b")
    with pytest.raises(ValueError, match="already"):
        upcasters.rename("a", "c")
    upcasters.rename("b", "c")
    with pytest.raises(ValueError, match="circle"):
        upcasters.rename("c", "a")
    assert upcasters.plan("x", 1) is None
    assert upcasters.plan("c", 1) is None
    plan = upcasters.plan("a", 2)
    assert plan is not None
    assert (plan.target, plan.steps) == ("c", ())


@pytest.mark.parametrize(
    ("step", "said"),
    [
        (lambda values: {"first": values["nothing"]}, "upcaster to magnatronic.examples.Greeted failed"),
        (lambda values: {"age": "old"}, "breaks its model's rules: age: "),
    ],
)
def test_an_upcaster_that_fails_is_told(step: Any, said: str) -> None:
    manifest = Manifest(()).with_schema(V1).with_schema(parsed_schema(greeted()))
    upcasters = Upcasters()
    upcasters.upcaster("magnatronic.examples.Greeted", 1)(step)
    with pytest.raises(InvalidEventError, match=said):
        Codec(manifest=manifest, upcasters=upcasters).decode(record(V1, b"\6Ada"))


def test_prune_drops_what_the_type_lacks_at_any_depth() -> None:
    inner = {"type": "record", "name": "x.I", "fields": [{"name": "a", "type": "int"}]}
    kinds = [("list", {"type": "array", "items": inner}), ("map", {"type": "map", "values": "x.I"})]
    schema = version(*kinds, ("maybe", ["null", "x.I"]), ("absent", "int"))
    item = {"a": 1, "b": 2}
    values = {"list": [item], "map": {"k": item}, "maybe": item, "gone": 1}
    assert prune(schema, values) == {"list": [{"a": 1}], "map": {"k": {"a": 1}}, "maybe": {"a": 1}}
    assert prune(schema, {"maybe": None}) == {"maybe": None}
