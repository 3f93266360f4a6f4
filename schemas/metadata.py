"""What travels beside an event: its identity, its cause, and the CloudEvents attributes made from them.

In: an event's cause and place. Out: :class:`Metadata`, which the codec writes as CloudEvents 1.0 binary-mode Kafka
headers. Ids are UUIDv5 of what caused the event, so that the same decision made twice names its events alike.
"""

from datetime import datetime
from hashlib import sha1, sha256
from typing import Any, Final
from uuid import UUID

import orjson

from schemas.events.base import Event
from schemas.frozen import frozen

__all__ = [
    "ID_NAMESPACE",
    "REDRIVE_HEADER",
    "Envelope",
    "Metadata",
    "canonical_json",
    "deterministic_id",
    "joined_id",
    "request_hash",
]

ID_NAMESPACE = UUID("6d61676e-6174-5726-af6e-696300000000")
"""The UUIDv5 namespace of all ids that Magnatronic derives."""

REDRIVE_HEADER: Final = "redrive"
"""The last header of a dead letter's record that was sent again: the name of the one agent that it is for."""

_HASHED_AT_ONCE = 2047
"""hashlib lets go of the interpreter lock for more bytes than this. Beside a busy thread it then takes 3 ms to come
back (measured; the switch interval is 5 ms), against 10 µs for hashing 20 kB."""

_NAMESPACE_HASH = sha1(ID_NAMESPACE.bytes, usedforsecurity=False)
_VARIANT = {digit: "89ab"[int(digit, 16) & 3] for digit in "0123456789abcdef"}


def deterministic_id(*parts: str | int) -> str:
    """The UUIDv5 (RFC 9562) of ``parts`` under :data:`ID_NAMESPACE`, as text.

    >>> deterministic_id("cause", "scope", 0) == deterministic_id("cause", "scope", 0)
    True
    """
    return joined_id("\x1f".join(map(str, parts)))


def joined_id(parts: str) -> str:
    """:func:`deterministic_id` of parts that are joined by U+001F already.

    >>> joined_id("cause\\x1fscope\\x1f0") == deterministic_id("cause", "scope", 0)
    True
    """
    digest = _NAMESPACE_HASH.copy()
    digest.update(parts.encode())
    text = digest.hexdigest()
    return f"{text[:8]}-{text[8:12]}-5{text[13:16]}-{_VARIANT[text[16]]}{text[17:20]}-{text[20:32]}"


def canonical_json(value: Any) -> str:
    """``value`` (a pydantic model, or anything JSON can hold) as JSON with sorted keys and no spaces.

    Raises:
        TypeError: it holds something that JSON can't.
    """
    if hasattr(value, "model_dump"):
        value = value.model_dump(mode="json")
    return orjson.dumps(value, option=orjson.OPT_SORT_KEYS).decode()


def request_hash(request: str) -> str:
    """The SHA-256 of a canonical JSON request, as hex."""
    raw = memoryview(request.encode())
    digest = sha256(raw[:_HASHED_AT_ONCE])
    for start in range(_HASHED_AT_ONCE, len(raw), _HASHED_AT_ONCE):
        digest.update(raw[start : start + _HASHED_AT_ONCE])
    return digest.hexdigest()


@frozen
class Metadata:
    """Who made an event, why, and about what.

    ``id`` is the event's id, ``source`` who made it (``/agents/<name>@<version>`` or ``/clients/<name>``), ``time``
    when it was decided, ``subject`` its record key. ``causation_id`` is the id of the event that it answers,
    ``correlation_id`` the id that all events of one task share (the task_id; for documents the document_id).
    ``traceparent`` is the W3C trace context; it is no part of a decision and is left out of comparisons.
    ``data_subjects`` are the key ids of the people that the event is about, sorted; all that follows from it has them
    too.
    """

    id: str
    source: str
    subject: str
    time: datetime
    causation_id: str = ""
    correlation_id: str = ""
    traceparent: str = ""
    data_subjects: tuple[str, ...] = ()


@frozen
class Envelope:
    """An event and its metadata. ``erased``: its personal fields can't be read any more, and are blank."""

    event: Event
    metadata: Metadata
    erased: bool = False
