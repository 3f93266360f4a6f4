"""How the system itself fares: topics ``telemetry``, ``alerts``, ``audit`` and ``dead-letters``."""

from enum import StrEnum

from pydantic import Field

from schemas.events.base import Event, Timestamp

__all__ = ["AccessDecided", "AlertCleared", "AlertRaised", "DeadLettered", "ProcessorStats", "Severity"]


class Severity(StrEnum):
    """How urgent an alert is."""

    WARNING = "warning"
    CRITICAL = "critical"


class ProcessorStats(Event, family="operations"):
    """What one processor did in the last ``interval_s`` seconds. Latencies are in milliseconds, of finished events."""

    source: str
    agent: str
    instance: str
    interval_s: float
    events_in: int
    events_out: int
    failures: int
    dead_letters: int
    in_flight: int
    lag: int
    p50_ms: float
    p99_ms: float
    tokens: int = 0
    cost_usd: float = 0.0


class AlertRaised(Event, family="operations"):
    """A rule's condition holds for ``source``."""

    source: str
    alert_id: str
    rule: str
    severity: Severity
    message: str
    value: float
    threshold: float


class AlertCleared(Event, family="operations"):
    """A raised alert's condition no longer holds."""

    source: str
    alert_id: str
    rule: str


class AccessDecided(Event, family="operations"):
    """Somebody's request for something was allowed or refused."""

    source: str
    principal: str
    action: str
    resource: str
    allowed: bool
    reason: str = ""


class DeadLettered(Event, family="operations"):
    """A record that could not be processed, whole: raw key, value and headers as they were, and why.

    ``attempts`` counts the times it was tried; ``headers`` keeps the order and repeats of the original's.
    """

    source_topic: str
    source_partition: int
    source_offset: int
    source_timestamp: Timestamp
    key: bytes | None = None
    value: bytes | None = None
    header_names: tuple[str, ...] = ()
    header_values: tuple[bytes, ...] = ()
    agent: str
    error_type: str
    error: str
    attempts: int = Field(default=1, ge=0)
