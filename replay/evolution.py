"""Whether an output that an older schema wrote is the one that is decided now.

In: a recorded output and the event decided again. Out: yes or no. Event types gain fields, so that today's codec writes
other bytes for the same decision. Then three things prove it instead: the recorded bytes are what their own schema's
writer makes of their values; these values, read by today's codec through Avro's resolution and upcasters, are the event
decided now; and so are all headers but those that follow from the schema.
"""

import io
from functools import lru_cache
from typing import Any, Final

import fastavro
import orjson

from replay.findings import NOT_DECIDED
from schemas.codec import Encoded
from schemas.metadata import Envelope
from schemas.record import Record
from schemas.registry import Manifest

__all__ = ["is_same_by_older_schema"]

_OF_THE_SCHEMA: Final = frozenset({NOT_DECIDED, "ce_dataschema", "ce_type", "ce_sealed"})
"""A renamed type has another ce_type, and what is sealed is bound to its schema."""
_FRAME_BYTES: Final = 5


def is_same_by_older_schema(record: Record, was: Envelope, envelope: Envelope, encoded: Encoded) -> bool:
    """Whether ``record``, which says ``was``, was written by another version of its schema than ``encoded`` is, and
    says the same as ``envelope``. Its topic and key are the caller's to compare.
    """
    schema = dict(record.headers).get("ce_dataschema")
    if schema is None or schema == dict(encoded.headers).get("ce_dataschema"):
        return False
    if was.event != envelope.event or _kept(record.headers) != _kept(encoded.headers):
        return False
    return record.value is not None and _is_canonical(schema.decode("ascii", "replace"), record.value[_FRAME_BYTES:])


def _kept(headers: Any) -> list[Any]:
    return [header for header in headers if header[0] not in _OF_THE_SCHEMA]


def _is_canonical(named: str, body: bytes) -> bool:
    schema = _schema(named)
    if schema is None:
        return False
    out = io.BytesIO()
    try:
        fastavro.schemaless_writer(out, schema, fastavro.schemaless_reader(io.BytesIO(body), schema, None))
    except (EOFError, IndexError, KeyError, OverflowError, TypeError, ValueError):
        return False
    return out.getvalue() == body


@lru_cache(maxsize=256)
def _schema(named: str) -> Any:
    """The committed schema of ``<full name>/<fingerprint>``, for fastavro; None where no release committed it."""
    name, _, fingerprint = named.partition("/")
    version = _manifest().find(name, fingerprint)
    return None if version is None else fastavro.parse_schema(orjson.loads(version.schema))


@lru_cache(maxsize=1)
def _manifest() -> Manifest:
    return Manifest.load()
