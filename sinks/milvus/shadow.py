"""The index made again beside the one in use: the next generation of its collections.

In: the store of the index in use. Out: a :class:`~sinks.rebuild.Projection`. Each generation has collections and
offsets of its own, and one row says which is in use, so that writing it switches over for everybody: recall searches
the new one with its next call, and sinks go on where its offsets stand. What a sink still writes into the old one goes
down with it.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import ClassVar, Final

from sinks.comparison import Comparison
from sinks.errors import StoreError
from sinks.milvus.comparing import compare_collection
from sinks.milvus.naming import in_generation, offsets_name, plain_name
from sinks.milvus.sink import MilvusSink
from sinks.milvus.store import MilvusStore
from sinks.rebuild import Projection, Stage
from sinks.sink import Offsets, SinkRecord

__all__ = ["MilvusProjection"]

_GRACE_S: Final = 5.0
"""Between the switch and the drop, on a server: other processes look once a second which generation is in use."""


class MilvusProjection(Projection):
    """``store`` is opened here, and closed by :meth:`close`; its other users keep it open."""

    name: ClassVar[str] = "milvus"
    by_offset: ClassVar[bool] = False
    follows: ClassVar[bool] = False

    def __init__(self, store: MilvusStore, topics: Sequence[str] | None = None) -> None:
        self._store = store
        self.topics = MilvusSink(store).topics if topics is None else tuple(topics)
        store.open()
        self._in_use = store.generation(fresh=True)

    def close(self) -> None:
        """Let go of the store."""
        self._store.close()

    @property
    def _shadow(self) -> MilvusSink:
        return MilvusSink(self._store, self._in_use + 1)

    def _left_of(self, generation: int) -> bool:
        """Whether anything is there of a generation."""
        return generation >= 0 and bool(
            self._store.collections(generation) or self._store.offsets(offsets_name(self.name, generation))
        )

    def prepare(self) -> Stage:
        """See :meth:`sinks.rebuild.Projection.prepare`."""
        self._in_use = self._store.generation(fresh=True)
        if self._left_of(self._in_use - 1):
            self._in_use -= 1
            return Stage.SWITCHED
        return Stage.RESUMED if self._left_of(self._in_use + 1) else Stage.NEW

    def position(self) -> Offsets:
        """See :meth:`sinks.rebuild.Projection.position`."""
        return self._shadow.offsets()

    def stands_at(self) -> Offsets:
        """See :meth:`sinks.rebuild.Projection.stands_at`."""
        return self._store.offsets(offsets_name(self.name, self._in_use))

    def feed(self, batch: Sequence[SinkRecord], offsets: Offsets) -> None:
        """See :meth:`sinks.rebuild.Projection.feed`."""
        self._shadow.write(batch, offsets)

    def rows_before(self, starts: Mapping[tuple[str, int], int]) -> Mapping[tuple[str, int], int]:
        """See :meth:`sinks.rebuild.Projection.rows_before`; rows do not say which records they came from."""
        if not any(map(self._store.count, self._store.collections(self._in_use))):
            return {}
        at, stands = self.position(), self.stands_at()
        older = {place: min(start, stands.get(place, 0)) - at.get(place, 0) for place, start in starts.items()}
        return {place: records for place, records in older.items() if records > 0}

    def carry(self, starts: Mapping[tuple[str, int], int]) -> int:
        """Not possible; see :meth:`sinks.rebuild.Projection.carry`."""
        raise StoreError(
            "rows of the index don't say which records they came from, so those that are older than the log can't be "
            "taken over; give an archive with --from FOLDER, or ingest the documents again"
        )

    def compare(self, since: Offsets, until: Offsets, on_progress: Callable[[int, int], None]) -> list[Comparison]:
        """See :meth:`sinks.rebuild.Projection.compare`; of the whole index, whatever ``since`` says."""
        names = sorted(self._plain(self._in_use) | self._plain(self._in_use + 1))
        pairs = [(in_generation(name, self._in_use), in_generation(name, self._in_use + 1)) for name in names]
        total = sum(self._store.count(collection) for pair in pairs for collection in pair)
        on_progress(0, total)
        done = 0

        def saw(rows: int) -> None:
            nonlocal done
            done += rows
            on_progress(done, total)

        return [
            compare_collection(self._store, name, stored, rebuilt, saw)
            for name, (stored, rebuilt) in zip(names, pairs, strict=True)
        ]

    def _plain(self, generation: int) -> set[str]:
        names = {plain_name(collection, generation) for collection in self._store.collections(generation)}
        return {name for name in names if name is not None}

    def switch(self) -> None:
        """See :meth:`sinks.rebuild.Projection.switch`."""
        self._store.use(self._in_use + 1)

    def finish(self, *, keep: bool) -> str:
        """See :meth:`sinks.rebuild.Projection.finish`."""
        if not self._store.embedded:
            time.sleep(_GRACE_S)
        kept = []
        stamp = datetime.now(UTC).strftime("%Y%m%d_%H%M%S")
        for collection in self._store.collections(self._in_use):
            if keep:
                kept.append(f"until_{stamp}_{plain_name(collection, self._in_use)}")
                self._store.rename(collection, kept[-1])
            else:
                self._store.drop(collection)
        # Last: as long as they are there, the next run knows that this is to be done.
        self._store.forget_offsets(offsets_name(self.name, self._in_use))
        return ", ".join(kept)

    def discard(self) -> None:
        """See :meth:`sinks.rebuild.Projection.discard`."""
        shadow = self._store.generation(fresh=True) + 1
        self._store.forget_offsets(offsets_name(self.name, shadow))
        for collection in self._store.collections(shadow):
            self._store.drop(collection)
