"""What an agent's lanes hold by the log: every step that the agent has finished decided again, partition by partition.

In: a log, the agent with its topics, and what it had finished. Out: :class:`PartitionState` values: each lane's state
as bytes, the timers that run, and what is left of steps that are not finished. It can be asked again later, when the
agent has rested and finished a little more: only record keys that something new came for, or that had a step open, are
decided anew. Records are spooled to disk, so memory holds the states and no more.
"""

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final, Self

from agents.step import LaneState, lane_of
from replay.decide import Deciding
from replay.findings import Decided, DecidedStep, Verdict
from replay.finished import Finished
from replay.log import Log
from replay.selection import Place, Selection, Span
from replay.spool import Spool, read_part
from replay.steps import Station
from replay.stretch import Progress, Scope, read_stretch, record_of
from schemas.codec import Codec
from schemas.errors import DecodeError
from schemas.events import Effect, TimerFired
from schemas.metadata import Envelope, deterministic_id
from schemas.record import Record

__all__ = ["LaneStates", "LaneTimer", "PartitionState", "Waiting"]

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)

History = Sequence[tuple[Record, Envelope]]


@dataclass(frozen=True, slots=True)
class LaneTimer:
    """A timer that runs: set by event ``cause``, whose record key is ``subject``."""

    lane: str
    name: str
    due: datetime
    subject: str
    correlation: str
    cause: str
    traceparent: str
    data_subjects: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Waiting:
    """An event whose offset is finished, though its handling has not come to its end: it waits for another attempt, or
    behind one that does. ``attempts`` are over.
    """

    record: Record
    attempts: int


@dataclass(slots=True)
class PartitionState:
    """What a partition's lanes hold. ``copies`` are recorded effects of events that are not finished, by event id and
    place in the order of completion. ``unknown`` lanes can't be decided again; the value says why. ``latest_ms`` is the
    newest append time among the finished records.
    """

    states: dict[str, bytes] = field(default_factory=dict)
    timers: dict[tuple[str, str], LaneTimer] = field(default_factory=dict)
    waiting: list[Waiting] = field(default_factory=list)
    copies: dict[tuple[str, int], Record] = field(default_factory=dict)
    unknown: dict[str, str] = field(default_factory=dict)
    latest_ms: int = 0


