"""Whether one Avro schema can read what another wrote: Avro's schema resolution rules, decided without any data.

In: a reader's and a writer's schema as trees. Out: a list of sentences, each a place where resolution fails for some
value; empty when every value resolves. Stricter than Avro in one point: a logical type must stay what it is, since a
long that was microseconds and becomes milliseconds resolves, and is wrong.

Rules: Apache Avro 1.12 specification, "Schema Resolution". Names match by their unqualified part, as the specification
says and fastavro does.
"""

from collections.abc import Iterator
from typing import Any, Final

from schemas.avro_schema import (
    ArrayType,
    EnumType,
    FixedType,
    MapType,
    Primitive,
    RecordType,
    Schema,
    UnionType,
)

__all__ = ["PROMOTIONS", "default_fits", "incompatibilities", "resolves_to", "same_name"]

PROMOTIONS: Final = {
    "int": ("int", "long", "float", "double"),
    "long": ("long", "float", "double"),
    "float": ("float", "double"),
    "string": ("string", "bytes"),
    "bytes": ("bytes", "string"),
}
"""What each primitive may be read as."""

_INT_RANGE: Final = range(-(1 << 31), 1 << 31)
_LONG_RANGE: Final = range(-(1 << 63), 1 << 63)


def incompatibilities(reader: Schema, writer: Schema) -> list[str]:
    """Why ``reader`` can't read everything that ``writer`` writes; empty when it can."""
    return list(_walk(reader, writer, _label(reader)))


def same_name(one: str, other: str) -> bool:
    """Whether two full names match in schema resolution: by their unqualified part."""
    return one.rpartition(".")[2] == other.rpartition(".")[2]


def resolves_to(reader: UnionType, writer: Schema) -> Schema | None:
    """The branch of ``reader`` that takes values of ``writer`` (no union): the first that reads all of them.

    The same type comes before a promotion, as an int would otherwise be read as whichever number is listed first.
    """
    for branch in sorted(reader.branches, key=lambda branch: branch.kind != writer.kind):
        if not incompatibilities(branch, writer):
            return branch
    return None


def _walk(reader: Schema, writer: Schema, path: str) -> Iterator[str]:
    if isinstance(writer, UnionType):
        for branch in writer.branches:
            yield from _walk(reader, branch, path)
    elif isinstance(reader, UnionType):
        if resolves_to(reader, writer) is None:
            branches = ", ".join(_label(branch) for branch in reader.branches)
            yield f"{path}: no branch of [{branches}] reads {_label(writer)}"
    elif isinstance(reader, Primitive) and isinstance(writer, Primitive):
        if reader.kind not in PROMOTIONS.get(writer.kind, (writer.kind,)):
            yield f"{path}: {_label(writer)} is not read as {_label(reader)}"
        elif reader.logical != writer.logical:
            yield f"{path}: the logical type changed from {writer.logical or 'none'} to {reader.logical or 'none'}"
    elif isinstance(reader, ArrayType) and isinstance(writer, ArrayType):
        yield from _walk(reader.items, writer.items, f"{path}[]")
    elif isinstance(reader, MapType) and isinstance(writer, MapType):
        yield from _walk(reader.values, writer.values, f"{path}{{}}")
    elif isinstance(reader, EnumType) and isinstance(writer, EnumType) and same_name(reader.name, writer.name):
        unknown = [symbol for symbol in writer.symbols if symbol not in reader.symbols]
        if unknown and reader.default is None:
            yield f"{path}: the reader's {reader.name} lacks {', '.join(unknown)} and has no default"
    elif isinstance(reader, FixedType) and isinstance(writer, FixedType) and same_name(reader.name, writer.name):
        if reader.size != writer.size:
            yield f"{path}: fixed of {writer.size} bytes is not read as fixed of {reader.size}"
    elif isinstance(reader, RecordType) and isinstance(writer, RecordType) and same_name(reader.name, writer.name):
        yield from _walk_record(reader, writer, path)
    else:
        yield f"{path}: {_label(writer)} is not read as {_label(reader)}"


def _walk_record(reader: RecordType, writer: RecordType, path: str) -> Iterator[str]:
    written = {field.name: field.type for field in writer.fields}
    for field in reader.fields:
        where = f"{path}.{field.name}"
        if field.name in written:
            yield from _walk(field.type, written[field.name], where)
        elif not field.has_default:
            yield f"{where}: the writer lacks it and it has no default"
        elif not default_fits(field.type, field.default):
            yield f"{where}: its default {field.default!r} does not fit {_label(field.type)}"


def default_fits(schema: Schema, default: Any) -> bool:
    """Whether a JSON default is one for ``schema``; for a union, one for its first branch."""
    if isinstance(schema, UnionType):
        return default_fits(schema.branches[0], default)
    if isinstance(schema, ArrayType):
        return isinstance(default, list) and all(default_fits(schema.items, item) for item in default)
    if isinstance(schema, MapType):
        return isinstance(default, dict) and all(default_fits(schema.values, item) for item in default.values())
    if isinstance(schema, RecordType):
        return isinstance(default, dict) and all(
            default_fits(field.type, default[field.name]) if field.name in default else field.has_default
            for field in schema.fields
        )
    if isinstance(schema, EnumType):
        return default in schema.symbols
    if isinstance(schema, FixedType):
        return _latin(default) and len(default) == schema.size
    return _primitive_fits(schema.kind, default)


def _primitive_fits(kind: str, default: Any) -> bool:
    if kind == "null":
        return default is None
    if kind == "boolean":
        return isinstance(default, bool)
    if kind in ("int", "long"):
        allowed = _INT_RANGE if kind == "int" else _LONG_RANGE
        return isinstance(default, int) and not isinstance(default, bool) and default in allowed
    if kind in ("float", "double"):
        return isinstance(default, int | float) and not isinstance(default, bool)
    return _latin(default) if kind == "bytes" else isinstance(default, str)


def _latin(value: Any) -> bool:
    return isinstance(value, str) and all(ord(letter) < 256 for letter in value)


def _label(schema: Schema) -> str:
    if isinstance(schema, Primitive):
        return f"{schema.kind} ({schema.logical})" if schema.logical else schema.kind
    if isinstance(schema, RecordType | EnumType | FixedType):
        return schema.name
    return schema.kind
