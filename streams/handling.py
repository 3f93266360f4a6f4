"""One event's handling: an attempt, what its failure means, and the messages that it leaves.

In: a :class:`~streams.partition.Work` with its event. Out: the same work with its messages: outputs, effects, the
lane's new state and timers for the changelog and, when the agent gave up, what ``on_failure`` emitted and the dead
letter; or the time to wait before the next attempt. A handler's failure never stops the processor.

Effects of a handler that still runs are journalled with the next commit: as the event in ``effects`` and as a copy in
the changelog, which the next owner gives to the handler when it runs the event again. The copies are tombstoned in the
transaction that finishes the event.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import replace
from datetime import datetime
from functools import partial
from typing import Any, Final

from agents.agent import Failure
from agents.context import Ports
from agents.errors import EffectFailedError
from agents.journal import Journal
from agents.step import LaneState, Running, StepResult, begin_step, failure_of, run_failure
from schemas.codec import Codec
from schemas.errors import EncodeError, EventTooLargeError, KeyStoreError, SubjectForgottenError
from schemas.events import Effect, LlmCalled, StepAssigned, StepCancelled
from schemas.metadata import Envelope, Metadata, deterministic_id
from schemas.record import Record
from streams.binding import Binding
from streams.changelog import Timer, effect_key, parked_key, run_key, state_key, timer_key, timer_value
from streams.errors import StateError
from streams.messages import DEAD_LETTERS, Messages, about_nobody, cause_of
from streams.partition import NO_RECORD, Entry, Partition, Trial, Work
from streams.state import StateCodec
from streams.stats import Stats
from streams.transactor import Outgoing

__all__ = ["Handling"]

_STATE_LIMIT: Final = 1_048_576
"""Bytes of one lane's state: what is larger is written again and again, and belongs elsewhere."""
_WARNINGS_A_SECOND: Final = 5
_HUNG_GRACE: Final = 1.5
_KEYS_AGAIN_S: Final = 1.0
_FORGOTTEN: Final = Failure(
    "SubjectForgotten", "it is about a data subject who was forgotten: its content is gone", retryable=False
)
_NO_CHANGE: Final = StepResult((), None, state_changed=False)

log = logging.getLogger(__name__)


