"""One step: an event, its lane's state and a journal go in; outputs, effects and the new state come out.

Pure but for what the journal performs. Processors run it live, replay runs it with recorded effects, and the two give
the same outputs byte for byte. Output ids are UUIDv5 of the cause, the agent and the output's place, so that a step
that is run again names its events alike.
"""

from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any

from agents.agent import Agent, Failure
from agents.context import Context
from agents.errors import EffectFailedError, UndeclaredOutputError
from agents.journal import Journal
from agents.turns import Turns, begin
from schemas.events import Event, Priority, TimerFired
from schemas.frozen import frozen
from schemas.metadata import Envelope, Metadata, joined_id
from schemas.topics import key_of

__all__ = [
    "LaneState",
    "Running",
    "StepResult",
    "TimerChange",
    "begin_step",
    "concerns",
    "decision_time",
    "failure_of",
    "lane_of",
    "live_state",
    "run_failure",
    "run_step",
    "state_for",
]

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@frozen
class LaneState:
    """What a lane keeps between events: the agent's model, the lane's last decision time, and when to forget it.

    ``data_subjects`` are those of all that the model was made of. ``erased``: one of them was forgotten, and what is
    personal in the model is blank.
    """

    value: Any
    now: datetime
    expires_at: datetime | None = None
    data_subjects: tuple[str, ...] = ()
    erased: bool = False


@frozen
class TimerChange:
    """The lane's timer ``name`` is now due at ``due``; None when it was cancelled."""

    name: str
    due: datetime | None


@frozen
class StepResult:
    """What a step decided.

    ``outputs`` are in emission order. ``state`` is the lane's new state, None to delete it; it is to be stored only
    when ``state_changed``. ``timers`` are the lane's timers that were set or cancelled, each once, in the order
    in which the handler first named them.
    """

    outputs: tuple[Envelope, ...]
    state: LaneState | None
    state_changed: bool
    timers: tuple[TimerChange, ...] = ()


def lane_of(agent: Agent[Any], event: Event) -> str:
    """The lane of ``event``: for a TimerFired the one that set the timer, else what the agent says.

    Raises:
        Exception: whatever ``agent.lane`` raised: the event has no lane.
    """
    return event.lane if type(event) is TimerFired else agent.lane(event)


def concerns(agent: Agent[Any], event: Event) -> bool:
    """Whether ``event`` is for ``agent``: of a type that it consumes, and no other agent's timer."""
    return type(event) in agent.consumes and (type(event) is not TimerFired or event.agent == agent.name)


def decision_time(timestamp_ms: int, state: LaneState | None, event: Event | None = None) -> datetime:
    """``ctx.now``: the latest of the record's timestamp (ms since the epoch), the lane's last decision time and, for a
    TimerFired, when the timer was due: brokers' clocks differ, and a timer must not seem to have come too early.
    """
    now = _time_of(timestamp_ms)
    if type(event) is TimerFired and now < event.due:
        now = event.due
    return now if state is None or now >= state.now else state.now


@lru_cache(maxsize=256)
def _time_of(timestamp_ms: int) -> datetime:
    # The records of a batch share their append time.
    return _EPOCH + timedelta(milliseconds=timestamp_ms)


def live_state(state: LaneState | None, timestamp_ms: int) -> LaneState | None:
    """The lane's state as an event of this timestamp sees it: None at or past its expiry.

    Record time decides, not the clock, so that an event sees the same however late it is handled, or replayed.
    """
    if state is None or state.expires_at is None or _time_of(timestamp_ms) < state.expires_at:
        return state
    return None


def state_for(agent: Agent[Any], state: LaneState | None) -> LaneState | None:
    """``state`` as ``agent`` reads it when another version of it left it: its own model, as after a restart.

    Raises:
        pydantic.ValidationError: the model can't be read as this agent's.
    """
    model = agent.state_type
    if state is None or model is None or type(state.value) is model:
        return state
    value = model.model_validate_json(state.value.model_dump_json())
    return LaneState(value, state.now, state.expires_at, state.data_subjects, state.erased)


def failure_of(error: BaseException) -> Failure:
    """What ``error`` means for its step. Only failed effects can be worth another attempt: a deterministic handler
    that raises anything else will raise it again.
    """
    if isinstance(error, EffectFailedError):
        return Failure(error.error_type, error.message, error.retryable)
    return Failure(type(error).__name__, str(error), retryable=False)


