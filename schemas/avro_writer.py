"""Writers of Avro bytes, compiled: one Python function for a schema, from a model's instance straight to bytes.

In: a schema tree that was generated from a model. Out: a function from an instance of the model to bytes, without a
dict in between. The same instance always gives the same bytes: maps are written in the order of their sorted keys.
"""

import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from schemas.avro_schema import ArrayType, EnumType, MapType, Primitive, RecordType, Schema, UnionType

__all__ = ["compile_writer"]

_NOTHING: Final[Mapping[str, frozenset[str]]] = {}
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)


def _varint(zigzag: int) -> bytes:
    if zigzag >> 64:
        raise OverflowError("a number has more than 64 bits")
    out = bytearray()
    while zigzag > 127:
        out.append(zigzag & 127 | 128)
        zigzag >>= 7
    out.append(zigzag)
    return bytes(out)


def _long(value: int) -> bytes:
    return _varint(value << 1 if value >= 0 else (-value << 1) - 1)


_LENGTHS: Final = tuple(_varint(2 * length) for length in range(8192))
"""Most lengths and counts are in here, ready-made."""


def _micros(value: datetime) -> bytes:
    return _long((value - _EPOCH) // _MICROSECOND)


def compile_writer(schema: RecordType, blank: Mapping[str, frozenset[str]] = _NOTHING) -> Callable[[Any], list[bytes]]:
    """A function that gives the bytes of an instance of the model that ``schema`` was generated from, in pieces.

    Fields that ``blank`` names, by the full name of their record, are written as if they were empty, or None.

    The function raises AttributeError, KeyError, TypeError, ValueError, OverflowError or struct.error where the
    instance, made without validation, holds what its model does not allow.
    """
    return _Compiler(blank).compile(schema)


class _Compiler:
    def __init__(self, blank: Mapping[str, frozenset[str]]) -> None:
        self._blank = blank
        self._scope: dict[str, Any] = {
            "_long": _long,
            "_lengths": _LENGTHS,
            "_micros": _micros,
            "_pack": struct.pack,
            "_float": struct.Struct("<f").pack,
            "_double": struct.Struct("<d").pack,
            "_text": str.encode,
        }
        self._functions: list[str] = []
        self._records: dict[str, str] = {}
        self._lines: list[str] = []
        self._pending: list[str] = []
        self._indent = 1
        self._names = 0

    def compile(self, schema: RecordType) -> Callable[[Any], list[bytes]]:
        name = self._record(schema)
        self._functions += ["def _write(v):", "    out = []", f"    {name}(v.__dict__, out)", "    return out"]
        exec(compile("\n".join(self._functions), "<avro writer>", "exec"), self._scope)
        made: Callable[[Any], list[bytes]] = self._scope["_write"]
        return made

    def _emit(self, line: str) -> None:
        self._lines.append("    " * self._indent + line)

    def _push(self, expression: str) -> None:
        """Note a piece for the output; neighbours go out in one call."""
        self._pending.append(expression)

    def _flush(self) -> None:
        if self._pending:
            pieces = ", ".join(self._pending)
            self._emit(f"out.append({pieces})" if len(self._pending) == 1 else f"out += ({pieces})")
            self._pending = []

    @contextmanager
    def _block_of(self, line: str) -> Iterator[None]:
        self._flush()
        self._emit(line)
        self._indent += 1
        yield
        self._flush()
        self._indent -= 1

    def _name(self, stem: str) -> str:
        self._names += 1
        return f"{stem}{self._names}"

    def _constant(self, value: Any) -> str:
        name = self._name("_c")
        self._scope[name] = value
        return name

    def _length(self, of: str) -> str:
        name = self._name("n")
        return f"_lengths[{name}] if ({name} := len({of})) < 8192 else _long({name})"

    def _value(self, schema: Schema, source: str) -> None:
        """Emit the code that writes the value of the expression ``source``."""
        if isinstance(schema, Primitive):
            self._primitive(schema, source)
        elif isinstance(schema, EnumType):
            indexes = {symbol: _LENGTHS[index] for index, symbol in enumerate(schema.symbols)}
            self._push(f"{self._constant(indexes)}[{source}]")
        elif isinstance(schema, ArrayType):
            self._array(schema, source)
        elif isinstance(schema, MapType):
            self._map(schema, source)
        elif isinstance(schema, UnionType):
            self._optional(schema, source)
        elif isinstance(schema, RecordType):
            name = self._record(schema)
            self._flush()
            self._emit(f"{name}({source}.__dict__, out)")
        else:
            raise TypeError(f"models have no {schema.kind}")

    def _primitive(self, schema: Primitive, source: str) -> None:
        kind = schema.kind
        if kind in ("string", "bytes"):
            value = self._name("s")
            self._emit(f"{value} = _text({source})" if kind == "string" else f"{value} = {source}")
            self._push(self._length(value))
            self._push(value)
        elif kind == "boolean":
            self._push(f"b'\\1' if {source} else b'\\0'")
        elif kind in ("float", "double"):
            self._push(f"_{kind}({source})")
        elif schema.logical == "timestamp-micros":
            self._push(f"_micros({source})")
        else:
            self._push(f"_lengths[{source}] if 0 <= {source} < 8192 else _long({source})")

    def _optional(self, schema: UnionType, source: str) -> None:
        value = self._name("o")
        self._flush()
        self._emit(f"{value} = {source}")
        with self._block_of(f"if {value} is None:"):
            self._push("b'\\0'")
        with self._block_of("else:"):
            self._push("b'\\2'")
            self._value(schema.branches[1], value)

    def _array(self, schema: ArrayType, source: str) -> None:
        value, item = self._name("a"), self._name("i")
        self._emit(f"{value} = {source}")
        with self._block_of(f"if {value}:"):
            self._push(self._length(value))
            if schema.items.kind in ("float", "double"):
                code = "f" if schema.items.kind == "float" else "d"
                self._push(f"_pack('<%d{code}' % len({value}), *{value})")
            else:
                with self._block_of(f"for {item} in {value}:"):
                    self._value(schema.items, item)
        self._push("b'\\0'")

    def _map(self, schema: MapType, source: str) -> None:
        value, key = self._name("m"), self._name("k")
        self._emit(f"{value} = {source}")
        with self._block_of(f"if {value}:"):
            self._push(self._length(value))
            with self._block_of(f"for {key} in sorted({value}):"):
                self._primitive(Primitive("string"), key)
                self._value(schema.values, f"{value}[{key}]")
        self._push("b'\\0'")

    def _record(self, schema: RecordType) -> str:
        if schema.name not in self._records:
            self._records[schema.name] = name = self._name("_w")
            outer = self._lines, self._indent, self._pending
            self._lines, self._indent, self._pending = [], 1, []
            blank = self._blank.get(schema.name, ())
            for field in schema.fields:
                if field.name in blank:
                    # An empty string, bytes, array or map, and the null of a union: all are a zero.
                    self._push("b'\\0'")
                else:
                    self._value(field.type, f"d[{field.name!r}]")
            self._flush()
            self._functions += [f"def {name}(d, out):", *(self._lines or ["    pass"])]
            self._lines, self._indent, self._pending = outer
        return self._records[schema.name]
