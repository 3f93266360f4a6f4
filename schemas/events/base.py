"""The base of every event model: an immutable pydantic model with one Avro full name.

In: field values, or a decoded Avro record. Out: a validated, frozen model. A class that subclasses :class:`Event` and
declares a ``family`` is a recorded type: it gets the Avro name ``magnatronic.<family>.<ClassName>`` (the CloudEvents
``type`` too) and a place in :data:`EVENT_TYPES`. Nested values subclass :class:`Value`.

Field types and their Avro counterparts: ``str`` string, ``bool`` boolean, ``int`` long, ``float`` double,
:data:`Float32` float, ``bytes`` bytes, ``datetime`` long with logical type timestamp-micros (UTC, aware), ``StrEnum``
enum, ``tuple[X, ...]`` array, ``dict[str, X]`` map, ``X | None`` union with null first. A field that is added later
must have a default, so that every version reads every other.
"""

from datetime import UTC, datetime
from typing import Annotated, ClassVar

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict

__all__ = ["EVENT_TYPES", "NAMESPACE", "Event", "Float32", "Micros", "Personal", "PersonalText", "Timestamp", "Value"]

NAMESPACE = "magnatronic"

EVENT_TYPES: dict[str, type["Event"]] = {}
"""Every recorded event type by its Avro full name, for example ``magnatronic.tasks.TaskSubmitted``."""


class Float32:
    """Annotation marker: ``Annotated[float, Float32]`` is recorded as Avro ``float`` (4 bytes), not ``double``."""


class Micros:
    """Annotation marker: the ``datetime`` is recorded as Avro ``timestamp-micros``."""


class Personal:
    """Annotation marker: the field can hold personal data, so it is sealed where its event names data subjects.

    Without the subjects' keys such a field is blank: an empty text, bytes, array or map, or None. Whether a text field
    is personal is decided for each: tests/unit/test_schemas_personal.py lists those that are not.
    """


PersonalText = Annotated[str, Personal]
"""What somebody wrote, or what was made of it."""


def _to_utc(value: datetime) -> datetime:
    return value.astimezone(UTC)


Timestamp = Annotated[AwareDatetime, AfterValidator(_to_utc), Micros]
"""A point in time, aware, in UTC, with microsecond resolution."""


class Value(BaseModel):
    """A value nested in events: frozen, without unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_bytes="base64", val_json_bytes="base64")


class Event(Value):
    """One recorded fact. Subclass it with ``family="..."`` to record a new type.

    >>> class Greeted(Event, family="examples"):
    ...     '''Somebody was greeted.'''
    ...     name: str
    >>> Greeted.full_name
    'magnatronic.examples.Greeted'
    """

    family: ClassVar[str] = ""
    full_name: ClassVar[str] = ""

    def __init_subclass__(cls, family: str | None = None) -> None:
        super().__init_subclass__()
        if family is not None:
            cls.family = family
            cls.full_name = f"{NAMESPACE}.{family}.{cls.__name__}"
            EVENT_TYPES[cls.full_name] = cls
