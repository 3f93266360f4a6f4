"""Makes a projection again from the log while the one in use goes on, compares the two, and switches over.

In: a :class:`Projection`, the log as :class:`History`, and how to hold the live sink between two batches. Out: a
:class:`RebuildReport`. The new projection (the shadow) is fed up to where the store says that the live one stands, so
both hold the same stretch of the log and can be compared row by row; only then, and only if they are equal or the
difference was accepted, readers and the live sink get the new one in a single step. All that is needed to go on after
SIGKILL is in the store: the shadow, its offsets and which of the two is in use.
"""

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar, Final, Protocol

from schemas.record import Record
from sinks.comparison import Comparison, added
from sinks.decoding import Decoder, decoded
from sinks.errors import HistoryLostError, RebuildStoppedError
from sinks.sink import Offsets, SinkRecord

__all__ = ["History", "Phase", "Progress", "Projection", "Rebuild", "RebuildReport", "Stage", "Stretch"]

Place = tuple[str, int]
Span = tuple[int, int]

_BATCH: Final = 5_000
_BATCH_BYTES: Final = 8 * 1024 * 1024
_CLOSE: Final = 2_000
"""So near behind the live sink, in offsets, the rest is read while that is held."""
_PASSES: Final = 20
_TRIES: Final = 5


class Stretch(Protocol):
    """Some records of a read, and the positions after them: :class:`replay.log.Batch`."""

    @property
    def records(self) -> Sequence[Record]:
        """In the order of offsets within each partition."""

    @property
    def positions(self) -> Mapping[Place, int]:
        """Where to go on, for every partition of the read."""


class History(Protocol):
    """The log, or an archive and the log after it."""

    def spans(self, topics: Sequence[str]) -> Mapping[Place, Span]:
        """What it holds now, ``[from, to)``, for every partition of ``topics``."""

    def read(self, spans: Mapping[Place, Span]) -> Iterator[Stretch]:
        """The committed records of ``spans``."""


class Stage(StrEnum):
    """How far an earlier run had come."""

    NEW = "new"
    RESUMED = "resumed"
    SWITCHED = "switched"
    """The new projection is in use already; what is left to do is to finish."""


class Phase(StrEnum):
    """What a rebuild is at."""

    READING = "reading the log"
    COMPARING = "comparing"
    SWITCHING = "switching over"
    FINISHING = "finishing"


Progress = Callable[[Phase, int, int], None]
"""Called with what is done of how much: offsets, or rows."""


class Projection(ABC):
    """What a kind of store knows of being made again. One thread at a time calls it; it is its owner's to close."""

    name: ClassVar[str]
    topics: tuple[str, ...]
    by_offset: ClassVar[bool]
    """Its rows name their offsets, so stretches can be compared while writes go on behind them."""
    follows: ClassVar[bool]
    """A write that was under way can miss the switch, so the log is read on for a moment after it."""

    @abstractmethod
    def prepare(self) -> Stage:
        """Find the shadow of an earlier run, or begin one.

        Raises:
            SinkError: the store failed.
        """

    @abstractmethod
    def position(self) -> Offsets:
        """Where the shadow stands."""

    @abstractmethod
    def stands_at(self) -> Offsets:
        """Where the projection in use stands."""

    @abstractmethod
    def feed(self, batch: Sequence[SinkRecord], offsets: Offsets) -> None:
        """Write into the shadow, as :meth:`sinks.sink.Sink.write` does; after the switch into what is in use now."""

    @abstractmethod
    def rows_before(self, starts: Mapping[Place, int]) -> Mapping[Place, int]:
        """Of how many records the projection in use has rows between the shadow's position and each start, where there
        are some.
        """

    @abstractmethod
    def carry(self, starts: Mapping[Place, int]) -> int:
        """Take these rows over into the shadow as they are; how many there were.

        Raises:
            SinkError: this kind of projection can't.
        """

    @abstractmethod
    def compare(self, since: Offsets, until: Offsets, on_progress: Callable[[int, int], None]) -> list[Comparison]:
        """Compare what comes of ``[since, until)``; a partition that ``since`` lacks is compared from its beginning."""

    @abstractmethod
    def switch(self) -> None:
        """Put the shadow into the place of what is in use, in one step for whoever reads."""

    @abstractmethod
    def finish(self, *, keep: bool) -> str:
        """Drop what was in use before, or with ``keep`` say under which name it lies."""

    @abstractmethod
    def discard(self) -> None:
        """Drop the shadow, if there is one."""


@dataclass(frozen=True, slots=True)
class RebuildReport:
    """What a rebuild came to.

    ``resumed`` tells that an earlier run had begun it, ``records`` how many were read in this one. ``compared`` is
    empty where that run had switched over already. ``carried`` rows are older than the log and were taken as they were.
    """

    projection: str
    switched: bool
    resumed: bool
    records: int
    seconds: float
    compared: tuple[Comparison, ...]
    carried: int = 0
    kept: str = ""

    @property
    def equal(self) -> bool:
        """Whether what was in use said what the log gives."""
        return all(each.equal for each in self.compared)

    def as_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {
            "projection": self.projection,
            "switched": self.switched,
            "equal": self.equal,
            "resumed": self.resumed,
            "records": self.records,
            "seconds": round(self.seconds, 1),
            "carried": self.carried,
            "kept": self.kept,
            "compared": [each.as_dict() for each in self.compared],
        }


