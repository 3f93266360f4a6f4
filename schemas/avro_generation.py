"""Avro schemas generated from the event models, and the command that commits them.

In: the models in :mod:`schemas.events`. Out: one Avro schema each, as ``schemas/avro/<full name>.avsc``,
and a new version in ``schemas/registry.json`` where a schema changed. ``python -m schemas.avro_generation`` writes
both; with ``--check`` it writes nothing and fails when the committed files are not what the models say, or when a
version is not FULL_TRANSITIVE-compatible with every one before it.
"""

import sys
import types
from collections.abc import Mapping, Sequence
from datetime import datetime
from enum import StrEnum
from functools import cache
from inspect import cleandoc
from pathlib import Path
from typing import Annotated, Any, Final, Union, get_args, get_origin

import orjson
from pydantic import AwareDatetime
from pydantic.fields import FieldInfo

import schemas.events
from schemas.avro_schema import RecordType, parse
from schemas.compatibility import incompatibilities
from schemas.errors import GenerationError, SchemaError
from schemas.events.base import EVENT_TYPES, NAMESPACE, Event, Float32, Micros, Value
from schemas.personal import marked_fields, personal_fields
from schemas.registry import MANIFEST_PATH, Manifest

__all__ = [
    "AVRO_FOLDER",
    "avro_schema",
    "avsc_text",
    "check",
    "generate",
    "parsed_schema",
    "personal_marks",
    "shipped_types",
]

AVRO_FOLDER: Final = Path(__file__).with_name("avro")
_PLAIN: Final[Mapping[Any, str]] = {str: "string", bool: "boolean", int: "long", float: "double", bytes: "bytes"}


def avro_schema(model: type[Value]) -> dict[str, Any]:
    """The Avro schema of ``model``, with docs, as a JSON object.

    Raises:
        GenerationError: a field's type has no Avro counterpart (see :mod:`schemas.events.base`), a type contains
            itself, or a default can't be written in Avro.
    """
    return _Generator().record(model)


@cache
def parsed_schema(model: type[Value]) -> RecordType:
    """The Avro schema of ``model`` as a tree.

    Raises:
        GenerationError: as :func:`avro_schema`.
    """
    schema = parse(avro_schema(model))
    assert isinstance(schema, RecordType)
    return schema


@cache
def personal_marks(model: type[Value]) -> dict[str, frozenset[str]]:
    """Which fields of the model's schema are marked Personal, by the full name of their record, nested ones too."""
    return {_full_name(nested): marked for nested, marked in marked_fields(model).items()}


def avsc_text(model: type[Value]) -> str:
    """The text of the ``.avsc`` file of ``model``; the same model always gives the same text."""
    return orjson.dumps(avro_schema(model), option=orjson.OPT_INDENT_2).decode() + "\n"


class _Generator:
    """Generates one schema: a named type is written out where it first occurs, and named after that."""

    def __init__(self) -> None:
        self._written: set[str] = set()
        self._open: list[str] = []

    def record(self, model: type[Value]) -> dict[str, Any]:
        name = _full_name(model)
        self._written.add(name)
        self._open.append(name)
        fields = [self._field(name, key, info) for key, info in model.model_fields.items()]
        self._open.pop()
        try:
            personal_fields(model)
        except TypeError as error:
            raise GenerationError(str(error)) from None
        return {"type": "record", "name": name, "doc": _doc(model), "fields": fields}

    def _field(self, owner: str, name: str, info: FieldInfo) -> dict[str, Any]:
        where = f"{owner}.{name}"
        field: dict[str, Any] = {"name": name, "type": self._type(where, info.annotation, info.metadata)}
        if not info.is_required():
            field["default"] = _default(where, info.get_default(call_default_factory=True, validated_data={}))
            if isinstance(field["type"], list) and field["default"] is not None:
                raise GenerationError(f"{where}: an optional field's default must be None, as null comes first")
        return field

    def _type(self, where: str, annotation: Any, metadata: Sequence[Any] = ()) -> Any:
        origin, args = get_origin(annotation), get_args(annotation)
        if origin is Annotated:
            return self._type(where, args[0], (*metadata, *args[1:]))
        if origin in (Union, types.UnionType):
            others = [arg for arg in args if arg is not types.NoneType]
            if len(others) != 1 or len(args) != 2:
                raise GenerationError(f"{where}: {annotation} is no X | None, the only union that is recorded")
            return ["null", self._type(where, others[0], metadata)]
        if origin is tuple and len(args) == 2 and args[1] is Ellipsis:
            return {"type": "array", "items": self._type(where, args[0])}
        if origin is dict and args[0] is str:
            return {"type": "map", "values": self._type(where, args[1])}
        if annotation is float:
            return "float" if _marked(metadata, Float32) else "double"
        if annotation in (datetime, AwareDatetime) and _marked(metadata, Micros):
            return {"type": "long", "logicalType": "timestamp-micros"}
        if annotation in _PLAIN:
            return _PLAIN[annotation]
        if isinstance(annotation, type) and issubclass(annotation, StrEnum | Value):
            return self._named(where, annotation)
        raise GenerationError(f"{where}: {annotation} has no Avro counterpart; schemas.events.base lists what has")

    def _named(self, where: str, model: type[StrEnum] | type[Value]) -> Any:
        name = _full_name(model)
        if name in self._open:
            raise GenerationError(f"{where}: {name} contains itself; recursive types are not recorded")
        if name in self._written:
            return name
        if issubclass(model, Value):
            return self.record(model)
        self._written.add(name)
        symbols = [member.value for member in model]
        return {"type": "enum", "name": name, "doc": _doc(model), "symbols": symbols}


