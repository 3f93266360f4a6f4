"""The Monitor's rules: conditions on a window's figures, and how a condition becomes an alert that begins and ends.

In: the figures of a window, and thresholds. Out: AlertRaised and AlertCleared, whose ids follow from the rule, the
source and the window's end. Pure: no Kafka, no Faust, no clock.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Final

from pydantic import BaseModel, ConfigDict

from schemas.events import AlertCleared, AlertRaised, Severity
from schemas.metadata import deterministic_id
from streams.figures import Figures

__all__ = ["RULES", "Alert", "Rule", "Scope", "Standing", "Thresholds", "judge"]


@dataclass(frozen=True, slots=True)
class Thresholds:
    """When rules raise, by default as the settings do (``MAGNATRONIC_ALERT_...``); None turns a rule off."""

    error_rate: float | None = 0.2
    lag_growth: int | None = 1000
    stall_s: float | None = 45.0
    p99_ms: float | None = 60_000.0
    cost_usd_per_hour: float | None = 50.0
    tokens_per_hour: int | None = 20_000_000


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
"""Every rule but one: two different outcomes of a task (:func:`streams.alerting.conflict_of`) need no window, and are
never cleared.
"""


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


def judge(
    rule: Rule, source: str, figures: Figures, end_ms: int, at: Thresholds, standings: dict[str, Standing]
) -> Alert | None:
    """The alert of ``source`` that begins or ends with the window that ends at ``end_ms``; ``standings``, by
    ``<rule> <source>``, are brought up to date.
    """
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
    alert = None
    if not before.alert_id and threshold is not None and after.over >= rule.raise_after:
        alert_id = deterministic_id("alert", rule.name, source, end_ms)
        raised = AlertRaised(
            source=source,
            alert_id=alert_id,
            rule=rule.name,
            severity=rule.severity,
            message=f"{source}: {rule.says(figures, value)}",
            value=value,
            threshold=threshold,
        )
        alert = Alert(raised, when)
        after = after.model_copy(update={"alert_id": alert_id})
    elif before.alert_id and after.below >= rule.clear_after:
        alert = Alert(AlertCleared(source=source, alert_id=before.alert_id, rule=rule.name), when)
        after = Standing()
    if after.alert_id or after.over:
        standings[key] = after
    else:
        standings.pop(key, None)
    return alert
