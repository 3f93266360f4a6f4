"""Records as rows of a Parquet file, and back; and the hash over records that says what a stretch holds.

In: records and, for people and SQL, the events decoded from them. Out: record batches with one row an event, and from
these the same records again, byte for byte. The columns that records are made from are raw; the others (event type,
ids, source, payload as JSON) are there to be queried, and are null where a record does not say or does not decode.
"""

from array import array
from collections.abc import Iterable, Sequence
from functools import lru_cache
from hashlib import sha256
from itertools import repeat
from struct import Struct
from typing import Any, Final

import pyarrow as pa

from replay.selection import Place
from schemas.codec import Codec
from schemas.errors import DecodeError, KeyStoreError
from schemas.record import Header, Record

__all__ = ["RAW", "SCHEMA", "LeftSealed", "RecordsHash", "Rows", "records_of"]

_TEXT: Final = pa.string()
_NAMES: Final = pa.dictionary(pa.int32(), pa.string())

SCHEMA: Final = pa.schema(
    [
        pa.field("topic", _NAMES, nullable=False),
        pa.field("partition", pa.int32(), nullable=False),
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("timestamp", pa.timestamp("ms", tz="UTC"), nullable=False),
        pa.field("key", pa.binary()),
        pa.field("value", pa.binary()),
        pa.field(
            "headers",
            pa.list_(pa.struct([pa.field("name", _TEXT, nullable=False), pa.field("value", pa.binary())])),
            nullable=False,
        ),
        pa.field("event_type", _NAMES),
        pa.field("id", _TEXT),
        pa.field("source", _NAMES),
        pa.field("subject", _TEXT),
        pa.field("correlation_id", _TEXT),
        pa.field("causation_id", _TEXT),
        pa.field("payload", _TEXT),
        pa.field("error", _TEXT),
    ]
)
"""The columns of an archive's files."""

RAW: Final = ("offset", "timestamp", "key", "value", "headers")
"""The columns that a record is made from; the manifest says topic and partition."""

_HEAD: Final = Struct(">qqqq")


class LeftSealed:
    """The cipher of who is to see nothing personal: events about data subjects are read without it, as if forgotten."""

    def seal(self, subjects: Sequence[str], associated: Sequence[bytes], plain: bytes) -> bytes:
        """Never."""
        raise KeyStoreError("an archive's codec reads only")

    def open(self, subjects: Sequence[str], associated: Sequence[bytes], sealed: bytes) -> bytes | None:
        """None: as if the key had been destroyed."""
        return None


class RecordsHash:
    """The SHA-256 over the records of one partition in offset order: offset, time, key, value and headers, raw.

    It depends on nothing but the records, so that it can be made from Kafka, or from any copy, again.
    """

    def __init__(self) -> None:
        self._digest = sha256()
        self.records = 0

    def add(self, records: Iterable[Record]) -> None:
        """Go on with ``records``."""
        parts: list[bytes] = []
        for record in records:
            self.records += 1
            key, value = record.key, record.value
            parts.append(
                _HEAD.pack(
                    record.offset,
                    record.timestamp_ms,
                    -1 if key is None else len(key),
                    -1 if value is None else len(value),
                )
            )
            names = tuple([name for name, _ in record.headers])
            values = [content for _, content in record.headers]
            parts.append(_names_bytes(names))
            sizes = array("q", [-1 if content is None else len(content) for content in values])
            sizes.byteswap()
            parts += sizes.tobytes(), key or b"", value or b"", *[content or b"" for content in values]
        self._digest.update(b"".join(parts))

    @property
    def hexdigest(self) -> str:
        """The hash of all records so far."""
        return self._digest.hexdigest()


@lru_cache(maxsize=4096)  # few producers, so few lists of names
def _names_bytes(names: tuple[str, ...]) -> bytes:
    raw = [name.encode() for name in names]
    return b"".join([_COUNT.pack(len(raw)), *(_COUNT.pack(len(name)) + name for name in raw)])


