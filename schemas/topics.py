"""The topics: what each carries, by what key, for how long. The one place that says so in code.

In: an event (and its task's priority). Out: the topic it belongs to and its record key. Topic creation, the README's
table and AsyncAPI are made from :data:`TOPICS`.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from schemas.events import (
    AccessDecided,
    AgentHeartbeat,
    AgentRegistered,
    AlertCleared,
    AlertRaised,
    ApprovalDenied,
    ApprovalGranted,
    ApprovalRequested,
    ChangeMarked,
    ChunkEmbedded,
    DeadLettered,
    DeadLetterResolved,
    DocumentIndexed,
    DocumentRemoved,
    DocumentSubmitted,
    Event,
    LlmCalled,
    LogArchived,
    MemoryRecalled,
    PlanProposed,
    PlanRejected,
    PolicyPromoted,
    PolicyProposed,
    PolicyRolledBack,
    Priority,
    ProcessorStats,
    Queried,
    StepAssessed,
    StepAssigned,
    StepCancelled,
    StepCancelRequested,
    StepCompleted,
    StepFailed,
    SubjectForgotten,
    TaskCancelled,
    TaskCancelRequested,
    TaskCompleted,
    TaskExpired,
    TaskFailed,
    TaskSubmitted,
    TextsEmbedded,
    TimerFired,
    ToolCalled,
    ToolStarted,
    Waited,
)

__all__ = [
    "CAPABILITIES",
    "DAYS_MS",
    "FOREVER",
    "TOPICS",
    "Topic",
    "all_topics",
    "key_of",
    "priority_of",
    "topic_name",
    "topic_of",
]

DAYS_MS: Final = 7 * 24 * 3600 * 1000
FOREVER: Final = -1
MAX_MESSAGE_BYTES: Final = 1_048_576
"""The usual cap on one message. Dead-letters hold twice as much, so that whatever arrived fits, with its error."""

CAPABILITIES: Final = ("retrieve", "research")
"""What steps can ask for; each has its own work topics."""


@dataclass(frozen=True, slots=True)
class Topic:
    """A topic, or with ``prioritized`` one for each priority, and with ``per_capability`` one for each capability too.

    ``key`` is the event field that is the record key; ``retention_ms`` -1 keeps records forever; ``partitions`` None
    takes the setting's number.
    """

    name: str
    key: str
    events: tuple[type[Event], ...]
    purpose: str
    retention_ms: int = FOREVER
    prioritized: bool = False
    per_capability: bool = False
    partitions: int | None = None
    max_message_bytes: int = MAX_MESSAGE_BYTES

    def names(self) -> tuple[str, ...]:
        """Every Kafka topic that this one stands for."""
        stems = [f"{self.name}.{capability}" for capability in CAPABILITIES] if self.per_capability else [self.name]
        if not self.prioritized:
            return tuple(stems)
        return tuple(f"{stem}.{priority.value}" for stem in stems for priority in Priority)


TOPICS: Final = (
    Topic("tasks", "task_id", (TaskSubmitted,), "what users ask for", prioritized=True),
    Topic(
        "tasks.lifecycle",
        "task_id",
        (
            PlanProposed,
            PlanRejected,
            StepAssessed,
            StepFailed,
            ApprovalGranted,
            ApprovalDenied,
            TaskCancelRequested,
            TimerFired,
        ),
        "all that the Coordinator decides by",
        prioritized=True,
    ),
    Topic("work", "task_id", (StepAssigned,), "steps for workers", prioritized=True, per_capability=True),
    Topic("work.results", "task_id", (StepCompleted,), "what workers made of them", prioritized=True),
    Topic(
        "effects",
        "task_id",
        (
            LlmCalled,
            ToolStarted,
            ToolCalled,
            MemoryRecalled,
            TextsEmbedded,
            Queried,
            Waited,
            ChangeMarked,
            StepCancelled,
        ),
        "every call to the outside world, with request and response",
        max_message_bytes=4 * MAX_MESSAGE_BYTES,
    ),
    Topic(
        "task.outcomes",
        "task_id",
        (TaskCompleted, TaskFailed, TaskExpired, TaskCancelled, ApprovalRequested),
        "how tasks end; the Coordinator alone writes here",
    ),
    Topic("control", "target", (StepCancelRequested,), "orders that every worker reads", DAYS_MS, partitions=1),
    Topic("documents", "document_id", (DocumentSubmitted, DocumentRemoved), "the corpus"),
    Topic("embeddings", "document_id", (ChunkEmbedded, DocumentIndexed), "the corpus as vectors"),
    Topic(
        "policies", "name", (PolicyProposed, PolicyPromoted, PolicyRolledBack), "what agents decide by", partitions=1
    ),
    Topic(
        "agents.directory", "name", (AgentRegistered, AgentHeartbeat), "which agents there are", DAYS_MS, partitions=1
    ),
    Topic("telemetry", "source", (ProcessorStats,), "each processor's figures, every second", DAYS_MS, partitions=1),
    Topic("alerts", "source", (AlertRaised, AlertCleared), "what is wrong", DAYS_MS, partitions=1),
    Topic(
        "audit",
        "source",
        (AccessDecided, LogArchived),
        "who was allowed what, and what vouches for archives of the log",
        partitions=1,
    ),
    Topic("privacy", "key_id", (SubjectForgotten,), "whose personal data is gone for good", partitions=1),
    Topic(
        "dead-letters",
        "source_topic",
        (DeadLettered, DeadLetterResolved),
        "records that could not be processed, whole, and what became of them",
        partitions=1,
        max_message_bytes=8 * MAX_MESSAGE_BYTES + 65_536,
    ),
)

_PRIORITIES: Final = {priority.value: priority for priority in Priority}
_BY_EVENT: Final = {event: topic for topic in TOPICS for event in topic.events}
_KEYS: Final = {event: topic.key for event, topic in _BY_EVENT.items()}


def topic_of(event_type: type[Event]) -> Topic:
    """The topic that events of this type belong to.

    Raises:
        LookupError: no topic carries the type; add it to :data:`TOPICS`.
    """
    try:
        return _BY_EVENT[event_type]
    except KeyError:
        raise LookupError(f"no topic carries {event_type.__name__}; name it in schemas.topics.TOPICS") from None


@lru_cache(maxsize=4096)
def _name(event_type: type[Event], priority: Priority, capability: str) -> str:
    topic = topic_of(event_type)
    stem = f"{topic.name}.{capability}" if topic.per_capability else topic.name
    return f"{stem}.{priority.value}" if topic.prioritized else stem


def topic_name(event: Event, priority: Priority = Priority.NORMAL) -> str:
    """The Kafka topic for ``event`` of a task with ``priority``.

    >>> topic_name(StepFailed(task_id="t", step_id="t/1", attempt=1, error_type="E", message="m"), Priority.HIGH)
    'tasks.lifecycle.high'
    """
    # A pydantic model takes 1.5 µs to say that it lacks an attribute, its dict says so at once.
    return _name(type(event), priority, event.__dict__.get("capability", ""))


def key_of(event: Event) -> str:
    """The record key of ``event``.

    >>> key_of(TaskSubmitted(task_id="t1", objective="x"))
    't1'
    """
    field = _KEYS.get(type(event)) or topic_of(type(event)).key
    return str(event.__dict__[field])


def priority_of(topic: str) -> Priority:
    """The priority that a Kafka topic's name tells; normal where it tells none."""
    return _PRIORITIES.get(topic.rpartition(".")[2], Priority.NORMAL)


def all_topics() -> dict[str, Topic]:
    """Every Kafka topic name and the :class:`Topic` it belongs to."""
    return {name: topic for topic in TOPICS for name in topic.names()}
