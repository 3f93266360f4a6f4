"""A task from submission to outcome: what topics ``tasks``, ``tasks.lifecycle`` and ``task.outcomes`` carry.

Every event is keyed by ``task_id``. ``step_id`` is ``<task_id>/<n>``, unique over all tasks.
"""

from enum import StrEnum
from typing import Annotated

from pydantic import Field

from schemas.events.base import Event, Personal, PersonalText, Timestamp, Value

__all__ = [
    "ApprovalDenied",
    "ApprovalGranted",
    "ApprovalRequested",
    "AssessedClaim",
    "Assessment",
    "Citation",
    "Evidence",
    "PlanProposed",
    "PlanRejected",
    "PlannedStep",
    "Priority",
    "StepAssessed",
    "StepFailed",
    "TaskCancelRequested",
    "TaskCancelled",
    "TaskCompleted",
    "TaskExpired",
    "TaskFailed",
    "TaskSubmitted",
    "TimerFired",
]


class Priority(StrEnum):
    """A task's priority; it never changes, and names the topics that the task's events go through."""

    HIGH = "high"
    NORMAL = "normal"
    LOW = "low"


class Assessment(StrEnum):
    """The Overseer's decision on one step's result."""

    ACCEPT = "accept"
    REVISE = "revise"
    REJECT = "reject"


class Evidence(Value):
    """A passage of a document that a result rests on. ``data_subjects`` are the key ids of whom it is about."""

    chunk_id: str
    document_id: str
    title: PersonalText
    heading: PersonalText = ""
    source: PersonalText = ""
    text: PersonalText
    score: float = 0.0
    data_subjects: tuple[str, ...] = ()


class Citation(Value):
    """Where a sentence of an answer comes from. ``marker`` is the number shown in the text, as in ``[1]``."""

    marker: int
    chunk_id: str
    document_id: str
    title: PersonalText
    heading: PersonalText = ""
    source: PersonalText = ""
    quote: PersonalText


class TaskSubmitted(Event, family="tasks"):
    """A user asks for something to be done. ``parameters`` are passed to every step."""

    task_id: str = Field(min_length=1, max_length=200)
    objective: PersonalText = Field(min_length=1)
    priority: Priority = Priority.NORMAL
    submitted_by: str = ""
    deadline: Timestamp | None = None
    parameters: Annotated[dict[str, str], Personal] = Field(default_factory=dict)


class PlannedStep(Value):
    """One node of a plan. ``depends_on`` holds the step_ids whose results it needs."""

    step_id: str
    capability: str
    objective: PersonalText
    depends_on: tuple[str, ...] = ()
    parameters: Annotated[dict[str, str], Personal] = Field(default_factory=dict)


class PlanProposed(Event, family="tasks"):
    """The Decomposer's plan: a directed acyclic graph of steps."""

    task_id: str
    objective: PersonalText
    steps: tuple[PlannedStep, ...]
    rationale: PersonalText = ""
    deadline: Timestamp | None = None


class PlanRejected(Event, family="tasks"):
    """No valid plan could be made; ``reason`` says why, in a sentence for the submitter."""

    task_id: str
    objective: PersonalText
    reason: PersonalText


class AssessedClaim(Value):
    """One claim of a result held against its evidence. The similarities are in [0, 1]."""

    text: PersonalText
    chunk_ids: tuple[str, ...] = ()
    lexical_similarity: float
    embedding_similarity: float | None = None
    grounded: bool


class StepAssessed(Event, family="tasks"):
    """The Overseer's verdict on a step's result; carries the result on, so that the Coordinator needs no other event.

    ``groundedness`` is the share of grounded claims, in [0, 1]; ``finding`` tells the worker what to mend.
    """

    task_id: str
    step_id: str
    attempt: int
    revision: int = 0
    decision: Assessment
    groundedness: float
    claims: tuple[AssessedClaim, ...] = ()
    finding: PersonalText = ""
    answer: PersonalText = ""
    citations: tuple[Citation, ...] = ()


class StepFailed(Event, family="tasks"):
    """A worker gave a step up. ``retryable`` says whether another attempt may succeed."""

    task_id: str
    step_id: str
    attempt: int
    error_type: str
    message: PersonalText
    retryable: bool = True


class ApprovalGranted(Event, family="tasks"):
    """A person allows what ``ApprovalRequested`` asked for."""

    task_id: str
    step_id: str
    approved_by: str
    comment: PersonalText = ""


class ApprovalDenied(Event, family="tasks"):
    """A person refuses what ``ApprovalRequested`` asked for."""

    task_id: str
    step_id: str
    denied_by: str
    reason: PersonalText = ""


class TaskCancelRequested(Event, family="tasks"):
    """The submitter wants the task to stop."""

    task_id: str
    requested_by: str
    reason: PersonalText = ""


class TimerFired(Event, family="tasks"):
    """A timer that a handler set has come due; it is for ``agent`` alone, in the ``lane`` that set it.

    It stands in the partition whose event set the timer, so in any topic that the agent reads; ``task_id`` is that
    event's record key, which for documents is the document's id.
    """

    task_id: str
    agent: str
    lane: str
    timer: str
    due: Timestamp


class TaskCompleted(Event, family="tasks"):
    """The task is done. ``groundedness`` is the lowest of its steps', in [0, 1]."""

    task_id: str
    objective: PersonalText
    answer: PersonalText
    citations: tuple[Citation, ...] = ()
    groundedness: float = 1.0
    steps: int = 1


class TaskFailed(Event, family="tasks"):
    """The task can't be done. ``step_id`` names the step that failed, if one did."""

    task_id: str
    objective: PersonalText
    reason: PersonalText
    step_id: str | None = None


class TaskExpired(Event, family="tasks"):
    """The task's deadline passed before it was done."""

    task_id: str
    objective: PersonalText
    deadline: Timestamp


class TaskCancelled(Event, family="tasks"):
    """The task was stopped at its submitter's request."""

    task_id: str
    objective: PersonalText
    requested_by: str
    reason: PersonalText = ""


class ApprovalRequested(Event, family="tasks"):
    """A step waits for a person's word until ``deadline``."""

    task_id: str
    step_id: str
    action: PersonalText
    reason: PersonalText
    deadline: Timestamp | None = None
