"""Records that are decoded only when somebody looks into them: outputs that no agent reads are compared as bytes.

In: a record that names itself in its headers. Out: :class:`LazyEnvelope`, which knows id, source and cause, and decodes
the event when it is asked for.
"""

from typing import Final

from schemas.codec import Codec
from schemas.events import EVENT_TYPES, Event
from schemas.metadata import Envelope
from schemas.record import Record

__all__ = ["LazyEnvelope", "lazily", "type_name"]

_NAMES: Final = {name.encode(): kind.__name__ for name, kind in EVENT_TYPES.items()}


class _Head:
    """As much of an event's metadata as tells what caused it."""

    __slots__ = ("causation_id", "id", "source")

    def __init__(self, event_id: bytes, source: bytes, cause: bytes) -> None:
        self.id = event_id.decode()
        self.source = source.decode()
        self.causation_id = cause.decode()


class LazyEnvelope(Envelope):
    """An event that is decoded when it is looked into; its ``metadata`` has id, source and causes only."""

    __slots__ = ("_codec", "_event", "_record", "name")

    def __init__(self, codec: Codec, record: Record, head: _Head, name: str) -> None:
        self.metadata = head  # type: ignore[assignment,misc]
        self.erased = False  # type: ignore[misc]
        self.name = name
        """The event type's class name."""
        self._codec, self._record = codec, record
        self._event: Event | None = None

    @property
    def event(self) -> Event:
        """The event.

        Raises:
            DecodeError: the record's bytes are none.
        """
        if self._event is None:
            self._event = self._codec.decode(self._record).event
        return self._event


def lazily(codec: Codec, record: Record) -> LazyEnvelope | None:
    """The record's envelope, not decoded; None when its headers don't tell enough, or it holds sealed fields."""
    headers = dict(record.headers)
    name = _NAMES.get(headers.get("ce_type") or b"")
    event_id, source, cause = headers.get("ce_id"), headers.get("ce_source"), headers.get("ce_causationid")
    if not (name and event_id and source and cause) or "ce_sealed" in headers or "ce_dataschema" not in headers:
        return None
    try:
        return LazyEnvelope(codec, record, _Head(event_id, source, cause), name)
    except UnicodeDecodeError:
        return None


def type_name(envelope: Envelope) -> str:
    """The event type's class name, without decoding the event for it."""
    return envelope.name if isinstance(envelope, LazyEnvelope) else type(envelope.event).__name__