class Handling:
    """Handles one binding's events. ``journal_later(work)`` has the effects of a running work committed soon;
    ``lease(partition)`` returns when a call may be made for the partition (:mod:`streams.lease`).
    """

    def __init__(
        self,
        binding: Binding,
        codec: Codec,
        ports: Ports,
        state_codec: StateCodec | None,
        stats: Stats,
        journal_later: Callable[[Work], None],
        lease: Callable[[Partition], Awaitable[None]],
    ) -> None:
        self._binding = binding
        self._agent = binding.agent
        self._source = binding.agent.source
        self._codec = codec
        self._messages = Messages(binding.agent, codec)
        self._ports = ports
        self._state_codec = state_codec
        self._stats = stats
        self._journal_later = journal_later
        self.lease = lease
        self._journal_type = _journal_type(self, ports, binding)
        self._warned_in = self._warnings = 0

    @property
    def hung_after_s(self) -> float | None:
        """When a handler that still runs waits for something that is no effect; None for never."""
        timeout_s = self._binding.timeout_s
        return None if timeout_s is None else timeout_s * _HUNG_GRACE

    def begin(self, work: Work) -> Coroutine[Any, Any, float | None] | None:
        """Run the agent on the event once, as far as it goes without waiting. None: the work is finished, its messages
        are there. Else the rest, to be awaited: None again, or the seconds to wait before it is to be run again.

        The rest raises asyncio.CancelledError if the event was taken away; nothing of it counts but what is journalled.
        """
        envelope, partition = work.envelope, work.partition
        assert envelope is not None
        journal = work.journal
        try:
            if journal is None:
                journal = work.journal = self._journal_of(work, envelope.metadata)
            state = None if self._state_codec is None else partition.state.get(work.lane)
            if state is not None and state.erased and self._agent.starts_anew:
                state = None
            if envelope.erased or journal.erased or (state is not None and state.erased):
                return self._erased(work)
            step = begin_step(self._agent, envelope, journal, state, work.record.timestamp_ms, partition.priority)
            if isinstance(step, Running):
                return self._finish(work, journal, step)
            messages = self._outcome(step, work)
            if journal.performed or work.trial is not None:
                # An effect that can't be recorded fails its event: what it decided could not be proved.
                messages += self._effects(work, journal)
        except StateError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever a handler raises is its event's failure
            return self._failed(work, journal, error)
        self._leave(work, step, messages)
        return None

    async def handle(self, work: Work) -> float | None:
        """:meth:`begin` and its rest."""
        rest = self.begin(work)
        return None if rest is None else await rest

    async def _finish(self, work: Work, journal: Journal, step: Running) -> float | None:
        try:
            result = await step.finish()
            messages = self._outcome(result, work)
            if journal.performed or work.trial is not None:
                messages += self._effects(work, journal)
        except asyncio.CancelledError:
            failure: Exception | Failure | None = _why_ended(work)
            if failure is None:
                self.cancelled(work)
                return None
        except Exception as error:  # noqa: BLE001 - whatever a handler raises is its event's failure
            failure = error
        else:
            self._leave(work, result, messages)
            return None
        return await self._failed(work, journal, failure)

    async def _failed(self, work: Work, journal: Journal | None, error: Exception | Failure) -> float | None:
        if isinstance(error, SubjectForgottenError):
            return await self._erased(work)
        trial = work.tried()
        if isinstance(error, KeyStoreError) and error.retryable:
            # No fault of the event's: it waits for as long as the key store is away.
            log.warning("%s waits: %s", self._agent.name, error)
            if journal is not None:
                journal.next_attempt()
            return _KEYS_AGAIN_S
        self._stats.failures += 1
        if journal is None:
            assert work.envelope is not None
            journal = work.journal = self._journal_type(work, work.envelope.metadata)
        failure = error if isinstance(error, Failure) else failure_of(error)
        policy = self._binding.retry_of(failure.error_type)
        if failure.retryable and trial.attempt < policy.attempts:
            wait_s = policy.wait_s(trial.attempt)
            trial.attempt += 1
            journal.next_attempt()
            self._stats.retries += 1
            return wait_s
        return await self._give_up(work, failure, journal)

    def _journal_of(self, work: Work, cause: Metadata) -> "_Journal":
        recorded: Sequence[Effect] = ()
        effects = work.partition.effects
        erased = False
        if work.trace is not None:
            work.trace.begin()
        elif not effects:
            return self._journal_type(work, cause)
        if effects and (records := effects.get(cause.id)) is not None:
            restored = [self._codec.decode(record) for record in records]
            recorded = [made.event for made in restored if isinstance(made.event, Effect)]
            work.tried().restored = tuple(effect.sequence for effect in recorded)
            erased = any(made.erased for made in restored)
            if work.trace is not None:
                work.trace.restored = tuple(restored)
            if erased:
                recorded = ()
        journal = self._journal_type(work, cause, recorded)
        journal.erased = erased
        return journal

    # Effects of a step that still runs.

    def performed(self, work: Work) -> None:
        """Have the running work's new effect committed soon."""
        trial = work.tried()
        if not trial.listed:
            trial.listed = True
            self._journal_later(work)

    async def durable(self, work: Work) -> None:
        """Wait until all effects so far are committed.

        Raises:
            EffectFailedError: one of them can't be recorded.
        """
        trial, journal = work.tried(), work.journal
        assert journal is not None
        wanted = len(journal.performed)
        if trial.durable < wanted:
            through = asyncio.get_running_loop().create_future()
            trial.waiters.append((wanted, through))
            self.performed(work)
            await through
        if trial.unrecordable:
            raise EffectFailedError("EventTooLarge", "an effect before this one can't be recorded", retryable=False)

    def journal_entry(self, work: Work) -> Entry | None:
        """What journals the effects that a running work has made since the last time; None if there are none."""
        trial, journal, envelope = work.tried(), work.journal, work.envelope
        trial.listed = False
        if journal is None or envelope is None:
            return None  # it has finished; its effects are among its messages
        messages = self._journalled(work, trial, journal, envelope.metadata.id)
        if not messages:
            return None
        self._stats.journalled += len(messages) // 2
        return Entry(
            work.partition, messages, order=work.order, committed=partial(_durable_to, trial, trial.journalled)
        )

    def _journalled(self, work: Work, trial: Trial, journal: Journal, event_id: str) -> list[Outgoing]:
        messages: list[Outgoing] = []
        changelog, number = work.partition.changelog, work.partition.number
        for made in journal.performed[trial.journalled :]:
            try:
                message = self._messages.of(made)
            except KeyStoreError as error:
                if not error.retryable:
                    trial.unrecordable = True
                    _wake(trial, len(journal.performed))
                    break
                log.warning("%s waits: %s", self._agent.name, error)
                asyncio.get_running_loop().call_later(_KEYS_AGAIN_S, self.performed, work)
                break
            except EncodeError:
                trial.unrecordable = True
                _wake(trial, len(journal.performed))
                break
            key = effect_key(event_id, _sequence(made))
            messages += [message, (changelog, key, message[2], message[3], number)]
            trial.journalled += 1
        return messages

    def _effects(self, work: Work, journal: Journal, *, skip_unrecordable: bool = False) -> list[Outgoing]:
        """The effects that are not journalled yet, and tombstones for the copies of those that are.

        Raises:
            EncodeError: one can't be recorded.
        """
        trial, performed = work.trial, journal.performed
        messages: list[Outgoing] = []
        for made in performed if trial is None else performed[trial.journalled :]:
            try:
                messages.append(self._messages.of(made))
            except (SubjectForgottenError, KeyStoreError):
                if not skip_unrecordable:
                    raise
                messages.append(self._messages.or_blank(made))
            except EncodeError as error:
                if not skip_unrecordable:
                    raise
                log.error("%s: effect %s can't be recorded: %s", self._agent.name, made.metadata.id, error)
        if trial is not None:
            messages += self._tombstones(work, trial, performed)
        return messages

    def _tombstones(self, work: Work, trial: Trial, performed: Sequence[Envelope]) -> list[Outgoing]:
        assert work.envelope is not None
        partition, event_id = work.partition, work.envelope.metadata.id
        keys = [effect_key(event_id, sequence) for sequence in trial.restored]
        keys += [effect_key(event_id, _sequence(made)) for made in performed[: trial.journalled]]
        if trial.parked:
            keys.append(parked_key(work.record.offset))
        if work.record.offset in partition.runs:
            keys.append(run_key(work.record.offset))
        return [(partition.changelog, key, None, None, partition.number) for key in keys]

    # How it ends.

    def cancelled(self, work: Work) -> None:
        """A StepCancelRequested ends it: nothing is decided, its effects and the fact are recorded."""
        envelope, trial = work.envelope, work.tried()
        assert envelope is not None
        event, cause = envelope.event, envelope.metadata
        assert isinstance(event, StepAssigned)
        fact = StepCancelled(
            task_id=event.task_id,
            step_id=event.step_id,
            attempt=event.attempt,
            agent=self._agent.name,
            event_id=cause.id,
            reason=trial.cancelled or "",
        )
        metadata = Metadata(
            id=deterministic_id(cause.id, self._agent.name, "cancelled"),
            source=self._source,
            subject=event.task_id,
            time=cause.time,
            causation_id=cause.id,
            correlation_id=cause.correlation_id,
            traceparent=cause.traceparent,
            data_subjects=cause.data_subjects,
        )
        journal = work.journal or self._journal_of(work, cause)
        messages = [self._messages.or_blank(Envelope(fact, metadata))]
        messages += self._effects(work, journal, skip_unrecordable=True)
        work.journal = journal
        self._stats.cancelled += 1
        self._leave(work, _NO_CHANGE, messages)

    async def crashed(self, work: Work, runs: int) -> None:
        """It was running so often when its process ended that it is not run again."""
        assert work.envelope is not None
        message = f"it was running {runs} times when its process ended without a word; it is not run again"
        work.tried().attempt = runs
        work.journal = journal = self._journal_of(work, work.envelope.metadata)
        failure = Failure("ProcessCrashed", message, retryable=False)
        while (wait_s := await self._give_up(work, failure, journal)) is not None:  # noqa: ASYNC110
            await asyncio.sleep(wait_s)  # a key store sets no event

    async def _give_up(self, work: Work, failure: Failure, journal: Journal) -> float | None:
        envelope, partition, attempts = work.envelope, work.partition, work.tried().attempt
        assert envelope is not None
        error = failure.message
        try:
            result = await run_failure(
                self._agent,
                envelope,
                failure,
                timestamp_ms=work.record.timestamp_ms,
                priority=partition.priority,
                state=partition.state.get(work.lane),
                journal=journal,
            )
            messages = self._outcome(result, work)
        except SubjectForgottenError:
            return await self._erased(work)
        except asyncio.CancelledError:
            if _why_ended(work) is None:
                self.cancelled(work)
                return None
            result, messages = _NO_CHANGE, []
            error = f"{error}; then on_failure hung"
        except Exception as second:  # noqa: BLE001 - told with the first one in the dead letter
            result, messages = _NO_CHANGE, []
            error = f"{error}; then on_failure failed with {type(second).__name__}: {second}"
        # Logs and traces are kept elsewhere, in the clear.
        told = "it is about data subjects" if journal.data_subjects else error[:500]
        self._warn(
            "%s gave up on %s[%d]@%d (%s) after %d attempts: %s: %s",
            self._agent.name,
            partition.topic,
            partition.number,
            work.record.offset,
            type(envelope.event).__name__,
            attempts,
            failure.error_type,
            told,
        )
        work.dead = True
        if work.trace is not None:
            work.trace.error = failure.error_type, told
        cause = replace(envelope.metadata, data_subjects=journal.data_subjects)
        messages.append(self._messages.dead_letter(work.record, cause, failure.error_type, error, attempts))
        messages += self._effects(work, journal, skip_unrecordable=True)
        self._leave(work, result, messages)
        return None

    async def _erased(self, work: Work) -> float | None:
        """The event, its lane's state or what was recalled for it is about a data subject who was forgotten.

        Nothing is decided on what is left. ``on_failure`` is called with the blank event, so that nobody waits; what it
        emits names no data subjects, and there is no dead letter: sending it again would change nothing. Returns the
        seconds to wait where the key store is away.
        """
        envelope, partition, before = work.envelope, work.partition, work.journal
        assert envelope is not None
        bare = about_nobody(envelope)
        state = partition.state.get(work.lane)
        if state is not None and state.erased:
            state = LaneState(state.value, state.now, state.expires_at)
        agent, source = self._agent, self._source
        work.journal = Journal(agent=agent.name, source=source, key=bare.metadata.subject, cause=bare.metadata)
        try:
            result = await run_failure(
                agent,
                bare,
                _FORGOTTEN,
                timestamp_ms=work.record.timestamp_ms,
                priority=partition.priority,
                state=state,
                journal=work.journal,
            )
            messages = self._outcome(result, work)
        except Exception as error:  # noqa: BLE001 - nobody is told then, but the log goes on
            if isinstance(error, KeyStoreError) and error.retryable:
                # What is left of the lane's state is about others, and so is what is emitted.
                work.journal = before
                if before is not None:
                    before.next_attempt()
                return _KEYS_AGAIN_S
            log.warning("%s: on_failure of an erased event failed: %s", agent.name, type(error).__name__)
            result, messages = _NO_CHANGE, []
        if work.trial is not None:
            performed = () if before is None else before.performed
            # Figures and cost of what was done are kept.
            messages += [self._messages.or_blank(made) for made in performed[work.trial.journalled :]]
            messages += self._tombstones(work, work.trial, performed)
        elif before is not None:
            messages += [self._messages.or_blank(made) for made in before.performed]
        self._stats.erased += 1
        self._leave(work, result, messages)
        return None

    def unreadable(self, work: Work, error: Exception) -> None:
        """The record is no event, or one that has no lane: a dead letter is all it leaves."""
        self._warn("%s: %s: %s", self._agent.name, type(error).__name__, str(error)[:500])
        work.dead = True
        messages = [self._messages.dead_letter(work.record, None, type(error).__name__, str(error), attempts=0)]
        if work.trial is not None and work.trial.parked:
            partition = work.partition
            messages.append((partition.changelog, parked_key(work.record.offset), None, None, partition.number))
        self._leave(work, _NO_CHANGE, messages)

    def refused(self, entry: Entry, at: int, error: str) -> None:
        """The broker refused the entry's message ``at``, which passed all checks here: its settings differ from ours.

        The state that belongs to it may have been built upon, so only that message is replaced, by a dead letter
        without the raw value.

        Raises:
            StateError: it is what a restore needs; going on without it would decide wrongly afterwards.
        """
        topic, key, value, headers, _ = entry.messages[at]
        size = 0 if value is None else len(value)
        if topic == entry.partition.changelog or not isinstance(entry, Work):
            raise StateError(
                f"{topic} refuses {key!r}, {size} bytes: {error}; raise its max.message.bytes to what Magnatronic "
                "creates it with"
            )
        if topic == DEAD_LETTERS and entry.record is not NO_RECORD:
            del entry.messages[at]  # it was that letter
            return
        partition = entry.partition
        bare = Record(partition.topic, partition.number, entry.order, entry.timestamp_ms, entry.key, b"", ())
        entry.record = bare
        entry.dead = True
        cause = cause_of(headers)
        said = f"{topic} refused an output of {size} bytes: {error}"
        entry.messages[at] = self._messages.dead_letter(bare, cause, "OutputRefused", said, attempts=1)

    def _leave(self, work: Work, result: StepResult, messages: list[Outgoing]) -> None:
        partition = work.partition
        work.outputs = len(result.outputs)
        if result.state_changed:
            # What `_outcome` made of it follows the outputs.
            raw = messages[work.outputs][2] if result.state is not None and self._state_codec is not None else None
            partition.state.set(work.lane, result.state, raw)
        if result.timers:
            self._set_timers(work, result)
        journal, work.journal = work.journal, None
        if journal is not None and journal.performed:
            self._count_cost(journal.performed)
        if work.trace is not None:
            attempt = 1 if work.trial is None else work.trial.attempt
            work.trace.handled(() if journal is None else journal.performed, attempt)
            work.committed = work.trace.committed
        if work.trial is not None:
            self._forget(work, work.trial)
        if partition.expire_due:
            partition.expire_due = False
            expired = partition.state.expire(work.record.timestamp_ms, partition.lanes)
            messages.extend((partition.changelog, state_key(lane), None, None, partition.number) for lane in expired)
        work.messages = messages
        size = 0
        for message in messages:
            size += len(message[2] or b"")
        work.bytes = size
        work.record, work.envelope = NO_RECORD, None

    def _forget(self, work: Work, trial: Trial) -> None:
        partition = work.partition
        if trial.restored and work.envelope is not None:
            partition.effects.pop(work.envelope.metadata.id, None)
        partition.runs.pop(work.record.offset, None)
        _wake(trial, -1)

    def _set_timers(self, work: Work, result: StepResult) -> None:
        timers = work.partition.timers
        for change in result.timers:
            if change.due is None:
                timers.cancel(work.lane, change.name)
            else:
                timers.set(self._timer(work, change.name, change.due))

    def _timer(self, work: Work, name: str, due: datetime) -> Timer:
        assert work.envelope is not None
        cause, journal = work.envelope.metadata, work.journal
        subjects = cause.data_subjects if journal is None else journal.data_subjects
        return Timer(work.lane, name, due, cause.subject, cause.correlation_id, cause.id, cause.traceparent, subjects)

    def _outcome(self, result: StepResult, work: Work) -> list[Outgoing]:
        """The outputs, the state's change and the timers as messages.

        Raises:
            EncodeError: one of them can't be written, or is larger than its topic takes.
        """
        partition = work.partition
        priority, of = partition.priority, self._messages.of
        messages = [of(output, priority) for output in result.outputs]
        if result.state_changed and self._state_codec is not None:
            value = None if result.state is None else self._state_codec.dump(result.state)
            if value is not None and len(value) > _STATE_LIMIT:
                raise EventTooLargeError(
                    f"the state of lane {work.lane!r} has {len(value)} bytes, over the {_STATE_LIMIT} that a lane may "
                    "have; keep less"
                )
            messages.append((partition.changelog, state_key(work.lane), value, None, partition.number))
        for change in result.timers:
            value = None if change.due is None else timer_value(self._timer(work, change.name, change.due))
            messages.append((partition.changelog, timer_key(work.lane, change.name), value, None, partition.number))
        return messages

    def _warn(self, message: str, *arguments: object) -> None:
        """Log a warning, at most so many a second: a flood of bad records has its dead letters to tell of it."""
        second = int(time.monotonic())
        if second != self._warned_in:
            if self._warnings > _WARNINGS_A_SECOND:
                log.warning("%s: and %d more like it", self._agent.name, self._warnings - _WARNINGS_A_SECOND)
            self._warned_in, self._warnings = second, 0
        self._warnings += 1
        if self._warnings <= _WARNINGS_A_SECOND:
            log.warning(message, *arguments)

    def _count_cost(self, performed: Sequence[Envelope]) -> None:
        for made in performed:
            if isinstance(made.event, LlmCalled):
                self._stats.tokens += made.event.prompt_tokens + made.event.completion_tokens
                self._stats.cost_usd += made.event.cost_usd


