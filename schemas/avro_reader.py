"""Readers of Avro bytes, compiled: one Python function for a writer's schema and the reader's schema it resolves to.

In: two schema trees. Out: a function from bytes to plain values (a dict for a record) with every field of the reader.
Compiled because it is the hot path: the function is straight-line code without any dispatch on types, and was measured
faster than fastavro (docs/decisions/0005). It trusts no length, count or index: each is held against the bytes
that are left, and what a schema could do wrong was refused by :mod:`schemas.avro_schema`.
"""

import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from schemas.avro_schema import (
    ArrayType,
    EnumType,
    Field,
    FixedType,
    MapType,
    Primitive,
    RecordType,
    Schema,
    UnionType,
)
from schemas.compatibility import incompatibilities, resolves_to
from schemas.errors import (
    DecodeError,
    MalformedError,
    TooLargeError,
    TrailingBytesError,
    TruncatedError,
    UnknownSchemaError,
    UnsafeSchemaError,
)

__all__ = ["MAX_VALUES", "compile_reader", "default_value", "values_per_byte"]

MAX_VALUES: Final = 65_536
"""The most array items and map entries, each times its fields, that one record may hold.

A message can be small in bytes and still large in memory: an empty string is one byte, and tens of them in Python.
"""

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MAX_VARINT_BYTES: Final = 10
_BLOCK_VALUES: Final = 16
"""What each block after the first of an array or map takes from the budget; writers need no more than one."""


def compile_reader(writer: Schema, reader: Schema | None = None) -> Callable[[bytes, int], Any]:
    """A function that reads a value of ``writer`` from ``data[start:]``, as ``reader`` (None: as it was written).

    The function takes ``data`` and ``start`` and raises DecodeError: the bytes are not exactly one such value.

    Raises:
        UnknownSchemaError: ``reader`` can't read what ``writer`` writes.
        UnsafeSchemaError: ``writer`` nests too deep.
    """
    if reader is not None and (problems := incompatibilities(reader, writer)):
        raise UnknownSchemaError(f"the writer's schema can't be read by this release: {'; '.join(problems)}")
    try:
        read = _Compiler().compile(writer, reader)
    except (SyntaxError, RecursionError) as error:
        raise UnsafeSchemaError(f"the writer's schema nests too deep to be read: {error}") from error

    def read_all(data: bytes, start: int) -> Any:
        try:
            value, end = read(data, start, [MAX_VALUES])
        except DecodeError:
            raise
        except (IndexError, struct.error):
            raise TruncatedError(f"the value ends after {len(data)} bytes, in the middle of a field") from None
        except UnicodeDecodeError as error:
            raise MalformedError(f"a string is no UTF-8: {error.reason}") from None
        except OverflowError:
            raise MalformedError("a timestamp is outside the years 1 to 9999") from None
        if end != len(data):
            if end > len(data):
                raise TruncatedError(f"the value ends {end - len(data)} bytes too early, after {len(data)}")
            raise TrailingBytesError(f"{len(data) - end} bytes are left after the event")
        return value

    return read_all


def _long(data: bytes, at: int) -> tuple[int, int]:
    """The zigzag varint at ``at``, still zigzag, and the place after it."""
    value = shift = 0
    for place in range(at, at + _MAX_VARINT_BYTES):
        byte = data[place]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            if value >> 64:
                break
            return value, place + 1
        shift += 7
    raise MalformedError(f"the number at byte {at} has more than 64 bits")


def _length(data: bytes, at: int) -> tuple[int, int]:
    """The length of a string or bytes at ``at``, twice (as zigzag has it), and the place after it."""
    value, place = _long(data, at)
    if value & 1:
        raise MalformedError(f"the length at byte {at} is negative")
    if value >> 1 > len(data) - place:
        raise TruncatedError(f"the length at byte {at} is {value >> 1}, but {len(data) - place} bytes are left")
    return value, place


