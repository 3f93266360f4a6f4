"""Compares a table of two databases, one stretch of the log after the other.

In: two databases of one ClickHouse and offsets. Out: a :class:`~sinks.comparison.Comparison`. Rows are hashed where
they lie, a bucket of 65,536 offsets at a time; only of buckets that differ row hashes are fetched, and whole rows only
for the examples. Columns that say when a row was inserted (their default is the clock) are left out.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, Final

from sinks.clickhouse.client import ClickHouse
from sinks.comparison import HASH_BITS, MOST_EXAMPLES, Comparison, Difference, DifferenceKind, shown
from sinks.sink import Offsets

__all__ = ["STRETCH", "compare_table", "shared_columns"]

_BUCKET: Final = 65_536
_CLOCK: Final = re.compile(r"\b(now|now64|today|rand\w*|generateUUID\w*)\s*\(", re.IGNORECASE)
STRETCH: Final = (
    "topic = {topic:String} AND partition = {partition:UInt32} AND offset >= {first:UInt64} AND offset < {end:UInt64}"
)
"""Where a row lies: ``topic``, ``partition`` and ``[first, end)``."""

_Buckets = dict[int, tuple[int, int]]


def shared_columns(stored: ClickHouse, rebuilt: ClickHouse, table: str) -> tuple[list[str], list[str]]:
    """The columns that can be compared, and those that can't: only one side has them, or the clock fills them."""
    sides = [_columns(side, table) for side in (stored, rebuilt)]
    both = [name for name in sides[1] if name in sides[0]]
    clock = {name for name in both if any(_CLOCK.search(side[name]) for side in sides)}
    alone = sides[0].keys() ^ sides[1].keys()
    return [name for name in both if name not in clock], sorted(alone | clock)


def _columns(side: ClickHouse, table: str) -> dict[str, str]:
    rows = side.read(
        "SELECT name, default_expression FROM system.columns "
        "WHERE database = {database:String} AND table = {table:String} ORDER BY position",
        {"database": side.database, "table": table},
    )
    return dict(rows)


def compare_table(
    stored: ClickHouse,
    rebuilt: ClickHouse,
    table: str,
    since: Offsets,
    until: Offsets,
    on_progress: Callable[[int, int], None],
) -> list[Comparison]:
    """What ``table`` says of each partition's ``[since, until)`` in both."""
    columns, uncompared = shared_columns(stored, rebuilt, table)
    comparing = _Comparing(stored, rebuilt, table, columns)
    places = sorted((place, since.get(place, 0), end) for place, end in until.items() if since.get(place, 0) < end)
    total, done = sum(end - first for _, first, end in places), 0
    on_progress(0, total)
    for place, first, end in places:
        comparing.stretch(*place, first, end)
        done += end - first
        on_progress(done, total)
    return [comparing.result(tuple(uncompared))]


class _Comparing:
    def __init__(self, stored: ClickHouse, rebuilt: ClickHouse, table: str, columns: list[str]) -> None:
        self._sides = (stored, rebuilt)
        self._table = table
        self._columns = columns
        self._hash = f"reinterpretAsUInt128(sipHash128({', '.join(f'`{column}`' for column in columns)}))"
        self._rows = [0, 0]
        self._sums = [0, 0]
        self._counts = dict.fromkeys(DifferenceKind, 0)
        self._examples: list[Difference] = []

    def result(self, uncompared: tuple[str, ...]) -> Comparison:
        counts = self._counts
        return Comparison(
            self._table,
            stored_rows=self._rows[0],
            rebuilt_rows=self._rows[1],
            stored_hash=self._sums[0],
            rebuilt_hash=self._sums[1],
            missing=counts[DifferenceKind.MISSING],
            surplus=counts[DifferenceKind.SURPLUS],
            changed=counts[DifferenceKind.CHANGED],
            examples=tuple(self._examples),
            uncompared=uncompared,
        )

    def stretch(self, topic: str, partition: int, first: int, end: int) -> None:
        where = {"topic": topic, "partition": partition, "first": first, "end": end}
        sides = [self._buckets(side, where) for side in self._sides]
        for number, buckets in enumerate(sides):
            self._rows[number] += sum(rows for rows, _ in buckets.values())
            self._sums[number] = (self._sums[number] + sum(total for _, total in buckets.values())) % 2**HASH_BITS
        for bucket in sorted(sides[0].keys() | sides[1].keys()):
            if sides[0].get(bucket) != sides[1].get(bucket):
                begin = bucket * _BUCKET
                self._bucket({**where, "first": max(first, begin), "end": min(end, begin + _BUCKET)})

    def _buckets(self, side: ClickHouse, where: Mapping[str, Any]) -> _Buckets:
        rows = side.read(
            f"SELECT intDiv(offset, {_BUCKET}) AS bucket, count(), sumWithOverflow({self._hash}) "
            f"FROM {self._table} FINAL WHERE {STRETCH} GROUP BY bucket",
            where,
        )
        return {bucket: (count, total) for bucket, count, total in rows}

    def _bucket(self, where: Mapping[str, Any]) -> None:
        sql = f"SELECT offset, {self._hash} FROM {self._table} FINAL WHERE {STRETCH}"
        stored, rebuilt = (dict(side.read(sql, where)) for side in self._sides)
        for offset in sorted(stored.keys() | rebuilt.keys()):
            if stored.get(offset) == rebuilt.get(offset):
                continue
            kind = DifferenceKind.CHANGED
            if offset not in stored:
                kind = DifferenceKind.MISSING
            elif offset not in rebuilt:
                kind = DifferenceKind.SURPLUS
            self._counts[kind] += 1
            if len(self._examples) < MOST_EXAMPLES:
                self._examples += self._example(kind, where, offset)

    def _example(self, kind: DifferenceKind, where: Mapping[str, Any], offset: int) -> list[Difference]:
        place = f"{self._table} {where['topic']}[{where['partition']}]@{offset}"
        if kind is not DifferenceKind.CHANGED:
            return [Difference(kind, place)]
        columns = ", ".join(f"`{column}`" for column in self._columns)
        sql = f"SELECT {columns} FROM {self._table} FINAL WHERE {STRETCH}"
        rows = [side.read(sql, {**where, "first": offset, "end": offset + 1}) for side in self._sides]
        return [
            Difference(kind, place, column, *shown(before, after))
            for column, before, after in zip(self._columns, rows[0][0], rows[1][0], strict=True)
            if before != after
        ]
