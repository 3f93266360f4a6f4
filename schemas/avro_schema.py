"""Avro schemas as trees: parsed from JSON that may be hostile, with full names resolved, fingerprinted and bounded.

In: a schema's JSON text (ours, or an external registry's). Out: a finite tree of the small classes below, which the
reader and writer compilers and the compatibility checker walk. What would let few bytes cost much is refused here
once, so that the hot path needs no guard against it: recursive types, arrays or maps whose items take no bytes, and
schemas that expand to more than :data:`MAX_NODES` nodes.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from typing import Any, ClassVar, Final

import orjson

from schemas.errors import UnsafeSchemaError

__all__ = [
    "MAX_NODES",
    "PRIMITIVES",
    "ArrayType",
    "EnumType",
    "Field",
    "FixedType",
    "MapType",
    "Primitive",
    "RecordType",
    "Schema",
    "UnionType",
    "canonical",
    "fingerprint",
    "parse",
]

PRIMITIVES: Final = ("null", "boolean", "int", "long", "float", "double", "bytes", "string")
MAX_NODES: Final = 1024
MAX_TEXT: Final = 1 << 20
MAX_DEPTH: Final = 64
MAX_FIXED: Final = 1 << 20
_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*\Z")
_MIN_SIZES: Final = {"null": 0, "float": 4, "double": 8}
_FINGERPRINT_HEX: Final = 32


@dataclass(frozen=True)
class Primitive:
    """One of :data:`PRIMITIVES`; ``logical`` is its logicalType or empty."""

    kind: str
    logical: str = ""

    nodes: ClassVar[int] = 1

    @cached_property
    def min_size(self) -> int:
        """The fewest bytes that a value takes."""
        return _MIN_SIZES.get(self.kind, 1)


@dataclass(frozen=True)
class FixedType:
    """``size`` raw bytes."""

    name: str
    size: int

    kind: ClassVar[str] = "fixed"
    nodes: ClassVar[int] = 1

    @property
    def min_size(self) -> int:
        """The fewest bytes that a value takes."""
        return self.size


@dataclass(frozen=True)
class EnumType:
    """One of ``symbols``; readers take ``default`` for a symbol they don't know, if there is one."""

    name: str
    symbols: tuple[str, ...]
    default: str | None = None

    kind: ClassVar[str] = "enum"
    nodes: ClassVar[int] = 1
    min_size: ClassVar[int] = 1


@dataclass(frozen=True)
class ArrayType:
    """Any number of ``items``."""

    items: "Schema"

    kind: ClassVar[str] = "array"
    min_size: ClassVar[int] = 1

    @cached_property
    def nodes(self) -> int:
        """How many nodes the tree has, expanded."""
        return 1 + self.items.nodes


@dataclass(frozen=True)
class MapType:
    """Any number of string keys with ``values``."""

    values: "Schema"

    kind: ClassVar[str] = "map"
    min_size: ClassVar[int] = 1

    @cached_property
    def nodes(self) -> int:
        """How many nodes the tree has, expanded."""
        return 2 + self.values.nodes


@dataclass(frozen=True)
class UnionType:
    """One of ``branches``."""

    branches: tuple["Schema", ...]

    kind: ClassVar[str] = "union"

    @cached_property
    def nodes(self) -> int:
        """How many nodes the tree has, expanded."""
        return 1 + sum(branch.nodes for branch in self.branches)

    @cached_property
    def min_size(self) -> int:
        """The fewest bytes that a value takes."""
        return 1 + min((branch.min_size for branch in self.branches), default=0)


@dataclass(frozen=True)
class Field:
    """A record's field. ``default`` is the JSON default, with ``has_default``."""

    name: str
    type: "Schema"
    has_default: bool = False
    default: Any = None


@dataclass(frozen=True)
class RecordType:
    """Fields in order. ``name`` is the full name."""

    name: str
    fields: tuple[Field, ...]

    kind: ClassVar[str] = "record"

    @cached_property
    def nodes(self) -> int:
        """How many nodes the tree has, expanded."""
        return 1 + sum(field.type.nodes for field in self.fields)

    @cached_property
    def min_size(self) -> int:
        """The fewest bytes that a value takes."""
        return sum(field.type.min_size for field in self.fields)


