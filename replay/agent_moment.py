"""What an agent was at a moment: its instances, the lanes that it had open, what it decided last, and its figures.

In: a log, the agent with its topics, and a time. Out: a :class:`~replay.sheet.Sheet`. The log is gone through once by
headers alone, to find the lanes that were open, and the records of the newest of these are then decided again. What
topics with a retention of days no longer hold is not there any more, and the sheet says so.
"""

import heapq
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from replay.decide import Handled, Station
from replay.history import Entry, Kind, TaskHistory, decoded, in_order
from replay.log import Log, Progress
from replay.moment import LaneThen, lanes_at
from replay.recorded import agent_of, redriven_for
from replay.selection import Selection
from replay.sheet import Sheet, SheetTable
from replay.trace import OUTCOMES
from replay.words import duration
from schemas.codec import Codec
from schemas.events import (
    AgentHeartbeat,
    AgentRegistered,
    DeadLettered,
    LlmCalled,
    ProcessorStats,
    StepCancelled,
    TaskCompleted,
    TimerFired,
)
from schemas.record import Record
from schemas.topics import TOPICS, Topic, all_topics, topic_of

__all__ = ["agent_then"]

_MILLISECOND: Final = timedelta(milliseconds=1)
_FIGURES: Final = timedelta(minutes=1)
_SHOWN: Final = 50
_LAST: Final = 10

_OUTCOMES: Final = frozenset(kind.full_name.encode() for kind in OUTCOMES)
_TIMER: Final = TimerFired.full_name.encode()


async def agent_then(
    log: Log,
    codec: Codec,
    station: Station,
    time: datetime,
    *,
    handled: Mapping[str, Handled] | None = None,
    on_progress: Progress | None = None,
) -> Sheet:
    """The agent of ``station`` at ``time``. ``handled`` is as :func:`replay.decide.redecide` takes it.

    Raises:
        LogReadError: the log could not be read.
    """
    held = frozenset(topic for topic, _ in log.spans())
    seen = _seen(log, station, time, held, on_progress)
    keys = seen.open_keys()
    lanes = []
    for history in _histories(log, codec, station, keys[:_SHOWN], held):
        found = await lanes_at(history, time, stations=(station,), codec=codec, handled=handled)
        lanes += [(history, lane) for lane in found if lane.open or _is_under_way(history, lane)]
    instances, versions = _instances(log, codec, station.agent.name, time, held)
    figures = _figures(log, codec, station.agent.name, time, held)
    notes = []
    if len(keys) > _SHOWN:
        notes.append(f"The lanes of the newest {_SHOWN} of {len(keys):,} open {_of(station)} are shown.")
    if doubtful := sum(lane.doubt is not None for _, lane in lanes):
        notes.append(
            f"The states of {doubtful} lanes are not certain: the code of today decides otherwise than recorded."
        )
    if not instances:
        notes.append("The directory holds nothing of it from then: it keeps its records for days only.")
    if not figures:
        notes.append("No figures of the minute before are left: topic telemetry keeps its records for days only.")
    return Sheet(
        f"Agent {station.agent.name} at {time.isoformat()}",
        {
            "versions": ", ".join(sorted(versions | seen.versions)) or None,
            f"open {_of(station)}": len(keys),
            "open lanes shown": len(lanes),
        },
        (
            SheetTable("instances", ("instance", "version", "registered", "health", "in flight", "heard"), instances),
            SheetTable("open lanes", _LANE_COLUMNS, tuple(_lane_row(*each, time) for each in lanes)),
            SheetTable("decided last", ("when", "key", "emitted", "on"), seen.last_rows()),
            SheetTable("the minute before", _FIGURE_COLUMNS, figures),
        ),
        {},
        notes,
    )


