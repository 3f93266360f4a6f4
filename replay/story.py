"""A trace in the order in which it is told: lines with what hangs below them, and what each of them has to show.

In: a :class:`~replay.trace.Trace`. Out: :class:`Line` values for the terminal and for HTML. A chain of causes stays on
one level, an event after the decision that led to it, and only where a decision led to several things does each of
them get a branch: a task of many steps one after another reads from top to bottom, not from left to right.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from replay.history import Entry
from replay.trace import Decision, Letter, Trace, made_by
from schemas.events import (
    DocumentRemoved,
    DocumentSubmitted,
    PlanProposed,
    PlanRejected,
    StepAssigned,
    StepCompleted,
    TaskSubmitted,
)

__all__ = ["Line", "is_unanswered", "story"]

_ANSWERED: Final = (
    TaskSubmitted,
    PlanProposed,
    PlanRejected,
    StepAssigned,
    StepCompleted,
    DocumentSubmitted,
    DocumentRemoved,
)
"""What somebody always answers: without an answer, it still waits for one."""


_DEEPEST: Final = 8
"""Branches within branches, each indented by 8 columns. What goes deeper is told on one level."""


@dataclass(frozen=True, slots=True)
class Line:
    """An event, the handling of one, one of its calls, or its dead letter, and what belongs below."""

    what: Entry | Decision | Letter
    below: tuple["Line", ...] = ()


def story(trace: Trace) -> tuple[Line, ...]:
    """The trace's lines: one for each root, the rest below them. Every entry and decision is told once."""
    told: set[Entry] = set()
    return tuple(_branch(trace, root, told, 0) for root in trace.roots)


def is_unanswered(trace: Trace, entry: Entry) -> bool:
    """Whether ``entry`` still waits for somebody to decide on it, as far as the history tells."""
    return trace.outcome is None and isinstance(entry.event, _ANSWERED) and not trace.on(entry)


def _branch(trace: Trace, entry: Entry, told: set[Entry], depth: int) -> Line:
    told.add(entry)
    return Line(entry, tuple(_chain(trace, entry, told, depth)))


def _chain(trace: Trace, entry: Entry, told: set[Entry], depth: int) -> Iterator[Line]:
    """What came of ``entry``, on one level for as long as one thing led to one other."""
    waiting = deque([entry])
    while waiting:
        decisions = trace.on(waiting.popleft())
        for decision in decisions:
            made = sorted((each for each in made_by(decision) if each not in told), key=lambda each: each.time)
            told.update(made)
            following = made if depth == _DEEPEST else _following(trace, made) if len(decisions) == 1 else []
            branches = [each for each in made if each not in following]
            yield Line(decision, (*_calls(decision), *(_branch(trace, each, told, depth + 1) for each in branches)))
            yield from map(Line, following)
            waiting += following


def _following(trace: Trace, made: list[Entry]) -> list[Entry]:
    """The one thing that a chain goes on with, where there is just one."""
    going = [each for each in made if trace.on(each) or isinstance(each.event, _ANSWERED)]
    return made if len(made) == 1 else going if len(going) == 1 else []


def _calls(decision: Decision) -> Iterable[Line]:
    yield from map(Line, decision.calls)
    if decision.cancelled is not None:
        yield Line(decision.cancelled)
    if decision.letter is not None:
        yield Line(decision.letter)
