"""What a task's lanes held at a moment in the past, decided again from the log.

In: a task's history, the agents with their topics, and a time. Out: a :class:`LaneThen` for each lane that a step had
been decided in by then. A step counts as decided from the append of what it led to; one that led to nothing from the
append of its last call or, without any, of its event. The log does not say when a transaction was committed: what it
appended counts from the moment of the append.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

import orjson

from agents.step import LaneState, lane_of
from replay.decide import Decided, DecidedStep, Handled, Station, Verdict, redecide
from replay.history import Entry, TaskHistory
from replay.sheet import Sheet, SheetTable
from replay.trace import Decision, trace_of
from replay.words import duration
from schemas.codec import Codec
from schemas.events import TimerFired

__all__ = ["LaneThen", "lane_sheet", "lanes_at"]

_CERTAIN: Final = frozenset({Verdict.SAME, Verdict.CANCELLED, Verdict.UNREADABLE})
"""Verdicts after which a lane's state is known: it is as decided, or the step left it as it was."""

_Place = tuple[str, int, int]


@dataclass(frozen=True, slots=True)
class LaneThen:
    """A lane of an agent as it was. ``state`` is None where the lane kept nothing; ``timers`` are those that ran.

    ``last`` is the last step that had been decided, at ``since``; ``open`` are the events of the lane that had been
    appended and were not decided yet. ``doubt`` is the lane's first step that the code did not decide as recorded.
    """

    agent: str
    version: str
    lane: str
    state: LaneState | None
    timers: Mapping[str, datetime]
    last: DecidedStep | None
    since: datetime | None
    open: tuple[Entry, ...]
    doubt: DecidedStep | None = None

    @property
    def state_as_json(self) -> Any:
        """The state's fields as JSON can hold them; None without a state."""
        return None if self.state is None else orjson.loads(self.state.value.model_dump_json())


async def lanes_at(
    history: TaskHistory,
    time: datetime,
    *,
    stations: Sequence[Station],
    codec: Codec,
    handled: Mapping[str, Handled] | None = None,
) -> tuple[LaneThen, ...]:
    """The lanes of ``stations`` that ``history`` shows, as they were at ``time``.

    All of the history is decided again, with what came after ``time`` too: what an agent decided by then shows in what
    is recorded of it later. ``handled`` is as :func:`replay.decide.redecide` takes it.
    """
    decided = await redecide(history.records, stations=stations, codec=codec, handled=handled, twice=False)
    return _lanes(decided, history, time, {station.agent.name: station for station in stations})


def _lanes(
    decided: Decided, history: TaskHistory, time: datetime, stations: Mapping[str, Station]
) -> tuple[LaneThen, ...]:
    made = {(each.agent, *_place(each.cause)): each for each in trace_of(history).decisions}
    entries = {_place(entry): entry for entry in history.entries}
    lanes: dict[tuple[str, str, int, str], list[tuple[DecidedStep, datetime | None, Entry]]] = {}
    for step in decided.steps:
        record = step.record
        place = record.topic, record.partition, record.offset
        entry = entries[place]
        if entry.time <= time:
            lane = lane_of(stations[step.agent].agent, step.envelope.event)
            when = _decided_at(step, made.get((step.agent, *place)), entry)
            lanes.setdefault((step.agent, record.topic, record.partition, lane), []).append((step, when, entry))
    return tuple(_lane(key[0], key[3], steps, time) for key, steps in lanes.items())


def _place(entry: Entry) -> _Place:
    return entry.record.topic, entry.record.partition, entry.record.offset


def _decided_at(step: DecidedStep, decision: Decision | None, entry: Entry) -> datetime | None:
    """When what the step led to was appended; None while it had led to nothing and is not known to be done."""
    if decision is not None and decision.ended is not None:
        return decision.ended
    if step.verdict is Verdict.OPEN:
        return None
    return max([entry.time, *(call.time for call in decision.calls)]) if decision is not None else entry.time


def _lane(
    agent: str, lane: str, steps: Sequence[tuple[DecidedStep, datetime | None, Entry]], time: datetime
) -> LaneThen:
    done = [(step, when) for step, when, _ in steps if when is not None and when <= time]
    timers: dict[str, datetime] = {}
    for step, _ in done:
        event = step.envelope.event
        if isinstance(event, TimerFired) and timers.get(event.timer) == event.due:
            del timers[event.timer]
        for change in step.result.timers if step.result is not None else ():
            timers.pop(change.name, None)
            if change.due is not None:
                timers[change.name] = change.due
    last, since = done[-1] if done else (None, None)
    state = None if last is None else last.after
    if state is not None and state.expires_at is not None and state.expires_at <= time:
        state = None
    waiting = tuple(entry for step, when, entry in steps if when is None or when > time)
    version = steps[0][0].version if last is None else last.version
    doubt = next((step for step, _ in done if step.verdict not in _CERTAIN), None)
    return LaneThen(agent, version, lane, state, timers, last, since, waiting, doubt)


def lane_sheet(history: TaskHistory, time: datetime, lanes: Sequence[LaneThen]) -> Sheet:
    """The lanes as a table, their states in full, and what is not to be relied on."""
    rows = []
    texts: dict[str, str] = {}
    notes = []
    for lane in lanes:
        waits = [f"{entry.type} since {duration(time - entry.time)}" for entry in lane.open]
        last = "" if lane.last is None else type(lane.last.envelope.event).__name__
        ago = "" if lane.since is None else f"{duration(time - lane.since)} before"
        timers = ", ".join(f"{name} at {due.isoformat()}" for name, due in lane.timers.items())
        kept = "a state" if lane.state is not None else "nothing"
        rows.append((f"{lane.agent}@{lane.version}", lane.lane, last, ago, kept, timers, ", ".join(waits)))
        if lane.state is not None:
            shown = orjson.dumps(lane.state_as_json, option=orjson.OPT_INDENT_2).decode()
            texts[f"state of {lane.agent}, lane {lane.lane}"] = shown
        if lane.doubt is not None:
            why = "; ".join(map(str, lane.doubt.findings)) or f"{lane.doubt.agent}'s step is {lane.doubt.verdict.value}"
            notes.append(f"The state of {lane.agent}, lane {lane.lane}, is not certain: {why}")
    columns = ("agent", "lane", "decided last", "when", "kept", "timers", "not decided yet")
    known = sum(entry.time <= time for entry in history.entries)
    return Sheet(
        f"What stood at {time.isoformat()}",
        {"records by then": known, "records since": len(history.entries) - known},
        (SheetTable("lanes", columns, tuple(rows)),),
        texts,
        notes,
    )
