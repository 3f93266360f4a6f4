"""The causal tree of a task or document: what led to what, who decided it, what it took.

In: a :class:`~replay.history.TaskHistory`. Out: :class:`Trace`: a :class:`Decision` for each handling of an event by an
agent, with the calls that it made, what came of it and how long it waited, and sums over all of them. Times are of two
clocks: records bear the broker's append time, calls the time of the process that made them; where the two disagree a
time that would be negative counts as 0.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Final

from replay.history import Entry, TaskHistory
from replay.recorded import Recorded, agent_of, version_of
from schemas.events import (
    ChangeMarked,
    DeadLettered,
    DeadLetterResolved,
    Effect,
    LlmCalled,
    StepCancelled,
    TaskCancelled,
    TaskCompleted,
    TaskExpired,
    TaskFailed,
    TimerFired,
    ToolStarted,
    Waited,
)
from schemas.record import Record

__all__ = ["OUTCOMES", "Decision", "Hop", "Letter", "Sums", "Trace", "made_by", "trace_of"]

OUTCOMES: Final = (TaskCompleted, TaskFailed, TaskExpired, TaskCancelled)
"""How a task ends."""

_ZERO: Final = timedelta()
_LONGEST_MS: Final = 1e10
_NO_CALLS: Final = (ToolStarted, Waited, ChangeMarked)

_Place = tuple[str, int, int]


@dataclass(frozen=True, slots=True, eq=False)
class Letter:
    """A dead letter, what became of it, and the record where it was sent again."""

    entry: Entry
    letter: DeadLettered
    resolved: tuple[Entry, ...]
    again: Entry | None


@dataclass(frozen=True, slots=True, eq=False)
class Decision:
    """One handling of ``cause`` by an agent. ``calls`` are its effects in the order of their completion.

    ``timers`` are the timers that it set and that have fired since.
    """

    agent: str
    version: str
    cause: Entry
    calls: tuple[Entry, ...] = ()
    outputs: tuple[Entry, ...] = ()
    timers: tuple[Entry, ...] = ()
    letter: Letter | None = None
    cancelled: Entry | None = None

    @property
    def effects(self) -> tuple[Effect, ...]:
        """What ``calls`` say."""
        return tuple(entry.event for entry in self.calls if isinstance(entry.event, Effect))

    @property
    def started(self) -> datetime | None:
        """When its first call began, by the clock of its process; None where it called nobody."""
        return min((effect.started_at for effect in self.effects), default=None)

    @property
    def ended(self) -> datetime | None:
        """When its end was appended; None where the log shows none."""
        ends = [*self.outputs, self.cancelled, None if self.letter is None else self.letter.entry]
        return max((entry.time for entry in ends if entry is not None), default=None)

    @property
    def waited(self) -> timedelta | None:
        """From the append of its cause to its first call; None where it called nobody."""
        return None if self.started is None else max(self.started - self.cause.time, _ZERO)

    @property
    def called(self) -> timedelta:
        """How long at least one of its calls was under way."""
        return _covered([_span(effect) for effect in self.effects])

    @property
    def took(self) -> timedelta | None:
        """From the append of its cause to the append of its end."""
        return None if self.ended is None else max(self.ended - self.cause.time, _ZERO)

    @property
    def attempts(self) -> int:
        """In how many runs of the handler it made calls, retries and runs after a crash counted, or gave up."""
        given_up = 1 if self.letter is None else self.letter.letter.attempts
        return max([given_up, *(effect.attempt for effect in self.effects)])


@dataclass(frozen=True, slots=True)
class Hop:
    """One step of the critical path: from an event's append to that of the one that it led to."""

    decision: Decision
    to: Entry
    waited: timedelta
    called: timedelta
    other: timedelta

    @property
    def total(self) -> timedelta:
        """Its length."""
        return self.waited + self.called + self.other


@dataclass(slots=True)
class Sums:
    """What decisions took together; times of decisions side by side add up."""

    decisions: int = 0
    waited: timedelta = _ZERO
    called: timedelta = _ZERO
    calls: int = 0
    llm_calls: int = 0
    failed_calls: int = 0
    repeats: int = 0
    dead_letters: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost_usd: float = 0.0

    def add(self, decision: Decision) -> None:
        """Count ``decision`` in."""
        self.decisions += 1
        self.waited += decision.waited or _ZERO
        self.called += decision.called
        self.repeats += decision.attempts - 1
        self.dead_letters += decision.letter is not None
        for effect in decision.effects:
            self.calls += not isinstance(effect, _NO_CALLS)
            self.failed_calls += bool(effect.error)
            if isinstance(effect, LlmCalled):
                self.llm_calls += 1
                self.prompt_tokens += effect.prompt_tokens
                self.completion_tokens += effect.completion_tokens
                self.cost_usd += effect.cost_usd


