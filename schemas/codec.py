"""The codec: events to Kafka values and headers, and back. Every event in the log went through here.

In: an event and its metadata. Out: the Confluent wire format (magic 0, schema id, Avro) and CloudEvents 1.0 binary-mode
headers; the same event and metadata always give the same bytes. The other way round it takes any bytes at all: what is
no event gives a :class:`schemas.errors.DecodeError` that names the record. The header ``ce_dataschema`` (full name and
fingerprint) decides what schema the bytes were written with; a record of a stock producer, without it, is read by its
framing id, and gets metadata that depends on nothing but its place in the log.
"""

import logging
import struct
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any, Final, NamedTuple

from pydantic import ValidationError

from schemas.avro_generation import parsed_schema, personal_marks
from schemas.avro_reader import MAX_VALUES, compile_reader, values_per_byte
from schemas.avro_schema import RecordType, Schema, fingerprint
from schemas.avro_writer import compile_writer
from schemas.encryption import Cipher
from schemas.errors import (
    DecodeError,
    EncodeError,
    EventTooLargeError,
    GenerationError,
    InvalidEventError,
    MalformedError,
    TooLargeError,
    UnknownSchemaError,
    UnsafeSchemaError,
)
from schemas.events import EVENT_TYPES
from schemas.events.base import Event
from schemas.metadata import Envelope, Metadata, deterministic_id
from schemas.personal import blank, personal_fields, placeholders
from schemas.record import Record
from schemas.registry import Manifest, ManifestIds, SchemaIds
from schemas.sealing import (
    SEALED,
    SUBJECTS,
    associated,
    open_part,
    part_reader,
    part_writer,
    subjects_header,
    subjects_of,
)
from schemas.topics import TOPICS
from schemas.upcasters import UPCASTERS, Upcaster, Upcasters, prune

__all__ = ["MAX_BYTES", "UNKNOWN_SOURCE", "Codec", "Encoded"]

MAX_BYTES: Final = max(topic.max_message_bytes for topic in TOPICS)
"""The default size cap: the largest message that any topic takes. Types are held to the cap of their topic too."""

UNKNOWN_SOURCE: Final = "/clients/unknown"
"""The source of records whose producer did not name itself."""

_log = logging.getLogger(__name__)
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_FRAME: Final = struct.Struct(">BI")
_HEADER_BYTES: Final = _FRAME.size
_MAX_MESSAGE: Final = 600
_MAX_PROBLEMS: Final = 50
_OVERHEAD_BYTES: Final = 1024
_MAX_HEADERS: Final = 4096
_MAX_READERS: Final = 1024
_MAX_SOURCES: Final = 1024


class Encoded(NamedTuple):
    """A record's value and headers, as a producer takes them."""

    value: bytes
    headers: list[tuple[str, bytes]]


@dataclass(slots=True)
class _Writing:
    """What is the same for every event of a type."""

    frame: bytes
    write: Callable[[Any], list[bytes]]
    type_header: tuple[str, bytes]
    schema_header: tuple[str, bytes]
    check: Callable[[bytes, int], Any]
    check_above: int
    max_bytes: int
    write_blank: Callable[[Any], list[bytes]]
    write_personal: Callable[[Any], bytes | None] | None


@dataclass(slots=True)
class _Reading:
    """How the bytes of one writer's schema become an event."""

    written_type: bytes
    read: Callable[[bytes, int], dict[str, Any]]
    upcast: Upcaster | None
    validate: Callable[[dict[str, Any]], Event]
    name: str
    schema: RecordType
    key: str
    max_bytes: int
    read_personal: Callable[[bytes], dict[str, Any]]
    model: type[Event]


