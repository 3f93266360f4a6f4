"""What an agent had finished of the log at some moment, as its consumer group had committed it.

In: for each partition the offset before which all but some is done, and those some (what
``streams.offsets.decode_finished`` makes of a commit). Out: :class:`Finished`, which answers for an offset, and the
same as JSON, for an archive's manifest. Pure.
"""

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from typing import Any

from replay.selection import Place, Span

__all__ = ["Finished"]


class Finished:
    """Finished offsets: of each partition all before ``until`` but those in ``open`` stretches ``[from, to)``."""

    def __init__(self, places: Mapping[Place, tuple[int, Iterable[Span]]]) -> None:
        self._places = {place: (until, tuple(open_)) for place, (until, open_) in places.items()}

    @classmethod
    def committed(cls, places: Mapping[Place, tuple[Iterable[int], int]]) -> "Finished":
        """From the unfinished offsets, ascending, and the offset before which all others are done."""
        return cls({place: (until, _stretches(unfinished)) for place, (unfinished, until) in places.items()})

    def finished(self, topic: str, partition: int, offset: int) -> bool:
        """Whether the record at this offset was finished."""
        until, open_ = self._places.get((topic, partition), (0, ()))
        if offset >= until:
            return False
        before = bisect_right(open_, offset, key=lambda span: span[0])
        return before == 0 or offset >= open_[before - 1][1]

    def as_json(self) -> list[list[Any]]:
        """As JSON can hold it: topic, partition, until, open stretches; in order."""
        return [
            [topic, partition, until, [list(span) for span in open_]]
            for (topic, partition), (until, open_) in sorted(self._places.items())
        ]

    @classmethod
    def from_json(cls, value: Iterable[Iterable[Any]]) -> "Finished":
        """The other way round.

        Raises:
            ValueError, TypeError: it is something else.
        """
        return cls(
            {
                (str(topic), int(partition)): (int(until), [(int(first), int(end)) for first, end in open_])
                for topic, partition, until, open_ in value
            }
        )


def _stretches(offsets: Iterable[int]) -> list[Span]:
    found: list[Span] = []
    for offset in offsets:
        if found and found[-1][1] == offset:
            found[-1] = found[-1][0], offset + 1
        else:
            found.append((offset, offset + 1))
    return found
