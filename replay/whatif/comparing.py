"""Holds each simulated step against the recorded one, and keeps the books of a task.

In: steps as they were carried out, with what the record has of them. Out: their outputs, each with whether it is as
recorded, and at the end a :class:`~replay.whatif.result.TaskResult`. Who wrote an event, when, and its trace are no
part of a decision; its type, its topic and its fields are.
"""

from collections.abc import Sequence
from typing import Any, Final

import orjson

from replay.difference import changes as differences
from replay.recorded import Left
from replay.whatif.answers import Stop, Would
from replay.whatif.changes import Changes
from replay.whatif.deciding import Encoded, Want
from replay.whatif.past import Item, Past
from replay.whatif.result import Departure, Divergence, Side, Status, TaskResult
from replay.whatif.stepping import Stepped
from schemas.codec import Codec
from schemas.events import (
    ChangeMarked,
    Effect,
    Event,
    LlmCalled,
    TaskCancelled,
    TaskCompleted,
    TaskExpired,
    TaskFailed,
    TaskSubmitted,
    ToolCalled,
    ToolStarted,
    Waited,
)
from schemas.metadata import Envelope
from schemas.record import Record
from schemas.sealing import SEALED
from schemas.topics import all_topics, priority_of, topic_name

__all__ = ["Ledger"]

_MOST: Final = 50
"""Differences that are kept of one task."""
_LONGEST: Final = 4000
_NO_CALLS: Final = (ChangeMarked, ToolStarted, Waited)
_FLEETING: Final = {name for name, topic in all_topics().items() if topic.retention_ms > 0}
"""Topics whose records go: that one is missing there tells nothing."""


