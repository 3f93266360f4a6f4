"""What comparing a projection with the one made again from the log comes to.

In: two stores of the same kind. Out: :class:`Comparison` values, one a table or collection, with counts, a hash of the
rows that does not depend on their order, and examples of what differs.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from enum import StrEnum
from itertools import takewhile
from typing import Any, Final

__all__ = ["HASH_BITS", "MOST_EXAMPLES", "Comparison", "Difference", "DifferenceKind", "added", "shown"]

HASH_BITS: Final = 128
"""A table's hash is the sum of its rows' hashes modulo 2**128."""

MOST_EXAMPLES: Final = 10
_SHOWN: Final = 120
_BEFORE: Final = 30


class DifferenceKind(StrEnum):
    """How the projection in use departs from what the log gives."""

    MISSING = "missing"
    """The log gives a row that the projection lacks."""
    SURPLUS = "surplus"
    """The projection has a row that the log does not give."""
    CHANGED = "changed"
    """The row says something else."""


@dataclass(frozen=True, slots=True)
class Difference:
    """One row that differs. ``field``, ``stored`` and ``rebuilt`` are empty unless it is changed."""

    kind: DifferenceKind
    place: str
    field: str = ""
    stored: str = ""
    rebuilt: str = ""

    def __str__(self) -> str:
        match self.kind:
            case DifferenceKind.MISSING:
                return f"{self.place} is missing"
            case DifferenceKind.SURPLUS:
                return f"{self.place} is there, but the log does not give it"
            case DifferenceKind.CHANGED:
                return f"{self.place}: {self.field} is {self.stored}, by the log {self.rebuilt}"


@dataclass(frozen=True, slots=True)
class Comparison:
    """One table or collection, as it is ``stored`` and as it was ``rebuilt``.

    ``examples`` are some of the differences. ``uncompared`` names columns that only one of the two has, or that say
    when a row was inserted.
    """

    table: str
    stored_rows: int
    rebuilt_rows: int
    stored_hash: int
    rebuilt_hash: int
    missing: int = 0
    surplus: int = 0
    changed: int = 0
    examples: tuple[Difference, ...] = ()
    uncompared: tuple[str, ...] = ()

    @property
    def equal(self) -> bool:
        """Whether every row is the same."""
        return (self.stored_rows, self.stored_hash) == (self.rebuilt_rows, self.rebuilt_hash)

    def as_dict(self) -> dict[str, Any]:
        """As JSON can hold it: hashes in hexadecimal."""
        return {
            **asdict(self),
            "stored_hash": f"{self.stored_hash:032x}",
            "rebuilt_hash": f"{self.rebuilt_hash:032x}",
            "examples": [{**asdict(example), "said": str(example)} for example in self.examples],
            "equal": self.equal,
        }


def added(parts: Iterable[Comparison]) -> tuple[Comparison, ...]:
    """Comparisons of stretches as one for each table, in the order in which they first come."""
    whole: dict[str, Comparison] = {}
    for part in parts:
        before = whole.get(part.table)
        whole[part.table] = part if before is None else _sum(before, part)
    return tuple(whole.values())


def _sum(first: Comparison, second: Comparison) -> Comparison:
    return Comparison(
        first.table,
        first.stored_rows + second.stored_rows,
        first.rebuilt_rows + second.rebuilt_rows,
        (first.stored_hash + second.stored_hash) % 2**HASH_BITS,
        (first.rebuilt_hash + second.rebuilt_hash) % 2**HASH_BITS,
        first.missing + second.missing,
        first.surplus + second.surplus,
        first.changed + second.changed,
        (*first.examples, *second.examples)[:MOST_EXAMPLES],
        tuple(sorted({*first.uncompared, *second.uncompared})),
    )


def shown(stored: object, rebuilt: object) -> tuple[str, str]:
    """Two values as a person wants to see them: each short, on one line, from a little before where they part."""
    texts = repr(stored), repr(rebuilt)
    if max(map(len, texts)) <= _SHOWN:
        return texts
    common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(*texts, strict=False)))
    begin = max(0, common - _BEFORE)
    return _cut(texts[0], begin), _cut(texts[1], begin)


def _cut(text: str, begin: int) -> str:
    piece = text[begin : begin + _SHOWN]
    before, after = "…" if begin else "", "…" if begin + _SHOWN < len(text) else ""
    return f"{before}{piece}{after} ({len(text)} characters)" if before or after else piece
