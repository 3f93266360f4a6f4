"""Simulates one task: everything that happened to it from outside happens again, and the fleet decides anew.

In: a task's :class:`~replay.whatif.past.Past`, a fleet, who answers calls. Out: a
:class:`~replay.whatif.result.TaskResult`. It is a discrete-event simulation. What came from outside comes at its
recorded time; so does what a step emits that decides as recorded on what it was recorded to decide on. What a changed
step emits comes after its cause and the calls, attempts and waits that it took. Events of one lane are handled one
after another, timers fire in simulated time, orders to stop reach steps that are still busy. Nothing is written
anywhere, and ties are broken by the recorded order, so that it always goes the same way.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from heapq import heappop, heappush
from typing import Any, Final

from agents.agent import Failure
from agents.step import TimerChange
from replay.recorded import Left, redriven_for
from replay.whatif.answers import Answers, Caller, TaskAnswers
from replay.whatif.comparing import Ledger
from replay.whatif.deciding import Ask, Encoded
from replay.whatif.fleet import Fleet, Post
from replay.whatif.past import OUTCOMES, Item, Past
from replay.whatif.result import Status, TaskResult
from replay.whatif.stepping import carry_out
from schemas.codec import Codec
from schemas.events import Effect, StepAssigned, StepCancelRequested, TimerFired
from schemas.metadata import Envelope, Metadata, deterministic_id
from schemas.record import Record
from schemas.topics import priority_of

__all__ = ["Simulation"]

_FROM_OUTSIDE: Final = frozenset({"ProcessCrashed", "HandlerHung"})
"""Failures that came upon a handler: they come again where nothing before them changed."""
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)
_MOST_STEPS: Final = 2000
"""More than any task of sense takes; one that goes beyond is kept from going on for ever."""

Lane = tuple[str, str, int, str]
"""Agent, topic, partition, lane."""


@dataclass(slots=True)
class _Delivery:
    """An event on its way. ``recorded``: at its recorded place and time. ``trusted``: the step that emitted it, if any,
    went as recorded. ``step`` is that step, whose cancellation takes the event back.
    """

    item: Item
    recorded: bool
    trusted: bool = True
    step: "_Busy | None" = None


@dataclass(slots=True)
class _Busy:
    """A worker's step, until ``ends_ms``."""

    step_id: str
    agent: str
    event_id: str
    ends_ms: int
    as_recorded: bool
    cancelled: bool = False


@dataclass(slots=True)
class _Timer:
    """A lane's timer. ``cancelled_ms`` is when it was moved or cancelled, None while it is not; ``by_recorded`` says
    that a step did so that went as recorded.
    """

    item: Item
    lane: Lane
    recorded: bool
    cancelled_ms: int | None = None
    by_recorded: bool = False


@dataclass(slots=True)
class _Held:
    """A step that the record shows cancelled, or not yet done: it runs only if nothing else ends the task."""

    at: int
    delivery: _Delivery
    agent: str
    lane: Lane
    left: Left
    handled: int = 0


