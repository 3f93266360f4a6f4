"""What differs between two texts: as rows that stand side by side, and as a unified diff.

In: two texts. Out: :class:`DiffRow` values for :mod:`replay.page` (or a terminal), with the words that differ inside a
changed line marked; or lines in the unified format. Bounded in time: what two large texts share at both ends is found
first, and where what is left is too large to be matched line by line it counts as replaced.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from difflib import unified_diff as _unified_diff
from enum import StrEnum
from itertools import zip_longest
from typing import Final

__all__ = ["Change", "DiffRow", "Piece", "side_by_side", "unified_diff"]

_WORD: Final = re.compile(r"\w+|\s+|[^\w\s]")
_LARGEST_MATCH: Final = 400_000
"""Pairs of lines, or of words, that a match may have to look at."""

_ALIKE: Final = 0.3
"""Below this share of equal words two lines are not one line that changed, and marks inside it would only confuse."""


class Change(StrEnum):
    """What became of a line."""

    SAME = "same"
    CHANGED = "changed"
    REMOVED = "removed"
    ADDED = "added"
    GAP = "gap"


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a line; ``changed`` when the other side does not have it."""

    text: str
    changed: bool = False


@dataclass(frozen=True, slots=True)
class DiffRow:
    """Two lines side by side; numbers count from 1 and are None where there is no such line.

    A GAP stands for ``skipped`` equal lines that are left out.
    """

    change: Change
    before_number: int | None = None
    before: tuple[Piece, ...] = ()
    after_number: int | None = None
    after: tuple[Piece, ...] = ()
    skipped: int = 0


def side_by_side(before: str, after: str, *, context: int | None = 3) -> list[DiffRow]:
    """The lines of both texts in rows, with ``context`` equal lines around what differs; None keeps all of them.

    >>> [row.change.value for row in side_by_side("a\\nb", "a\\nc\\nd", context=None)]
    ['same', 'changed', 'added']
    """
    old, new = before.splitlines(), after.splitlines()
    rows: list[DiffRow] = []
    for tag, i1, i2, j1, j2 in _opcodes(old, new):
        if tag == "equal":
            rows += [
                DiffRow(Change.SAME, i + 1, (Piece(old[i]),), j + 1, (Piece(new[j]),))
                for i, j in zip(range(i1, i2), range(j1, j2), strict=True)
            ]
        else:
            for left, right in zip_longest(range(i1, i2), range(j1, j2)):
                rows.append(_row(old, new, left, right))
    return rows if context is None else list(_folded(rows, context))


def unified_diff(before: str, after: str, *, names: tuple[str, str] = ("before", "after"), context: int = 3) -> str:
    """The unified diff of two texts, empty when they are equal."""
    old, new = before.splitlines(), after.splitlines()
    if len(old) * len(new) > _LARGEST_MATCH:
        return "\n".join(_unified_of_rows(side_by_side(before, after, context=context), names))
    return "\n".join(_unified_diff(old, new, *names, lineterm="", n=context))


def _unified_of_rows(rows: Sequence[DiffRow], names: tuple[str, str]) -> Iterator[str]:
    if any(row.change not in (Change.SAME, Change.GAP) for row in rows):
        yield from (f"--- {names[0]}", f"+++ {names[1]}")
        signs = {Change.SAME: " ", Change.REMOVED: "-", Change.ADDED: "+"}
        for row in rows:
            before, after = ("".join(piece.text for piece in side) for side in (row.before, row.after))
            if row.change is Change.GAP:
                yield f"@@ {row.skipped} equal lines @@"
            elif row.change is Change.CHANGED:
                yield from (f"-{before}", f"+{after}")
            else:
                yield signs[row.change] + (after if row.change is Change.ADDED else before)


def _opcodes(old: Sequence[str], new: Sequence[str]) -> Iterator[tuple[str, int, int, int, int]]:
    """difflib's opcodes, with the equal ends taken off first, so that a small change in a large text costs little."""
    shorter = min(len(old), len(new))
    head = next((n for n in range(shorter) if old[n] != new[n]), shorter)
    tail = next((n for n in range(shorter - head) if old[-1 - n] != new[-1 - n]), shorter - head)
    if head:
        yield "equal", 0, head, 0, head
    middle_old, middle_new = old[head : len(old) - tail], new[head : len(new) - tail]
    if len(middle_old) * len(middle_new) > _LARGEST_MATCH:
        yield "replace", head, len(old) - tail, head, len(new) - tail
    else:
        matcher = SequenceMatcher(None, middle_old, middle_new, autojunk=False)
        for tag, i1, i2, j1, j2 in matcher.get_opcodes():
            yield tag, i1 + head, i2 + head, j1 + head, j2 + head
    if tail:
        yield "equal", len(old) - tail, len(old), len(new) - tail, len(new)


def _row(old: Sequence[str], new: Sequence[str], left: int | None, right: int | None) -> DiffRow:
    if left is None and right is not None:
        return DiffRow(Change.ADDED, after_number=right + 1, after=(Piece(new[right]),))
    if left is not None and right is None:
        return DiffRow(Change.REMOVED, before_number=left + 1, before=(Piece(old[left]),))
    assert left is not None
    assert right is not None
    before, after = _words(old[left], new[right])
    return DiffRow(Change.CHANGED, left + 1, before, right + 1, after)


def _words(before: str, after: str) -> tuple[tuple[Piece, ...], tuple[Piece, ...]]:
    old, new = _WORD.findall(before), _WORD.findall(after)
    left: list[Piece] = []
    right: list[Piece] = []
    equal = 0
    for tag, i1, i2, j1, j2 in _opcodes(old, new):
        if tag == "equal":
            equal += sum(not word.isspace() for word in old[i1:i2])
        if i2 > i1:
            left.append(Piece("".join(old[i1:i2]), tag != "equal"))
        if j2 > j1:
            right.append(Piece("".join(new[j1:j2]), tag != "equal"))
    if 2 * equal < _ALIKE * sum(not word.isspace() for word in (*old, *new)):
        return (Piece(before),), (Piece(after),)
    return tuple(left), tuple(right)


def _folded(rows: Sequence[DiffRow], context: int) -> Iterator[DiffRow]:
    """The rows without the equal ones that are more than ``context`` away from a difference."""
    changed = [index for index, row in enumerate(rows) if row.change is not Change.SAME]
    kept: set[int] = set()
    for index in changed:
        kept.update(range(max(0, index - context), min(len(rows), index + context + 1)))
    skipped = 0
    for index, row in enumerate(rows):
        if index in kept:
            if skipped:
                yield DiffRow(Change.GAP, skipped=skipped)
                skipped = 0
            yield row
        else:
            skipped += 1
    if skipped:
        yield DiffRow(Change.GAP, skipped=skipped)