class Codec:
    """Encodes and decodes events. Safe to share between threads.

    ``ids`` is where schema ids come from (None: the committed manifest), ``cipher`` seals personal fields (None: events
    about data subjects are read blank, and can't be written), and ``max_bytes`` is the cap on a record's value.
    """

    def __init__(
        self,
        ids: SchemaIds | None = None,
        *,
        cipher: Cipher | None = None,
        max_bytes: int = MAX_BYTES,
        manifest: Manifest | None = None,
        upcasters: Upcasters = UPCASTERS,
    ) -> None:
        self._manifest = Manifest.load() if manifest is None else manifest
        self._ids = ManifestIds(self._manifest) if ids is None else ids
        self.cipher = cipher
        self._max_bytes = max_bytes
        self._upcasters = upcasters
        self._writing: dict[type[Event], _Writing] = {}
        self._by_schema: dict[bytes, _Reading] = {}
        self._by_id: dict[int, _Reading] = {}
        self._sources: dict[bytes, str] = {}
        self._last_time = b"", _EPOCH
        self._said = False

    def prepare(self, *event_types: type[Event]) -> None:
        """Get the ids of these types now, so that a registry that is away shows at start-up and no event waits for it.

        Raises:
            RegistryError: a type has no schema id, or the registry did not answer.
        """
        for kind in event_types:
            if kind not in self._writing:
                self._prepare_writing(kind)

    def encode(self, event: Event, metadata: Metadata) -> Encoded:
        """The value and headers of ``event``.

        Raises:
            EncodeError: the event (made without validation) or the metadata can't be written, or is over the size cap.
            SubjectForgottenError: it is about a data subject whose key was destroyed.
            UnavailableError: the type has no schema id, or a data subject's key can't be had.
        """
        kind = type(event)
        writing = self._writing.get(kind) or self._prepare_writing(kind)
        try:
            subject, cause, correlation = metadata.subject, metadata.causation_id, metadata.correlation_id
            subject_text = subject.encode()
            # Of a task's events both are the task.
            correlation_text = subject_text if correlation == subject else correlation.encode()
            headers: list[tuple[str, bytes]] = [
                _SPECVERSION,
                writing.type_header,
                _source_header(metadata.source),
                ("ce_id", metadata.id.encode()),
                _time_header(metadata.time),
                writing.schema_header,
                ("ce_subject", subject_text),
                ("ce_causationid", cause.encode()),
                ("ce_correlationid", correlation_text),
                _CONTENT_TYPE,
            ]
            if not (subject and cause and correlation):
                headers = [header for header in headers if header[1] or header[0] not in _OPTIONAL]
            if metadata.traceparent:
                headers.append(("traceparent", metadata.traceparent.encode()))
            if metadata.data_subjects:
                return self._sealed(event, metadata, writing, headers)
            value = writing.frame + b"".join(writing.write(event))
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError, struct.error) as error:
            raise EncodeError(
                f"{kind.full_name} of {metadata.source!r} can't be encoded ({type(error).__name__}: {error}); "
                "validate it with its model before it is emitted"
            ) from error
        if len(value) > writing.check_above:
            self._check_size(kind, value, headers, writing)
        return Encoded(value, headers)

    def decode(self, record: Record) -> Envelope:
        """The event and metadata of ``record``.

        Raises:
            DecodeError: the record is no event that can be read here; the subclass says why.
            UnavailableError: the registry, which alone could tell the writer's schema, or the key store did not
                answer; worth a retry.
        """
        try:
            return self._decode(record)
        except DecodeError as error:
            place = f"{record.topic}[{record.partition}]@{record.offset}"
            raise type(error)(f"{place}: {str(error)[:_MAX_MESSAGE]}") from error.__cause__

    def _decode(self, record: Record) -> Envelope:
        value = record.value
        if value is None:
            raise MalformedError("the record has no value; events are never tombstones")
        if len(value) > self._max_bytes:
            raise TooLargeError(f"the value has {len(value)} bytes, over the cap of {self._max_bytes}")
        if len(value) < _HEADER_BYTES or value[0] != 0:
            raise MalformedError(
                f"the value starts with {value[:_HEADER_BYTES].hex() or 'nothing'}, not with magic byte 0 and a schema "
                "id; write it with the Confluent wire format"
            )
        headers = dict(record.headers)
        named = headers.get("ce_dataschema")
        reading = self._by_id.get(int.from_bytes(value[1:5], "big")) if named is None else self._by_schema.get(named)
        if reading is None:
            reading = self._prepare_reading(named, int.from_bytes(value[1:5], "big"))
        if len(value) > reading.max_bytes:
            raise TooLargeError(f"the value has {len(value)} bytes, over {reading.name}'s cap of {reading.max_bytes}")
        fields = reading.read(value, _HEADER_BYTES)
        if SEALED in headers:
            if len(value) + len(headers[SEALED] or b"") > reading.max_bytes:
                raise TooLargeError(f"value and {SEALED} are over {reading.name}'s cap of {reading.max_bytes} bytes")
            plain = None if self.cipher is None else open_part(self.cipher, headers, value)
            if plain is None:
                return self._erased(record, headers, fields, reading)
            fields.update(reading.read_personal(plain))
        if reading.upcast is not None:
            fields = _upcast(reading, fields)
        try:
            event = reading.validate(fields)
        except ValidationError as error:
            raise InvalidEventError(
                f"{reading.name} breaks its model's rules: {_first_problems(error)}; mend the producer"
            ) from None
        return Envelope(event, self._metadata(record, headers, event, reading))

    def _sealed(self, event: Event, metadata: Metadata, writing: _Writing, headers: list[tuple[str, bytes]]) -> Encoded:
        """The record of an event about data subjects."""
        subjects = subjects_header(metadata.data_subjects)
        headers.append((SUBJECTS, subjects))
        plain = None if writing.write_personal is None else writing.write_personal(event)
        value = writing.frame + b"".join(writing.write_blank(event))
        if plain is not None:
            if self.cipher is None:
                raise EncodeError(
                    f"{event.full_name} is about data subjects, and this process has no key store; set "
                    "MAGNATRONIC_KEY_STORE"
                )
            bound = associated(writing.schema_header[1], metadata.id.encode(), subjects, value)
            headers.append((SEALED, self.cipher.seal(metadata.data_subjects, bound, plain)))
            if len(value) + len(plain) + len(subjects) > writing.check_above:
                # As one value it must be what readers take, too.
                self._check_size(type(event), writing.frame + b"".join(writing.write(event)), headers[:-1], writing)
                self._check_size(type(event), value, headers, writing)
        return Encoded(value, headers)

    def _erased(
        self, record: Record, headers: dict[str, bytes | None], fields: dict[str, Any], reading: _Reading
    ) -> Envelope:
        """The event without its personal fields; the others are held to its model's rules."""
        if self.cipher is None and not self._said:
            self._said = True
            _log.warning(
                "events about data subjects are read without what is personal: this process has no key store "
                "(MAGNATRONIC_KEY_STORE)"
            )
        if reading.upcast is not None:
            fields = _upcast(reading, fields)
        try:
            event = reading.validate({**fields, **placeholders(reading.model)})
        except ValidationError as error:
            raise InvalidEventError(
                f"{reading.name}, blank, breaks its model's rules: {_first_problems(error)}; mend the producer"
            ) from None
        return Envelope(blank(event), self._metadata(record, headers, event, reading), erased=True)

    def _metadata(self, record: Record, headers: dict[str, bytes | None], event: Event, reading: _Reading) -> Metadata:
        get = headers.get
        if (version := get("ce_specversion")) is not None and version != b"1.0":
            raise MalformedError(f"ce_specversion is {version[:40]!r}, but only CloudEvents 1.0 is read")
        if (kind := get("ce_type")) is not None and kind != reading.written_type:
            raise MalformedError(
                f"ce_type is {kind[:100]!r}, but the schema is that of {reading.written_type.decode()}"
            )
        try:
            event_id, source, subject = get("ce_id"), get("ce_source"), get("ce_subject")
            time, cause, correlation = get("ce_time"), get("ce_causationid"), get("ce_correlationid")
            trace, subjects = get("traceparent"), get(SUBJECTS)
            subject_text = subject.decode() if subject else _key_text(record, event, reading)
            if not correlation:
                correlation_text = "" if event_id else str(getattr(event, reading.key, ""))
            else:
                correlation_text = subject_text if correlation == subject else correlation.decode()
            return Metadata(
                event_id.decode() if event_id else deterministic_id(record.topic, record.partition, record.offset),
                (self._sources.get(source) or self._source(source)) if source else UNKNOWN_SOURCE,
                subject_text,
                self._time(time) if time else _EPOCH + timedelta(milliseconds=record.timestamp_ms),
                cause.decode() if cause else "",
                correlation_text,
                trace.decode() if trace else "",
                subjects_of(subjects) if subjects else (),
            )
        except UnicodeDecodeError as error:
            raise MalformedError(f"a CloudEvents header is no UTF-8: {error.object[:60]!r}") from None
        except (ValueError, OverflowError) as error:
            raise MalformedError(f"ce_time or the record's timestamp is no point in time: {error}") from None

    def _source(self, text: bytes) -> str:
        source = text.decode()
        if len(self._sources) < _MAX_SOURCES:
            self._sources[text] = source
        return source

    def _time(self, text: bytes) -> datetime:
        # What one transaction wrote shares its time.
        last, time = self._last_time
        if text != last:
            time = _parse_time(text)
            self._last_time = text, time
        return time

    def _prepare_writing(self, kind: type[Event]) -> _Writing:
        max_bytes = min(self._max_bytes, _topic_cap(kind))
        try:
            schema = parsed_schema(kind)
        except (GenerationError, UnsafeSchemaError) as error:
            raise EncodeError(f"{kind.__name__} has no Avro schema: {error}") from error
        marks = personal_marks(kind)
        made = self._writing[kind] = _Writing(
            frame=_FRAME.pack(0, self._ids.id_of(schema)),
            write=compile_writer(schema),
            type_header=("ce_type", schema.name.encode()),
            schema_header=("ce_dataschema", f"{schema.name}/{fingerprint(schema)}".encode()),
            check=compile_reader(schema),
            # Fewer bytes can't hold more values than a reader takes.
            check_above=min(max_bytes - _MAX_HEADERS, int(MAX_VALUES / max(values_per_byte(schema), 1))),
            max_bytes=max_bytes,
            write_blank=compile_writer(schema, marks),
            write_personal=part_writer(schema, personal_fields(kind), marks) if marks else None,
        )
        return made

    def _prepare_reading(self, named: bytes | None, schema_id: int) -> _Reading:
        """Find the writer's schema and compile its reader; remembered, as few schemas write most records."""
        if named is None:
            made = self._reading(self._fetch(schema_id), f"schema id {schema_id}")
            _remember(self._by_id, schema_id, made)
            return made
        try:
            name, _, print_ = named.decode("ascii").partition("/")
        except UnicodeDecodeError:
            raise MalformedError(f"ce_dataschema {named[:100]!r} is no <full name>/<fingerprint>") from None
        if not name or not print_:
            raise MalformedError(f"ce_dataschema {named[:100]!r} is no <full name>/<fingerprint>")
        version = self._manifest.find(name, print_)
        schema: Schema
        if version is not None:
            schema = version.parsed
        else:
            # A newer release wrote it: this one's manifest can't know it, but a registry may.
            schema = self._fetch(schema_id)
            if fingerprint(schema) != print_:
                raise UnknownSchemaError(
                    f"the manifest does not know {named[:200]!r}, and schema id {schema_id} is another schema; "
                    "upgrade this release"
                )
        made = self._reading(schema, f"ce_dataschema {named[:200]!r}")
        _remember(self._by_schema, named, made)
        return made

    def _fetch(self, schema_id: int) -> Schema:
        try:
            schema = self._ids.schema_of(schema_id)
        except UnsafeSchemaError as error:
            raise UnknownSchemaError(f"schema id {schema_id} is not read with: {error}") from error
        if schema is None:
            raise UnknownSchemaError(
                f"nobody knows schema id {schema_id}; set MAGNATRONIC_SCHEMA_REGISTRY_URL to the producer's registry"
            )
        return schema

    def _reading(self, schema: Schema, what: str) -> _Reading:
        if not isinstance(schema, RecordType):
            raise UnknownSchemaError(f"{what} is no record, so no event")
        version = self._manifest.find(schema.name, fingerprint(schema))
        upcast = None if version is None else self._upcasters.plan(version.name, version.version)
        name = schema.name if upcast is None else upcast.target
        model = EVENT_TYPES.get(name)
        if model is None:
            raise UnknownSchemaError(f"{what} is of type {name}, and this release has no such event")
        try:
            read = compile_reader(schema, None if upcast is not None else parsed_schema(model))
        except UnsafeSchemaError as error:
            raise UnknownSchemaError(f"{what}: {error}") from error
        return _Reading(
            written_type=schema.name.encode(),
            read=read,
            upcast=upcast,
            validate=model.__pydantic_validator__.validate_python,
            name=name,
            schema=parsed_schema(model),
            key=next((topic.key for topic in TOPICS if model in topic.events), ""),
            max_bytes=min(self._max_bytes, _topic_cap(model)),
            read_personal=part_reader(schema, None if upcast is not None else parsed_schema(model)),
            model=model,
        )

    @staticmethod
    def _check_size(kind: type[Event], value: bytes, headers: list[tuple[str, bytes]], writing: _Writing) -> None:
        # The broker counts headers, key and its own framing too.
        size = len(value) + sum(len(name) + len(text) for name, text in headers) + _OVERHEAD_BYTES
        if size > writing.max_bytes:
            raise EventTooLargeError(
                f"{kind.full_name} takes {size} bytes, over the cap of {writing.max_bytes}; emit less in one event"
            )
        try:
            writing.check(value, _HEADER_BYTES)
        except DecodeError as error:
            raise EventTooLargeError(f"{kind.full_name} could not be read again: {error}") from error


