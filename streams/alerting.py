"""What is wrong, by rules over windows of ProcessorStats. Pure: no Kafka, no Faust, no clock.

In: each processor's figures by the second, with the times at which the broker appended them. Out: :class:`Figures` of
hopping windows, for an instance and summed for an agent, and AlertRaised and AlertCleared where a rule's condition
begins and ceases to hold. All of it follows from the records and their order alone, ids too: whoever reads the same log
raises the same alerts, however often. A repeated or late record changes nothing: an instance's figures count once, in
the order in which it told them, and a window that was judged stays judged.

A window is judged when a record of the same agent is older than its end by :data:`GRACE_MS`. Times are the broker's
append times, one clock for all machines, so that an instance whose clock is slow is not late.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Final, Self

from pydantic import BaseModel, ConfigDict

from schemas.events import (
    AlertCleared,
    AlertRaised,
    ProcessorStats,
    Severity,
    TaskCancelled,
    TaskCompleted,
    TaskExpired,
    TaskFailed,
)
from schemas.metadata import deterministic_id

__all__ = [
    "EVERYBODY",
    "GRACE_MS",
    "OUTCOMES",
    "RULES",
    "STEP_MS",
    "WINDOW_MS",
    "Alert",
    "Figures",
    "Rule",
    "Sample",
    "Scope",
    "Spending",
    "Thresholds",
    "Watch",
    "conflict_of",
    "forget",
    "judge_spending",
    "judge_window",
]

WINDOW_MS: Final = 60_000
"""A window's length: a minute evens out what a second does."""
STEP_MS: Final = 15_000
"""A window ends, and is judged, this often; each second counts in four of them."""
GRACE_MS: Final = 2_000
"""How long a window waits for figures that are appended late: they come each second from every instance."""
SILENT_MS: Final = 600_000
"""An agent that has told nothing for so long is forgotten, and its alerts are cleared. Measured by others' figures."""
HOUR_MINUTES: Final = 60

EVERYBODY: Final = "*"
"""The source of alerts about all agents together."""

OUTCOMES: Final = (TaskCompleted, TaskFailed, TaskExpired, TaskCancelled)


@dataclass(frozen=True, slots=True)
class Thresholds:
    """When rules raise, by default as the settings do (``MAGNATRONIC_ALERT_...``); None turns a rule off."""

    error_rate: float | None = 0.2
    lag_growth: int | None = 1000
    stall_s: float | None = 45.0
    p99_ms: float | None = 60_000.0
    cost_usd_per_hour: float | None = 50.0
    tokens_per_hour: int | None = 20_000_000


class Figures(BaseModel):
    """What one instance did in one window, or with :meth:`total` several of them.

    ``samples`` counts seconds told. ``p99_ms`` is the mean of the seconds' p99, each weighed by its events.
    ``stalled_s`` are seconds in which an offset was held up, ``stalled`` says by what. ``first_lag`` and ``lag`` are
    the first and last told. ``told_us`` is the instance's own time of its newest sample, in microseconds since the
    epoch, ``offset`` where that lay: a record that is read again changes nothing.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    samples: int = 0
    events_in: int = 0
    events_out: int = 0
    failures: int = 0
    dead_letters: int = 0
    in_flight: int = 0
    first_lag: int = 0
    lag: int = 0
    p99_ms: float = 0.0
    tokens: int = 0
    cost_usd: float = 0.0
    stalled_s: float = 0.0
    stalled: str = ""
    told_us: int = 0
    offset: int = -1

    def __add__(self, sample: "Sample") -> Self:
        """These figures and one more second; the same figures where the record is in them already."""
        if sample.offset <= self.offset:
            return self
        stats = sample.stats
        events = self.events_in + stats.events_in
        weighed = self.p99_ms * self.events_in + stats.p99_ms * stats.events_in
        held_up = stats.stalled or ("it takes nothing of what waits" if _idle_before_work(stats) else "")
        return self.model_copy(
            update={
                "samples": self.samples + 1,
                "events_in": events,
                "events_out": self.events_out + stats.events_out,
                "failures": self.failures + stats.failures,
                "dead_letters": self.dead_letters + stats.dead_letters,
                "in_flight": stats.in_flight,
                "first_lag": self.first_lag if self.samples else stats.lag,
                "lag": stats.lag,
                "p99_ms": weighed / events if events else 0.0,
                "tokens": self.tokens + stats.tokens,
                "cost_usd": self.cost_usd + stats.cost_usd,
                "stalled_s": self.stalled_s + (stats.interval_s if held_up else 0.0),
                "stalled": held_up or self.stalled,
                "told_us": sample.told_us,
                "offset": sample.offset,
            }
        )

    @classmethod
    def total(cls, several: Iterable["Figures"]) -> "Figures":
        """The figures of an agent's instances together."""
        known = list(several)
        events = sum(each.events_in for each in known)
        return cls(
            samples=max((each.samples for each in known), default=0),
            events_in=events,
            events_out=sum(each.events_out for each in known),
            failures=sum(each.failures for each in known),
            dead_letters=sum(each.dead_letters for each in known),
            in_flight=sum(each.in_flight for each in known),
            first_lag=sum(each.first_lag for each in known),
            lag=sum(each.lag for each in known),
            p99_ms=sum(each.p99_ms * each.events_in for each in known) / events if events else 0.0,
            tokens=sum(each.tokens for each in known),
            cost_usd=sum(each.cost_usd for each in known),
            stalled_s=max((each.stalled_s for each in known), default=0.0),
            stalled=next((each.stalled for each in known if each.stalled), ""),
        )