Schema = Primitive | FixedType | EnumType | ArrayType | MapType | UnionType | RecordType


def parse(source: str | bytes | Mapping[str, Any]) -> Schema:
    """The schema that a JSON text, or the object loaded from one, describes.

    Raises:
        UnsafeSchemaError: it is no valid Avro schema, or it would let few bytes cost much.
    """
    if isinstance(source, str | bytes):
        if len(source) > MAX_TEXT:
            raise UnsafeSchemaError(f"the schema text has {len(source)} characters, over {MAX_TEXT}")
        try:
            source = orjson.loads(source)
        except orjson.JSONDecodeError as error:
            raise UnsafeSchemaError(f"the schema is no JSON: {error}") from error
    return _Parser().schema(source, "", 0)


class _Parser:
    def __init__(self) -> None:
        self._named: dict[str, Schema | None] = {}

    def schema(self, source: Any, namespace: str, depth: int) -> Schema:
        if depth > MAX_DEPTH:
            raise UnsafeSchemaError(f"the schema nests deeper than {MAX_DEPTH} levels")
        made = self._schema(source, namespace, depth)
        if made.nodes > MAX_NODES:
            raise UnsafeSchemaError(f"the schema expands to more than {MAX_NODES} nodes")
        return made

    def _schema(self, source: Any, namespace: str, depth: int) -> Schema:
        if isinstance(source, str):
            return Primitive(source) if source in PRIMITIVES else self._reference(source, namespace)
        if isinstance(source, list):
            return self._union([self.schema(branch, namespace, depth + 1) for branch in source])
        if not isinstance(source, Mapping):
            raise UnsafeSchemaError(f"{source!r:.60} is no Avro schema")
        kind = source.get("type")
        if isinstance(kind, str) and kind in PRIMITIVES:
            logical = source.get("logicalType", "")
            return Primitive(kind, logical if isinstance(logical, str) else "")
        if kind == "array":
            return ArrayType(self._sized(source.get("items"), namespace, depth, "array items"))
        if kind == "map":
            # The key alone takes a byte, so values may take none.
            return MapType(self.schema(source.get("values"), namespace, depth + 1))
        if kind in ("record", "error", "enum", "fixed"):
            return self._define(kind, source, namespace, depth)
        return self.schema(kind, namespace, depth + 1)

    def _reference(self, name: str, namespace: str) -> Schema:
        full = name if "." in name or not namespace else f"{namespace}.{name}"
        for candidate in (full, name):
            if candidate in self._named:
                found = self._named[candidate]
                if found is None:
                    raise UnsafeSchemaError(f"{candidate} contains itself; recursive types are not read")
                return found
        raise UnsafeSchemaError(f"the schema refers to {full[:100]!r}, which it does not define")

    def _sized(self, source: Any, namespace: str, depth: int, what: str) -> Schema:
        schema = self.schema(source, namespace, depth + 1)
        if schema.min_size == 0:
            raise UnsafeSchemaError(f"{what} can take no bytes, so that a few bytes could stand for billions of them")
        return schema

    @staticmethod
    def _union(branches: list[Schema]) -> UnionType:
        seen: set[str] = set()
        for branch in branches:
            key = branch.name if isinstance(branch, RecordType | EnumType | FixedType) else branch.kind
            if key in seen or key == "union":
                raise UnsafeSchemaError(f"a union holds {key} twice or holds a union")
            seen.add(key)
        if not branches:
            raise UnsafeSchemaError("a union has no branches")
        return UnionType(tuple(branches))

    def _define(self, kind: str, source: Mapping[str, Any], namespace: str, depth: int) -> Schema:
        name = _full_name(source.get("name"), source.get("namespace", namespace))
        if name in self._named:
            raise UnsafeSchemaError(f"the schema defines {name} twice")
        self._named[name] = None
        made: Schema
        if kind == "fixed":
            size = source.get("size")
            if not isinstance(size, int) or not 0 <= size <= MAX_FIXED:
                raise UnsafeSchemaError(f"{name}: size {size!r:.40} is not within 0 and {MAX_FIXED}")
            made = FixedType(name, size)
        elif kind == "enum":
            made = _enum(name, source)
        else:
            made = self._record(name, source, depth)
        self._named[name] = made
        return made

    def _record(self, name: str, source: Mapping[str, Any], depth: int) -> RecordType:
        namespace = name.rpartition(".")[0]
        listed = source.get("fields")
        if not isinstance(listed, list):
            raise UnsafeSchemaError(f"{name} lists no fields")
        fields: dict[str, Field] = {}
        nodes = 0
        for item in listed:
            if not isinstance(item, Mapping):
                raise UnsafeSchemaError(f"{name}: {item!r:.60} is no field")
            field_name = item.get("name")
            if not isinstance(field_name, str) or "." in field_name or not _NAME.match(field_name):
                raise UnsafeSchemaError(f"{name}: {field_name!r:.60} is no field name")
            if field_name in fields:
                raise UnsafeSchemaError(f"{name} has the field {field_name} twice")
            made = self.schema(item.get("type"), namespace, depth + 1)
            nodes += made.nodes
            if nodes > MAX_NODES:
                raise UnsafeSchemaError(f"{name} expands to more than {MAX_NODES} nodes")
            fields[field_name] = Field(field_name, made, "default" in item, item.get("default"))
        return RecordType(name, tuple(fields.values()))


