"""Steps on their way to workers and back: what topics ``work.<capability>``, ``work.results`` and ``control`` carry.

That a step was stopped stands in topic ``effects``: it is something the outside did to a handler.
"""

from typing import Annotated

from pydantic import Field

from schemas.events.base import Event, Personal, PersonalText, Timestamp, Value
from schemas.events.tasks import Citation, Evidence

__all__ = ["Claim", "StepAssigned", "StepCancelRequested", "StepCancelled", "StepCompleted", "StepInput"]


class StepInput(Value):
    """The accepted result of a step that this one depends on."""

    step_id: str
    objective: PersonalText
    answer: PersonalText
    citations: tuple[Citation, ...] = ()


class StepAssigned(Event, family="work"):
    """A worker is to do this step. ``finding`` is the Overseer's, when the step was sent back (``revision`` > 0)."""

    task_id: str
    step_id: str
    attempt: int = 1
    revision: int = 0
    capability: str
    objective: PersonalText
    inputs: tuple[StepInput, ...] = ()
    parameters: Annotated[dict[str, str], Personal] = Field(default_factory=dict)
    finding: PersonalText = ""
    deadline: Timestamp | None = None


class Claim(Value):
    """A statement of a result, with the chunks that are said to support it."""

    text: PersonalText
    chunk_ids: tuple[str, ...] = ()


class StepCompleted(Event, family="work"):
    """A worker's result, with what it rests on. ``model`` is the language model that wrote it, if one did."""

    task_id: str
    step_id: str
    attempt: int
    revision: int = 0
    capability: str
    objective: PersonalText
    answer: PersonalText
    claims: tuple[Claim, ...] = ()
    citations: tuple[Citation, ...] = ()
    evidence: tuple[Evidence, ...] = ()
    model: str = ""


class StepCancelRequested(Event, family="work"):
    """Workers that run this step are to stop. ``target`` is its step_id."""

    target: str
    task_id: str
    reason: PersonalText = ""


class StepCancelled(Event, family="work"):
    """A running or waiting step was stopped, as a StepCancelRequested asked.

    It is why the log has no outputs that the event ``event_id`` caused in ``agent``: replay does not decide it again.
    """

    task_id: str
    step_id: str
    attempt: int
    agent: str
    event_id: str
    reason: PersonalText = ""