@dataclass(frozen=True, slots=True)
class Trace:
    """``decisions`` are in order of their causes; ``roots`` are the entries that nothing in the history led to.

    ``outcome`` is how the task ended; None while it is under way, and for documents.
    """

    history: TaskHistory
    outcome: Entry | None
    decisions: tuple[Decision, ...]
    roots: tuple[Entry, ...]
    sums: Sums
    by_agent: Mapping[str, Sums]
    path: tuple[Hop, ...]
    _on: Mapping[Entry, tuple[Decision, ...]] = field(repr=False)

    def on(self, entry: Entry) -> tuple[Decision, ...]:
        """The decisions that were made on ``entry``."""
        return self._on.get(entry, ())

    @property
    def began(self) -> datetime:
        """The append time of the first record."""
        return self.history.entries[0].time

    @property
    def wall(self) -> timedelta:
        """From the first record to the outcome, or to the last record where there is none."""
        last = self.history.entries[-1] if self.outcome is None else self.outcome
        return max(last.time - self.began, _ZERO)


def trace_of(history: TaskHistory) -> Trace:
    """The tree of ``history``. Repeated, redriven, undecodable and orphaned records have their place in it."""
    decisions = _decisions(history)
    on: dict[Entry, list[Decision]] = defaultdict(list)
    led_to: dict[Entry, Decision] = {}
    sums, by_agent = Sums(), dict[str, Sums]()
    for decision in decisions:
        on[decision.cause].append(decision)
        sums.add(decision)
        by_agent.setdefault(decision.agent, Sums()).add(decision)
        for entry in made_by(decision):
            led_to.setdefault(entry, decision)
    outcome = next((entry for entry in history.entries if isinstance(entry.event, OUTCOMES)), None)
    ends = [entry for entry in history.entries if entry in led_to] if outcome is None else [outcome]
    return Trace(
        history,
        outcome,
        tuple(decisions),
        tuple(_roots(history, on, led_to)),
        sums,
        by_agent,
        tuple(_path(ends[-1], led_to)) if ends else (),
        {entry: tuple(made) for entry, made in on.items()},
    )


def made_by(decision: Decision) -> tuple[Entry, ...]:
    """The entries that the decision led to and that decisions can be made on: outputs, timers, what was sent again."""
    again = (decision.letter.again,) if decision.letter is not None and decision.letter.again is not None else ()
    return (*decision.outputs, *decision.timers, *again)


def _decisions(history: TaskHistory) -> list[Decision]:
    entries = history.entries
    recorded = Recorded(history.records)
    at = {_place(entry.record): entry for entry in entries}
    letters = _letters(entries)
    agents: dict[str, dict[str, None]] = defaultdict(dict)
    timers: dict[tuple[str, str], list[Entry]] = defaultdict(list)
    cancelled: dict[tuple[str, str], Entry] = {}
    left: dict[str, int] = defaultdict(int)
    for entry in entries:
        if entry.redriven_for == "" and entry.id:
            left[entry.id] += 1
        match entry.event:
            case Effect() as effect:
                agents[effect.event_id][effect.agent] = None
            case StepCancelled() as stopped:
                agents[stopped.event_id][stopped.agent] = None
                cancelled[stopped.agent, stopped.event_id] = entry
            case TimerFired() as fired if entry.envelope is not None:
                agents[entry.envelope.metadata.causation_id][fired.agent] = None
                timers[fired.agent, entry.envelope.metadata.causation_id].append(entry)
            case DeadLettered() as letter:
                source = at.get((letter.source_topic, letter.source_partition, letter.source_offset))
                if source is not None:
                    agents[source.id][letter.agent] = None
            case _ if entry.envelope is not None and not entry.redriven_for:
                metadata = entry.envelope.metadata
                if metadata.causation_id and (name := agent_of(metadata.source)):
                    agents[metadata.causation_id][name] = None
    decisions = []
    for entry in entries:
        if isinstance(entry.event, Effect | DeadLettered | DeadLetterResolved | StepCancelled):
            continue
        left[entry.id] -= entry.redriven_for == ""
        names = (entry.redriven_for,) if entry.redriven_for else tuple(agents.get(entry.id, ()))
        for name in names:
            took = recorded.take(name, entry.id, entry.record, more=left[entry.id] > 0)
            letter_of = letters.get((name, *_place(entry.record)))
            decision = Decision(
                name,
                version_of(took.source),
                entry,
                tuple(at[_place(record)] for record, _ in took.effects),
                tuple(at[_place(record)] for record, _ in took.outputs),
                tuple(timers.pop((name, entry.id), ())),
                letter_of,
                cancelled.pop((name, entry.id), None),
            )
            if decision.calls or decision.timers or decision.ended is not None or entry.redriven_for:
                decisions.append(decision)
    return decisions


