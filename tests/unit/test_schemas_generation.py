"""The committed schema files agree with the models, and the generator says what can't be recorded."""

import json
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import fastavro
import pytest
from pydantic import Field

from schemas import avro_generation
from schemas.avro_generation import avro_schema, avsc_text, check, generate, main, parsed_schema, shipped_types
from schemas.avro_schema import canonical, fingerprint, parse
from schemas.errors import GenerationError
from schemas.events import EVENT_TYPES, Event, Float32, Personal, Timestamp, Value
from schemas.personal import personal_fields
from schemas.registry import Manifest, check_append_only


class Mood(StrEnum):
    """How one feels."""

    GOOD = "good"
    BAD = "bad"


class Place(Value):
    """Somewhere."""

    name: str
    mood: Mood = Mood.GOOD


@pytest.fixture
def own_types() -> Iterator[None]:
    """Event types that a test declares are gone after it."""
    before = dict(EVENT_TYPES)
    yield
    EVENT_TYPES.clear()
    EVENT_TYPES.update(before)


def test_the_committed_files_are_what_the_models_say() -> None:
    assert check() == []


@pytest.mark.parametrize("name", sorted(shipped_types()))
def test_each_committed_schema_is_valid_avro_for_another_implementation(name: str) -> None:
    schema = json.loads((avro_generation.AVRO_FOLDER / f"{name}.avsc").read_text())
    parsed = fastavro.parse_schema(schema)
    assert isinstance(parsed, dict)
    assert parsed["name"] == name
    assert schema["doc"]


@pytest.mark.parametrize("name", sorted(shipped_types()))
def test_generation_is_deterministic_and_docs_are_no_part_of_the_fingerprint(name: str) -> None:
    model = EVENT_TYPES[name]
    assert avsc_text(model) == avsc_text(model)
    text = avsc_text(model)
    assert fingerprint(parse(text)) == fingerprint(parse(canonical(parse(text)))) == fingerprint(parsed_schema(model))
    redocumented = json.loads(text) | {"doc": "something else"}
    assert fingerprint(parse(redocumented)) == fingerprint(parsed_schema(model))


def test_every_field_type_has_its_counterpart(own_types: None) -> None:
    class Everything(Event, family="examples"):
        """All there is."""

        text: str
        flag: bool
        whole: int = 3
        wide: float = 0.5
        narrow: Annotated[float, Float32] = 0.0
        raw: bytes = b"\xff\x00"
        at: Timestamp
        maybe_at: Timestamp | None = None
        mood: Mood = Mood.BAD
        places: tuple[Place, ...] = ()
        by_name: dict[str, Place] = Field(default_factory=dict)
        place: Place | None = None
        vector: tuple[Annotated[float, Float32], ...] = ()
        secret: Annotated[str, Personal] = ""

    name = Place.__module__.rpartition(".")[2]
    micros = {"type": "long", "logicalType": "timestamp-micros"}
    mood = {"type": "enum", "name": f"magnatronic.{name}.Mood", "doc": "How one feels.", "symbols": ["good", "bad"]}
    place = {
        "type": "record",
        "name": f"magnatronic.{name}.Place",
        "doc": "Somewhere.",
        "fields": [
            {"name": "name", "type": "string"},
            {"name": "mood", "type": f"magnatronic.{name}.Mood", "default": "good"},
        ],
    }
    assert avro_schema(Everything) == {
        "type": "record",
        "name": "magnatronic.examples.Everything",
        "doc": "All there is.",
        "fields": [
            {"name": "text", "type": "string"},
            {"name": "flag", "type": "boolean"},
            {"name": "whole", "type": "long", "default": 3},
            {"name": "wide", "type": "double", "default": 0.5},
            {"name": "narrow", "type": "float", "default": 0.0},
            {"name": "raw", "type": "bytes", "default": "\u00ff\u0000"},
            {"name": "at", "type": micros},
            {"name": "maybe_at", "type": ["null", micros], "default": None},
            {"name": "mood", "type": mood, "default": "bad"},
            {"name": "places", "type": {"type": "array", "items": place}, "default": []},
            {"name": "by_name", "type": {"type": "map", "values": place["name"]}, "default": {}},
            {"name": "place", "type": ["null", place["name"]], "default": None},
            {"name": "vector", "type": {"type": "array", "items": "float"}, "default": []},
            {"name": "secret", "type": "string", "default": ""},
        ],
    }
    fastavro.parse_schema(avro_schema(Everything))
    assert personal_fields(Everything) == ("secret",)