_SPECVERSION: Final = ("ce_specversion", b"1.0")
_OPTIONAL: Final = frozenset({"ce_subject", "ce_causationid", "ce_correlationid"})
_CONTENT_TYPE: Final = ("content-type", b"application/avro")


def _topic_cap(kind: type[Event]) -> int:
    return next((topic.max_message_bytes for topic in TOPICS if kind in topic.events), MAX_BYTES)


@lru_cache(maxsize=256)
def _source_header(source: str) -> tuple[str, bytes]:
    return "ce_source", source.encode()


@lru_cache(maxsize=256)  # the records of a batch share their append time, which becomes their outputs' time
def _time_header(time: datetime) -> tuple[str, bytes]:
    if time.tzinfo is not UTC:
        if time.tzinfo is None:
            raise EncodeError("the metadata's time has no time zone; use an aware datetime")
        time = time.astimezone(UTC)
    return "ce_time", (time.isoformat("T", "microseconds")[:26] + "Z").encode()


def _parse_time(text: bytes) -> datetime:
    time = datetime.fromisoformat(text.decode())
    if time.tzinfo is UTC:
        return time
    if time.tzinfo is None:
        raise ValueError(f"{text[:40]!r} has no time zone")
    return time.astimezone(UTC)


def _key_text(record: Record, event: Event, reading: _Reading) -> str:
    if record.key is not None:
        try:
            return record.key.decode()
        except UnicodeDecodeError:
            pass
    return str(getattr(event, reading.key, ""))


def _upcast(reading: _Reading, fields: dict[str, Any]) -> dict[str, Any]:
    assert reading.upcast is not None
    try:
        values: dict[str, Any] = prune(reading.schema, reading.upcast(fields))
        return values
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise InvalidEventError(
            f"the upcaster to {reading.name} failed ({type(error).__name__}: {error}); mend it in schemas.upcasters"
        ) from error


def _first_problems(error: ValidationError) -> str:
    if error.error_count() > _MAX_PROBLEMS:
        # Telling each would take longer than finding them.
        return f"{error.error_count()} fields are wrong"
    problems = error.errors(include_url=False, include_context=False, include_input=False)
    told = [f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in problems[:3]]
    return "; ".join(told)[:500]


def _remember(readings: dict[Any, _Reading], key: Any, made: _Reading) -> None:
    while len(readings) >= _MAX_READERS:
        del readings[next(iter(readings))]
    readings[key] = made
