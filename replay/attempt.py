"""Runs a recorded step again, as the processor ran it, and tells of two runs what they say of each other.

In: an event with its lane's state, what its handling left, and the agent. Out: :class:`Attempt`, with the outputs as
bytes; and of two attempts, the second one with a shifted clock and other random numbers, a finding for each use of what
is not the handler's own, with the field in which the two differ.
"""

from collections.abc import Iterator
from typing import Any, Final, Protocol

from agents.agent import Agent, Failure
from agents.errors import NondeterminismError
from agents.handler_loop import of_thread
from agents.journal import Journal, Request
from agents.step import LaneState, StepResult, begin_step, failure_of, run_failure
from agents.turns import Turns
from replay.checks import Report
from replay.difference import Change, changes, told
from replay.findings import Finding, FindingKind
from replay.guard import Guard, Use
from replay.recorded import Left
from schemas.codec import Codec, Encoded
from schemas.events import DeadLettered, Priority
from schemas.metadata import Envelope, Metadata
from schemas.record import Record
from schemas.topics import key_of, priority_of, topic_name

__all__ = ["NOT_REENACTED", "Attempt", "attempt_step", "is_stable", "stability_faults"]

NOT_REENACTED: Final = frozenset({"ProcessCrashed", "HandlerHung"})
"""Failures that came upon the handler from outside."""

_OF_ITS_PLACE: Final = frozenset({"EncodeError", "EventTooLargeError", "EventTooLarge", "MissingPortError"})
"""Failures for which the process, or a size that is no part of the decision, was the reason."""


class ReplayJournal(Journal):
    """The journal of one attempt. It knows the call that it could not answer; ``like`` is the first attempt's."""

    replaying = True
    unrecorded: Request | None = None

    def __init__(self, agent: Agent[Any], key: str, cause: Metadata, left: Left, like: "ReplayJournal | None") -> None:
        # One is made for each attempt, so no more is set than a replay needs.
        self._agent, self._source, self._key, self._cause = agent.name, agent.source, key, cause
        self.performed = []
        if like is not None:
            self._recorded, self._attempt, self._next = like._recorded, like._attempt, like._next
            self._subjects = like._subjects
        elif left.calls:
            self._load(list(left.calls))

    async def ask(self, request: Request, effect_type: Any) -> Any:
        """As the journal's own."""
        turns = of_thread.loop.owner
        if isinstance(turns, Turns) and turns.is_alone:
            # Nothing else can happen before its answer: the handler need not wait for it.
            name, scope, hashed = effect_type.__name__, request.scope, request.hashed
            occurrence = 0 if self._occurrences is None else self._occurrences.get((name, scope, hashed), 0)
            recorded = self._recorded.get((name, scope, hashed, occurrence))
            if recorded is not None and not recorded.error:
                self._occurrence(name, scope, hashed)
                return recorded
        try:
            return await super().ask(request, effect_type)
        finally:
            if request.recorded is None:
                self.unrecorded = request


class Attempt:
    """One run of a handler, and of its on_failure."""

    __slots__ = ("encoded", "error", "failure", "fault", "journal", "result", "uses")

    def __init__(self, journal: ReplayJournal) -> None:
        self.journal = journal
        self.result: StepResult | None = None
        self.encoded: list[tuple[str, Envelope, Encoded]] = []
        self.failure: Failure | None = None
        self.error = ""
        self.fault: NondeterminismError | None = None
        self.uses: tuple[Use, ...] = ()

    def encode(self, codec: Codec | None, priority: Priority) -> None:
        """Make the outputs' bytes; without a codec they are not wanted."""
        assert self.result is not None
        if codec is not None:
            self.encoded = [
                (topic_name(output.event, priority), output, codec.encode(output.event, output.metadata))
                for output in self.result.outputs
            ]


class Means(Protocol):
    """What attempts need: the codec, and the guard that watches them, None for none."""

    codec: Codec
    guard: Guard | None


async def attempt_step(
    means: Means,
    agent: Agent[Any],
    record: Record,
    envelope: Envelope,
    state: LaneState | None,
    left: Left,
    *,
    first: Attempt | None = None,
) -> Attempt:
    """Run the handler with what was recorded and, when it fails, its on_failure, as the processor does.

    ``first`` makes it the second attempt, which is to be held against that one: its outputs are not encoded again.
    """
    guard, metadata = means.guard, envelope.metadata
    key = metadata.subject or key_of(envelope.event)
    journal = ReplayJournal(agent, key, metadata, left, None if first is None else first.journal)
    attempt = Attempt(journal)
    codec = means.codec if first is None or first.failure is not None else None
    if guard is None:
        await _run(attempt, codec, agent, record, envelope, state, left)
        return attempt
    guard.begin(second=first is not None)
    try:
        await _run(attempt, codec, agent, record, envelope, state, left)
    finally:
        attempt.uses = guard.end()
    return attempt


