"""What differs between two events, field by field, in words.

In: two models (or any values). Out: :class:`Change` values with dotted paths, and text with old and new lines marked
with - and +; long texts as a unified diff around what changed.
"""

from collections.abc import Iterator, Mapping, Sequence
from difflib import unified_diff
from textwrap import wrap
from typing import Any, Final

from pydantic import BaseModel

from schemas.frozen import frozen

__all__ = ["Change", "changes", "text_diff", "told"]

_LONG: Final = 120
_WIDTH: Final = 100
_MOST: Final = 20
_ABSENT: Final = "(absent)"


@frozen
class Change:
    """A field that is not the same: its dotted path, and its two values."""

    path: str
    old: Any
    new: Any


def changes(old: Any, new: Any, path: str = "") -> list[Change]:
    """The fields in which ``new`` differs from ``old``, in the order of the model.

    >>> changes({"a": (1, 2)}, {"a": (1, 3), "b": 4})
    [Change(path='a.1', old=2, new=3), Change(path='b', old='(absent)', new=4)]
    """
    return list(_walk(old, new, path))


def _walk(old: Any, new: Any, path: str) -> Iterator[Change]:
    if isinstance(old, BaseModel) and isinstance(new, BaseModel) and type(old) is type(new):
        for name in type(old).model_fields:
            yield from _walk(getattr(old, name, _ABSENT), getattr(new, name, _ABSENT), _join(path, name))
    elif isinstance(old, Mapping) and isinstance(new, Mapping):
        for name in [*old, *(name for name in new if name not in old)]:
            yield from _walk(old.get(name, _ABSENT), new.get(name, _ABSENT), _join(path, str(name)))
    elif isinstance(old, list | tuple) and isinstance(new, list | tuple):
        for index in range(max(len(old), len(new))):
            before = old[index] if index < len(old) else _ABSENT
            after = new[index] if index < len(new) else _ABSENT
            yield from _walk(before, after, _join(path, str(index)))
    elif type(old) is not type(new) or (
        old != new and (old == old or new == new)
    ):  # two times not-a-number is the same
        yield Change(path, old, new)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def told(found: Sequence[Change]) -> str:
    """The changes as text: a line with the path, then old (-) and new (+) values; the first twenty of them."""
    lines = []
    for change in found[:_MOST]:
        lines.append(f"{change.path}:")
        lines.append(text_diff(_shown(change.old), _shown(change.new)))
    if len(found) > _MOST:
        lines.append(f"and {len(found) - _MOST} more fields")
    return "\n".join(lines)


def text_diff(old: str, new: str) -> str:
    """Old lines marked with -, new ones with +; of long texts only what is around the changes.

    >>> text_diff("a", "b")
    '- a\\n+ b'
    """
    if len(old) <= _LONG and len(new) <= _LONG and "\n" not in old + new:
        return f"- {old}\n+ {new}"
    lines = list(unified_diff(_lines(old), _lines(new), lineterm="", n=1))[2:]
    return "\n".join(lines) or f"- {old[:_LONG]}\n+ {new[:_LONG]}"


def _lines(text: str) -> list[str]:
    """Lines short enough that a diff of them says where a text changed."""
    return [
        piece
        for line in text.splitlines()
        for piece in (wrap(line, _WIDTH, drop_whitespace=False, replace_whitespace=False) or [""])
    ]


def _shown(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, bytes):
        return f"{len(value)} bytes {value[:32].hex()}{'…' if len(value) > 32 else ''}"
    if isinstance(value, BaseModel):
        return repr(value)
    return str(value)