def _idle_before_work(stats: ProcessorStats) -> bool:
    """Whether events wait that it has not even fetched, and none of them was finished. Slow ones in its hands are no
    stall: each has its own time limit.
    """
    return stats.lag > stats.in_flight and stats.events_in == 0 and stats.events_out == 0


@dataclass(frozen=True, slots=True)
class Sample:
    """A second's figures: appended at ``at_ms`` and ``offset``, told by the instance's own clock at ``told_us``."""

    stats: ProcessorStats
    at_ms: int
    offset: int
    told_us: int


class Scope(StrEnum):
    """Whom a rule judges."""

    INSTANCE = "instance"
    AGENT = "agent"
    EVERYBODY = "everybody"


@dataclass(frozen=True, slots=True)
class Rule:
    """A condition. It is raised after ``raise_after`` judgements in a row at or over its threshold, and cleared after
    ``clear_after`` in a row below ``clear_at`` times the threshold: what lies between changes nothing.

    ``threshold`` picks it from the settings, ``measure`` takes the value from a window's figures, ``says`` makes the
    sentence for people.
    """

    name: str
    scope: Scope
    severity: Severity
    threshold: Callable[[Thresholds], float | None]
    measure: Callable[[Figures], float]
    says: Callable[[Figures, float], str]
    raise_after: int
    clear_after: int
    clear_at: float


_FEWEST_ATTEMPTS: Final = 10


def _error_rate(figures: Figures) -> float:
    attempts = figures.events_in + figures.failures
    return figures.failures / attempts if attempts >= _FEWEST_ATTEMPTS else 0.0


RULES: Final = (
    # A fifth of the attempts of an agent fails, whoever's fault it is. Retries may still save the events.
    Rule(
        "error-rate",
        Scope.AGENT,
        Severity.WARNING,
        lambda at: at.error_rate,
        _error_rate,
        lambda figures, value: f"{value:.0%} of {figures.events_in + figures.failures} attempts failed in a minute",
        raise_after=1,
        clear_after=2,
        clear_at=0.5,
    ),
    # More comes in than is done, for longer than a burst takes.
    Rule(
        "lag-growth",
        Scope.AGENT,
        Severity.WARNING,
        lambda at: at.lag_growth,
        lambda figures: float(figures.lag - figures.first_lag),
        lambda figures, value: f"{value:,.0f} more events waited at a minute's end than at its start: {figures.lag:,}",
        raise_after=2,
        clear_after=2,
        clear_at=0.1,
    ),
    # An offset doesn't move on. The processor names the cause where it knows it.
    Rule(
        "stall",
        Scope.INSTANCE,
        Severity.CRITICAL,
        lambda at: at.stall_s,
        lambda figures: figures.stalled_s,
        lambda figures, value: f"held up for {value:.0f} s of a minute: {figures.stalled}",
        raise_after=1,
        clear_after=2,
        clear_at=0.25,
    ),
    # From fetched to committed, retries and waiting behind others included.
    Rule(
        "latency",
        Scope.AGENT,
        Severity.WARNING,
        lambda at: at.p99_ms,
        lambda figures: figures.p99_ms,
        lambda figures, value: f"one event in a hundred took {value / 1000:.1f} s, {figures.events_in} in a minute",
        raise_after=2,
        clear_after=2,
        clear_at=0.75,
    ),
    # Judged each minute over the last hour, for all agents together.
    Rule(
        "cost",
        Scope.EVERYBODY,
        Severity.CRITICAL,
        lambda at: at.cost_usd_per_hour,
        lambda figures: figures.cost_usd,
        lambda _, value: f"{value:.2f} US dollars were spent in an hour",
        raise_after=1,
        clear_after=1,
        clear_at=0.9,
    ),
    Rule(
        "tokens",
        Scope.EVERYBODY,
        Severity.WARNING,
        lambda at: None if at.tokens_per_hour is None else float(at.tokens_per_hour),
        lambda figures: float(figures.tokens),
        lambda _, value: f"{value:,.0f} tokens were used in an hour",
        raise_after=1,
        clear_after=1,
        clear_at=0.9,
    ),
)
"""Every rule but one: two different outcomes of a task (:func:`conflict_of`) need no window, and are never cleared."""