async def _run(
    attempt: Attempt,
    codec: Codec | None,
    agent: Agent[Any],
    record: Record,
    envelope: Envelope,
    state: LaneState | None,
    left: Left,
) -> None:
    letter = None if left.letter is None else left.letter[0]
    priority = priority_of(record.topic)
    try:
        if letter is not None and letter.error_type in NOT_REENACTED:
            attempt.failure = _told(letter)
        else:
            step = begin_step(agent, envelope, attempt.journal, state, record.timestamp_ms, priority)
            attempt.result = step if isinstance(step, StepResult) else await step.finish()
            attempt.encode(codec, priority)
            if letter is not None and letter.error_type in _OF_ITS_PLACE:
                attempt.failure = _told(letter)
    except NondeterminismError as error:
        if letter is not None and letter.error_type in (*_OF_ITS_PLACE, NondeterminismError.__name__):
            attempt.failure = _told(letter)
        else:
            attempt.result, attempt.fault = None, error
    except Exception as error:  # noqa: BLE001 - the live processor took it for the step's failure, whatever it was
        attempt.failure = failure_of(error)
    if attempt.failure is not None:
        await _fail(attempt, attempt.failure, codec, agent, record, envelope, state)


async def _fail(
    attempt: Attempt,
    failure: Failure,
    codec: Codec | None,
    agent: Agent[Any],
    record: Record,
    envelope: Envelope,
    state: LaneState | None,
) -> None:
    attempt.error, attempt.encoded = failure.message, []
    attempt.result = StepResult((), state, state_changed=False)
    priority = priority_of(record.topic)
    try:
        attempt.result = await run_failure(
            agent,
            envelope,
            failure,
            timestamp_ms=record.timestamp_ms,
            priority=priority,
            state=state,
            journal=attempt.journal,
        )
        attempt.encode(codec, priority)
    except NondeterminismError as error:
        attempt.result, attempt.fault = None, error
    except Exception as second:  # noqa: BLE001 - told with the first one in the dead letter
        attempt.result, attempt.encoded = StepResult((), state, state_changed=False), []
        attempt.error = f"{failure.message}; then on_failure failed with {type(second).__name__}: {second}"


def _told(letter: DeadLettered) -> Failure:
    """The failure that the dead letter tells of; these are never retryable."""
    return Failure(letter.error_type, letter.error.partition("; then on_failure ")[0], retryable=False)


def is_stable(first: Attempt, second: Attempt) -> bool:
    """Whether the two gave the same, and used nothing that is not the handler's own."""
    return not first.uses and not second.uses and _same(first, second)


def stability_faults(first: Attempt, second: Attempt, report: Report) -> Iterator[Finding]:
    """What the handler used that is not its own, and where deciding twice gave two results."""
    differs: list[Change] = []
    if not _same(first, second):
        differs = _differences(first, second)
    field, diff = (differs[0].path, told(differs)) if differs else ("", "")
    uses = dict.fromkeys((*first.uses, *second.uses))
    for use in uses:
        reaches = f"; it reaches {field}" if field else ""
        yield report(use.kind, f"{use.what} is used at {use.where or 'the handler'}{reaches}", field, diff)
    if differs and not uses:
        yield report(FindingKind.UNSTABLE, f"deciding it twice gives two results; the first is {field}", field, diff)


def _same(first: Attempt, second: Attempt) -> bool:
    """Whether the two gave the same; of the events what they hold is compared, which is quicker than the models."""
    one, other = first.result, second.result
    if one is None or other is None or first.failure is not None or second.failure is not None:
        failures = first.failure == second.failure and str(first.fault) == str(second.fault)
        return failures and one == other
    if one.state is not other.state and one.state != other.state:
        return False
    if one.timers != other.timers or len(one.outputs) != len(other.outputs):
        return False
    for old, new in zip(one.outputs, other.outputs, strict=True):
        if type(old.event) is not type(new.event) or old.event.__dict__ != new.event.__dict__:
            return False
        if old.metadata != new.metadata:
            return False
    return True


def _differences(first: Attempt, second: Attempt) -> list[Change]:
    """In what two attempts differ; old is the first's."""
    found = changes(_failure(first), _failure(second), "failure")
    one, other = first.result, second.result
    if one is None or other is None:
        return found
    if len(one.outputs) != len(other.outputs):
        found.append(Change("outputs", _types(one), _types(other)))
    for number, (old, new) in enumerate(zip(one.outputs, other.outputs, strict=False)):
        path = "" if len(one.outputs) == 1 else f"{type(old.event).__name__}[{number}]"
        found += changes(old.event, new.event, path)
        if type(old.event) is type(new.event):
            names = ("id", "subject", "time", "source", "correlation_id", "data_subjects")
            found += changes(
                {name: getattr(old.metadata, name) for name in names},
                {name: getattr(new.metadata, name) for name in names},
                f"{path}.metadata".lstrip("."),
            )
    old_state, new_state = one.state, other.state
    if old_state is None or new_state is None:
        found += [] if old_state is new_state else [Change("state", old_state, new_state)]
    else:
        found += changes(old_state.value, new_state.value, "state")
        found += changes(old_state.expires_at, new_state.expires_at, "state.expires_at")
    found += changes(
        {timer.name: timer.due for timer in one.timers}, {timer.name: timer.due for timer in other.timers}, "timers"
    )
    return found


def _failure(attempt: Attempt) -> str:
    if attempt.fault is not None:
        return f"{type(attempt.fault).__name__}: {attempt.fault}"
    return "" if attempt.failure is None else f"{attempt.failure.error_type}: {attempt.failure.message}"


def _types(result: StepResult) -> str:
    return ", ".join(type(output.event).__name__ for output in result.outputs)
