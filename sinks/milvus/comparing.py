"""Compares two collections of chunks row by row: ids, texts, all other fields, and vectors to the last bit.

In: a store and two collections. Out: a :class:`~sinks.comparison.Comparison`. Milvus gives 16,384 rows an answer at
most and no order, so the rows are had by ranges of the documents' keys, which are hashes: a range that is too full is
split into sixteen.
"""

from array import array
from collections.abc import Callable, Iterator
from hashlib import sha256
from typing import Any, Final

from sinks.comparison import HASH_BITS, MOST_EXAMPLES, Comparison, Difference, DifferenceKind, shown
from sinks.milvus.store import MilvusStore

__all__ = ["compare_collection", "ranges"]

_MOST: Final = 2_000
"""Rows in memory at once of each side: with 384 floats each takes some 13 kB."""
_HEX: Final = "0123456789abcdef"
_CROWDED: Final = 6
_WINDOW: Final = 1_000
_MOST_ROWS: Final = 16_384
_FIELDS: Final = ("document_id", "document_key", "ordinal", "title", "heading", "source", "text", "subjects")

_Rows = dict[str, dict[str, Any]]
_Collections = tuple[str, ...]


def compare_collection(
    store: MilvusStore, name: str, stored: str, rebuilt: str, on_rows: Callable[[int], None]
) -> Comparison:
    """What ``stored`` and ``rebuilt`` say; ``on_rows`` is told how many more rows were seen."""
    comparing = _Comparing(name)
    for sides in ranges(store, (stored, rebuilt)):
        comparing.compare(*sides)
        on_rows(sum(map(len, sides)))
    return comparing.result()


def ranges(store: MilvusStore, collections: _Collections, prefix: str = "") -> Iterator[list[_Rows]]:
    """The whole rows of the collections, range by range of the document keys that begin with ``prefix``."""
    if len(prefix) == _CROWDED:
        yield from _crowded(store, collections, prefix)
        return
    where = f'document_key like "{prefix}%"' if prefix else 'chunk_id != ""'
    sides = [_by_id(store.chunks(collection, where, _MOST)) for collection in collections]
    if max(map(len, sides)) < _MOST:
        yield sides
        return
    for digit in _HEX:
        yield from ranges(store, collections, prefix + digit)


def _crowded(store: MilvusStore, collections: _Collections, prefix: str) -> Iterator[list[_Rows]]:
    """So narrow a range has very few documents, each of very many chunks."""
    seen: list[str] = []
    while True:
        where = f'document_key like "{prefix}%"'
        if seen:
            where += " and document_key not in [" + ", ".join(f'"{key}"' for key in seen) + "]"
        sides = [_by_id(store.chunks(collection, where, _MOST)) for collection in collections]
        if max(map(len, sides)) < _MOST:
            yield sides
            return
        for key in sorted({row["document_key"] for side in sides for row in side.values()}):
            yield from _document(store, collections, key)
            seen.append(key)


def _document(store: MilvusStore, collections: _Collections, key: str) -> Iterator[list[_Rows]]:
    """One document, by the ordinals of its chunks."""
    first = 0
    while any(
        store.chunks(collection, f'document_key == "{key}" and ordinal >= {first}', 1) for collection in collections
    ):
        where = f'document_key == "{key}" and ordinal >= {first} and ordinal < {first + _WINDOW}'
        yield [_by_id(store.chunks(collection, where, _MOST_ROWS)) for collection in collections]
        first += _WINDOW


def _by_id(rows: list[dict[str, Any]]) -> _Rows:
    return {row["chunk_id"]: row for row in rows}


class _Comparing:
    def __init__(self, name: str) -> None:
        self.rows = [0, 0]
        self._name = name
        self._sums = [0, 0]
        self._counts = dict.fromkeys(DifferenceKind, 0)
        self._examples: list[Difference] = []

    def result(self) -> Comparison:
        counts = self._counts
        return Comparison(
            self._name,
            stored_rows=self.rows[0],
            rebuilt_rows=self.rows[1],
            stored_hash=self._sums[0],
            rebuilt_hash=self._sums[1],
            missing=counts[DifferenceKind.MISSING],
            surplus=counts[DifferenceKind.SURPLUS],
            changed=counts[DifferenceKind.CHANGED],
            examples=tuple(self._examples),
        )

    def compare(self, stored: _Rows, rebuilt: _Rows) -> None:
        hashes = [{chunk: _hash(row) for chunk, row in side.items()} for side in (stored, rebuilt)]
        for number, side in enumerate(hashes):
            self.rows[number] += len(side)
            self._sums[number] = (self._sums[number] + sum(side.values())) % 2**HASH_BITS
        for chunk in sorted(stored.keys() | rebuilt.keys()):
            if hashes[0].get(chunk) == hashes[1].get(chunk):
                continue
            kind = DifferenceKind.CHANGED
            if chunk not in stored:
                kind = DifferenceKind.MISSING
            elif chunk not in rebuilt:
                kind = DifferenceKind.SURPLUS
            self._counts[kind] += 1
            if len(self._examples) < MOST_EXAMPLES:
                self._examples += self._example(kind, chunk, stored.get(chunk), rebuilt.get(chunk))

    def _example(
        self, kind: DifferenceKind, chunk: str, stored: dict[str, Any] | None, rebuilt: dict[str, Any] | None
    ) -> list[Difference]:
        place = f"{self._name} {chunk}"
        if stored is None or rebuilt is None:
            return [Difference(kind, place)]
        fields = [field for field in _FIELDS if stored[field] != rebuilt[field]]
        found = [Difference(kind, place, field, *shown(stored[field], rebuilt[field])) for field in fields]
        before, after = _numbers(stored), _numbers(rebuilt)
        if before != after:
            at = next((at for at, pair in enumerate(zip(before, after, strict=False)) if pair[0] != pair[1]), -1)
            found.append(Difference(kind, place, f"vector[{at}]", *shown(before[at], after[at])))
        return found


def _numbers(row: dict[str, Any]) -> "array[float]":
    return array("f", row["vector"])


def _hash(row: dict[str, Any]) -> int:
    digest = sha256()
    for field in ("chunk_id", *_FIELDS):
        raw = str(row[field]).encode()
        digest.update(len(raw).to_bytes(4, "big") + raw)
    digest.update(_numbers(row).tobytes())
    return int.from_bytes(digest.digest()[: HASH_BITS // 8], "big")
