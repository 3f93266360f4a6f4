"""What a sink's runner has read and not written yet.

In: records with their events, and positions that moved. Out: the next batch, and whether it is due. Belongs to the
runner's thread.
"""

import time
from collections.abc import Collection
from typing import Final

from sinks.kafka_reading import Place
from sinks.sink import SinkRecord

__all__ = ["Pending"]

_OVERHEAD: Final = 200
"""Bytes that a record takes besides its key and value."""


class Pending:
    """A batch that grows. ``records`` are in order, ``moved`` holds the positions after them, by partition."""

    def __init__(self) -> None:
        self.records: list[SinkRecord] = []
        self.moved: dict[Place, int] = {}
        self._bytes = 0
        self._since = 0.0
        self._average = 1_000.0

    @property
    def record_bytes(self) -> float:
        """How large records have been lately."""
        return self._average

    def add(self, item: SinkRecord) -> None:
        """Take a record; its position is moved apart."""
        size = len(item.record.value or b"") + len(item.record.key or b"") + _OVERHEAD
        self._average += (size - self._average) / (100 if size < self._average else 4)
        self.records.append(item)
        self._bytes += size

    def move(self, place: Place, position: int) -> None:
        """Note that all before ``position`` was read."""
        if not self.moved:
            self._since = time.monotonic()
        self.moved[place] = position

    def due(self, records: int, size: int, linger_s: float) -> bool:
        """Whether it holds so many records or bytes, or its first position moved so long ago."""
        if not self.moved:
            return False
        return len(self.records) >= records or self._bytes >= size or time.monotonic() - self._since >= linger_s

    def drop(self, gone: Collection[Place]) -> None:
        """Forget what was read of these partitions."""
        self.records = [item for item in self.records if (item.record.topic, item.record.partition) not in gone]
        self.moved = {place: offset for place, offset in self.moved.items() if place not in gone}

    def clear(self) -> None:
        """Forget all of it."""
        self.records, self.moved, self._bytes = [], {}, 0