def _marked(metadata: Sequence[Any], mark: type) -> bool:
    return any(item is mark or isinstance(item, mark) for item in metadata)


def _full_name(model: type[StrEnum] | type[Value]) -> str:
    if issubclass(model, Event):
        if not model.full_name:
            raise GenerationError(f"{model.__name__} declares no family, so it is no recorded type")
        return model.full_name
    return f"{NAMESPACE}.{model.__module__.rpartition('.')[2]}.{model.__name__}"


def _doc(model: type) -> str:
    doc = cleandoc(model.__dict__.get("__doc__") or "")
    if not doc:
        raise GenerationError(f"{model.__name__} has no docstring; it is the schema's doc")
    return doc


def _default(where: str, value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value.value if isinstance(value, StrEnum) else value
    if isinstance(value, bytes):
        return value.decode("latin-1")
    if value == ():
        return []
    if value == {}:
        return {}
    raise GenerationError(f"{where}: the default {value!r} can't be written in Avro; use an empty one or a plain value")


def shipped_types() -> dict[str, type[Event]]:
    """The event types of :mod:`schemas.events`, by full name and in its order; not those declared elsewhere."""
    return {
        name: model
        for name, model in sorted(EVENT_TYPES.items())
        if model.__module__.startswith(f"{schemas.events.__name__}.")
    }


def generate(
    folder: Path = AVRO_FOLDER,
    manifest_path: Path = MANIFEST_PATH,
    models: Mapping[str, type[Event]] | None = None,
) -> list[str]:
    """Write the ``.avsc`` files and append changed schemas to the manifest; says what it did, a line each.

    ``models`` are the event types by full name, the shipped ones by default.

    Raises:
        GenerationError: a changed schema is not compatible with a committed version; nothing is written then.
    """
    before = Manifest.load(manifest_path) if manifest_path.exists() else Manifest(())
    manifest = before
    files: dict[Path, str] = {}
    for name, model in sorted((shipped_types() if models is None else models).items()):
        files[folder / f"{name}.avsc"] = avsc_text(model)
        manifest = manifest.with_schema(parsed_schema(model))
    if problems := _incompatible(manifest):
        raise GenerationError("; ".join(problems))
    done = []
    folder.mkdir(parents=True, exist_ok=True)
    for path, text in files.items():
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
            done.append(f"wrote {path.name}")
    for path in sorted(folder.glob("*.avsc")):
        if path not in files:
            path.unlink()
            done.append(f"removed {path.name}: no event type has this name any more")
    if manifest.versions != before.versions:
        manifest_path.write_text(manifest.text())
        done.extend(
            f"id {version.id}: {version.name} version {version.version}"
            for version in manifest.versions[len(before.versions) :]
        )
    return done


def check(
    folder: Path = AVRO_FOLDER,
    manifest_path: Path = MANIFEST_PATH,
    models: Mapping[str, type[Event]] | None = None,
) -> list[str]:
    """What differs between the models and the committed files, or breaks compatibility; empty when all is well."""
    manifest = Manifest.load(manifest_path)
    problems = []
    models = shipped_types() if models is None else models
    expected = {f"{name}.avsc": model for name, model in sorted(models.items())}
    for file, model in expected.items():
        path = folder / file
        if not path.exists() or path.read_text() != avsc_text(model):
            problems.append(f"{file} is not what the model says; run `python -m schemas.avro_generation`")
    problems += [
        f"{path.name} belongs to no event type; run `python -m schemas.avro_generation`"
        for path in sorted(folder.glob("*.avsc"))
        if path.name not in expected
    ]
    extended = manifest
    for model in expected.values():
        extended = extended.with_schema(parsed_schema(model))
    problems += [
        f"{version.name} is not in {manifest_path.name} as it now is; run `python -m schemas.avro_generation`"
        for version in extended.versions[len(manifest.versions) :]
    ]
    return problems + _incompatible(extended)


def _incompatible(manifest: Manifest) -> list[str]:
    problems = []
    for name in sorted({version.name for version in manifest.versions}):
        history = manifest.history(name)
        for position, newer in enumerate(history):
            for older in history[:position]:
                for reader, writer in ((newer, older), (older, newer)):
                    problems += [
                        f"{name} version {reader.version} can't read version {writer.version}: {problem}"
                        for problem in incompatibilities(reader.parsed, writer.parsed)
                    ]
    return problems


def main(arguments: Sequence[str]) -> int:
    """The command: no argument writes, ``--check`` only looks. Returns the exit code."""
    if arguments not in ([], ["--check"]):
        print("usage: python -m schemas.avro_generation [--check]", file=sys.stderr)
        return 2
    try:
        lines = check() if arguments else generate()
    except SchemaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for line in lines:
        print(line)
    return 1 if arguments and lines else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