class LaneStates:
    """The lanes of ``station``'s agent by ``log``. ``dump`` makes the bytes of a state; ``folder`` is where records are
    spooled. A context manager.
    """

    def __init__(
        self,
        log: Log,
        station: Station,
        codec: Codec,
        dump: Callable[[LaneState], bytes],
        *,
        folder: Path | None = None,
        on_progress: Progress = lambda *_: None,
    ) -> None:
        self._log = log
        self._station = station
        self._codec = codec
        self._dump = dump
        self._folder = folder
        self._tell = on_progress
        self._scope = Scope(Selection(), (station,))
        self._spools: list[Spool] = []
        self._parts: list[Path] = []
        self._read_to: dict[Place, int] = {}
        self._results: dict[bytes, _GroupState] = {}
        self._open: set[bytes] = set()
        self.differing = 0
        """How many steps did not come out as recorded; an audit names them."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for spool in self._spools:
            spool.__exit__(None, None, None)

    def topics(self) -> list[str]:
        """All topics that are read."""
        return sorted(self._scope.topics())

    def behind(self, spans: Mapping[Place, Span]) -> int:
        """How many offsets of ``spans`` were not read yet."""
        return sum(end - self._read_to.get(place, first) for place, (first, end) in spans.items())

    def read(self, spans: Mapping[Place, Span], finished: Finished) -> int:
        """Decide what ``finished`` names of ``spans``, or what has come since the last time; how many steps were
        decided. ``spans`` have to hold all that the agent had left when ``finished`` was asked for.

        Raises:
            LogReadError: the log can't be read.
        """
        new = {
            place: (max(first, self._read_to.get(place, first)), end)
            for place, (first, end) in spans.items()
            if self._read_to.get(place, first) < end
        }
        spool = Spool(sum(end - first for first, end in new.values()), folder=self._folder)
        self._spools.append(spool)
        read_stretch(self._log, new, self._scope, self._codec, spool, self._tell)
        parts = spool.parts()
        self._read_to = {place: end for place, (_, end) in spans.items()}
        touched = None
        if self._parts:
            touched = self._open | {group for path in parts for group, _ in read_part(path)}
            parts = [*self._parts, *parts]
        self._parts = parts
        return asyncio.run(self._decide(touched, finished, sum(spool.items for spool in self._spools)))

    def partitions(self) -> dict[Place, PartitionState]:
        """What the lanes hold as of the last :meth:`read`."""
        found: dict[Place, PartitionState] = {}
        for group in self._results.values():
            group.add_to(found)
        return found

    async def _decide(self, touched: set[bytes] | None, finished: Finished, total: int) -> int:
        agent = self._station.agent.name
        deciding = Deciding([self._station], self._codec, {agent: finished}, twice=False)
        held: dict[bytes, list[Any]] = {}
        steps = done = 0
        for path in self._parts:
            for group, items in read_part(path):
                done += len(items)
                if touched is not None:
                    if group in touched:
                        # What came later lies in another part.
                        held.setdefault(group, []).extend(items)
                    continue
                steps += await self._group(group, items, deciding, finished)
                self._tell("deciding", done, total)
        for group, items in held.items():
            steps += await self._group(group, items, deciding, finished)
            self._tell("deciding", done, total)
        return steps

    async def _group(self, group: bytes, items: Iterable[Any], deciding: Deciding, finished: Finished) -> int:
        history: list[tuple[Record, Envelope]] = []
        for item in items:
            record = record_of(item)
            try:
                history.append((record, self._codec.decode(record)))
            except DecodeError:
                continue
        decided = await deciding.decide(history)
        before = self._results.get(group)
        made = _GroupState(self._station, decided, history, finished, self._dump)
        self.differing += made.differing - (0 if before is None else before.differing)
        self._results[group] = made
        (self._open.add if made.is_open else self._open.discard)(group)
        return len(decided.steps)


class _GroupState:
    """What is left of one group's steps."""

    __slots__ = ("_copies", "_latest", "_states", "_timers", "_unknown", "_waiting", "differing", "is_open")

    def __init__(
        self,
        station: Station,
        decided: Decided,
        history: History,
        finished: Finished,
        dump: Callable[[LaneState], bytes],
    ) -> None:
        agent = station.agent
        self.is_open = False
        self.differing = sum(step.verdict is Verdict.DIFFERS for step in decided.steps)
        self._unknown: dict[tuple[Place, str], str] = {}
        self._timers: dict[tuple[Place, str, str], LaneTimer] = {}
        self._waiting: list[tuple[Place, Waiting]] = []
        self._copies: list[tuple[Place, str, int, Record]] = []
        self._states: list[tuple[Place, str, bytes]] = []
        self._latest: dict[Place, int] = {}
        open_: dict[str, Place] = {}
        for step in decided.steps:
            record = step.record
            place = record.topic, record.partition
            is_finished = finished.finished(*place, record.offset)
            if is_finished:
                self._latest[place] = max(self._latest.get(place, 0), record.timestamp_ms)
            try:
                lane = lane_of(agent, step.envelope.event)
            except Exception:  # noqa: BLE001 - it has no lane, so it left no state
                continue
            if (place, lane) in self._unknown:
                continue
            if step.verdict is Verdict.ERASED:
                self._unknown[place, lane] = "a data subject that it is about was forgotten"
            elif step.verdict is Verdict.DIFFERS and step.result is None:
                self._unknown[place, lane] = f"the step at {_told(record)} can't be decided again"
            elif step.verdict is Verdict.OPEN:
                self.is_open = True
                open_[step.envelope.metadata.id] = place
                if is_finished:
                    attempts = max((effect.attempt for effect in step.effects), default=1)
                    self._waiting.append((place, Waiting(record, attempts)))
            elif step.result is not None:
                self._set_timers(step, place, lane)
        for (_, topic, number, lane), state in decided.states.items():
            if state is not None and ((topic, number), lane) not in self._unknown:
                self._states.append(((topic, number), lane, dump(state)))
        self._drop_fired(history, agent.name)
        for record, envelope in history:
            event = envelope.event
            if isinstance(event, Effect) and event.agent == agent.name and event.event_id in open_:
                self._copies.append((open_[event.event_id], event.event_id, event.sequence, record))

    def _set_timers(self, step: DecidedStep, place: Place, lane: str) -> None:
        assert step.result is not None
        cause, state = step.envelope.metadata, step.result.state
        subjects = cause.data_subjects if state is None else tuple(sorted({*cause.data_subjects, *state.data_subjects}))
        for change in step.result.timers:
            if change.due is None:
                self._timers.pop((place, lane, change.name), None)
            else:
                told = cause.subject, cause.correlation_id, cause.id, cause.traceparent, subjects
                self._timers[place, lane, change.name] = LaneTimer(lane, change.name, change.due, *told)

    def _drop_fired(self, history: History, agent: str) -> None:
        fired = {envelope.metadata.id for _, envelope in history if type(envelope.event) is TimerFired}
        for key, timer in list(self._timers.items()):
            micros = (timer.due - _EPOCH) // _MICROSECOND
            if deterministic_id(timer.cause, agent, "timer", timer.lane, timer.name, micros) in fired:
                del self._timers[key]

    def add_to(self, partitions: dict[Place, PartitionState]) -> None:
        """Add it to what other groups have left."""

        def of(place: Place) -> PartitionState:
            found = partitions.get(place)
            if found is None:
                found = partitions[place] = PartitionState()
            return found

        for place, lane, raw in self._states:
            of(place).states[lane] = raw
        for (place, lane, name), timer in self._timers.items():
            of(place).timers[lane, name] = timer
        for place, waiting in self._waiting:
            of(place).waiting.append(waiting)
        for place, event_id, sequence, record in self._copies:
            of(place).copies[event_id, sequence] = record
        for (place, lane), why in self._unknown.items():
            of(place).unknown[lane] = why
        for place, latest in self._latest.items():
            partition = of(place)
            partition.latest_ms = max(partition.latest_ms, latest)


def _told(record: Record) -> str:
    return f"{record.topic}[{record.partition}]@{record.offset}"