class Ledger:
    """One task's books. ``exact``: the code is the one that decided, as far as it is known."""

    def __init__(self, past: Past, changes: Changes, codec: Codec, *, exact: bool) -> None:
        self._past, self._changes, self._codec = past, changes, codec
        self._exact = exact
        self._found: list[Divergence] = []
        self._stops: list[Stop] = []
        self.outcome: tuple[int, Envelope] | None = None
        """When (simulated milliseconds) the task came to what end."""
        self.steps = 0
        self._reused = self._elsewhere = self._made = 0
        self._spent_tokens, self._spent_usd = 0, 0.0
        self._calls: list[LlmCalled] = []

    @property
    def differs(self) -> bool:
        """Whether anything does so far."""
        return bool(self._found)

    def ended(self, at: int, envelope: Envelope) -> None:
        """The task came to an end."""
        if self.outcome is None:
            self.outcome = at, envelope

    def step(
        self, at: int, cause: Item, agent: str, left: Left, stepped: Stepped, *, beyond: bool
    ) -> list[tuple[Item, bool]]:
        """Enter a step; its outputs, each with whether it is as recorded. ``beyond``: the record has nothing of it."""
        self.steps += 1
        noting = _Noting(self._found, at, cause, agent)
        if not beyond:
            self._requests(noting, left, stepped)
        self._count(left, stepped)
        if stepped.stops:
            self._stops += stepped.stops
            return []
        decision = stepped.decision
        assert decision is not None
        if stepped.failure is not None and left.letter is None and not beyond:
            failure = stepped.failure
            noting.note(Departure.FAILS, "", "", "", f"{failure.error_type}: {failure.message}")
        outputs = () if decision.result is None else decision.result.outputs
        return self._outputs(noting, cause[0], left, outputs, decision.encoded, beyond=beyond)

    # Requests.

    def _requests(self, noting: "_Noting", left: Left, stepped: Stepped) -> None:
        effects = [item[1].event for item in left.effects if isinstance(item[1].event, Effect)]
        unasked = list(stepped.unasked)
        for want in stepped.wants:
            replaced = next((each for each in effects if _identity(each) == want.identity), None)
            if replaced is not None:
                field, before, after = self._unfit(replaced)
                noting.note(Departure.ASKS, want.kind, field, before, after)
                continue
            pair = next((identity for identity in unasked if identity[0] == want.kind), None)
            was = None if pair is None else next((each for each in effects if _identity(each) == pair), None)
            if pair is not None:
                unasked.remove(pair)
            noting.request(want, was)
        if not stepped.wants:
            for identity in unasked:
                skipped = next((each for each in effects if _identity(each) == identity), None)
                noting.note(Departure.SKIPS, identity[0], "", "" if skipped is None else skipped.request, "")

    def _unfit(self, effect: Effect) -> tuple[str, str, str]:
        """Why the recorded answer to an unchanged request does not stand: a field, and what it was and is."""
        if isinstance(effect, LlmCalled):
            asked = f"{self._changes.provider}/{self._changes.model}".rstrip("/")
            return "provider", f"{effect.provider}/{effect.model}", asked
        if isinstance(effect, ToolCalled):
            had = effect.tool in self._changes.without_tools
            return "tool", effect.tool if had else "", "" if had else effect.tool
        return "", effect.request, ""

    # Outputs.

    def _outputs(
        self,
        noting: "_Noting",
        cause: Record,
        left: Left,
        outputs: Sequence[Envelope],
        encoded: Sequence[Encoded],
        *,
        beyond: bool,
    ) -> list[tuple[Item, bool]]:
        expected = {envelope.metadata.id: (record, envelope) for record, envelope in left.outputs}
        found: list[tuple[Item, bool]] = []
        for output, (value, headers) in zip(outputs, encoded, strict=True):
            topic = topic_name(output.event, priority_of(cause.topic))
            was = expected.pop(output.metadata.id, None)
            partition = cause.partition if was is None else was[0].partition
            made = Record(topic, partition, -1, 0, output.metadata.subject.encode(), value, headers)
            if was is None:
                twin = self._past.twin(output.metadata.id, topic)
                same = beyond or (topic in _FLEETING and self._exact)
                if not same:
                    noting.note(Departure.ADDS, type(output.event).__name__, "", "", _text(output.event))
                found.append((self._item(made, output, twin), same))
                continue
            differing = [] if _alike(was[0], made) else differences(was[1].event, self._codec.decode(made).event)
            if was[0].topic != topic:
                noting.note(Departure.DECIDES, type(output.event).__name__, "topic", was[0].topic, topic)
            for change in differing:
                noting.note(Departure.DECIDES, type(output.event).__name__, change.path, change.old, change.new)
            same = not differing and was[0].topic == topic
            as_was = same and was[1].metadata.time == output.metadata.time
            found.append((was if as_was else (made, self._codec.decode(made)), same))
        for record, envelope in expected.values():
            if not beyond and record.topic not in _FLEETING:
                noting.note(Departure.OMITS, type(envelope.event).__name__, "", _text(envelope.event), "")
        return found

    def _item(self, made: Record, output: Envelope, twin: Item | None) -> Item:
        if twin is not None and _alike(twin[0], made) and twin[1].metadata.time == output.metadata.time:
            return twin
        return made, self._codec.decode(made)

    # Sums.

    def _count(self, left: Left, stepped: Stepped) -> None:
        recorded = [item[1].event for item in left.effects]
        if stepped.wants or stepped.unasked:
            gone = set(stepped.unasked)
            used = [each for each in recorded if isinstance(each, Effect) and _identity(each) not in gone]
            used = [each for each in used if self._changes.stands(each)]
        else:
            used = [each for each in recorded if isinstance(each, Effect)]
        self._reused += sum(not isinstance(each, _NO_CALLS) for each in used)
        self._elsewhere += len(stepped.elsewhere)
        self._made += len(stepped.made)
        for effect in (*used, *stepped.elsewhere, *stepped.made):
            if isinstance(effect, LlmCalled):
                self._calls.append(effect)
        for effect in stepped.made:
            if isinstance(effect, LlmCalled):
                self._spent_tokens += effect.prompt_tokens + effect.completion_tokens
                self._spent_usd += effect.cost_usd

    def result(self, status: Status | None = None) -> TaskResult:
        """What came of the task; ``status`` where more is known than the books tell."""
        past = self._past
        submitted = past.submitted
        objective = submitted[1].event.objective if submitted and isinstance(submitted[1].event, TaskSubmitted) else ""
        before = None if past.outcome is None else (past.outcome[0].timestamp_ms, past.outcome[1])
        return TaskResult(
            task_id=past.task_id,
            status=status or self._status(),
            objective=objective,
            before=self._side(before, past.calls()),
            after=self._side(self.outcome, self._calls),
            divergences=tuple(self._found[:_MOST]),
            steps=self.steps,
            reused=self._reused,
            elsewhere=self._elsewhere,
            made=self._made,
            spent_tokens=self._spent_tokens,
            spent_usd=round(self._spent_usd, 9),
            would=tuple(_stopped(stop) for stop in self._stops),
            digest=past.digest(),
        )

    def _status(self) -> Status:
        if any(stop.would is Would.SPEND for stop in self._stops):
            return Status.BUDGET
        if self._stops:
            return Status.STOPPED
        if self.outcome is None:
            return Status.UNFINISHED
        return Status.DIVERGED if self._found else Status.SAME

    def _side(self, outcome: tuple[int, Envelope] | None, calls: Sequence[LlmCalled]) -> Side:
        sums: dict[str, Any] = {
            "tokens": sum(call.prompt_tokens + call.completion_tokens for call in calls),
            "cost_usd": round(sum(call.cost_usd for call in calls), 9),
            "calls": len(calls),
        }
        if outcome is None:
            return Side(**sums)
        at, envelope = outcome
        submitted = self._past.submitted
        event = envelope.event
        return Side(
            outcome=type(event).__name__,
            answer=_said(event),
            groundedness=event.groundedness if isinstance(event, TaskCompleted) else None,
            latency_ms=None if submitted is None else at - submitted[0].timestamp_ms,
            **sums,
        )


