"""The sink contract: what a projection of the log is.

In: batches of records, decoded where they can be, and the offsets that the batch ends at. Out: rows in a store, and
the store's own word on how far it has come. A sink keeps its offsets in the store that holds its data, so a store that
is restored from a backup, or lost, says so itself and is fed again from there; the consumer group's offsets only serve
monitoring.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from schemas.metadata import Envelope
from schemas.record import Record

__all__ = ["Offsets", "Sink", "SinkRecord"]


@dataclass(frozen=True, slots=True)
class SinkRecord:
    """A record as a sink gets it: the bytes, and the event in them.

    ``envelope`` is None and ``error`` says why when the bytes don't decode; otherwise ``error`` is empty.
    """

    record: Record
    envelope: Envelope | None
    error: str = ""


Offsets = Mapping[tuple[str, int], int]
"""``(topic, partition)`` to the next offset to read."""


class Sink(ABC):
    """A store that is fed from the log.

    One thread at a time calls it. ``name`` is the stem of its consumer group and its identity in the store's offsets;
    ``topics`` are the Kafka topics it wants, by full name.
    """

    name: ClassVar[str]
    topics: tuple[str, ...]

    @abstractmethod
    def open(self) -> None:
        """Connect, and create or bring up to date what the store lacks. Called before anything else.

        Raises:
            SinkError: the store can't be reached or prepared; :attr:`~sinks.errors.SinkError.retryable` says whether
                trying again may help.
        """

    @abstractmethod
    def offsets(self) -> Offsets:
        """How far the store itself says it has come; partitions that it has never seen are missing.

        Raises:
            SinkError: the store can't be read.
        """

    @abstractmethod
    def write(self, batch: Sequence[SinkRecord], offsets: Offsets) -> None:
        """Take ``batch``, then note ``offsets``: the data first, so that a crash in between repeats it.

        Therefore it must be idempotent: records written again, in the same or other batches, change nothing that a
        reader sees. ``batch`` may be empty (control records moved the position); ``offsets`` holds the partitions
        that moved only.

        Raises:
            SinkError: nothing is promised about what was written; the same batch comes again if it is retryable.
        """

    def replaced(self) -> bool:
        """Whether a rebuild has put another store into use since :meth:`offsets` was asked. It is asked again then, and
        what follows is written there. Asked once a second; :meth:`write` may raise ReplacedError before.

        Raises:
            SinkError: the store can't be read.
        """
        return False

    @abstractmethod
    def close(self) -> None:
        """Leave the store whole and let go of it. Nothing is called afterwards."""
