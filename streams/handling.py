"""One event's handling: attempts, backoff, failure, and the messages that it leaves.

In: a :class:`~streams.partition.Work` with its event. Out: the same work with its messages: outputs, effects, the
lane's new state for the changelog and, when the agent gave up, what ``on_failure`` emitted and the dead letter. A
handler's failure never stops the processor.
"""

import asyncio
import logging
import random
import time
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Final

from agents.agent import Failure
from agents.context import Ports
from agents.journal import Journal
from agents.step import LaneState, StepResult, failure_of, run_failure, run_step
from schemas.codec import Codec
from schemas.errors import EncodeError, EventTooLargeError
from schemas.events import DeadLettered, LlmCalled, Priority
from schemas.metadata import Envelope, Metadata, deterministic_id
from schemas.record import Record
from schemas.topics import all_topics, topic_name, topic_of
from streams.binding import Binding
from streams.errors import StateError
from streams.partition import Work
from streams.state import StateCodec
from streams.stats import Stats
from streams.transactor import Outgoing

__all__ = ["Handling"]

_LIMITS: Final = {name: topic.max_message_bytes for name, topic in all_topics().items()}
_DEAD_LETTERS: Final = topic_of(DeadLettered).name
_STATE_LIMIT: Final = 1_048_576
_RECORD_OVERHEAD: Final = 96
"""What batch and record framing may add to key, value and headers."""
_HEADER_OVERHEAD: Final = 8
_WARNINGS_A_SECOND: Final = 5
_HUNG_GRACE: Final = 1.5
_NO_CHANGE: Final = StepResult((), None, state_changed=False)
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)

log = logging.getLogger(__name__)