_COUNT: Final = Struct(">q")


class Rows:
    """Rows on their way into a file. ``bytes`` is about what the records took in Kafka."""

    def __init__(self, codec: Codec) -> None:
        self._codec = codec
        self._columns: list[list[Any]] = [[] for _ in SCHEMA]
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._columns[0])

    def add(self, record: Record) -> None:
        """One more row.

        Raises:
            RegistryError: the registry, which alone could tell the writer's schema, did not answer.
        """
        payload = error = None
        try:
            envelope = self._codec.decode(record)
        except DecodeError as problem:
            error = f"{type(problem).__name__}: {problem}"
            said = {name: (content or b"").decode("utf-8", "replace") for name, content in record.headers}
            about = [said.get(name) for name in _HEADERS]
        else:
            payload = envelope.event.model_dump_json()
            metadata = envelope.metadata
            about = [
                envelope.event.full_name,
                metadata.id,
                metadata.source,
                metadata.subject or None,
                metadata.correlation_id or None,
                metadata.causation_id or None,
            ]
        row = [
            record.topic,
            record.partition,
            record.offset,
            record.timestamp_ms,
            record.key,
            record.value,
            record.headers,
            *about,
            payload,
            error,
        ]
        for column, cell in zip(self._columns, row, strict=True):
            column.append(cell)
        self.bytes += (
            len(record.key or b"")
            + len(record.value or b"")
            + sum([len(name) + len(content or b"") for name, content in record.headers])
        )

    def take(self) -> pa.RecordBatch:
        """The rows so far as one batch; it begins anew."""
        columns = self._columns
        self._columns = [[] for _ in SCHEMA]
        self.bytes = 0
        made = [
            _headers(cells) if field.name == "headers" else pa.array(cells, field.type)
            for field, cells in zip(SCHEMA, columns, strict=True)
        ]
        return pa.record_batch(made, schema=SCHEMA)


_HEADERS: Final = ("ce_type", "ce_id", "ce_source", "ce_subject", "ce_correlationid", "ce_causationid")


def _headers(cells: Sequence[Sequence[Header]]) -> pa.ListArray:
    flat = [header for headers in cells for header in headers]
    offsets = array("i", [0])
    end = 0
    for headers in cells:
        end += len(headers)
        offsets.append(end)
    kind = SCHEMA.field("headers").type.value_type
    pairs = pa.StructArray.from_arrays(
        [pa.array([name for name, _ in flat], _TEXT), pa.array([content for _, content in flat], pa.binary())],
        fields=[kind.field(0), kind.field(1)],
    )
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pairs, type=SCHEMA.field("headers").type)


def records_of(place: Place, batch: pa.RecordBatch) -> list[Record]:
    """The records of one partition, from a batch with the columns :data:`RAW`."""
    topic, partition = place
    headers = batch.column("headers")
    if isinstance(headers, pa.ChunkedArray):
        headers = headers.combine_chunks()
    pairs = headers.flatten()
    names = _plain(pairs.field("name").dictionary_encode())
    flat = list(zip(names, _plain(pairs.field("value")), strict=True))
    ends = headers.value_lengths().to_numpy(zero_copy_only=False).cumsum().tolist()
    starts = [0, *ends[:-1]]
    return list(
        map(
            Record,
            repeat(topic),
            repeat(partition),
            batch.column("offset").to_numpy().tolist(),
            batch.column("timestamp").cast(pa.int64()).to_numpy().tolist(),
            _plain(batch.column("key")),
            _plain(batch.column("value")),
            [flat[start:end] for start, end in zip(starts, ends, strict=True)],
        )
    )


def _plain(cells: pa.Array) -> list[Any]:
    # Many times as quick as to_pylist.
    if isinstance(cells, pa.DictionaryArray):
        words = cells.dictionary.to_pylist()
        return [words[index] for index in cells.indices.to_numpy().tolist()]
    plain: list[Any] = cells.to_numpy(zero_copy_only=False).tolist()
    return plain
