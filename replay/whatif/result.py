"""What a what-if found: for each task what differs first, how it ended before and after, and what that took.

In: what the simulation notes. Out: frozen values that JSON can hold, and sums over tasks.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

__all__ = ["Departure", "Divergence", "Side", "Status", "TaskResult", "Totals", "from_dict", "totals"]


class Status(StrEnum):
    """How a task fared."""

    SAME = "same"
    """Nothing differs."""
    DIVERGED = "diverged"
    """Something differs, and it was carried through to an outcome."""
    STOPPED = "stopped"
    """A call would have been made that nobody is to answer; ``would`` has it."""
    BUDGET = "budget"
    """The next call could have gone over the budget; run it again with more to go on."""
    UNFINISHED = "unfinished"
    """It comes to no outcome any more."""
    RUNAWAY = "runaway"
    """It does not come to rest."""
    LEFT_OUT = "left out"
    """It can't be simulated; ``why`` says so."""


class Departure(StrEnum):
    """In which way a step differs."""

    ASKS = "asks otherwise"
    SKIPS = "no longer asks"
    DECIDES = "decides otherwise"
    ADDS = "emits what it did not"
    OMITS = "does not emit"
    FAILS = "fails"


@dataclass(frozen=True, slots=True)
class Divergence:
    """Where a step differs from the recorded one. ``field`` is a dotted path in a request or an output; the values are
    text, cut when long; ``at_ms`` is simulated time.
    """

    kind: Departure
    agent: str
    event_type: str
    event_id: str
    what: str
    field: str
    before: str
    after: str
    at_ms: int


@dataclass(frozen=True, slots=True)
class Side:
    """How a task went, before or after. ``groundedness`` is in [0, 1], None where nothing was assessed; ``latency_ms``
    runs from its submission to its outcome, None without one.
    """

    outcome: str = ""
    answer: str = ""
    groundedness: float | None = None
    tokens: int = 0
    cost_usd: float = 0.0
    calls: int = 0
    latency_ms: int | None = None


@dataclass(frozen=True, slots=True)
class TaskResult:
    """One task. ``steps`` were simulated. ``reused`` calls were answered by the record at their place, ``elsewhere`` by
    the record at another place of the task, ``made`` are new; ``spent_tokens`` and ``spent_usd`` are theirs. ``would``
    are the calls that were not made.
    """

    task_id: str
    status: Status
    objective: str = ""
    before: Side = Side()
    after: Side = Side()
    divergences: tuple[Divergence, ...] = ()
    steps: int = 0
    reused: int = 0
    elsewhere: int = 0
    made: int = 0
    spent_tokens: int = 0
    spent_usd: float = 0.0
    would: tuple[Mapping[str, str], ...] = ()
    why: str = ""
    digest: str = ""

    @property
    def first(self) -> Divergence | None:
        """What differs first."""
        return self.divergences[0] if self.divergences else None

    @property
    def decided(self) -> Divergence | None:
        """The first decision that differs; a request that does may be answered alike."""
        return next((each for each in self.divergences if each.kind not in (Departure.ASKS, Departure.SKIPS)), None)

    @property
    def ended_otherwise(self) -> bool:
        """Whether the outcome is another one, by its type or its answer."""
        return (self.before.outcome, self.before.answer) != (self.after.outcome, self.after.answer)

    def as_dict(self) -> dict[str, Any]:
        """All of it as JSON can hold it."""
        return asdict(self)


def from_dict(told: Mapping[str, Any]) -> TaskResult:
    """What :meth:`TaskResult.as_dict` told."""
    return TaskResult(
        **{
            **told,
            "status": Status(told["status"]),
            "before": Side(**told["before"]),
            "after": Side(**told["after"]),
            "divergences": tuple(
                Divergence(**{**each, "kind": Departure(each["kind"])}) for each in told["divergences"]
            ),
            "would": tuple(told["would"]),
        }
    )


@dataclass
class Totals:
    """Sums over tasks. ``groundedness`` and ``latency_ms`` are means over the tasks that have them on both sides."""

    tasks: int = 0
    by_status: dict[str, int] = field(default_factory=dict)
    decisions_differ: int = 0
    outcomes_differ: int = 0
    steps: int = 0
    reused: int = 0
    elsewhere: int = 0
    made: int = 0
    spent_tokens: int = 0
    spent_usd: float = 0.0
    would: dict[str, int] = field(default_factory=dict)
    first_by_agent: dict[str, int] = field(default_factory=dict)
    before: dict[str, float | int | None] = field(default_factory=dict)
    after: dict[str, float | int | None] = field(default_factory=dict)
    completed: tuple[int, int] = (0, 0)

    def as_dict(self) -> dict[str, Any]:
        """All of it as JSON can hold it."""
        return asdict(self)


def totals(results: Iterable[TaskResult]) -> Totals:
    """The sums over ``results``."""
    sums = Totals()
    sides: dict[str, dict[str, list[float]]] = {
        side: {name: [] for name in ("groundedness", "latency_ms")} for side in ("before", "after")
    }
    counts: dict[str, dict[str, float]] = {side: {"tokens": 0, "cost_usd": 0.0, "calls": 0} for side in sides}
    completed = [0, 0]
    for result in results:
        sums.tasks += 1
        sums.by_status[result.status.value] = sums.by_status.get(result.status.value, 0) + 1
        if result.status is Status.LEFT_OUT:
            continue
        sums.decisions_differ += result.decided is not None
        finished = result.status in (Status.SAME, Status.DIVERGED)
        sums.outcomes_differ += finished and result.ended_otherwise
        for name in ("steps", "reused", "elsewhere", "made", "spent_tokens", "spent_usd"):
            setattr(sums, name, getattr(sums, name) + getattr(result, name))
        for would in result.would:
            sums.would[would["would"]] = sums.would.get(would["would"], 0) + 1
        if result.first is not None:
            sums.first_by_agent[result.first.agent] = sums.first_by_agent.get(result.first.agent, 0) + 1
        if not finished:
            continue
        for index, (name, side) in enumerate((("before", result.before), ("after", result.after))):
            completed[index] += side.outcome == "TaskCompleted"
            for count in counts[name]:
                counts[name][count] += getattr(side, count)
        for measure in ("groundedness", "latency_ms"):
            values = getattr(result.before, measure), getattr(result.after, measure)
            if None not in values:
                sides["before"][measure].append(values[0])
                sides["after"][measure].append(values[1])
    sums.spent_usd = round(sums.spent_usd, 9)
    sums.completed = completed[0], completed[1]
    for name, measures in sides.items():
        means = {measure: _mean(values) for measure, values in measures.items()}
        told = {**counts[name], "cost_usd": round(counts[name]["cost_usd"], 9), **means}
        setattr(sums, name, told)
    return sums


def _mean(values: list[float]) -> float | None:
    return round(sum(values) / len(values), 4) if values else None