class Handling:
    """Handles one binding's events."""

    def __init__(
        self, binding: Binding, codec: Codec, ports: Ports, state_codec: StateCodec | None, stats: Stats
    ) -> None:
        self._binding = binding
        self._agent = binding.agent
        self._source = binding.agent.source
        self._codec = codec
        self._ports = ports
        self._state_codec = state_codec
        self._stats = stats
        self._warned_in = self._warnings = 0

    @property
    def hung_after_s(self) -> float | None:
        """When a handler that still runs waits for something that is no effect; None for never."""
        binding = self._binding
        if binding.timeout_s is None:
            return None
        attempts = binding.max_attempts * (binding.timeout_s + binding.max_backoff_s)
        return attempts * _HUNG_GRACE

    async def handle(self, work: Work) -> None:
        """Run the agent on the event, as often as policy says, and leave the messages in ``work``.

        Raises:
            asyncio.CancelledError: the event was taken away; nothing of it counts.
        """
        envelope, partition, agent = work.envelope, work.partition, self._agent
        assert envelope is not None
        timestamp, priority = work.record.timestamp_ms, partition.priority
        state = partition.state.get(work.lane)
        journal = Journal(
            agent=agent.name,
            source=self._source,
            key=envelope.metadata.subject,
            cause=envelope.metadata,
            ports=self._ports,
            timeout_s=self._binding.timeout_s,
        )
        attempt = 1
        while True:
            try:
                result = await run_step(
                    agent, envelope, timestamp_ms=timestamp, priority=priority, state=state, journal=journal
                )
                # An effect that can't be recorded fails its event: what it decided could not be proved.
                messages = self._messages(result, work)
                if journal.performed:
                    messages += [self._effect(made) for made in journal.performed]
                break
            except asyncio.CancelledError:
                failure = _ended_as_hung(work)
            except Exception as error:  # noqa: BLE001 - whatever a handler raises is its event's failure
                failure = failure_of(error)
            self._stats.failures += 1
            if failure.retryable and attempt < self._binding.max_attempts:
                await asyncio.sleep(self._backoff_s(attempt))
                journal.next_attempt()
                attempt += 1
                continue
            result, messages = await self._give_up(work, failure, attempt, state, journal)
            messages += self._recordable(journal.performed)
            break
        work.outputs = len(result.outputs)
        if journal.performed:
            self._count_cost(journal.performed)
        if result.state_changed:
            partition.state.set(work.lane, result.state)
        self._leave(work, messages)

    def _backoff_s(self, attempt: int) -> float:
        """Exponential, with full jitter on its upper half, so that what failed together does not come back together."""
        binding = self._binding
        return min(binding.max_backoff_s, binding.backoff_s * 2.0 ** (attempt - 1)) * random.uniform(0.5, 1.0)

    async def _give_up(
        self, work: Work, failure: Failure, attempts: int, state: LaneState | None, journal: Journal
    ) -> tuple[StepResult, list[Outgoing]]:
        envelope, partition = work.envelope, work.partition
        assert envelope is not None
        error = failure.message
        try:
            result = await run_failure(
                self._agent,
                envelope,
                failure,
                timestamp_ms=work.record.timestamp_ms,
                priority=partition.priority,
                state=state,
                journal=journal,
            )
            messages = self._messages(result, work)
        except asyncio.CancelledError:
            _ended_as_hung(work)
            result, messages = _NO_CHANGE, []
            error = f"{error}; then on_failure hung"
        except Exception as second:  # noqa: BLE001 - told with the first one in the dead letter
            result, messages = _NO_CHANGE, []
            error = f"{error}; then on_failure failed with {type(second).__name__}: {second}"
        self._warn(
            "%s gave up on %s[%d]@%d (%s) after %d attempts: %s: %s",
            self._agent.name,
            partition.topic,
            partition.number,
            work.offset,
            type(envelope.event).__name__,
            attempts,
            failure.error_type,
            error[:500],
        )
        messages.append(self._dead_letter(work, failure.error_type, error, attempts))
        return result, messages

    def unreadable(self, work: Work, error: Exception) -> None:
        """The record is no event, or one that has no lane: a dead letter is all it leaves."""
        self._warn("%s: %s: %s", self._agent.name, type(error).__name__, str(error)[:500])
        self._leave(work, [self._dead_letter(work, type(error).__name__, str(error), attempts=0)])

    def rejected(self, work: Work, at: int, error: str) -> None:
        """The broker refused the work's message ``at``, which passed all checks here: its settings differ from ours.

        The state that belongs to it may have been built upon, so only that message is replaced, by a dead letter
        without the raw value.

        Raises:
            StateError: it is the state itself; going on without it would decide wrongly after a restore.
        """
        topic, _, value, _, _ = work.messages[at]
        if topic == work.partition.changelog:
            raise StateError(
                f"{topic} refuses the state of lane {work.lane!r}, {len(value or b'')} bytes: {error}; raise its "
                f"max.message.bytes to {_STATE_LIMIT}"
            )
        already_a_letter = topic == _DEAD_LETTERS
        said = f"{topic} refused an output of {0 if value is None else len(value)} bytes: {error}"
        if already_a_letter and len(work.record.value or b"") == 0:
            del work.messages[at]
            return
        record = work.record
        work.record = Record(record.topic, record.partition, record.offset, record.timestamp_ms, record.key, b"", ())
        work.messages[at] = self._dead_letter(work, "OutputRefused", said, attempts=1)

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

    def _leave(self, work: Work, messages: list[Outgoing]) -> None:
        partition = work.partition
        if partition.expire_due:
            partition.expire_due = False
            expired = partition.state.expire(work.record.timestamp_ms, partition.lanes)
            messages.extend((partition.changelog, lane.encode(), None, None, partition.number) for lane in expired)
        work.messages = messages
        size = 0
        for message in messages:
            size += len(message[2] or b"")
        work.bytes = size

    def _messages(self, result: StepResult, work: Work) -> list[Outgoing]:
        """The outputs and the state's change as messages.

        Raises:
            EncodeError: one of them can't be written, or is larger than its topic takes.
        """
        priority = work.partition.priority
        messages = [self._message(output, priority) for output in result.outputs]
        if result.state_changed and self._state_codec is not None:
            value = None if result.state is None else self._state_codec.dump(result.state)
            if value is not None and len(value) > _STATE_LIMIT - 2 * _RECORD_OVERHEAD - len(work.lane):
                raise EventTooLargeError(
                    f"the state of lane {work.lane!r} has {len(value)} bytes, over the {_STATE_LIMIT} that its "
                    "changelog takes; keep less"
                )
            messages.append((work.partition.changelog, work.lane.encode(), value, None, work.partition.number))
        return messages

    def _message(self, envelope: Envelope, priority: Priority) -> Outgoing:
        event, metadata = envelope.event, envelope.metadata
        value, headers = self._codec.encode(event, metadata)
        topic = topic_name(event, priority)
        key = metadata.subject.encode()
        limit = _LIMITS[topic]
        # Headers are measured only where it may matter.
        if len(value) * 2 + len(key) > limit:
            size = len(value) + len(key) + _RECORD_OVERHEAD
            size += sum(len(name) + len(content) + _HEADER_OVERHEAD for name, content in headers)
            if size > limit:
                raise EventTooLargeError(
                    f"{event.full_name} has {size} bytes, over the {limit} that {topic} takes; emit less in one event"
                )
        return topic, key, value, headers, -1

    def _effect(self, made: Envelope) -> Outgoing:
        return self._message(made, Priority.NORMAL)

    def _recordable(self, performed: Iterable[Envelope]) -> list[Outgoing]:
        """The effects of an event that failed, but for the one that may be why: it is too large for its topic."""
        messages = []
        for made in performed:
            try:
                messages.append(self._effect(made))
            except EncodeError as error:
                log.error("%s: effect %s can't be recorded: %s", self._agent.name, made.metadata.id, error)
        return messages

    def _count_cost(self, performed: Iterable[Envelope]) -> None:
        for made in performed:
            if isinstance(made.event, LlmCalled):
                self._stats.tokens += made.event.prompt_tokens + made.event.completion_tokens
                self._stats.cost_usd += made.event.cost_usd

    def _dead_letter(self, work: Work, error_type: str, error: str, attempts: int) -> Outgoing:
        work.dead = True
        record, cause = work.record, None if work.envelope is None else work.envelope.metadata
        letter = DeadLettered(
            source_topic=record.topic,
            source_partition=record.partition,
            source_offset=record.offset,
            source_timestamp=_EPOCH + timedelta(milliseconds=max(record.timestamp_ms, 0)),
            key=record.key,
            value=record.value,
            header_names=tuple(name for name, _ in record.headers),
            header_values=tuple(content or b"" for _, content in record.headers),
            agent=self._agent.name,
            error_type=error_type,
            error=error[:4000],
            attempts=attempts,
        )
        metadata = Metadata(
            id=deterministic_id(record.topic, record.partition, record.offset, self._agent.name, "dead-letter"),
            source=self._source,
            subject=record.topic,
            time=letter.source_timestamp,
            causation_id="" if cause is None else cause.id,
            correlation_id="" if cause is None else cause.correlation_id,
            traceparent="" if cause is None else cause.traceparent,
        )
        try:
            return self._message(Envelope(letter, metadata), Priority.NORMAL)
        except EncodeError as too_large:
            # It is still in its topic, at the place that the letter names.
            bare = letter.model_copy(
                update={"value": None, "header_names": (), "header_values": (), "error": f"{letter.error}; {too_large}"}
            )
            return self._message(Envelope(bare, metadata), Priority.NORMAL)


def _ended_as_hung(work: Work) -> Failure:
    """What a cancellation means: the watchdog ended a handler that hangs.

    Raises:
        asyncio.CancelledError: it was not the watchdog.
    """
    task = asyncio.current_task()
    if not work.hung or not work.partition.owned or task is None:
        raise asyncio.CancelledError
    task.uncancel()
    work.hung = False
    return Failure("HandlerHung", "the handler waits for something that is no effect; it was ended", retryable=False)