class _Noting:
    """Notes what differs in one step."""

    def __init__(self, found: list[Divergence], at: int, cause: Item, agent: str) -> None:
        self._found, self._at, self._cause, self._agent = found, at, cause, agent

    def note(self, kind: Departure, what: str, field: str, before: Any, after: Any) -> None:
        envelope = self._cause[1]
        self._found.append(
            Divergence(
                kind=kind,
                agent=self._agent,
                event_type=type(envelope.event).__name__,
                event_id=envelope.metadata.id,
                what=what,
                field=field,
                before=_cut(before),
                after=_cut(after),
                at_ms=self._at,
            )
        )

    def request(self, want: Want, was: Effect | None) -> None:
        if was is None:
            self.note(Departure.ASKS, want.kind, "", "", want.text)
            return
        for change in differences(orjson.loads(was.request), orjson.loads(want.text)):
            self.note(Departure.ASKS, want.kind, change.path, change.old, change.new)


def _alike(one: Record, other: Record) -> bool:
    """Whether both hold the same event, by their bytes; what is personal in it is in a header of its own."""
    return one.value == other.value and dict(one.headers).get(SEALED) == dict(other.headers).get(SEALED)


def _identity(effect: Effect) -> tuple[str, str, str, int]:
    return type(effect).__name__, effect.scope, effect.request_hash, effect.occurrence


def _stopped(stop: Stop) -> dict[str, str]:
    return {
        "would": stop.would.value,
        "agent": stop.agent,
        "event_id": stop.event_id,
        "kind": stop.kind,
        "request": stop.request,
        "why": stop.why,
    }


def _said(event: Event) -> str:
    match event:
        case TaskCompleted():
            return event.answer
        case TaskFailed() | TaskCancelled():
            return event.reason
        case TaskExpired():
            return f"its deadline, {event.deadline.isoformat()}, passed"
    return ""


def _text(event: Event) -> str:
    return event.model_dump_json(exclude_defaults=True)


def _cut(value: Any) -> str:
    text = value if isinstance(value, str) else _shown(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}… and {len(text) - _LONGEST:,} more characters"


def _shown(value: Any) -> str:
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    return value.model_dump_json() if hasattr(value, "model_dump_json") else str(value)