@dataclass(slots=True)
class _Seen:
    """What the headers told. Times are in milliseconds since the epoch."""

    by_key: bool
    tasks: bool
    inputs: dict[bytes, tuple[int, bytes]] = field(default_factory=dict)
    answers: dict[bytes, int] = field(default_factory=dict)
    ended: set[bytes] = field(default_factory=set)
    versions: set[str] = field(default_factory=set)
    last: list[tuple[int, int, bytes, str, bytes]] = field(default_factory=list)

    def open_keys(self) -> list[str]:
        """The keys with something open, the newest first."""
        newest: dict[bytes, int] = {}
        for name, (at, key) in self.inputs.items():
            answered = self.answers.get(name)
            # A task that an agent keeps state of is open until it ends, whatever the agent answered.
            is_open = answered is None or answered < at or (self.by_key and self.tasks)
            if is_open and not (self.tasks and key in self.ended):
                newest[key] = max(at, newest.get(key, at))
        return [key.decode(errors="replace") for key in sorted(newest, key=lambda key: -newest[key])]

    def last_rows(self) -> tuple[tuple[Any, ...], ...]:
        """The last decisions, the newest first: what was emitted, and on which event."""
        return tuple(
            (datetime.fromtimestamp(at / 1000, UTC), key.decode(errors="replace"), emitted, cause.decode())
            for at, _, key, emitted, cause in sorted(self.last, reverse=True)
        )


def _seen(log: Log, station: Station, time: datetime, held: Collection[str], on_progress: Progress | None) -> _Seen:
    agent = station.agent
    seen = _Seen(agent.state_type is not None, _key_field(station) == "task_id")
    consumed = frozenset(kind.full_name.encode() for kind in agent.consumes)
    own = topic_of(DeadLettered), topic_of(TaskCompleted), *map(topic_of, agent.emits)
    topics = (station.topics | {name for topic in own for name in topic.names()}) & frozenset(held)
    until = time + _MILLISECOND
    for batch in log.read(Selection(topics=topics, until=until), on_progress=on_progress):
        for record in batch.records:
            _look(seen, station, consumed, record)
    if (effects := topic_of(StepCancelled).name) in held:
        stopped = frozenset((StepCancelled.full_name,))
        selection = Selection(topics=frozenset((effects,)), until=until, event_types=stopped)
        for batch in log.read(selection):
            for record in batch.records:
                _look(seen, station, consumed, record)
    return seen


def _look(seen: _Seen, station: Station, consumed: Collection[bytes], record: Record) -> None:
    headers = dict(record.headers)
    kind, key = headers.get("ce_type") or b"", record.key or b""
    source = (headers.get("ce_source") or b"").decode(errors="replace")
    own = agent_of(source) == station.agent.name
    if kind in _OUTCOMES:
        seen.ended.add(key)
    for_it = kind in consumed or not kind  # stock producers name no type
    for_it = for_it and (own or kind != _TIMER) and redriven_for(record) in ("", station.agent.name)
    if record.topic in station.topics and for_it:
        name = key if seen.by_key else headers.get("ce_id") or f"{record.topic}/{record.offset}".encode()
        seen.inputs[name] = record.timestamp_ms, key
    if own and kind != _TIMER:
        cause = headers.get("ce_causationid") or b""
        name = key if seen.by_key else cause
        seen.answers[name] = max(record.timestamp_ms, seen.answers.get(name, 0))
        seen.versions.add(source.partition("@")[2])
        emitted = kind.decode(errors="replace").rpartition(".")[2]
        item = record.timestamp_ms, record.offset, key, emitted, cause
        (heapq.heappush if len(seen.last) < _LAST else heapq.heappushpop)(seen.last, item)


def _key_field(station: Station) -> str:
    known: dict[str, Topic] = all_topics()
    return next((known[name].key for name in station.topics if name in known), "task_id")


def _of(station: Station) -> str:
    return "tasks" if _key_field(station) == "task_id" else "documents"


def _histories(
    log: Log, codec: Codec, station: Station, keys: Collection[str], held: Collection[str]
) -> list[TaskHistory]:
    """The whole histories of ``keys``: what came after the moment tells what had been decided by then."""
    if not keys:
        return []
    key_field = _key_field(station)
    names = {name for topic in TOPICS if topic.key == key_field for name in topic.names()} | {topic_of(LlmCalled).name}
    selection = Selection(topics=frozenset(names & set(held)), tasks=frozenset(keys))
    found: dict[str, list[Entry]] = defaultdict(list)
    for batch in log.read(selection):
        for record in batch.records:
            found[(record.key or b"").decode(errors="replace")].append(decoded(record, codec))
    kind: Kind = "task" if key_field == "task_id" else "document"
    return [TaskHistory(key, kind, in_order(found[key])) for key in keys if key in found]


