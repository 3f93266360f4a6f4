"""When windows of ProcessorStats are judged, and what is wrong then. Pure: no Kafka, no Faust, no clock.

In: figures of hopping windows (:mod:`streams.figures`), and rules (:mod:`streams.rules`). Out: AlertRaised and
AlertCleared where a rule's condition begins and ceases to hold. All of it follows from the records and their order
alone, ids too: whoever reads the same log raises the same alerts, however often. A repeated or late record changes
nothing: an instance's figures count once, in the order in which it told them, and a judged window stays judged.

A window is judged when a record of the same agent is older than its end by :data:`GRACE_MS`. Times are the broker's
append times, one clock for all machines, so that an instance whose clock is slow is not late.
"""

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Final, Self

from pydantic import BaseModel, ConfigDict

from schemas.events import (
    AlertCleared,
    AlertRaised,
    Severity,
    TaskCancelled,
    TaskCompleted,
    TaskExpired,
    TaskFailed,
)
from schemas.metadata import deterministic_id
from streams.figures import STEP_MS, WINDOW_MS, Figures, Sample
from streams.rules import RULES, Alert, Scope, Standing, Thresholds, judge

__all__ = [
    "EVERYBODY",
    "GRACE_MS",
    "OUTCOMES",
    "SILENT_MS",
    "Spending",
    "Watch",
    "conflict_of",
    "forget",
    "judge_spending",
    "judge_window",
]

GRACE_MS: Final = 2_000
"""How long a window waits for figures that are appended late: they come each second from every instance."""
SILENT_MS: Final = 600_000
"""An agent that has told nothing for so long is forgotten, and its alerts are cleared. Measured by others' figures."""
HOUR_MINUTES: Final = 60

EVERYBODY: Final = "*"
"""The source of alerts about all agents together."""

OUTCOMES: Final = (TaskCompleted, TaskFailed, TaskExpired, TaskCancelled)


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

    def is_due(self, at_ms: int) -> bool:
        """Whether a window is to be judged when a record of ``at_ms`` comes."""
        return at_ms - GRACE_MS >= self.judged_ms + STEP_MS

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
    sources = {standing.partition(" ")[2] for standing in standings}
    instances = {f"{agent}/{instance}": each for instance, each in figures.items()}
    # One that fell silent is judged as idle: what it does can't be seen. The directory says that it is gone.
    judged = {source: instances.get(source, Figures()) for source in sorted(instances.keys() | (sources - {agent}))}
    by_scope = {Scope.AGENT: {agent: Figures.total(figures.values())}, Scope.INSTANCE: judged}
    alerts = [
        judge(rule, source, each, end_ms, at, standings)
        for rule in RULES
        for source, each in by_scope.get(rule.scope, {}).items()
    ]
    told = dict(watch.told_us)
    for instance, each in figures.items():
        told[instance] = max(told.get(instance, 0), each.told_us)
    after = watch.model_copy(
        update={"judged_ms": max(watch.judged_ms, end_ms), "told_us": told, "standings": standings}
    )
    return after, [alert for alert in alerts if alert is not None]


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
    alerts: list[Alert | None] = []
    if judged > known.judged_ms:
        spent = [each for end, by_agent in minutes.items() if end <= judged for each in by_agent.values()]
        hour = Figures(cost_usd=sum(cost for cost, _ in spent), tokens=sum(tokens for _, tokens in spent))
        everybody = (rule for rule in RULES if rule.scope is Scope.EVERYBODY)
        alerts += [judge(rule, EVERYBODY, hour, judged, at, standings) for rule in everybody]
    after = Spending(judged_ms=max(judged, known.judged_ms), minutes=minutes, standings=standings)
    return after, [alert for alert in alerts if alert is not None]


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