class Rebuild:
    """One rebuild of ``projection`` from ``history``.

    ``hold`` keeps the live sink between two batches while it is entered; where that runs in another process it can't
    be, and is not needed. ``accept`` switches over though the two differ. ``carry`` takes over what is older than the
    log. ``keep`` leaves what was in use. Setting ``stopping`` ends it; the next run goes on.
    """

    def __init__(
        self,
        projection: Projection,
        history: History,
        codec: Decoder,
        *,
        hold: Callable[[], AbstractContextManager[None]] = nullcontext,
        accept: bool = False,
        carry: bool = False,
        keep: bool = False,
        on_progress: Progress = lambda *_: None,
        stopping: threading.Event | None = None,
    ) -> None:
        self._projection = projection
        self._history = history
        self._codec = codec
        self._hold = hold
        self._accept = accept
        self._carry = carry
        self._keep = keep
        self._tell = on_progress
        self._stopping = stopping or threading.Event()
        self._records = 0
        self._carried = 0

    def run(self) -> RebuildReport:
        """Rebuild; returns when the new projection is in use, or the two differ and that was not accepted.

        Raises:
            HistoryLostError: the log no longer holds what the projection has rows of; nothing was changed.
            RebuildStoppedError: ``stopping`` was set.
            SinkError: the store failed; run it again.
        """
        projection, began = self._projection, time.monotonic()
        stage = projection.prepare()
        compared: tuple[Comparison, ...] = ()
        switched, kept = True, ""
        if stage is not Stage.SWITCHED:
            self._look_at_beginnings(stage)
            compared = self._compared()
            switched = all(each.equal for each in compared) or self._accept
        if switched:
            if projection.follows:
                self._feed({place: end for place, (_, end) in self._spans().items()})
            self._tell(Phase.FINISHING, 0, 0)
            kept = projection.finish(keep=self._keep)
        return RebuildReport(
            projection.name,
            switched,
            stage is not Stage.NEW,
            self._records,
            time.monotonic() - began,
            compared,
            self._carried,
            kept,
        )

    def _spans(self) -> Mapping[Place, Span]:
        return self._history.spans(self._projection.topics)

    def _look_at_beginnings(self, stage: Stage) -> None:
        """What the log has lost is said before anything is made of the rest."""
        projection = self._projection
        at = projection.position()
        starts = {place: first for place, (first, _) in self._spans().items() if first > at.get(place, 0)}
        older = projection.rows_before(starts) if starts else {}
        if not older:
            return
        if self._carry:
            self._carried = projection.carry(starts)
            return
        if stage is Stage.NEW:
            projection.discard()
        lost = ", ".join(
            f"{topic}[{number}] begins at offset {starts[topic, number]:,} and {rows:,} records of it are older"
            for (topic, number), rows in sorted(older.items())
        )
        raise HistoryLostError(
            f"the log no longer holds all that {projection.name} was made of: {lost}. Nothing was changed. Give an "
            "archive that has it with --from FOLDER, or take these over as they are with --carry"
        )

    def _compared(self) -> tuple[Comparison, ...]:
        """Bring the two to the same offsets, compare them, and switch if that is right."""
        projection = self._projection
        parts: list[Comparison] = []
        since: Offsets = {}
        self._come_close()
        if projection.by_offset:
            # The long part of it, while the live sink goes on behind.
            since = self._come_close()
            parts += self._differences({}, since)
            if not all(each.equal for each in parts) and not self._accept:
                return added(parts)
            self._come_close()
        for left in reversed(range(_TRIES)):
            with self._hold():
                until = projection.stands_at()
                self._feed(until)
                rest = self._differences(since, until)
                equal = all(each.equal for each in rest)
                # What differs may be a batch that is being written elsewhere.
                if equal or projection.stands_at() == until or not left:
                    if equal or self._accept:
                        self._tell(Phase.SWITCHING, 0, 0)
                        projection.switch()
                    break
        return added([*parts, *rest])

    def _come_close(self) -> Offsets:
        for _ in range(_PASSES):
            until = self._projection.stands_at()
            if self._feed(until) < _CLOSE:
                break
        return until

    def _differences(self, since: Offsets, until: Offsets) -> list[Comparison]:
        def tell(done: int, of: int) -> None:
            self._tell(Phase.COMPARING, done, of)
            self._check()

        return self._projection.compare(since, until, tell)

    def _feed(self, until: Offsets) -> int:
        """Feed the shadow up to ``until``; how many offsets that was."""
        at = self._projection.position()
        spans = self._spans()
        wanted: dict[Place, Span] = {}
        for place, end in until.items():
            if place not in spans:
                continue
            # What is older than the log was carried over, or nothing came of it.
            first = max(at.get(place, 0), spans[place][0])
            if first < end:
                wanted[place] = first, end
        total = sum(end - first for first, end in wanted.values())
        if not total:
            return 0
        begun = sum(first for first, _ in wanted.values())
        batch: list[SinkRecord] = []
        size = 0
        positions: Mapping[Place, int] = {}
        self._tell(Phase.READING, 0, total)
        for stretch in self._history.read(wanted):
            positions = stretch.positions
            for record in stretch.records:
                batch.append(decoded(self._codec, record))
                size += len(record.value or b"") + 200
            if len(batch) >= _BATCH or size >= _BATCH_BYTES:
                self._write(batch, positions)
                batch, size = [], 0
                self._tell(Phase.READING, sum(positions.values()) - begun, total)
            self._check()
        self._write(batch, positions)
        self._tell(Phase.READING, total, total)
        return total

    def _write(self, batch: Sequence[SinkRecord], offsets: Offsets) -> None:
        self._projection.feed(batch, offsets)
        self._records += len(batch)

    def _check(self) -> None:
        if self._stopping.is_set():
            raise RebuildStoppedError(
                f"the rebuild of {self._projection.name} was stopped; run the command again and it goes on"
            )