@dataclass
class Simulation:
    """One task's. Run it once."""

    past: Past
    fleet: Fleet
    posts: Mapping[str, Post]
    answers: Answers
    codec: Codec
    _heap: list[tuple[int, int, int, "_Delivery | _Timer"]] = field(default_factory=list)
    _states: dict[Lane, Any] = field(default_factory=dict)
    _free_ms: dict[Lane, int] = field(default_factory=dict)
    _timers: dict[tuple[Lane, str], _Timer] = field(default_factory=dict)
    _busy: list[_Busy] = field(default_factory=list)
    _held: list[_Held] = field(default_factory=list)
    _handled: Counter[tuple[str, str]] = field(default_factory=Counter)
    _failed: set[tuple[str, str]] = field(default_factory=set)
    _latest: dict[str, Item] = field(default_factory=dict)
    _now: int = 0
    _new: int = 0
    _pushed: int = 0

    def __post_init__(self) -> None:
        self._topics = frozenset(topic for post in self.posts.values() for topic in post.topics)
        self._own = TaskAnswers(self.answers, self.past)
        self.ledger = Ledger(self.past, self.answers.changes, self.codec, exact=self.fleet.local)

    async def run(self) -> TaskResult:
        """Let it all happen."""
        for item in self.past.inputs():
            self._push(_Delivery(item, recorded=True))
        while True:
            while self._heap and self.ledger.steps < _MOST_STEPS:
                self._now, _, _, due = heappop(self._heap)
                await (self._fire(due) if isinstance(due, _Timer) else self._deliver(due))
            if self._heap or self.ledger.outcome is not None or not self._held:
                break
            held = self._held.pop(0)  # without it the task would come to no end
            await self._step(max(self._now, held.at), held.delivery, held.agent, held.lane, held.left, go_on=True)
        return self.ledger.result(Status.RUNAWAY if self._heap else None)

    # Events on their way.

    def _push(self, due: "_Delivery | _Timer", at: int | None = None) -> None:
        place = self.past.place_of(due.item[0]) if due.recorded else None
        if place is None:
            self._new += 1
            place = self._now if at is None else at, len(self.past.items) + self._new
        self._pushed += 1
        heappush(self._heap, (*place, self._pushed, due))

    async def _deliver(self, due: _Delivery) -> None:
        record, envelope = due.item
        if due.step is not None and due.step.cancelled:
            return
        if isinstance(envelope.event, OUTCOMES):
            self.ledger.ended(self._now, envelope)
        elif isinstance(envelope.event, StepCancelRequested):
            self._cancel(envelope.event, due)
            return
        again = redriven_for(record)
        if again and not self._is_failed(again, envelope):
            return  # nothing failed this time that was to be sent again
        if again and (known := self._latest.get(envelope.metadata.id)) is not None:
            record = replace(record, value=known[0].value, headers=[*known[0].headers, record.headers[-1]])
            due = replace(due, item=(record, known[1]))
        elif not again:
            self._latest[envelope.metadata.id] = due.item
        if record.topic not in self._topics:
            return
        for agent, lane in await self.fleet.takers(*due.item):
            if again in ("", agent) and record.topic in self.posts[agent].topics:
                await self._handle(due, agent, (agent, record.topic, record.partition, lane))

    def _is_failed(self, agent: str, envelope: Envelope) -> bool:
        return (agent, envelope.metadata.id) in self._failed

    async def _handle(self, due: _Delivery, agent: str, lane: Lane) -> None:
        record, envelope = due.item
        step = agent, envelope.metadata.id
        twin = self.past.twin(envelope.metadata.id, record.topic)
        known = due.item if due.recorded or twin is None or redriven_for(record) else twin
        left = self.past.take(agent, envelope.metadata.id, known[0], self._handled[step])
        self._handled[step] += 1
        self._failed.discard(step)
        at = max(self._now, self._free_ms.get(lane, 0))
        if left.cancelled is not None:
            self._held.append(_Held(at, due, agent, lane, left))
            return
        await self._step(at, due, agent, lane, left)

    # One step.

    async def _step(self, at: int, due: _Delivery, agent: str, lane: Lane, left: Left, *, go_on: bool = False) -> None:
        record, envelope = due.item
        running = self.posts[agent].running
        recorded = [item[1].event for item in left.effects]
        stands = [each for each in recorded if isinstance(each, Effect) and self.answers.changes.stands(each)]
        letter = left.letter[0] if left.letter is not None else None
        crashed = letter is not None and letter.error_type in _FROM_OUTSIDE and len(stands) == len(recorded)
        ask = Ask(
            agent=agent,
            record=record,
            envelope=envelope,
            priority=priority_of(record.topic),
            state=self._states.get(lane),
            effects=tuple(stands),
            version=self.past.version(agent, left),
            rewrite=self.answers.changes.rewrite,
            changed=not self.fleet.local or (not left.source and not due.recorded),
            failure=Failure(letter.error_type, letter.error, retryable=False) if crashed and letter else None,
            crashed=crashed,
        )
        caller = Caller(agent, self.fleet.source(agent), envelope.metadata, 1, running.timeout_s)
        unknown = due.recorded and not left.ended and not go_on
        stepped = await carry_out(
            ask, caller, fleet=self.fleet, answers=self._own, running=running, may_ask=not self._is_open(unknown, left)
        )
        decision = stepped.decision
        beyond = not left.ended and (go_on or not (due.recorded or left.effects))
        if stepped.open or (unknown and self.fleet.local and decision is not None and self._adds(decision.encoded)):
            self._held.append(_Held(at, due, agent, lane, left))
            return
        ends = at + round(stepped.elapsed_ms)
        if decision is None or decision.result is None:
            self.ledger.step(at, due.item, agent, left, stepped, beyond=beyond)
            return
        as_recorded = due.recorded and not stepped.wants and not stepped.unasked and stepped.failure is None
        as_recorded = as_recorded or (due.recorded and letter is not None and not stepped.wants)
        outputs = self.ledger.step(at, due.item, agent, left, stepped, beyond=beyond)
        if stepped.failure is not None or crashed:
            self._failed.add((agent, envelope.metadata.id))
        busy = self._begun(envelope, agent, ends, as_recorded and all(same for _, same in outputs))
        self._emit(due, outputs, busy, as_recorded, ends)
        self._free_ms[lane] = max(ends, self._free_ms.get(lane, 0))
        self._states[lane] = decision.result.state
        self._set_timers(decision.result.timers, due, lane, ends, as_recorded)

    def _is_open(self, unknown: bool, left: Left) -> bool:
        """Whether the record may simply end before the step did: it left no end, and nothing before it differs."""
        return (
            unknown
            and not self.ledger.differs
            and len(left.effects)
            == sum(
                self.answers.changes.stands(item[1].event) for item in left.effects if isinstance(item[1].event, Effect)
            )
        )

    def _adds(self, encoded: tuple[Encoded, ...]) -> bool:
        return bool(encoded) and not self.ledger.differs

    def _begun(self, envelope: Envelope, agent: str, ends: int, as_recorded: bool) -> _Busy | None:
        if not isinstance(envelope.event, StepAssigned):
            return None
        busy = _Busy(envelope.event.step_id, agent, envelope.metadata.id, ends, as_recorded)
        self._busy.append(busy)
        return busy

    def _emit(
        self, due: _Delivery, outputs: list[tuple[Item, bool]], busy: _Busy | None, as_recorded: bool, ends: int
    ) -> None:
        for (record, envelope), same in outputs:
            if as_recorded and same and self.past.place_of(record) is not None:
                self._push(_Delivery((record, envelope), recorded=True, trusted=due.trusted, step=busy))
                continue
            self._new += 1
            moved = replace(record, offset=-self._new, timestamp_ms=ends)
            trusted = as_recorded and due.trusted
            self._push(_Delivery((moved, envelope), recorded=False, trusted=trusted, step=busy), ends)

    # Orders to stop.

    def _cancel(self, order: StepCancelRequested, due: _Delivery) -> None:
        """Stop what is busy with the step. Where the record has the order, it also has whether it came in time."""
        for busy in self._busy:
            late = busy.ends_ms <= self._now or (due.trusted and busy.as_recorded)
            if busy.step_id == order.target and not late:
                busy.cancelled = True
        self._held = [
            held
            for held in self._held
            if getattr(held.delivery.item[1].event, "step_id", None) != order.target or held.left.cancelled is None
        ]

    # Timers.

    def _set_timers(
        self, changes: tuple[TimerChange, ...], due: _Delivery, lane: Lane, ends: int, as_recorded: bool
    ) -> None:
        for change in changes:
            known = self._timers.pop((lane, change.name), None)
            if known is not None:
                known.cancelled_ms, known.by_recorded = ends, as_recorded
            if change.due is not None:
                self._timers[lane, change.name] = self._timer(change.name, change.due, due.item, lane, ends)

    def _timer(self, name: str, at: datetime, cause: Item, lane: Lane, ends: int) -> _Timer:
        record, envelope = cause
        metadata = envelope.metadata
        micros = (at - _EPOCH) // _MICROSECOND
        fired_id = deterministic_id(metadata.id, lane[0], "timer", lane[3], name, micros)
        if (twin := self.past.twin(fired_id, record.topic)) is not None:
            timer = _Timer(twin, lane, recorded=True)
            self._push(timer)
            return timer
        event = TimerFired(task_id=metadata.subject, agent=lane[0], lane=lane[3], timer=name, due=at)
        fired = Metadata(
            id=fired_id,
            source=self.fleet.source(lane[0]),
            subject=metadata.subject,
            time=at,
            causation_id=metadata.id,
            correlation_id=metadata.correlation_id,
            traceparent=metadata.traceparent,
            data_subjects=metadata.data_subjects,
        )
        value, headers = self.codec.encode(event, fired)
        self._new += 1
        fires = max(ends, -(-micros // 1000))
        made = Record(record.topic, record.partition, -self._new, fires, fired.subject.encode(), value, headers)
        timer = _Timer((made, Envelope(event, fired)), lane, recorded=False)
        self._push(timer, fires)
        return timer

    async def _fire(self, timer: _Timer) -> None:
        if timer.cancelled_ms is not None:
            too_late = timer.recorded and timer.by_recorded
            if self._now >= timer.cancelled_ms and not too_late:
                return
        if not timer.recorded and not self.ledger.differs and self._now > self.past.ends_ms:
            return  # the record ends before it is due
        name = timer.item[1].event.__dict__["timer"]
        if self._timers.get((timer.lane, name)) is timer:
            del self._timers[timer.lane, name]
        await self._deliver(_Delivery(timer.item, recorded=timer.recorded))