class Node(Value):
    """Contains itself."""

    children: tuple["Node", ...] = ()


@pytest.mark.parametrize(
    ("annotation", "default", "said"),
    [
        (str | int, ..., "only union"),
        (list[str], ..., "no Avro counterpart"),
        (dict[int, str], ..., "no Avro counterpart"),
        (str | None, "x", "must be None"),
        (Node, ..., "contains itself"),
        (tuple[str, ...], ("x",), "can't be written"),
        (Annotated[int, Personal], ..., "Personal"),
    ],
)
def test_what_can_not_be_recorded_is_refused(own_types: None, annotation: object, default: object, said: str) -> None:
    made = type(
        "Odd",
        (Event,),
        {
            "__doc__": "Odd.",
            "__annotations__": {"other": str, "field": annotation},
            "__module__": __name__,
            **({} if default is ... else {"field": default}),
        },
        family="examples",
    )
    with pytest.raises(GenerationError, match=said):
        avro_schema(made)


def test_a_type_without_a_docstring_is_refused(own_types: None) -> None:
    class Silent(Event, family="examples"):
        name: str

    with pytest.raises(GenerationError, match="docstring"):
        avro_schema(Silent)


def grown(**fields: object) -> dict[str, type[Event]]:
    """The event type Grown with these fields: ... for a required text, otherwise the default."""
    annotations = {name: type(default) if default is not ... else str for name, default in fields.items()}
    defaults = {name: default for name, default in fields.items() if default is not ...}
    body = {"__doc__": "Grows.", "__annotations__": annotations, "__module__": __name__, **defaults}
    made: Any = type("Grown", (Event,), body, family="examples")
    return {made.full_name: made}


def test_history_grows_only_by_what_every_version_can_read(own_types: None, tmp_path: Path) -> None:
    folder, manifest = tmp_path / "avro", tmp_path / "registry.json"
    models = grown(name=...)
    assert generate(folder, manifest, models) == [
        "wrote magnatronic.examples.Grown.avsc",
        "id 1: magnatronic.examples.Grown version 1",
    ]
    assert check(folder, manifest, models) == []
    assert generate(folder, manifest, models) == []
    first = Manifest.load(manifest)

    models = grown(name=..., age=7)
    assert len(check(folder, manifest, models)) == 2
    assert generate(folder, manifest, models)[-1] == "id 2: magnatronic.examples.Grown version 2"
    second = Manifest.load(manifest)
    assert check_append_only(first, second) == []
    assert [version.version for version in second.history("magnatronic.examples.Grown")] == [1, 2]

    committed = manifest.read_text()
    models = grown(name=..., age=7, town=...)
    with pytest.raises(GenerationError, match=r"version 3 can't read version 1: .*town: the writer lacks it"):
        generate(folder, manifest, models)
    assert any("town" in problem for problem in check(folder, manifest, models))
    assert manifest.read_text() == committed

    with pytest.raises(GenerationError, match="a version can't return"):
        generate(folder, manifest, grown(name=...))

    gone = "magnatronic.examples.Grown.avsc"
    assert check(folder, manifest, {}) == [f"{gone} belongs to no event type; run `python -m schemas.avro_generation`"]
    assert generate(folder, manifest, {}) == [f"removed {gone}: no event type has this name any more"]
    assert Manifest.load(manifest).versions == second.versions


def test_types_declared_elsewhere_are_not_committed(own_types: None) -> None:
    (name,) = grown(name=...)
    assert name in EVENT_TYPES
    assert name not in shipped_types()
    assert len(shipped_types()) >= 36
    assert check() == []


def test_the_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["--check"]) == 0
    assert main(["--wrong"]) == 2
    assert "usage" in capsys.readouterr().err
    monkeypatch.setattr(avro_generation, "check", lambda: ["something differs"])
    assert main(["--check"]) == 1
    assert capsys.readouterr().out == "something differs\n"
