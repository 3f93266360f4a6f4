"""The steps of one record key, decided one after another as the processor did.

In: the key's records in order, and :class:`Shared`, what all keys have in common. Out: steps with their verdicts, the
states of the lanes, and outputs for other keys. A lane whose state is not known any more is not decided further.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Protocol

from agents.agent import Agent
from agents.step import LaneState, StepResult, concerns, lane_of, state_for
from replay.attempt import NOT_REENACTED, Attempt, attempt_step, is_stable, stability_faults
from replay.checks import Report, compare_outputs, effect_faults, letter_faults, recorded_checks, unrecorded
from replay.difference import text_diff
from replay.findings import DecidedStep, Finding, FindingKind, OutputCheck, Sent, Verdict
from replay.guard import Guard
from replay.recorded import Left, Recorded, redriven_for, version_of
from schemas.codec import Codec
from schemas.events import Effect, Event, TimerFired
from schemas.metadata import Envelope, deterministic_id
from schemas.record import Record
from schemas.topics import key_of

__all__ = ["KeySteps", "Shared", "Station"]

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)

Lane = tuple[str, str, int, str]
"""Agent, topic, partition, lane."""


@dataclass(frozen=True, slots=True)
class Station:
    """An agent and the topics that it reads."""

    agent: Agent[Any]
    topics: frozenset[str]

    def handles(self, record: Record, event: Event) -> bool:
        """Whether the agent handles the record: it is in one of its topics, of a type that it consumes, no other
        agent's timer, and not sent again for another agent.
        """
        return (
            record.topic in self.topics
            and (concerns(self.agent, event) or self._concerned(event))
            and redriven_for(record) in ("", self.agent.name)
        )

    def _concerned(self, event: Event) -> bool:
        """Whether an older version consumed the event."""
        older = self.agent.predecessors
        return bool(older) and any(concerns(self.agent.at_version(version), event) for version in older)


class Shared(Protocol):
    """What the keys of an audit have in common."""

    codec: Codec
    guard: Guard | None

    def version(self, agent: Agent[Any], source: str) -> Agent[Any]:
        """The agent that makes the decisions of ``source``, under that name: a new version is no difference."""

    def finished(self, agent: str, record: Record) -> bool | None:
        """Whether the agent's group says that the record is done with; None where nothing is known of the group."""

    def gone(self, topic: str, record: Record) -> bool:
        """Whether the topic may have deleted what came of the record."""

    def hash_of(self, record: Record) -> str:
        """The record's hash."""


@dataclass(slots=True)
class Step:
    station: Station
    record: Record
    envelope: Envelope
    lane: str | None
    error: str
    number: int
    more: bool = False


class _Reporter:
    """Makes findings of a step: ``report(kind, message, field, diff)``."""

    __slots__ = ("_step",)

    def __init__(self, step: Step) -> None:
        self._step = step

    def __call__(self, kind: FindingKind, message: str, field: str = "", diff: str = "") -> Finding:
        record, envelope = self._step.record, self._step.envelope
        return Finding(
            kind,
            self._step.station.agent.name,
            envelope.metadata.id,
            type(envelope.event).__name__,
            record.topic,
            record.partition,
            record.offset,
            field,
            message,
            diff,
        )


