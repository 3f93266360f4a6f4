"""From a record of the log to what a sink takes, whether its bytes decode or not.

In: a record and a codec. Out: a :class:`~sinks.sink.SinkRecord`. Shared by all that feed sinks, so that the same record
always gives the same row.
"""

from typing import Protocol

from schemas.errors import SchemaError, UnavailableError
from schemas.metadata import Envelope
from schemas.record import Record
from sinks.sink import SinkRecord

__all__ = ["Decoder", "decoded"]


class Decoder(Protocol):
    """What is needed of :class:`schemas.codec.Codec`."""

    def decode(self, record: Record) -> Envelope:
        """The event in ``record``, or a SchemaError."""


def decoded(codec: Decoder, record: Record) -> SinkRecord:
    """``record`` with its event, or with why it has none.

    Raises:
        UnavailableError: nobody can say now what the bytes mean.
    """
    try:
        return SinkRecord(record, codec.decode(record))
    except UnavailableError:
        raise
    except SchemaError as error:
        return SinkRecord(record, None, f"{type(error).__name__}: {error}")
