"""Which fields of a model are personal, and the same value without them.

In: models whose fields are marked :class:`~schemas.events.base.Personal`, nested ones too. Out: copies in which these
fields are blank and all others as they were: keys, ids, numbers, times and names of types, agents, models and tools.
A blank value is an empty text, bytes, array or map, or None. A value whose personal fields are blank already comes back
as it is, which tells that there is nothing to seal.
"""

import types
from collections.abc import Callable
from functools import cache
from typing import Annotated, Any, Final, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel

from schemas.events.base import Personal, Value

__all__ = ["blank", "marked_fields", "personal_fields", "placeholders"]

ModelT = TypeVar("ModelT", bound=BaseModel)
_Blanker = Callable[[Any], Any]

_BLANKS: Final[dict[Any, Any]] = {str: "", bytes: b"", tuple: (), dict: {}}
_PLACEHOLDER: Final = "-"


def blank(value: ModelT) -> ModelT:
    """``value`` with its personal fields blank; the same object where they are blank already."""
    made: ModelT = _blanked(value, _blankers(type(value)))
    return made


def personal_fields(model: type[BaseModel]) -> tuple[str, ...]:
    """The model's own fields that are personal or hold something personal, in order.

    Raises:
        TypeError: a field is marked that has no blank value, such as a number.
    """
    return tuple(_blankers(model))


def marked_fields(model: type[Value]) -> dict[type[Value], frozenset[str]]:
    """The marked fields of the model and of those nested in it; models without one are missing."""
    found: dict[type[Value], frozenset[str]] = {}
    seen: set[type[Value]] = set()
    waiting: list[Any] = [model]
    while waiting:
        kind = waiting.pop()
        waiting.extend(get_args(kind))
        if isinstance(kind, type) and issubclass(kind, Value) and kind not in seen:
            seen.add(kind)
            waiting.extend(info.annotation for info in kind.model_fields.values())
            if marked := frozenset(name for name, info in kind.model_fields.items() if _is_marked(info.metadata)):
                found[kind] = marked
    return found


@cache
def placeholders(model: type[BaseModel]) -> dict[str, str]:
    """What the model's own personal texts are given to be validated by the model's rules when they are blank."""
    return {
        name: _PLACEHOLDER
        for name, info in model.model_fields.items()
        if _is_marked(info.metadata) and info.annotation is str
    }


@cache
def _blankers(model: type[BaseModel]) -> dict[str, _Blanker]:
    found: dict[str, _Blanker] = {}
    for name, info in model.model_fields.items():
        made = _blanker(f"{model.__name__}.{name}", info.annotation, _is_marked(info.metadata))
        if made is not None:
            found[name] = made
    return found


def _is_marked(metadata: Any) -> bool:
    return any(mark is Personal or isinstance(mark, Personal) for mark in metadata)


def _blanker(where: str, annotation: Any, marked: bool) -> _Blanker | None:
    """What makes a field's value blank; None where nothing in it is personal."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _blanker(where, args[0], marked or _is_marked(args[1:]))
    if origin in (Union, types.UnionType):
        if marked:
            return lambda _: None
        inner = [made for arg in args if (made := _blanker(where, arg, False)) is not None]
        if not inner:
            return None
        if len(args) != 2 or types.NoneType not in args:
            raise TypeError(f"{where}: only X | None can hold something personal, not {annotation}")
        some = inner[0]
        return lambda value: None if value is None else some(value)
    if marked:
        kind = origin or annotation
        if kind not in _BLANKS:
            raise TypeError(
                f"{where}: {annotation} has no blank value; only texts, bytes, arrays and maps can be Personal"
            )
        empty = _BLANKS[kind]
        return lambda _: empty.copy() if kind is dict else empty
    if origin is tuple and (made := _blanker(where, args[0], False)) is not None:
        return _each(made)
    if origin is dict and (item := _blanker(where, args[1], False)) is not None:
        return lambda value: {key: item(one) for key, one in value.items()}
    if isinstance(annotation, type) and issubclass(annotation, BaseModel) and (fields := _blankers(annotation)):
        return lambda value: _blanked(value, fields)
    return None


def _each(made: _Blanker) -> _Blanker:
    def blanked(values: tuple[Any, ...]) -> tuple[Any, ...]:
        results = tuple(map(made, values))
        return values if all(one is other for one, other in zip(values, results, strict=True)) else results

    return blanked


def _blanked(value: Any, blankers: dict[str, _Blanker]) -> Any:
    changed = {}
    for name, blanker in blankers.items():
        before = getattr(value, name)
        after = blanker(before)
        if after is not before and after != before:
            changed[name] = after
    return value.model_copy(update=changed) if changed else value
