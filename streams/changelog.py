"""What lies in a changelog besides lane states, and how it is written: journal, timers, parked events, crash counts.

In: what a processor has to remember of a partition until its event is finished. Out: keys and values for its
changelog, and from a changelog's last record of each key :class:`Restored`, what the partition's next owner goes on
with. A key is ``<kind>/<rest>`` in UTF-8; a null value is a tombstone.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Final

from pydantic import BaseModel, ConfigDict, ValidationError

from schemas.record import Header, Record
from streams.errors import StateError
from streams.transactor import Outgoing

__all__ = [
    "OWNER_KEY",
    "REBUILD_KEY",
    "STATE_PREFIX",
    "Parked",
    "Restored",
    "Timer",
    "effect_key",
    "owner_value",
    "parked_key",
    "parked_message",
    "run_key",
    "run_value",
    "state_key",
    "timer_key",
    "timer_value",
]

STATE_PREFIX: Final = b"state/"
"""What the keys of lane states start with; the lane follows."""
OWNER_KEY: Final = b"owner/"
"""The key of the marker that a partition's owner writes when it takes over, and deletes when it leaves in order."""
REBUILD_KEY: Final = b"rebuild/"
"""The key of the marker that is there while a rebuild writes what was lost: no owner may start with a part of it."""

_SEPARATOR: Final = "\x1f"
_ESCAPE: Final = "\x1e"
_ATTEMPT: Final = "parked-attempt"
_DUE: Final = "parked-due"
_TIMESTAMP: Final = "parked-timestamp"
_KEY: Final = "parked-key"
_PARKED_HEADERS: Final = (_ATTEMPT, _DUE, _TIMESTAMP, _KEY)
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)


def state_key(lane: str) -> bytes:
    """The key of a lane's state."""
    return STATE_PREFIX + lane.encode()


def effect_key(event_id: str, sequence: int) -> bytes:
    """The key of an event's effect; ``sequence`` is its place in the order of completion."""
    return f"effect/{event_id}/{sequence}".encode()


def timer_key(lane: str, name: str) -> bytes:
    """The key of a lane's timer. Lane and name may have any characters."""
    if _SEPARATOR in lane or _ESCAPE in lane:
        lane = lane.replace(_ESCAPE, f"{_ESCAPE}e").replace(_SEPARATOR, f"{_ESCAPE}f")
    return f"timer/{lane}{_SEPARATOR}{name}".encode()


def _lane_of_timer(escaped: str) -> str:
    return escaped.replace(f"{_ESCAPE}f", _SEPARATOR).replace(f"{_ESCAPE}e", _ESCAPE)


def parked_key(offset: int) -> bytes:
    """The key of a parked event; ``offset`` is its place in the input partition."""
    return b"parked/%d" % offset


def run_key(offset: int) -> bytes:
    """The key of an event's crash count; ``offset`` is its place in the input partition."""
    return b"run/%d" % offset


def run_value(starts: int) -> bytes:
    """The value of a crash count: how often the event was started in a life of the process that ended badly."""
    return b"%d" % starts


def owner_value(deaths: int, life: str = "") -> bytes:
    """The value of the owner's marker: how many owners in a row died before this one, and which life it is in."""
    return b'{"deaths":%d,"life":"%b"}' % (deaths, life.encode())


@dataclass(frozen=True, slots=True)
class Timer:
    """A lane's timer. When it is due, TimerFired with record key ``subject`` is written, caused by event ``cause``."""

    lane: str
    name: str
    due: datetime
    subject: str
    correlation: str
    cause: str
    traceparent: str
    data_subjects: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Parked:
    """An event that waits for its next attempt.

    ``record`` is as it was in the input topic; ``attempt`` counts those that are over, ``due_ms`` is in milliseconds
    since the epoch.
    """

    record: Record
    attempt: int
    due_ms: int