def _block(data: bytes, at: int, min_size: int, weight: int, extra: int, budget: list[int]) -> tuple[int, int]:
    """The item count of the array or map block at ``at``, and the place after it."""
    zigzag, place = _long(data, at)
    count = (zigzag >> 1) ^ -(zigzag & 1)
    if count < 0:
        # A negative count is followed by the block's size in bytes, for skipping.
        count = -count
        _, place = _long(data, place)
    if count * min_size > len(data) - place:
        raise TruncatedError(f"the block at byte {at} counts {count} items, but {len(data) - place} bytes are left")
    budget[0] -= count * weight + extra
    if budget[0] < 0:
        raise TooLargeError(f"the record holds more than {MAX_VALUES} values in its arrays and maps")
    return count, place


def _bad_index(what: str, zigzag: int) -> int:
    raise MalformedError(f"{what} has no entry {(zigzag >> 1) ^ -(zigzag & 1)}")


def _bad_bool() -> bool:
    raise MalformedError("a boolean is neither 0 nor 1")


def _no_symbol(enum: str, symbol: str) -> str:
    raise MalformedError(f"{enum} does not have the symbol {symbol!r}")


class _Compiler:
    """Writes the source of one reader. Names of foreign schemas enter it only as ``repr`` or as constants."""

    def __init__(self) -> None:
        self._scope: dict[str, Any] = {
            "_long": _long,
            "_length": _length,
            "_block": _block,
            "_bad_index": _bad_index,
            "_bad_bool": _bad_bool,
            "_no_symbol": _no_symbol,
            "_EPOCH": _EPOCH,
            "_timedelta": timedelta,
            "_unpack_from": struct.unpack_from,
            "_float": struct.Struct("<f").unpack_from,
            "_double": struct.Struct("<d").unpack_from,
        }
        self._functions: list[str] = []
        self._records: dict[tuple[str, str | None], str] = {}
        self._lines: list[str] = []
        self._indent = 1
        self._names = 0

    def compile(self, writer: Schema, reader: Schema | None) -> Callable[[bytes, int, list[int]], tuple[Any, int]]:
        self._value(writer, reader, "v")
        source = "\n".join([*self._functions, *self._function("_read")])
        exec(compile(source, "<avro reader>", "exec"), self._scope)
        # A record's own function is the reader already, and saves a call.
        made: Callable[[bytes, int, list[int]], tuple[Any, int]] = self._scope[
            next(iter(self._records.values())) if isinstance(writer, RecordType) else "_read"
        ]
        return made

    def _function(self, name: str) -> list[str]:
        return [f"def {name}(b, p, budget):", *self._lines, "    return v, p"]

    def _emit(self, line: str) -> None:
        self._lines.append("    " * self._indent + line)

    @contextmanager
    def _block_of(self, line: str) -> Iterator[None]:
        self._emit(line)
        self._indent += 1
        yield
        self._indent -= 1

    def _name(self, stem: str) -> str:
        self._names += 1
        return f"{stem}{self._names}"

    def _constant(self, value: Any) -> str:
        name = self._name("_c")
        self._scope[name] = value
        return name

    def _value(self, writer: Schema, reader: Schema | None, to: str) -> None:
        """Emit the code that reads a ``writer`` at ``p`` into the variable ``to``."""
        if isinstance(writer, UnionType):
            self._union(writer, reader, to)
            return
        if isinstance(reader, UnionType):
            reader = resolves_to(reader, writer)
            if reader is None:
                self._emit(f"_bad_index({'a union that the reader cannot resolve'!r}, 0)")
                return
        if isinstance(writer, Primitive):
            self._primitive(writer, reader, to)
        elif isinstance(writer, FixedType):
            self._emit(f"q = p + {writer.size}; {to} = b[p:q]; p = q")
        elif isinstance(writer, EnumType):
            self._enum(writer, reader, to)
        elif isinstance(writer, ArrayType):
            self._array(writer, reader, to)
        elif isinstance(writer, MapType):
            self._map(writer, reader, to)
        else:
            self._record(writer, reader, to)

    def _zigzag(self) -> None:
        self._emit("n = b[p]; p += 1")
        self._emit("if n > 127: n, p = _long(b, p - 1)")

    def _primitive(self, writer: Primitive, reader: Schema | None, to: str) -> None:
        kind = writer.kind
        read_as = reader.kind if reader is not None else kind
        if kind == "null":
            self._emit(f"{to} = None")
        elif kind == "boolean":
            self._emit(f"{to} = b[p] == 1 or (b[p] and _bad_bool()) is True; p += 1")
        elif kind in ("int", "long"):
            self._zigzag()
            if writer.logical == "timestamp-micros" and kind == "long":
                self._emit(f"{to} = _EPOCH + _timedelta(0, 0, (n >> 1) ^ -(n & 1))")
            else:
                number = "(n >> 1) ^ -(n & 1)"
                self._emit(f"{to} = float({number})" if read_as in ("float", "double") else f"{to} = {number}")
        elif kind in ("float", "double"):
            self._emit(f"{to} = _{kind}(b, p)[0]; p += {writer.min_size}")
        else:
            self._emit("n = b[p]; p += 1")
            # Two bytes hold lengths up to 8,191, and are read here because calls take longer than all else of it.
            with self._block_of("if n & 129:"):
                self._emit("if n & 1 or (m := b[p]) > 127: n, p = _length(b, p - 1)")
                with self._block_of("else:"):
                    self._emit("n += (m << 7) - 128; p += 1")
                    self._emit("if p + (n >> 1) > len(b): _length(b, p - 2)")
            self._emit("q = p + (n >> 1)")
            self._emit(f"{to} = b[p:q]{'.decode()' if read_as == 'string' else ''}; p = q")

    def _enum(self, writer: EnumType, reader: Schema | None, to: str) -> None:
        symbols: list[str | None] = list(writer.symbols)
        if isinstance(reader, EnumType):
            symbols = [symbol if symbol in reader.symbols else reader.default for symbol in writer.symbols]
        name = self._constant(tuple(symbols))
        self._zigzag()
        self._emit(f"{to} = {name}[n >> 1] if n < {2 * len(symbols)} and not n & 1 else _bad_index({writer.name!r}, n)")

    def _union(self, writer: UnionType, reader: Schema | None, to: str) -> None:
        self._zigzag()
        for index, branch in enumerate(writer.branches):
            with self._block_of(f"{'elif' if index else 'if'} n == {2 * index}:"):
                self._value(branch, reader, to)
        with self._block_of("else:"):
            self._emit("_bad_index('a union', n)")

    @contextmanager
    def _blocks(self, min_size: int, weight: int) -> Iterator[str]:
        """Emit the loop over the blocks of an array or map, giving the variable that has a block's item count."""
        count, extra = self._name("k"), self._name("x")
        self._emit(f"{extra} = 0")
        with self._block_of("while True:"):
            self._emit(f"{count} = b[p]")
            with self._block_of(f"if {count} == 0:"):
                self._emit("p += 1")
                self._emit("break")
            # The usual first block, of less than 64 items that there is room for, needs no call.
            room = f"({count} >> 1) * {min_size} > len(b) - p - 1 or ({count} >> 1) * {weight} > budget[0]"
            with self._block_of(f"if {count} & 129 or {extra} or {room}:"):
                self._emit(f"{count}, p = _block(b, p, {min_size}, {weight}, {extra}, budget)")
                self._emit(f"if not {count}: break")
            with self._block_of("else:"):
                self._emit(f"p += 1; {count} >>= 1; budget[0] -= {count} * {weight}")
            yield count
            self._emit(f"{extra} = {_BLOCK_VALUES}")

    def _array(self, writer: ArrayType, reader: Schema | None, to: str) -> None:
        items = reader.items if isinstance(reader, ArrayType) else None
        out, item = self._name("a"), self._name("i")
        self._emit(f"{out} = []")
        with self._blocks(writer.items.min_size, writer.items.nodes) as count:
            if writer.items.kind in ("float", "double"):
                code, size = ("f", 4) if writer.items.kind == "float" else ("d", 8)
                self._emit(f"{out} += _unpack_from('<%d{code}' % {count}, b, p); p += {size} * {count}")
            else:
                with self._block_of(f"for _ in range({count}):"):
                    self._value(writer.items, items, item)
                    self._emit(f"{out}.append({item})")
        self._emit(f"{to} = {out}")

    def _map(self, writer: MapType, reader: Schema | None, to: str) -> None:
        values = reader.values if isinstance(reader, MapType) else None
        out, key, item = self._name("m"), self._name("i"), self._name("i")
        self._emit(f"{out} = {{}}")
        with (
            self._blocks(1 + writer.values.min_size, 1 + writer.values.nodes) as count,
            self._block_of(f"for _ in range({count}):"),
        ):
            self._primitive(Primitive("string"), None, key)
            self._value(writer.values, values, item)
            self._emit(f"{out}[{key}] = {item}")
        self._emit(f"{to} = {out}")

    def _record(self, writer: RecordType, reader: Schema | None, to: str) -> None:
        key = (writer.name, reader.name if isinstance(reader, RecordType) else None)
        if key not in self._records:
            self._records[key] = self._name("_r")
            outer = self._lines, self._indent
            self._lines, self._indent = [], 1
            self._record_body(writer, reader if isinstance(reader, RecordType) else None)
            self._functions += self._function(self._records[key])
            self._lines, self._indent = outer
        self._emit(f"{to}, p = {self._records[key]}(b, p, budget)")

    def _record_body(self, writer: RecordType, reader: RecordType | None) -> None:
        wanted = None if reader is None else {field.name: field for field in reader.fields}
        entries = []
        for position, field in enumerate(writer.fields):
            if wanted is None:
                self._value(field.type, None, f"f{position}")
                entries.append(f"{field.name!r}: f{position}")
            elif field.name in wanted:
                self._value(field.type, wanted.pop(field.name).type, f"f{position}")
                entries.append(f"{field.name!r}: f{position}")
            else:
                self._value(field.type, None, "_")
        entries += [f"{field.name!r}: {self._default(field)}" for field in (wanted or {}).values()]
        self._emit(f"v = {{{', '.join(entries)}}}")

    def _default(self, field: Field) -> str:
        value = default_value(field.type, field.default)
        if value == [] or value == {}:
            return repr(value)
        return self._constant(value)