def _place(record: Record) -> _Place:
    return record.topic, record.partition, record.offset


def _letters(entries: Sequence[Entry]) -> dict[tuple[str, str, int, int], Letter]:
    """The dead letters by agent and place of the record."""
    resolved: dict[tuple[str, str, int, int], list[Entry]] = defaultdict(list)
    for entry in entries:
        if isinstance(entry.event, DeadLetterResolved):
            resolved[_about(entry.event)].append(entry)
    at = {_place(entry.record): entry for entry in entries}
    letters = {}
    for entry in entries:
        if isinstance(entry.event, DeadLettered):
            about = _about(entry.event)
            source = at.get(about[1:])
            again = None
            if source is not None and source.id:
                again = next((other for other in entries if _is_again(other, source, entry.event.agent)), None)
            letters[about] = Letter(entry, entry.event, tuple(resolved[about]), again)
    return letters


def _about(letter: DeadLettered | DeadLetterResolved) -> tuple[str, str, int, int]:
    return letter.agent, letter.source_topic, letter.source_partition, letter.source_offset


def _is_again(entry: Entry, source: Entry, agent: str) -> bool:
    return (
        entry.redriven_for == agent
        and entry.id == source.id
        and (entry.record.topic, entry.record.partition) == (source.record.topic, source.record.partition)
        and entry.record.offset > source.record.offset
    )


def _roots(
    history: TaskHistory, on: Mapping[Entry, Iterable[Decision]], led_to: Mapping[Entry, Decision]
) -> list[Entry]:
    """What nothing led to; and of events that name each other as their cause, the earliest."""
    beside = {entry for made in on.values() for decision in made for entry in decision.calls}
    beside |= {decision.cancelled for made in on.values() for decision in made if decision.cancelled is not None}
    shown = [
        entry
        for entry in history.entries
        if entry not in beside and not isinstance(entry.event, DeadLettered | DeadLetterResolved)
    ]
    roots = [entry for entry in shown if entry not in led_to]
    seen: set[Entry] = set()
    for root in roots:
        _mark(root, on, seen)
    for entry in shown:
        if entry not in seen:
            roots.append(entry)
            _mark(entry, on, seen)
    return roots


def _mark(root: Entry, on: Mapping[Entry, Iterable[Decision]], seen: set[Entry]) -> None:
    waiting = [root]
    while waiting:
        entry = waiting.pop()
        if entry not in seen:
            seen.add(entry)
            waiting += [made for decision in on.get(entry, ()) for made in made_by(decision)]


def _path(end: Entry, led_to: Mapping[Entry, Decision]) -> list[Hop]:
    """From the first cause to ``end``, each event with the one that it led to."""
    hops: list[Hop] = []
    seen: set[Entry] = set()
    entry = end
    while (decision := led_to.get(entry)) is not None and entry not in seen:
        seen.add(entry)
        total = max(entry.time - decision.cause.time, _ZERO)
        waited = min(decision.waited or _ZERO, total)
        called = min(decision.called, total - waited)
        hops.append(Hop(decision, entry, waited, called, total - waited - called))
        entry = decision.cause
    return hops[::-1]


def _span(effect: Effect) -> tuple[datetime, datetime]:
    length = effect.latency_ms if 0.0 <= effect.latency_ms < _LONGEST_MS else 0.0  # nor is NaN or infinity a length
    return effect.started_at, effect.started_at + timedelta(milliseconds=length)


def _covered(spans: list[tuple[datetime, datetime]]) -> timedelta:
    """How long at least one of ``spans`` held."""
    covered, until = _ZERO, None
    for start, end in sorted(spans):
        if until is not None and start < until:
            start = until
        if end > start:
            covered += end - start
        until = end if until is None else max(until, end)
    return covered