def _is_under_way(history: TaskHistory, lane: LaneThen) -> bool:
    """Whether the lane keeps a task's state that is no mere marker of what is over, or may do so."""
    kept = lane.state is not None and lane.state.expires_at is None
    return history.kind == "task" and (kept or lane.doubt is not None)


_LANE_COLUMNS: Final = ("lane", "key", "decided last", "waits for an end", "since", "calls so far", "kept")


def _lane_row(history: TaskHistory, lane: LaneThen, time: datetime) -> tuple[Any, ...]:
    calls = sum(
        entry.record.topic == topic_of(LlmCalled).name
        and entry.time <= time
        and any(entry.envelope.metadata.causation_id == waiting.id for waiting in lane.open)
        for entry in history.entries
        if entry.envelope is not None
    )
    waiting = ", ".join(entry.type for entry in lane.open)
    first = min((entry.time for entry in lane.open), default=lane.since)
    last = "" if lane.last is None else type(lane.last.envelope.event).__name__
    since = "" if first is None else duration(time - first)
    kept = "" if lane.state is None else lane.state.value.model_dump_json()
    return lane.lane, history.id, last, waiting, since, calls, kept


def _instances(
    log: Log, codec: Codec, name: str, time: datetime, held: Collection[str]
) -> tuple[tuple[tuple[Any, ...], ...], set[str]]:
    topic = topic_of(AgentRegistered).name
    if topic not in held:
        return (), set()
    registered: dict[str, tuple[str, datetime]] = {}
    heard: dict[str, tuple[str, int, datetime]] = {}
    selection = Selection(topics=frozenset((topic,)), tasks=frozenset((name,)), until=time + _MILLISECOND)
    for batch in log.read(selection):
        for record in batch.records:
            entry = decoded(record, codec)
            match entry.event:
                case AgentRegistered(instance=instance, version=version):
                    registered[instance] = version, entry.time
                case AgentHeartbeat() as beat:
                    heard[beat.instance] = beat.health.value, beat.in_flight, entry.time
    rows = []
    for instance in sorted(registered.keys() | heard.keys()):
        version, since = registered.get(instance, ("", None))
        health, in_flight, at = heard.get(instance, ("", None, None))
        rows.append(
            (instance, version, since, health, in_flight, "" if at is None else f"{duration(time - at)} before")
        )
    return tuple(rows), {version for version, _ in registered.values()}


_FIGURE_COLUMNS: Final = (
    *("instance", "in", "out", "failed", "dead", "in flight", "lag", "p99 ms", "tokens", "cost $", "held up by"),
)


def _figures(log: Log, codec: Codec, name: str, time: datetime, held: Collection[str]) -> tuple[tuple[Any, ...], ...]:
    """A row an instance: sums over the minute, and what stood last."""
    topic = topic_of(ProcessorStats).name
    if topic not in held:
        return ()
    found: dict[str, list[ProcessorStats]] = defaultdict(list)
    selection = Selection(topics=frozenset((topic,)), since=time - _FIGURES, until=time + _MILLISECOND)
    for batch in log.read(selection):
        for record in batch.records:
            stats = decoded(record, codec).event
            if isinstance(stats, ProcessorStats) and stats.agent == name:
                found[stats.instance].append(stats)
    return tuple(
        (
            instance,
            sum(each.events_in for each in told),
            sum(each.events_out for each in told),
            sum(each.failures for each in told),
            sum(each.dead_letters for each in told),
            told[-1].in_flight,
            told[-1].lag,
            max(each.p99_ms for each in told),
            sum(each.tokens for each in told),
            sum(each.cost_usd for each in told),
            told[-1].stalled,
        )
        for instance, told in sorted(found.items())
    )