def _full_name(name: Any, namespace: Any) -> str:
    if not isinstance(name, str) or not isinstance(namespace, str):
        raise UnsafeSchemaError(f"{name!r:.60} is no Avro name")
    full = name if "." in name or not namespace else f"{namespace}.{name}"
    if not _NAME.match(full) or full in PRIMITIVES:
        raise UnsafeSchemaError(f"{full!r:.60} is no Avro name")
    return full


def _enum(name: str, source: Mapping[str, Any]) -> EnumType:
    symbols = source.get("symbols")
    if not isinstance(symbols, list) or not symbols or not all(isinstance(symbol, str) for symbol in symbols):
        raise UnsafeSchemaError(f"{name} lists no symbols")
    if len(set(symbols)) != len(symbols):
        raise UnsafeSchemaError(f"{name} lists a symbol twice")
    default = source.get("default")
    if default is not None and default not in symbols:
        raise UnsafeSchemaError(f"{name}: the default {default!r:.60} is none of its symbols")
    return EnumType(name, tuple(symbols), default)


def canonical(schema: Schema) -> str:
    """The schema as compact JSON without docs: Avro's parsing canonical form, plus defaults and logical types.

    Defaults and logical types are kept, because a change of either is a change of what a version means.
    """
    return orjson.dumps(_canonical(schema, set())).decode()


def _canonical(schema: Schema, defined: set[str]) -> Any:
    if isinstance(schema, Primitive):
        return {"type": schema.kind, "logicalType": schema.logical} if schema.logical else schema.kind
    if isinstance(schema, ArrayType):
        return {"type": "array", "items": _canonical(schema.items, defined)}
    if isinstance(schema, MapType):
        return {"type": "map", "values": _canonical(schema.values, defined)}
    if isinstance(schema, UnionType):
        return [_canonical(branch, defined) for branch in schema.branches]
    if schema.name in defined:
        return schema.name
    defined.add(schema.name)
    if isinstance(schema, FixedType):
        return {"name": schema.name, "type": "fixed", "size": schema.size}
    if isinstance(schema, EnumType):
        made: dict[str, Any] = {"name": schema.name, "type": "enum", "symbols": list(schema.symbols)}
        return made | ({"default": schema.default} if schema.default is not None else {})
    fields = [
        {"name": field.name, "type": _canonical(field.type, defined)}
        | ({"default": field.default} if field.has_default else {})
        for field in schema.fields
    ]
    return {"name": schema.name, "type": "record", "fields": fields}


def fingerprint(schema: Schema) -> str:
    """The first 128 bits of the SHA-256 of :func:`canonical`, as 32 hex digits."""
    return sha256(canonical(schema).encode()).hexdigest()[:_FINGERPRINT_HEX]
