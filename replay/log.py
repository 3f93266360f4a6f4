"""What history is read from: a log that gives its committed records in batches, whether it is Kafka or an archive.

In: a :class:`~replay.selection.Selection`, and where an earlier read had come to. Out: :class:`Batch` values of raw
records with the positions to go on from, so that a reader of any length can stop and resume. One contract suite
(tests/contract/test_log_contract.py) holds for every log.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from replay.selection import Place, Selection, Span
from schemas.record import Record

__all__ = ["Batch", "Log", "Progress"]

Progress = Callable[[int, int], None]
"""Called with the positions done and the positions of all."""

ALL = Selection()


@dataclass(frozen=True, slots=True)
class Batch:
    """Some records of a read, in offset order within each partition, and the positions after them.

    ``positions`` names every partition of the read: given as ``start`` of another read of the same selection, that goes
    on where this batch ended. A batch can be without records: nothing of that stretch was meant.
    """

    records: Sequence[Record]
    positions: Mapping[Place, int]


class Log(ABC):
    """Committed records, up to each partition's last stable offset. Use it as a context manager."""

    @abstractmethod
    def spans(self, topics: Collection[str] = ()) -> dict[Place, Span]:
        """What it holds now of ``topics``, or of all event topics: a span for each partition, empty ones too.

        Raises:
            LogReadError: the log can't be reached, or a topic is missing.
        """

    @abstractmethod
    def read(
        self,
        selection: Selection = ALL,
        *,
        start: Mapping[Place, int] | None = None,
        on_progress: Progress | None = None,
    ) -> Iterator[Batch]:
        """The records that ``selection`` means, from ``start`` on, to where the log stands when the read begins.

        Memory does not grow with the length of the log.

        Raises:
            LogTruncatedError: the log no longer holds what a span or a start asks for.
            LogReadError: the log can't be read; the message says what to do.
        """

    @abstractmethod
    def close(self) -> None:
        """Let go of what it holds open."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
