"""What is fetched and not yet handed out, and how much of what is handed out may be under way at once.

In: messages, as the consumer's thread fetches them, and notes of how many are settled. Out: chunks of messages for the
event loop, urgent ones first, and which ranks are to be fetched no further. Were they left in the client's own queue,
a high-priority record would wait behind every low one that was fetched before it, and pausing a partition there throws
away what was fetched of it. It knows no Kafka but the three questions that it asks a message.
"""

import threading
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final, Protocol

from streams.dispatch import LOW, NORMAL, Turns, shares

__all__ = ["Backlog", "Fetched"]

_MOST: Final = 4096
"""Messages of a rank that wait here: a processor's work of an eighth of a second, which is enough to fetch more."""
_MOST_BYTES: Final = 4 * 1024 * 1024


class Fetched(Protocol):
    """What is asked of a message."""

    def __len__(self) -> int: ...

    def topic(self) -> Any:
        """The name of its topic."""

    def partition(self) -> Any:
        """The number of its partition."""


class Backlog:
    """Messages by rank. :meth:`add` is for the consumer's thread, :meth:`full` for any, the rest for the event loop's.

    Of ``max_in_flight`` messages in flight (taken and not settled) :func:`~streams.dispatch.shares` keeps some for
    higher ranks. ``ranks`` are those of the topics.
    """

    def __init__(self, max_in_flight: int, ranks: Mapping[str, int]) -> None:
        self._ranks = dict(ranks)
        there = set(self._ranks.values())
        self._only: int | None = next(iter(there)) if len(there) == 1 else None
        self._limits = shares(max_in_flight, there)
        self._most = max(1, min(_MOST, max_in_flight))
        self._lock = threading.Lock()
        self._waiting: tuple[deque[Any], ...] = (deque(), deque(), deque())
        self._bytes = [0, 0, 0]
        self._in_flight = [0, 0, 0]
        self._full = [False, False, False]
        self._turns = Turns()

    @property
    def in_flight(self) -> int:
        """Messages taken and not settled."""
        return sum(self._in_flight)

    def __len__(self) -> int:
        return sum(map(len, self._waiting))

    def add(self, messages: Sequence[Fetched]) -> None:
        """Keep what was fetched, in its order."""
        with self._lock:
            if self._only is not None:
                self._waiting[self._only].extend(messages)
                self._bytes[self._only] += sum(map(len, messages))
                return
            ranks, waiting, sizes = self._ranks, self._waiting, self._bytes
            for message in messages:
                rank = ranks[message.topic()]
                waiting[rank].append(message)
                sizes[rank] += len(message)

    def full(self, rank: int) -> bool:
        """Whether nothing more of ``rank`` should be fetched. It stays so until half of what waits is gone."""
        with self._lock:
            part = 2 if self._full[rank] else 1
            full = len(self._waiting[rank]) * part >= self._most or self._bytes[rank] * part >= _MOST_BYTES
            self._full[rank] = full
            return full

    def take(self, most: int) -> list[Any]:
        """At most ``most`` messages that may go in flight now, those of a partition in their order."""
        with self._lock:
            may = self._room()
            taken: list[Any] = []
            while len(taken) < most:
                there = [bool(waiting) and room > 0 for waiting, room in zip(self._waiting, may, strict=True)]
                count = 1
                if sum(there) == 1:
                    rank = there.index(True)
                    count = min(most - len(taken), may[rank], len(self._waiting[rank]))
                elif (rank := self._turns.next(*there)) < 0:
                    break
                popleft = self._waiting[rank].popleft
                batch = [popleft() for _ in range(count)]
                taken += batch
                self._bytes[rank] -= sum(map(len, batch))
                self._in_flight[rank] += count
                may = self._room()
            return taken

    def settle(self, count: int, rank: int) -> None:
        """``count`` messages of ``rank`` are in flight no longer."""
        self._in_flight[rank] -= count

    def discard(self, places: Collection[tuple[str, int]]) -> None:
        """Forget what waits of these partitions."""
        with self._lock:
            for rank, waiting in enumerate(self._waiting):
                kept = [message for message in waiting if (message.topic(), message.partition()) not in places]
                if len(kept) < len(waiting):
                    waiting.clear()
                    waiting.extend(kept)
                    self._bytes[rank] = sum(map(len, kept))

    def _room(self) -> tuple[int, int, int]:
        everything, below_high, low = self._limits
        high = everything - sum(self._in_flight)
        normal = min(high, below_high - self._in_flight[NORMAL] - self._in_flight[LOW])
        return high, normal, min(normal, low - self._in_flight[LOW])
