"""How an event's personal fields travel: blank in the record's value, whole and sealed in the header ``ce_sealed``.

In: an event and its data subjects, or a record's value and headers. Out: the value of the blank event and the sealed
header, or the sealed fields. What is sealed is the list of the fields' names, a line feed, and the Avro of these fields
as the event's schema has them, so that a field that is marked later, or no longer, changes nothing for older records.
It is bound to the schema, the event's id, its subjects and the value beside it: no part can be put into another record.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Final

from schemas.avro_reader import compile_reader
from schemas.avro_schema import RecordType
from schemas.avro_writer import compile_writer
from schemas.encryption import KEY_ID, MAX_SUBJECTS
from schemas.errors import EncodeError, MalformedError

__all__ = [
    "SEALED",
    "SUBJECTS",
    "associated",
    "open_part",
    "part_reader",
    "part_writer",
    "subjects_header",
    "subjects_of",
]

SEALED: Final = "ce_sealed"
SUBJECTS: Final = "ce_datasubjects"
"""The CloudEvents extension that names the data subjects: their key ids, sorted, with commas in between."""

_MAX_PARTS: Final = 64

PartReader = Callable[[bytes, int], dict[str, Any]]


def part_writer(
    schema: RecordType, names: Sequence[str], marks: Mapping[str, frozenset[str]]
) -> Callable[[Any], bytes | None]:
    """A function that gives what is to be sealed of an instance of the schema's model: the fields ``names``, which hold
    what ``marks`` say is personal. None where all of it is blank.
    """
    part = _part(schema, names)
    write, write_blank = compile_writer(part), compile_writer(part, marks)
    head = ",".join(names).encode() + b"\n"

    def personal(event: Any) -> bytes | None:
        whole = b"".join(write(event))
        return None if whole == b"".join(write_blank(event)) else head + whole

    return personal


def part_reader(written: RecordType, target: RecordType | None) -> Callable[[bytes], dict[str, Any]]:
    """A function that gives the fields in what was sealed of an event of schema ``written``, as ``target`` has them
    (None: as they were written). It raises DecodeError.
    """
    known = {field.name for field in written.fields}
    readers: dict[bytes, tuple[PartReader, tuple[str, ...]]] = {}

    def read(plain: bytes) -> dict[str, Any]:
        head, line, _ = plain[:65_536].partition(b"\n")
        made = readers.get(head) if line else None
        if made is None:
            names = tuple(head.decode("utf-8", "replace").split(",")) if line else ()
            if not names or not known.issuperset(names):
                raise MalformedError(f"{SEALED} holds fields that {written.name} does not have: {str(names)[:200]}")
            wanted = None if target is None else _part(target, names)
            made = compile_reader(_part(written, names), wanted), names
            if len(readers) < _MAX_PARTS:
                readers[head] = made
        return made[0](plain, len(head) + 1)

    return read


def _part(schema: RecordType, names: Sequence[str]) -> RecordType:
    return RecordType(schema.name, tuple(field for field in schema.fields if field.name in names))


def associated(dataschema: bytes, event_id: bytes, subjects: bytes, value: bytes) -> tuple[bytes, ...]:
    """What a seal is bound to: the two headers' and the id's bytes, and the record's value."""
    return dataschema, event_id, subjects, value


def open_part(cipher: Any, headers: Mapping[str, bytes | None], value: bytes) -> bytes | None:
    """What a record's sealed header holds; None when a subject's key was destroyed.

    Raises:
        MalformedError: it was not sealed for this record, or not by us.
        KeyStoreError: a key can't be had.
    """
    sealed, subjects = headers.get(SEALED), headers.get(SUBJECTS)
    dataschema, event_id = headers.get("ce_dataschema"), headers.get("ce_id")
    if not sealed or not subjects or not dataschema or not event_id:
        raise MalformedError(f"{SEALED} needs {SUBJECTS}, ce_dataschema and ce_id beside it, and something in it")
    try:
        opened: bytes | None = cipher.open(
            subjects_of(subjects), associated(dataschema, event_id, subjects, value), sealed
        )
    except ValueError as error:
        raise MalformedError(f"{SEALED} can't be opened: {error}") from None
    return opened


@lru_cache(maxsize=1024)
def subjects_header(subjects: tuple[str, ...]) -> bytes:
    """The header's text.

    Raises:
        EncodeError: they are not key ids, or not sorted, or too many.
    """
    if len(subjects) > MAX_SUBJECTS:
        raise EncodeError(f"an event about {len(subjects)} data subjects can't be recorded, {MAX_SUBJECTS} at most")
    wrong = [subject for subject in subjects if not KEY_ID.fullmatch(subject)]
    if wrong or list(subjects) != sorted(set(subjects)):
        raise EncodeError(
            f"data_subjects {str(subjects)[:200]} are not sorted key ids; the key store gives them, as ds-<32 hex>"
        )
    return ",".join(subjects).encode()


@lru_cache(maxsize=1024)
def subjects_of(text: bytes) -> tuple[str, ...]:
    """The key ids that the header names.

    Raises:
        MalformedError: it is no such list.
    """
    subjects = tuple(text.decode("ascii", "replace").split(",")) if len(text) <= MAX_SUBJECTS * 36 else ()
    if not subjects or list(subjects) != sorted(set(subjects)) or not all(map(KEY_ID.fullmatch, subjects)):
        raise MalformedError(f"{SUBJECTS} {text[:100]!r} is no sorted list of at most {MAX_SUBJECTS} key ids")
    return subjects