class Standing(BaseModel):
    """How a rule stands for one source: judgements in a row over and below, and the open alert's id."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    over: int = 0
    below: int = 0
    alert_id: str = ""


@dataclass(frozen=True, slots=True)
class Alert:
    """An alert that begins or ends, and the time that decided it."""

    event: AlertRaised | AlertCleared
    at: datetime

    @property
    def id(self) -> str:
        """The event's id: the same whoever finds it, however often."""
        return deterministic_id(self.event.alert_id, type(self.event).__name__)


class Watch(BaseModel):
    """What is known of an agent beside its windows.

    ``judged_ms`` is the end of the last window that was judged. ``told_us`` has the newest time told by each of its
    instances, for those that count as late ever after. ``standings`` are by ``<rule> <source>``.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    judged_ms: int
    told_us: dict[str, int] = {}
    standings: dict[str, Standing] = {}

    @classmethod
    def beginning(cls, at_ms: int) -> Self:
        """For an agent whose first figures were appended at ``at_ms``."""
        return cls(judged_ms=at_ms - at_ms % STEP_MS)

    def due(self, at_ms: int) -> list[int]:
        """The ends of the windows to be judged when a record of ``at_ms`` comes, oldest first.

        After a long silence only windows that can hold something are among them.
        """
        newest = min(at_ms - GRACE_MS, self.judged_ms + STEP_MS + GRACE_MS + WINDOW_MS)
        return list(range(self.judged_ms + STEP_MS, newest + 1, STEP_MS))

    def reach(self, at_ms: int) -> Self:
        """The watch when all windows that were due at ``at_ms`` are judged: those of a long silence held nothing."""
        newest = at_ms - GRACE_MS
        return self.model_copy(update={"judged_ms": max(self.judged_ms, newest - newest % STEP_MS)})

    def unjudged(self, at_ms: int) -> list[int]:
        """The ends of all windows that may hold something unjudged when a record of ``at_ms`` comes."""
        first = at_ms - at_ms % STEP_MS
        return sorted({*self.due(at_ms), *range(first, first + WINDOW_MS + STEP_MS, STEP_MS)})

    def late(self, sample: Sample, held: Iterable[Figures]) -> bool:
        """Whether a judged window would change by it, or its instance told it, or a later one, before. Such a record
        does not tell the time either: nothing is due by it.

        ``held`` are the instance's windows that are :meth:`unjudged`. What lies further on in the log than the sample
        does not count: after a crash they can hold records that come once more.
        """
        if sample.at_ms < self.judged_ms or sample.told_us <= self.told_us.get(sample.stats.instance, 0):
            return True
        return any(each.offset < sample.offset and sample.told_us <= each.told_us for each in held)

    def open_alerts(self) -> dict[str, str]:
        """The sources with an open alert, and the rules, comma-separated."""
        found: dict[str, str] = {}
        for key, standing in self.standings.items():
            if standing.alert_id:
                rule, _, source = key.partition(" ")
                found[source] = f"{found[source]}, {rule}" if source in found else rule
        return found


def judge_window(
    watch: Watch, agent: str, end_ms: int, figures: Mapping[str, Figures], at: Thresholds
) -> tuple[Watch, list[Alert]]:
    """Judge the agent's window that ends at ``end_ms``; ``figures`` are by instance, of those that told any.

    The watch afterwards, and the alerts that begin or end.
    """
    standings = dict(watch.standings)
    alerts: list[Alert] = []
    sources = {standing.partition(" ")[2] for standing in standings}
    instances = {f"{agent}/{instance}": each for instance, each in figures.items()}
    total = Figures.total(figures.values())
    for rule in RULES:
        if rule.scope is Scope.AGENT:
            _judge(rule, agent, total, end_ms, at, standings, alerts)
        elif rule.scope is Scope.INSTANCE:
            # One that fell silent is judged as idle: what it does can't be seen. The directory says that it is gone.
            for source in sorted(instances.keys() | (sources - {agent})):
                _judge(rule, source, instances.get(source, Figures()), end_ms, at, standings, alerts)
    told = dict(watch.told_us)
    for instance, each in figures.items():
        told[instance] = max(told.get(instance, 0), each.told_us)
    after = watch.model_copy(
        update={"judged_ms": max(watch.judged_ms, end_ms), "told_us": told, "standings": standings}
    )
    return after, alerts


def _judge(
    rule: Rule,
    source: str,
    figures: Figures,
    end_ms: int,
    at: Thresholds,
    standings: dict[str, Standing],
    alerts: list[Alert],
) -> None:
    key = f"{rule.name} {source}"
    before = standings.get(key, Standing())
    threshold = rule.threshold(at)
    value = rule.measure(figures)
    over = threshold is not None and value >= threshold
    below = threshold is None or value < threshold * rule.clear_at
    after = Standing(
        over=before.over + 1 if over else 0, below=before.below + 1 if below else 0, alert_id=before.alert_id
    )
    when = datetime.fromtimestamp(end_ms / 1000, UTC)
    if not before.alert_id and threshold is not None and after.over >= rule.raise_after:
        alert_id = deterministic_id("alert", rule.name, source, end_ms)
        alerts.append(
            Alert(
                AlertRaised(
                    source=source,
                    alert_id=alert_id,
                    rule=rule.name,
                    severity=rule.severity,
                    message=f"{source}: {rule.says(figures, value)}",
                    value=value,
                    threshold=threshold,
                ),
                when,
            )
        )
        after = after.model_copy(update={"alert_id": alert_id})
    elif before.alert_id and after.below >= rule.clear_after:
        alerts.append(Alert(AlertCleared(source=source, alert_id=before.alert_id, rule=rule.name), when))
        after = Standing()
    if after.alert_id or after.over:
        standings[key] = after
    else:
        standings.pop(key, None)


def forget(watch: Watch, at_ms: int) -> list[Alert] | None:
    """The ends of the alerts of an agent of which nothing was to be judged for :data:`SILENT_MS` at ``at_ms``; None:
    it was not silent for so long.
    """
    if at_ms - watch.judged_ms < SILENT_MS:
        return None
    when = datetime.fromtimestamp((watch.judged_ms + SILENT_MS) / 1000, UTC)
    cleared = []
    for key, standing in watch.standings.items():
        if standing.alert_id:
            rule, _, source = key.partition(" ")
            cleared.append(Alert(AlertCleared(source=source, alert_id=standing.alert_id, rule=rule), when))
    return cleared


class Spending(BaseModel):
    """What all agents spent, by minute: ``minutes`` maps a minute's end to each agent's (US dollars, tokens).

    Setting an agent's minute again changes nothing, so a repeated judgement doesn't either.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    judged_ms: int = 0
    minutes: dict[int, dict[str, tuple[float, int]]] = {}
    standings: dict[str, Standing] = {}


