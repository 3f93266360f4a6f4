"""The errors of schemas.

SchemaError
├── GenerationError           a model can't be expressed in Avro, or the committed files are not what the models say
├── UnavailableError          what is needed to read or write a record can't be had
│   ├── RegistryError         a schema id: not in the manifest, or the registry refused or didn't answer
│   └── KeyStoreError         a data subject's key: the key store refused or didn't answer
├── UnsafeSchemaError         a writer schema that would let few bytes cost much: recursive, too large, items of no size
├── EncodeError               an event can't be written
│   ├── EventTooLargeError    its bytes are over the size cap
│   └── SubjectForgottenError it is about a data subject whose key was destroyed
└── DecodeError               a record can't be read; names its topic, partition and offset
    ├── TruncatedError        the bytes end too early
    ├── TrailingBytesError    bytes are left after the event
    ├── UnknownSchemaError    nobody knows the schema id or fingerprint, or the schema is none that can be read
    ├── TooLargeError         over the size cap, or more values than one event may hold
    ├── MalformedError        no value, bad framing, bad header, bad UTF-8, an index or length out of range
    └── InvalidEventError     well-formed Avro that breaks the model's own rules
"""

__all__ = [
    "DecodeError",
    "EncodeError",
    "EventTooLargeError",
    "GenerationError",
    "InvalidEventError",
    "KeyStoreError",
    "MalformedError",
    "RegistryError",
    "SchemaError",
    "SubjectForgottenError",
    "TooLargeError",
    "TrailingBytesError",
    "TruncatedError",
    "UnavailableError",
    "UnknownSchemaError",
    "UnsafeSchemaError",
]


class SchemaError(Exception):
    """The base of all errors that schemas raise."""


class GenerationError(SchemaError):
    """A model can't be expressed in Avro, or committed schema files are not what the models say."""


class UnavailableError(SchemaError):
    """What is needed to read or write a record can't be had.

    ``retryable``: who has it did not answer, or answered that it can't now; the same call may succeed later.
    """

    def __init__(self, message: str, *, retryable: bool = False) -> None:
        super().__init__(message)
        self.retryable = retryable


class RegistryError(UnavailableError):
    """A schema or its id can't be had from the manifest or the registry."""


class KeyStoreError(UnavailableError):
    """A data subject's key can't be had from the key store."""


class UnsafeSchemaError(SchemaError):
    """A schema that is no valid Avro, or that would let few bytes cost much time or memory."""


class EncodeError(SchemaError):
    """An event can't be written as Avro."""


class EventTooLargeError(EncodeError):
    """An event's bytes are over the size cap, so no reader would take them."""


class SubjectForgottenError(EncodeError):
    """An event is about a data subject whose key was destroyed, so nothing of it can be recorded."""


class DecodeError(SchemaError):
    """A record can't be read as an event. Retrying does not help; the record belongs into dead-letters."""


class TruncatedError(DecodeError):
    """The bytes end before the event does."""


class TrailingBytesError(DecodeError):
    """Bytes are left after the event."""


class UnknownSchemaError(DecodeError):
    """Neither manifest nor registry knows the writer's schema, or no event type here can read it."""


class TooLargeError(DecodeError):
    """The record is over the size cap, or holds more values than one event may."""


class MalformedError(DecodeError):
    """The bytes or headers are no encoding of an event at all."""


class InvalidEventError(DecodeError):
    """The bytes are well-formed Avro, but the event breaks its model's rules."""
