"""How the system itself fares: topics ``telemetry``, ``alerts``, ``audit`` and ``dead-letters``."""

from enum import StrEnum

from pydantic import Field

from schemas.events.base import Event, PersonalText, Timestamp

__all__ = [
    "AccessDecided",
    "AlertCleared",
    "AlertRaised",
    "DeadLetterResolved",
    "DeadLettered",
    "LogArchived",
    "ProcessorStats",
    "Resolution",
    "Severity",
]


class Severity(StrEnum):
    """How urgent an alert is."""

    WARNING = "warning"
    CRITICAL = "critical"


class Resolution(StrEnum):
    """What became of a dead letter."""

    REDRIVEN = "redriven"
    DISCARDED = "discarded"


class ProcessorStats(Event, family="operations"):
    """What one processor did in the last ``interval_s`` seconds. Latencies are in milliseconds, of finished events.

    ``stalled`` says in words what holds an offset up, empty when nothing does. ``partitions`` are those owned,
    ``parked`` the events that wait for a retry, ``skipped`` those that were for another agent or finished before.
    """

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
    stalled: str = ""
    partitions: int = 0
    parked: int = 0
    skipped: int = 0


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


class LogArchived(Event, family="operations"):
    """An archive of the log holds so much by now, and ``head`` vouches for it.

    ``archive`` is the archive's name, ``cluster`` the id of the Kafka cluster whose log it holds. ``head`` is the hash
    of the last entry of its manifest: as hex, it covers all entries before it, and with them every record.
    """

    source: str
    archive: str
    cluster: str
    segments: int
    records: int
    head: str


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
    error: PersonalText
    attempts: int = Field(default=1, ge=0)


class DeadLetterResolved(Event, family="operations"):
    """Somebody dealt with the dead letter of the record at this place: sent it to ``agent`` again, or gave it up."""

    source_topic: str
    source_partition: int
    source_offset: int
    agent: str
    resolution: Resolution
    resolved_by: str
    reason: str = ""