class _Journal(Journal):
    """The journal of one work. One is made for each event, and most are never asked anything: what the base class takes
    as three functions are methods here, and what is the same for all is the class's.
    """

    _handling: Handling

    def __init__(self, work: Work, cause: Metadata, recorded: Sequence[Effect] = ()) -> None:
        self._work, self._cause, self._key = work, cause, cause.subject
        self.performed = []
        if recorded:
            self._load(sorted(recorded, key=lambda effect: effect.sequence))

    def _on_performed(self) -> None:
        self._handling.performed(self._work)

    async def _durable(self) -> None:
        await self._handling.durable(self._work)

    async def _permitted(self) -> None:
        await self._handling.lease(self._work.partition)


def _journal_type(handling: Handling, ports: Ports, binding: Binding) -> type[_Journal]:
    """The class of the journals of one agent's works."""
    agent, shared = binding.agent, {"_handling": handling, "ports": ports, "_timeout_s": binding.timeout_s}
    return type("_Journal", (_Journal,), {**shared, "_agent": agent.name, "_source": agent.source})


def _sequence(made: Envelope) -> int:
    assert isinstance(made.event, Effect)
    return made.event.sequence


def _durable_to(trial: Trial, count: int) -> None:
    trial.durable = count
    _wake(trial, count)


def _wake(trial: Trial, upto: int) -> None:
    """Let those go on who wait for the first ``upto`` effects; -1 for all."""
    waiting = []
    for wanted, through in trial.waiters:
        if upto >= 0 and wanted > upto:
            waiting.append((wanted, through))
        elif not through.done():
            through.set_result(None)
    trial.waiters = waiting


def _why_ended(work: Work) -> Failure | None:
    """What a cancellation means: None when a StepCancelRequested asked for it, a failure when the handler hung.

    Raises:
        asyncio.CancelledError: the event was taken away.
    """
    task, trial = asyncio.current_task(), work.trial
    if trial is None or not work.partition.owned or task is None:
        raise asyncio.CancelledError
    if trial.cancelled is not None:
        task.uncancel()
        return None
    if not trial.hung:
        raise asyncio.CancelledError
    task.uncancel()
    trial.hung = False
    return Failure("HandlerHung", "the handler waits for something that is no effect; it was ended", retryable=False)
