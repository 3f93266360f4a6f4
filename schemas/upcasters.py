"""Upcasters: what turns an event of an old schema version into the current one, where Avro's resolution can't.

In: the plain values of a record, as its writer's schema had them. Out: values for the current model, before it
validates them. Adding a field with a default needs no upcaster (Avro resolution does that); a field that changed its
meaning, or a type that changed its name, does. Upcasters are chained, version by version, so each is written once and
never touched again.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from schemas.avro_schema import ArrayType, MapType, RecordType, Schema, UnionType

__all__ = ["UPCASTERS", "Upcast", "Upcaster", "Upcasters", "prune"]

Values = dict[str, Any]
Upcast = Callable[[Values], Values]


@dataclass(frozen=True, slots=True)
class Upcaster:
    """The way from one schema version to the current type: ``steps`` in order, then the type named ``target``."""

    target: str
    steps: tuple[Upcast, ...]

    def __call__(self, values: Values) -> Values:
        """Run the steps on a record's values."""
        for step in self.steps:
            values = step(values)
        return values


class Upcasters:
    """The upcasters of all types.

    >>> upcasters = Upcasters()
    >>> @upcasters.upcaster("magnatronic.examples.Greeted", 1)
    ... def split_name(values):
    ...     first, _, last = values.pop("name").partition(" ")
    ...     return values | {"first": first, "last": last}
    >>> upcasters.plan("magnatronic.examples.Greeted", 1)({"name": "Ada Lovelace"})
    {'first': 'Ada', 'last': 'Lovelace'}
    """

    def __init__(self) -> None:
        self._steps: dict[str, dict[int, Upcast]] = {}
        self._renamed: dict[str, str] = {}

    def upcaster(self, full_name: str, version: int) -> Callable[[Upcast], Upcast]:
        """Register a function from values of ``version`` to values of ``version + 1``.

        Raises:
            ValueError: there is one already.
        """

        def register(step: Upcast) -> Upcast:
            steps = self._steps.setdefault(full_name, {})
            if version in steps:
                raise ValueError(
                    f"{full_name} version {version} has an upcaster already: {steps[version].__qualname__}"
                )
            steps[version] = step
            return step

        return register

    def rename(self, old: str, new: str) -> None:
        """Records of type ``old`` are of type ``new`` now, whose version 1 has the shape of ``old``'s last version.

        Raises:
            ValueError: ``old`` was renamed already, or the renames would go round in a circle.
        """
        if old in self._renamed:
            raise ValueError(f"{old} was renamed to {self._renamed[old]} already")
        follow: str | None = new
        while follow is not None:
            if follow == old:
                raise ValueError(f"{old} -> {new} closes a circle of renames")
            follow = self._renamed.get(follow)
        self._renamed[old] = new

    def plan(self, full_name: str, version: int) -> Upcaster | None:
        """How records of this type and version become current; None where Avro's resolution does it alone.

        After a rename the new type's own upcasters run, from its first version.
        """
        asked, steps = full_name, list[Upcast]()
        name: str | None = full_name
        while name is not None:
            full_name = name
            steps += [step for at, step in sorted(self._steps.get(name, {}).items()) if at >= version]
            name, version = self._renamed.get(name), 1
        return Upcaster(full_name, tuple(steps)) if steps or full_name != asked else None


def prune(schema: Schema, value: Any) -> Any:
    """``value`` without the record fields that ``schema`` lacks, at any depth.

    An upcaster gets values as they were written: Avro's resolution did not drop what the current type lacks.
    """
    if isinstance(schema, UnionType):
        return None if value is None else prune(schema.branches[-1], value)
    if isinstance(schema, RecordType) and isinstance(value, dict):
        return {field.name: prune(field.type, value[field.name]) for field in schema.fields if field.name in value}
    if isinstance(schema, ArrayType):
        return [prune(schema.items, item) for item in value]
    if isinstance(schema, MapType):
        return {key: prune(schema.values, item) for key, item in value.items()}
    return value


UPCASTERS: Final = Upcasters()
"""The upcasters that the codec uses by default. No type has needed one yet."""