@dataclass(slots=True)
class Restored:
    """What a changelog partition holds.

    ``states`` are values of :class:`streams.state.StateCodec` by lane, ``effects`` the recorded effects by event id, in
    order of completion; their records have the changelog's place and their own value and headers. ``parked`` is in the
    order of offsets. ``runs`` has the crash count of each input offset, ``deaths`` that of the owner's marker, None
    when there is no marker: the last owner left in good order. ``life`` names the life of the process that wrote it.
    ``rebuilding``: a rebuild has written a part of what belongs there. ``end`` is the offset that the partition ended
    at: 0 where nothing was ever written.
    """

    states: dict[str, bytes] = field(default_factory=dict)
    effects: dict[str, list[Record]] = field(default_factory=dict)
    timers: list[Timer] = field(default_factory=list)
    parked: list[Parked] = field(default_factory=list)
    runs: dict[int, int] = field(default_factory=dict)
    deaths: int | None = None
    life: str = ""
    rebuilding: bool = False
    end: int = field(default=0, compare=False)

    @property
    def empty(self) -> bool:
        """Whether nothing at all was there."""
        return self.deaths is None and not (self.states or self.effects or self.timers or self.parked or self.runs)

    @classmethod
    def of(cls, states: dict[str, bytes], others: Iterable[Record], input_topic: str) -> "Restored":
        """The lane states and what ``others``, the last records of all other keys, say.

        Raises:
            StateError: a record is of no kind that is known here, or none of its kind.
        """
        restored = cls(states)
        effects: dict[str, list[tuple[int, Record]]] = {}
        for record in others:
            try:
                restored._take(record, input_topic, effects)
            except ValueError as error:
                said = error.errors(include_url=False)[:2] if isinstance(error, ValidationError) else error
                raise StateError(
                    f"{record.topic}[{record.partition}]@{record.offset}: key {(record.key or b'')[:200]!r} with "
                    f"{len(record.value or b'')} bytes can't be read: {str(said)[:500]}; it was written by a later "
                    "release, or by somebody else"
                ) from error
        for event_id, numbered in effects.items():
            numbered.sort(key=lambda each: each[0])
            restored.effects[event_id] = [record for _, record in numbered]
        restored.parked.sort(key=lambda each: each.record.offset)
        return restored

    def _take(self, record: Record, input_topic: str, effects: dict[str, list[tuple[int, Record]]]) -> None:
        value = record.value or b""
        kind, slash, rest = (record.key or b"").decode().partition("/")
        match kind if slash else "":
            case "effect":
                event_id, _, sequence = rest.rpartition("/")
                effects.setdefault(event_id, []).append((_number(sequence), record))
            case "timer":
                self.timers.append(_timer(rest, value))
            case "parked":
                self.parked.append(_parked(_number(rest), record, input_topic))
            case "run":
                self.runs[_number(rest)] = _number(value.decode())
            case "owner" if not rest:
                owner = _OwnerValue.model_validate_json(value)
                self.deaths, self.life = owner.deaths, owner.life
            case "rebuild" if not rest:
                self.rebuilding = True
            case _:
                raise ValueError("there is no such kind")


class _OwnerValue(BaseModel):
    model_config = ConfigDict(strict=True)

    deaths: int
    life: str = ""


class _TimerValue(BaseModel):
    """``due`` is in microseconds since the epoch. Unknown fields are a later release's."""

    model_config = ConfigDict(strict=True)

    due: int
    subject: str
    correlation: str
    cause: str
    traceparent: str
    data_subjects: tuple[str, ...] = ()


def timer_value(timer: Timer) -> bytes:
    """The changelog value of ``timer``: JSON, readable with any consumer."""
    value = _TimerValue(
        due=(timer.due - _EPOCH) // _MICROSECOND,
        subject=timer.subject,
        correlation=timer.correlation,
        cause=timer.cause,
        traceparent=timer.traceparent,
        data_subjects=timer.data_subjects,
    )
    return value.model_dump_json(exclude_defaults=True).encode()


def _timer(rest: str, data: bytes) -> Timer:
    lane, separator, name = rest.partition(_SEPARATOR)
    if not separator:
        raise ValueError("the key has a lane but no name")
    value = _TimerValue.model_validate_json(data)
    try:
        due = _EPOCH + timedelta(microseconds=value.due)
    except OverflowError as error:
        raise ValueError(f"due at {value.due} µs is no time") from error
    told = value.subject, value.correlation, value.cause, value.traceparent, value.data_subjects
    return Timer(_lane_of_timer(lane), name, due, *told)


def parked_message(changelog: str, parked: Parked) -> Outgoing:
    """The message that keeps ``parked`` in ``changelog``.

    The first four headers are always ours, so that the event's own may have any names.

    Raises:
        ValueError: the record has no value, which would make the message a tombstone; such a record is no event.
    """
    record = parked.record
    if record.value is None:
        raise ValueError(f"{record.topic}[{record.partition}]@{record.offset} has no value and can't be parked")
    headers: list[Header] = [
        (_ATTEMPT, b"%d" % parked.attempt),
        (_DUE, b"%d" % parked.due_ms),
        (_TIMESTAMP, b"%d" % record.timestamp_ms),
        (_KEY, record.key),
        *record.headers,
    ]
    # Null header values are valid, and the client takes them, though the alias for messages does not say so.
    return changelog, parked_key(record.offset), record.value, headers, record.partition  # type: ignore[return-value]


def _parked(offset: int, record: Record, input_topic: str) -> Parked:
    ours = dict(record.headers[: len(_PARKED_HEADERS)])
    if tuple(ours) != _PARKED_HEADERS:
        raise ValueError(f"its headers begin with {', '.join(ours) or 'nothing'}, not {', '.join(_PARKED_HEADERS)}")
    attempt, due, timestamp = (_number((ours[name] or b"").decode()) for name in (_ATTEMPT, _DUE, _TIMESTAMP))
    headers = tuple(record.headers[len(_PARKED_HEADERS) :])
    original = Record(input_topic, record.partition, offset, timestamp, ours[_KEY], record.value, headers)
    return Parked(original, attempt, due)


def _number(text: str) -> int:
    """The integer that ``text`` writes in decimal, as it is written here."""
    number = int(text)
    if str(number) != text:
        raise ValueError(f"{text!r} is no plain number")
    return number