class Running:
    """A step whose handler waits."""

    __slots__ = ("_agent", "_ctx", "_envelope", "_journal", "_state", "_turns")

    def __init__(
        self,
        agent: Agent[Any],
        envelope: Envelope,
        ctx: Context[Any],
        journal: Journal,
        state: LaneState | None,
        turns: Turns,
    ) -> None:
        self._agent, self._envelope, self._ctx, self._journal = agent, envelope, ctx, journal
        self._state, self._turns = state, turns

    async def finish(self) -> StepResult:
        """See it through.

        Raises:
            Exception: whatever the handler raised; nothing it emitted counts.
        """
        await self._turns.finish()
        return _result(self._agent, self._envelope, self._ctx, self._journal, self._state, "")


def begin_step(
    agent: Agent[Any],
    envelope: Envelope,
    journal: Journal,
    state: LaneState | None,
    timestamp_ms: int,
    priority: Priority,
) -> StepResult | Running:
    """:func:`run_step` as far as it goes without waiting, which for most events is to the end.

    Raises:
        Exception: whatever the handler raised; nothing it emitted counts.
    """
    if state is not None:
        state = live_state(state, timestamp_ms)
        ctx = _context(agent, envelope, timestamp_ms, priority, state, journal)
    elif type(envelope.event) is TimerFired:
        ctx = _context(agent, envelope, timestamp_ms, priority, None, journal)
    else:
        ctx = Context(agent.name, envelope.metadata, _time_of(timestamp_ms), priority, None, journal)
    turns = begin(journal, agent.handle(envelope.event, ctx))
    if turns is None:
        return _result(agent, envelope, ctx, journal, state, "")
    return Running(agent, envelope, ctx, journal, state, turns)


async def run_step(
    agent: Agent[Any],
    envelope: Envelope,
    *,
    timestamp_ms: int,
    priority: Priority,
    state: LaneState | None,
    journal: Journal,
) -> StepResult:
    """Let ``agent`` handle the event.

    Raises:
        Exception: whatever the handler raised; nothing it emitted counts.
    """
    step = begin_step(agent, envelope, journal, state, timestamp_ms, priority)
    return step if isinstance(step, StepResult) else await step.finish()


async def run_failure(
    agent: Agent[Any],
    envelope: Envelope,
    failure: Failure,
    *,
    timestamp_ms: int,
    priority: Priority,
    state: LaneState | None,
    journal: Journal,
) -> StepResult:
    """Let ``agent`` say what its failure on the event means for others.

    Raises:
        Exception: whatever ``on_failure`` raised.
    """
    state = live_state(state, timestamp_ms)
    ctx = _context(agent, envelope, timestamp_ms, priority, state, journal)
    if (turns := begin(journal, agent.on_failure(envelope.event, failure, ctx))) is not None:
        await turns.finish()
    return _result(agent, envelope, ctx, journal, state, "failure")


def _context(
    agent: Agent[Any],
    envelope: Envelope,
    timestamp_ms: int,
    priority: Priority,
    state: LaneState | None,
    journal: Journal,
) -> Context[Any]:
    now = decision_time(timestamp_ms, state, envelope.event)
    if state is not None and state.data_subjects:
        journal.concern(state.data_subjects)
    return Context(agent.name, envelope.metadata, now, priority, None if state is None else state.value, journal)


def _result(
    agent: Agent[Any], envelope: Envelope, ctx: Context[Any], journal: Journal, before: LaneState | None, kind: str
) -> StepResult:
    left = ctx.outputs
    value = left.state
    subjects = journal.data_subjects
    outputs = _outputs(agent, envelope.metadata, left.emitted, ctx.now, kind, subjects) if left.emitted else ()
    timers = () if left.timers is None else tuple(TimerChange(name, due) for name, due in left.timers.items())
    if value is None:
        return StepResult(outputs, None, before is not None, timers)
    if before is not None and value is before.value:
        return StepResult(outputs, before, False, timers)
    expires_at = None if left.expires_after is None else ctx.now + left.expires_after
    return StepResult(outputs, LaneState(value, ctx.now, expires_at, subjects), True, timers)


def _outputs(
    agent: Agent[Any], cause: Metadata, events: list[Event], now: datetime, kind: str, subjects: tuple[str, ...]
) -> tuple[Envelope, ...]:
    name, source, emits, cause_id = agent.name, agent.source, agent.emits, cause.id
    stem = f"{cause_id}\x1f{name}\x1f{kind}\x1f"
    outputs = []
    for ordinal, event in enumerate(events):
        if type(event) not in emits:
            raise UndeclaredOutputError(
                f"{name} emitted {type(event).__name__}, which its `emits` does not list; add it there"
            )
        metadata = Metadata(
            joined_id(f"{stem}{ordinal}"),
            source,
            key_of(event),
            now,
            cause_id,
            cause.correlation_id,
            cause.traceparent,
            subjects,
        )
        outputs.append(Envelope(event, metadata))
    return tuple(outputs)
