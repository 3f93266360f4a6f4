"""Events as messages of a transaction, and dead letters, which keep a record whole.

In: what an agent emitted, or a record that it could not process. Out: :data:`~streams.transactor.Outgoing` tuples that
their topics take.
"""

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from agents.agent import Agent
from schemas.codec import Codec
from schemas.errors import EncodeError, EventTooLargeError, KeyStoreError, MalformedError, SubjectForgottenError
from schemas.events import DeadLettered, Priority
from schemas.metadata import Envelope, Metadata, deterministic_id
from schemas.personal import blank
from schemas.record import Record
from schemas.sealing import SUBJECTS, subjects_of
from schemas.topics import all_topics, topic_name, topic_of
from streams.transactor import Outgoing

__all__ = ["DEAD_LETTERS", "Messages", "about_nobody", "cause_of"]

DEAD_LETTERS: Final = topic_of(DeadLettered).name

_LIMITS: Final = {name: topic.max_message_bytes for name, topic in all_topics().items()}
_SMALL: Final = min(_LIMITS.values())
_RECORD_OVERHEAD: Final = 96
"""What batch and record framing may add to key, value and headers."""
_HEADER_OVERHEAD: Final = 8
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


class Messages:
    """Encodes what one agent leaves."""

    def __init__(self, agent: Agent[Any], codec: Codec) -> None:
        self._agent = agent
        self._encode = codec.encode

    def of(self, envelope: Envelope, priority: Priority = Priority.NORMAL) -> Outgoing:
        """The message of an event.

        Raises:
            EncodeError: it can't be written, or is larger than its topic takes.
        """
        return self.to(topic_name(envelope.event, priority), envelope)

    def to(self, topic: str, envelope: Envelope, partition: int = -1) -> Outgoing:
        """The message of an event for a topic that it does not usually stand in (TimerFired), or for one partition.

        Raises:
            EncodeError: it can't be written, or is larger than its topic takes.
        """
        event, metadata = envelope.event, envelope.metadata
        value, headers = self._encode(event, metadata)
        key = metadata.subject.encode()
        # What is measured only where it may matter: the headers, and what the topic takes.
        if len(value) * 2 + len(key) > _SMALL:
            # Topics that this release does not know have the usual limit.
            limit = _LIMITS.get(topic, _LIMITS["effects"])
            size = len(value) + len(key) + _RECORD_OVERHEAD
            size += sum(len(name) + len(content) + _HEADER_OVERHEAD for name, content in headers)
            if size > limit:
                raise EventTooLargeError(
                    f"{event.full_name} has {size} bytes, over the {limit} that {topic} takes; emit less in one event"
                )
        return topic, key, value, headers, partition

    def or_blank(self, envelope: Envelope) -> Outgoing:
        """As :meth:`of`; where a data subject was forgotten by now, or has no key here, without what is personal, and
        about nobody.

        Raises:
            EncodeError: it can't be written, or is larger than its topic takes.
            KeyStoreError: the key store did not answer.
        """
        try:
            return self.of(envelope)
        except SubjectForgottenError:
            return self.of(about_nobody(envelope))
        except KeyStoreError as error:
            if error.retryable:
                raise
            # Whoever made it may name whom he likes: a letter about it must be written all the same.
            return self.of(about_nobody(envelope))

    def dead_letter(
        self, record: Record, cause: Metadata | None, error_type: str, error: str, attempts: int
    ) -> Outgoing:
        """The dead letter of ``record``: raw key, value and headers as they were, and why."""
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
            source=self._agent.source,
            subject=record.topic,
            time=letter.source_timestamp,
            causation_id="" if cause is None else cause.id,
            correlation_id="" if cause is None else cause.correlation_id,
            traceparent="" if cause is None else cause.traceparent,
            data_subjects=_named(record) if cause is None else cause.data_subjects,
        )
        try:
            return self.or_blank(Envelope(letter, metadata))
        except EncodeError as too_large:
            # It is still in its topic, at the place that the letter names.
            bare = letter.model_copy(
                update={"value": None, "header_names": (), "header_values": (), "error": f"{letter.error}; {too_large}"}
            )
            return self.or_blank(Envelope(bare, metadata))


def about_nobody(envelope: Envelope) -> Envelope:
    """The event without what is personal in it, and without data subjects."""
    return Envelope(blank(envelope.event), replace(envelope.metadata, data_subjects=()), erased=True)


def cause_of(headers: Sequence[tuple[str, bytes]] | None) -> Metadata | None:
    """What the headers of one of our messages tell of the event that it answers; None when it answers none."""
    told = dict(headers or ())
    cause = told.get("ce_causationid", b"").decode()
    if not cause:
        return None
    return Metadata(
        cause,
        "",
        "",
        _EPOCH,
        correlation_id=told.get("ce_correlationid", b"").decode(),
        traceparent=told.get("traceparent", b"").decode(),
        data_subjects=subjects_of(told[SUBJECTS]) if SUBJECTS in told else (),
    )


def _named(record: Record) -> tuple[str, ...]:
    """The data subjects that the headers of a record name, which could not be read as an event."""
    try:
        return subjects_of(dict(record.headers).get(SUBJECTS) or b"")
    except MalformedError:
        return ()