def judge_spending(
    known: Spending, agent: str, end_ms: int, figures: Iterable[Figures], at: Thresholds
) -> tuple[Spending, list[Alert]]:
    """Take in what ``agent`` spent in the minute that ends at ``end_ms``; judge the hours that are complete by it.

    An hour is judged when the first agent's minute after it is known: the others' have been told by then.
    """
    total = Figures.total(figures)
    minutes = {end: dict(by_agent) for end, by_agent in known.minutes.items()}
    minutes.setdefault(end_ms, {})[agent] = (total.cost_usd, total.tokens)
    newest = max(minutes)
    minutes = {end: each for end, each in minutes.items() if end > newest - (HOUR_MINUTES + 1) * 60_000}
    judged = newest - 60_000
    standings = dict(known.standings)
    alerts: list[Alert] = []
    if judged > known.judged_ms:
        spent = [each for end, by_agent in minutes.items() if end <= judged for each in by_agent.values()]
        hour = Figures(cost_usd=sum(cost for cost, _ in spent), tokens=sum(tokens for _, tokens in spent))
        for rule in RULES:
            if rule.scope is Scope.EVERYBODY:
                _judge(rule, EVERYBODY, hour, judged, at, standings, alerts)
    return Spending(judged_ms=max(judged, known.judged_ms), minutes=minutes, standings=standings), alerts


def conflict_of(task_id: str, first: tuple[str, str], second: tuple[str, str], at: datetime) -> Alert | None:
    """The alert that a task has two outcomes, each an (event id, type); None where they are one event told twice.

    ``at`` is when the second was appended. One alert a task, whatever else follows.
    """
    if first[0] == second[0]:
        return None
    alert_id = deterministic_id("alert", "conflict", task_id)
    return Alert(
        AlertRaised(
            source=task_id,
            alert_id=alert_id,
            rule="conflict",
            severity=Severity.CRITICAL,
            message=f"task {task_id} ended twice: {first[1]} ({first[0]}) and {second[1]} ({second[0]})",
            value=2.0,
            threshold=2.0,
        ),
        at,
    )