def values_per_byte(schema: Schema) -> float:
    """An upper bound on what one byte of the schema's values can take from the budget of :data:`MAX_VALUES`."""
    if isinstance(schema, ArrayType):
        return schema.items.nodes / schema.items.min_size + values_per_byte(schema.items)
    if isinstance(schema, MapType):
        return (1 + schema.values.nodes) / (1 + schema.values.min_size) + values_per_byte(schema.values)
    if isinstance(schema, RecordType):
        return sum(values_per_byte(field.type) for field in schema.fields)
    if isinstance(schema, UnionType):
        return sum(values_per_byte(branch) for branch in schema.branches)
    return 0.0


def default_value(schema: Schema, default: Any) -> Any:
    """The value that a JSON default stands for, as a reader gives it."""
    if isinstance(schema, UnionType):
        return default_value(schema.branches[0], default)
    if isinstance(schema, ArrayType):
        return [default_value(schema.items, item) for item in default]
    if isinstance(schema, MapType):
        return {key: default_value(schema.values, item) for key, item in default.items()}
    if isinstance(schema, RecordType):
        return {
            field.name: default_value(field.type, default.get(field.name, field.default)) for field in schema.fields
        }
    if schema.kind in ("bytes", "fixed"):
        return default.encode("latin-1")
    if schema.kind in ("float", "double"):
        return float(default)
    if isinstance(schema, Primitive) and schema.logical == "timestamp-micros":
        return _EPOCH + timedelta(microseconds=default)
    return default
