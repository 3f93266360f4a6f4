"""What history is read from: a log that gives its committed records in batches, whether it is Kafka or an archive.

In: a :class:`~replay.selection.Selection`, and where an earlier read had come to. Out: :class:`Batch` values of raw
records with the positions to go on from, so that a reader of any length can stop and resume. One contract suite
(tests/contract/test_log_contract.py) holds for every log.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

from replay.errors import LogReadError, LogTruncatedError
from replay.selection import Place, Selection, Span
from schemas.record import Record

__all__ = ["ALL", "Batch", "Log", "Progress", "wanted_spans"]

Progress = Callable[[int, int], None]
"""Called with the positions done and the positions of all."""

ALL: Final = Selection()
"""Everything."""


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


def wanted_spans(
    held: Mapping[Place, Span], selection: Selection, start: Mapping[Place, int], before: str
) -> dict[Place, Span]:
    """What is to be read of each partition: the selection's span, or all that is held, from ``start`` on.

    ``before`` says why a log that begins later does so, for the error's message.

    Raises:
        LogTruncatedError: a span or a start lies before what is held.
        LogReadError: one lies after it, or there is no such partition.
    """
    if selection.spans is None:
        wanted = dict(held)
    else:
        topics = {topic for topic, _ in held}
        if missing := sorted(place for place in selection.spans if place not in held and place[0] in topics):
            raise LogReadError(f"there is no partition {', '.join(f'{topic}/{number}' for topic, number in missing)}")
        wanted = {place: span for place, span in selection.spans.items() if place in held}
    for place, (first, end) in wanted.items():
        low, high = held[place]
        position = start.get(place, first)
        if selection.spans is not None:
            position = min(max(first, position), max(first, end))
        if position < end and position < low:
            raise LogTruncatedError(
                f"{place[0]}/{place[1]} begins at offset {low}, and {position} is asked for: {before}"
            )
        if position > high:
            raise LogReadError(
                f"{place[0]}/{place[1]} ends at offset {high}, and {position} is asked for; "
                "was the topic made anew, or is it another cluster's?"
            )
        wanted[place] = position, max(position, min(end, high))
    return wanted