class KeySteps:
    """The records of one key while they are decided."""

    def __init__(self, deciding: Shared, history: Sequence[tuple[Record, Envelope]]) -> None:
        self._deciding = deciding
        self._history = history
        self._plan: list[Step] = []
        self.recorded = Recorded(history)
        self.steps: list[DecidedStep] = []
        self.states: dict[Lane, LaneState | None] = {}
        self.sent: list[Sent] = []
        self._timers: set[str] = set()
        """The ids that TimerFired have for timers that were set so far, decided now."""
        self._blocked: dict[Lane, Verdict] = {}
        """Lanes whose state is not known any more, and why."""
        self._sources: dict[tuple[Any, ...], str] = {}
        """Who decided last, by lane and by agent and partition."""

    def plan(self, by_topic: Mapping[str, Sequence[Station]]) -> list[Step]:
        """Every handling of the history, in order."""
        steps = self._plan
        for record, envelope in self._history:
            for station in by_topic.get(record.topic, ()):
                if station.handles(record, envelope.event):
                    lane, error = None, ""
                    try:
                        lane = lane_of(station.agent, envelope.event)
                    except Exception as raised:  # noqa: BLE001 - whatever it was, the event has no lane
                        error = type(raised).__name__
                    steps.append(Step(station, record, envelope, lane, error, len(steps)))
        if len(steps) < 2:
            return steps
        names = [(step.station.agent.name, step.envelope.metadata.id) for step in steps]
        if len(set(names)) < len(names):
            left = Counter(names)
            for name, step in zip(names, steps, strict=True):
                left[name] -= 1
                step.more = left[name] > 0
        return steps

    async def step(self, step: Step) -> None:
        """Decide one of them."""
        agent, record, envelope = step.station.agent, step.record, step.envelope
        left = self.recorded.take(agent.name, envelope.metadata.id, record, more=step.more)
        if step.lane is None:
            self._unreadable(step, left)
            return
        lane: Lane = (agent.name, record.topic, record.partition, step.lane)
        before = self.states.get(lane)
        verdict = self._undecided(step, left, lane)
        if verdict is not None:
            self._leave(step, left, agent, before, before, None, verdict=verdict)
            return
        agent = self._deciding.version(agent, self._source(left, lane))
        if not concerns(agent, envelope.event):
            return  # another version consumes it
        before = state_for(agent, before)
        report = _Reporter(step)
        deciding = self._deciding
        attempt = await attempt_step(deciding, agent, record, envelope, before, left)
        findings: list[Finding] = []
        if deciding.guard is not None:
            again = await attempt_step(deciding, agent, record, envelope, before, left, first=attempt)
            if not is_stable(attempt, again):
                findings += stability_faults(attempt, again, report)
        if not left.ended and self._may_be_open(step, attempt):
            self._blocked[lane] = Verdict.OPEN
            self._leave(step, left, agent, before, before, None, findings=findings, verdict=Verdict.OPEN)
            return
        for item in left.effects:
            findings += effect_faults(*item, report)
        findings += self._faults(attempt, left, record, report)
        if type(envelope.event) is TimerFired and envelope.metadata.id not in self._timers:
            message = f"the timer {envelope.event.timer!r} that fired was not set by any step decided again"
            findings.append(report(FindingKind.TIMER, message, "timer"))
        if attempt.fault is not None:
            if agent.state_type is not None:
                self._blocked[lane] = Verdict.OPEN
            recorded = recorded_checks(left.outputs, deciding.hash_of)
            checks = [replace(check, redecided_hash=None) for check in recorded]
            self._leave(step, left, agent, before, before, None, checks=checks, findings=findings)
            return
        outcome = compare_outputs(
            attempt.encoded,
            left.outputs,
            envelope.metadata.subject or key_of(envelope.event),
            report,
            deciding,
            record,
        )
        if outcome.findings or outcome.sent:
            refused = left.letter is not None and left.letter[0].error_type == "OutputRefused"
            findings += [each for each in outcome.findings if not (refused and each.kind is FindingKind.OUTPUT_MISSING)]
            if not refused:
                step_number = len(self.steps)
                self.sent += [Sent(check, missing, step_number, encoded) for check, missing, encoded in outcome.sent]
        result = attempt.result
        assert result is not None
        if result.timers:
            self._timers.update(_timer_ids(agent, envelope, step.lane, result))
        self._leave(step, left, agent, before, result.state, result, checks=outcome.checks, findings=findings)

    def _source(self, left: Left, lane: Lane) -> str:
        """Who decided the step. One that left nothing was decided by the version that was at work then: the lane's last
        one or, before it left anything, the partition's, or else the first that is seen.
        """
        agent, topic, partition, _ = lane
        place = agent, topic, partition
        if source := left.source:
            self._sources[lane] = self._sources[place] = source
            return source
        return self._sources.get(lane) or self._sources.get(place) or self.recorded.first_source.get(agent, "")

    def _undecided(self, step: Step, left: Left, lane: Lane) -> Verdict | None:
        """Why the step is not to be decided; None when it is."""
        if (blocked := self._blocked.get(lane)) is not None:
            return blocked
        if left.cancelled is not None:
            return Verdict.CANCELLED
        if _is_erased(step.envelope, left):
            self._blocked[lane] = Verdict.ERASED
            return Verdict.ERASED
        if not left.ended and self._deciding.finished(lane[0], step.record) is False and not self._followed(step):
            self._blocked[lane] = Verdict.OPEN
            return Verdict.OPEN
        return None

    def _may_be_open(self, step: Step, attempt: Attempt) -> bool:
        """Whether the step, which left no sign of its end, may have none yet."""
        if attempt.failure is not None and attempt.failure.retryable:
            # It waits for another attempt, and its lane behind it: their offsets are finished all the same.
            return not self._followed(step)
        if self._deciding.finished(step.station.agent.name, step.record) is not None:
            return False
        return bool(attempt.encoded or attempt.failure or attempt.fault) and not self._followed(step)

    def _followed(self, step: Step) -> bool:
        """Whether a later event of the lane came to its end: then this one did so before it."""
        name, record = step.station.agent.name, step.record
        return any(
            later.lane == step.lane
            and later.station is step.station
            and (later.record.topic, later.record.partition) == (record.topic, record.partition)
            and self.recorded.shows_end(name, later.envelope.metadata.id, later.record)
            for later in self._plan[step.number + 1 :]
        )

    def _unreadable(self, step: Step, left: Left) -> None:
        """An event without a lane: its dead letter is all that it left."""
        agent, record, findings = step.station.agent, step.record, []
        report = _Reporter(step)
        if left.letter is None and self._deciding.finished(agent.name, record):
            message = f"the event has no lane ({step.error}); no dead letter tells of it"
            findings.append(report(FindingKind.LETTER_MISSING, message))
        elif left.letter is not None and left.letter[0].error_type != step.error:
            old, new = left.letter[0].error_type, step.error
            message = "its dead letter has another error_type"
            findings.append(report(FindingKind.LETTER_DIFFERS, message, "error_type", text_diff(old, new)))
        verdict = Verdict.UNREADABLE if left.letter is not None else Verdict.OPEN
        self._leave(step, left, agent, None, None, None, findings=findings, verdict=verdict)

    def _faults(self, attempt: Attempt, left: Left, record: Record, report: Report) -> list[Finding]:
        """What is wrong with the attempt but for its outputs."""
        letter = None if left.letter is None else left.letter[0]
        if (fault := attempt.fault) is not None:
            asked = attempt.journal.unrecorded
            if asked is None:
                return [] if attempt.uses else [report(FindingKind.NONDETERMINISM, str(fault))]
            left_over = set(attempt.journal.unasked())
            others = [each for each in left.calls if f"{type(each).__name__} {each.request_hash[:12]}" in left_over]
            name = asked.effect_type.__name__
            return [unrecorded(name, asked.text, asked.scope, asked.occurrence, others, report)]
        unasked = attempt.journal.unasked() if left.effects else []
        if letter is None and attempt.failure is None and not unasked:
            return []
        findings = list(letter_faults(letter, attempt.failure, attempt.error, record, report))
        if letter is None or letter.error_type not in NOT_REENACTED:
            findings += [
                report(FindingKind.EFFECT_UNASKED, f"it is recorded, but not asked for any more: {each}")
                for each in unasked
            ]
        return findings

    def _leave(
        self,
        step: Step,
        left: Left,
        agent: Agent[Any],
        before: LaneState | None,
        after: LaneState | None,
        result: StepResult | None,
        *,
        checks: Sequence[OutputCheck] = (),
        findings: Sequence[Finding] = (),
        verdict: Verdict | None = None,
    ) -> None:
        record = step.record
        if step.lane is not None:
            self.states[agent.name, record.topic, record.partition, step.lane] = after
        if verdict is None or findings:
            verdict = Verdict.DIFFERS if findings else Verdict.SAME
        elif not checks:
            checks = recorded_checks(left.outputs, self._deciding.hash_of)
        version = version_of(left.source or agent.source)
        self.steps.append(
            DecidedStep(
                agent.name,
                version,
                record,
                step.envelope,
                left.calls,
                before,
                after,
                result,
                tuple(checks),
                tuple(findings),
                verdict,
            )
        )


def _is_erased(envelope: Envelope, left: Left) -> bool:
    """Whether something that the step rests on, or left, can't be read any more."""
    if envelope.erased:
        return True
    for _, made in left.effects:
        # One without a request was recorded blank, as somebody was forgotten while its step ran.
        if made.erased or (isinstance(made.event, Effect) and not made.event.request):
            return True
    for _, made in left.outputs:  # noqa: SIM110 - for every step: a generator takes four times as long
        if made.erased:
            return True
    return False


def _timer_ids(agent: Agent[Any], envelope: Envelope, lane: str, result: StepResult) -> list[str]:
    cause = envelope.metadata.id
    return [
        deterministic_id(cause, agent.name, "timer", lane, timer.name, (timer.due - _EPOCH) // _MICROSECOND)
        for timer in result.timers
        if timer.due is not None
    ]
