"""Deals with dead letters: sends them to their agent again, or gives them up.

In: letters that :mod:`magnatronic.letters` found. Out: for each, a :class:`~schemas.events.DeadLetterResolved` and,
where it is sent again, its record back in the topic that it came from, both in one Kafka transaction. Operators fence
each other by one transactional id, and each reads what is resolved only after it has fenced the others: so no letter is
sent twice, however many press the button and whatever crashes.
"""

import secrets
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final

from confluent_kafka import KafkaError, KafkaException, Producer

from magnatronic.errors import ClusterError, FencedOperatorError, WrongInputError
from magnatronic.follow import KAFKA_LOGGER
from magnatronic.letters import DEAD_LETTERS, Entry, LetterReader
from schemas.codec import MAX_BYTES, Codec
from schemas.events import DeadLetterResolved, Resolution
from schemas.metadata import REDRIVE_HEADER, Metadata, deterministic_id
from schemas.record import Header
from schemas.topics import key_of

__all__ = ["TRANSACTIONAL_ID", "DeadLetters", "Resolved", "redrive_headers"]

TRANSACTIONAL_ID: Final = "magnatronic.dlq"
"""One for all operators of a cluster: who begins last fences the others."""

_BATCH: Final = 500
_BATCH_BYTES: Final = 16 * 1024 * 1024
"""A transaction's bounds: it is over in a second or so."""
_TIMEOUT_S: Final = 30.0
_PATIENCE_S: Final = 60.0
_FENCED: Final = frozenset({KafkaError._FENCED, KafkaError.PRODUCER_FENCED, KafkaError.INVALID_PRODUCER_EPOCH})

_Message = tuple[str, int, bytes | None, bytes | None, list[Header]]
"""Topic, partition, key, value, headers."""


@dataclass(frozen=True, slots=True)
class Resolved:
    """A letter that was dealt with, and where its record lies now (None where it was discarded)."""

    entry: Entry
    partition: int | None = None
    offset: int | None = None


@dataclass(slots=True)
class _Batch:
    entries: list[Entry] = field(default_factory=list)
    messages: list[_Message] = field(default_factory=list)
    bytes: int = 0


def redrive_headers(headers: Sequence[Header], agent: str) -> list[Header]:
    """``headers`` for ``agent`` alone: its name is the last one, and no other redrive's is left."""
    return [*(header for header in headers if header[0] != REDRIVE_HEADER), (REDRIVE_HEADER, agent.encode())]


class DeadLetters:
    """Deals with the dead letters of a cluster. ``kafka`` holds librdkafka settings, ``by`` says who acts, for the
    record.
    """

    def __init__(self, kafka: Mapping[str, Any], codec: Codec, *, by: str) -> None:
        self._kafka = dict(kafka)
        self._codec = codec
        self._by = by
        self._reader = LetterReader(kafka, codec)

    def redrive(
        self, entries: Collection[Entry], *, again: bool = False, skip_resolved: bool = False, reason: str = ""
    ) -> list[Resolved]:
        """Send the letters' records back to where they came from, for the agents that gave them up alone.

        Each record's new copy and the note that its letter is resolved commit together, up to some hundred letters in
        one transaction; a crash leaves whole transactions. A letter that is resolved already is refused, unless
        ``again``; with ``skip_resolved`` it is left out instead.

        Raises:
            WrongInputError: a letter is resolved already, or its record is gone; nothing was redriven.
            FencedOperatorError: another operator has begun.
            ClusterError: the cluster can't be reached, or refused.
        """
        return self._resolve(entries, Resolution.REDRIVEN, reason, again=again, skip_resolved=skip_resolved)

    def discard(self, entries: Collection[Entry], *, reason: str, skip_resolved: bool = False) -> list[Resolved]:
        """Note that the letters are given up, and why.

        Raises:
            WrongInputError: there is no reason, or a letter is resolved already; nothing was noted.
            FencedOperatorError: another operator has begun.
            ClusterError: the cluster can't be reached, or refused.
        """
        if not reason.strip():
            raise WrongInputError("say why the letters are discarded: --reason")
        return self._resolve(entries, Resolution.DISCARDED, reason, again=False, skip_resolved=skip_resolved)

    def _resolve(
        self, entries: Collection[Entry], resolution: Resolution, reason: str, *, again: bool, skip_resolved: bool
    ) -> list[Resolved]:
        producer = _Producer(self._kafka)
        # From here on no other operator can commit; what they committed is in the log.
        now = {entry.place: entry for entry in self._reader.entries()}
        chosen = list({entry.place: now.get(entry.place, entry) for entry in entries}.values())
        if not again:
            resolved = [entry for entry in chosen if entry.resolved is not None]
            if resolved and not skip_resolved:
                raise WrongInputError(_already(resolved))
            chosen = [entry for entry in chosen if entry.resolved is None]
        if resolution is Resolution.REDRIVEN:
            self._check_sources(chosen)
        done: list[Resolved] = []
        for batch in self._batches(chosen, resolution, reason):
            try:
                places = producer.commit(batch.messages)
            except FencedOperatorError:
                raise FencedOperatorError(
                    f"another operator began to resolve dead letters; {len(done)} of {len(chosen)} were "
                    f"{resolution.value} here, the others not. See what is open, then try again"
                ) from None
            except ClusterError as error:
                raise ClusterError(f"{error}; {len(done)} of {len(chosen)} letters were {resolution.value}") from error
            if resolution is Resolution.REDRIVEN:
                done += [Resolved(entry, *place) for entry, place in zip(batch.entries, places[::2], strict=True)]
            else:
                done += [Resolved(entry) for entry in batch.entries]
        return done

    def _check_sources(self, entries: Collection[Entry]) -> None:
        """See to it that each record is there, and the partition that it goes back to, before anything is sent."""
        known = self._reader.partitions({entry.place.topic for entry in entries})
        for entry in entries:
            place = entry.place
            if place.partition not in known[place.topic]:
                raise WrongInputError(
                    f"dead letter {entry.short_id} came from {place.topic}[{place.partition}], which the cluster no "
                    "longer has; create it, or discard the letter"
                )
            if not entry.kept and self._reader.source(place) is None:
                raise WrongInputError(
                    f"dead letter {entry.short_id} was too large to hold its record, and {place.topic}"
                    f"[{place.partition}]@{place.offset} is no longer there; nothing was redriven. Discard it"
                )

    def _batches(self, entries: Collection[Entry], resolution: Resolution, reason: str) -> Iterator[_Batch]:
        batch = _Batch()
        for entry, messages in self._messages(entries, resolution, reason):
            batch.entries.append(entry)
            batch.messages += messages
            batch.bytes += sum(len(value or b"") for _, _, _, value, _ in messages)
            if len(batch.entries) >= _BATCH or batch.bytes >= _BATCH_BYTES:
                yield batch
                batch = _Batch()
        if batch.entries:
            yield batch

    def _messages(
        self, entries: Collection[Entry], resolution: Resolution, reason: str
    ) -> Iterator[tuple[Entry, list[_Message]]]:
        """For each entry the note that it is resolved and, before it, the record where it goes back."""
        if resolution is Resolution.DISCARDED:
            for entry in entries:
                yield entry, [self._note(entry, resolution, reason)]
            return
        for letter in self._reader.letters(entries):
            entry, record, place = letter.entry, letter.record, letter.entry.place
            if record is None:
                raise WrongInputError(f"the record of dead letter {entry.short_id} has just left {place.topic}")
            headers = redrive_headers(record.headers, place.agent)
            again = place.topic, place.partition, record.key, record.value, headers
            yield entry, [again, self._note(entry, resolution, reason)]

    def _note(self, entry: Entry, resolution: Resolution, reason: str) -> _Message:
        place = entry.place
        event = DeadLetterResolved(
            source_topic=place.topic,
            source_partition=place.partition,
            source_offset=place.offset,
            agent=place.agent,
            resolution=resolution,
            resolved_by=self._by,
            reason=reason,
        )
        metadata = Metadata(
            id=deterministic_id(entry.id, "resolved", entry.offset, entry.resolutions),
            source=f"/clients/{self._by}",
            subject=key_of(event),
            time=datetime.now(UTC),
            causation_id=entry.id,
            correlation_id=entry.correlation_id,
            traceparent=f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-01",
        )
        value, headers = self._codec.encode(event, metadata)
        # Beside its letter: a partition keeps the order in which letters are written and resolved.
        return DEAD_LETTERS, entry.partition, metadata.subject.encode(), value, list(headers)


class _Producer:
    """A transactional producer that fences all others of its kind when it is made."""

    def __init__(self, kafka: Mapping[str, Any]) -> None:
        self._producer = Producer(
            {
                **kafka,
                "transactional.id": TRANSACTIONAL_ID,
                "client.id": TRANSACTIONAL_ID,
                "transaction.timeout.ms": 10_000,
                "retry.backoff.ms": 1,
                "linger.ms": 1,
                "compression.type": "lz4",
                "message.max.bytes": MAX_BYTES + 65_536,
                "log_level": 2,
            },
            logger=KAFKA_LOGGER,
        )
        self._call(lambda: self._producer.init_transactions(_TIMEOUT_S), "init_transactions")

    def commit(self, messages: Sequence[_Message]) -> list[tuple[int, int]]:
        """Commit the messages together; the partition and offset of each.

        Raises:
            FencedOperatorError: another operator has begun; nothing of this was committed.
            ClusterError: the cluster can't be reached, or refused a message.
        """
        delivered: dict[int, tuple[int, int]] = {}
        failures: list[str] = []
        self._call(self._producer.begin_transaction, "begin_transaction")
        try:
            for index, message in enumerate(messages):
                self._produce(message, _note_delivery(index, message[0], delivered, failures))
            self._call(lambda: self._producer.commit_transaction(_TIMEOUT_S), "commit_transaction")
        except (ClusterError, BufferError):
            with suppress(KafkaException):
                self._producer.abort_transaction(_TIMEOUT_S)
            if failures:
                raise ClusterError(f"Kafka refuses a record for {failures[0]}") from None
            raise
        return [delivered[index] for index in range(len(messages))]

    def _produce(self, message: _Message, on_delivery: Callable[..., None]) -> None:
        topic, partition, key, value, headers = message
        while True:
            try:
                self._producer.produce(topic, value, key, partition, headers=headers, on_delivery=on_delivery)
                self._producer.poll(0)
                return
            except BufferError:  # more than librdkafka queues: let some go out
                self._producer.poll(0.05)
            except KafkaException as error:
                raise self._meaning(error.args[0], f"produce to {topic}") from error

    def _call(self, call: Callable[[], Any], what: str) -> None:
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            try:
                call()
                return
            except KafkaException as error:
                cause: KafkaError = error.args[0]
                goes_on = cause.retriable() and not cause.txn_requires_abort() and not cause.fatal()
                if not goes_on or time.monotonic() > deadline:
                    raise self._meaning(cause, what) from error

    def _meaning(self, error: KafkaError, what: str) -> ClusterError | FencedOperatorError:
        if error.code() in _FENCED:
            return FencedOperatorError("another operator began to resolve dead letters; nothing was done here")
        return ClusterError(f"{what} failed: {error.str()}")


def _note_delivery(
    index: int, topic: str, delivered: dict[int, tuple[int, int]], failures: list[str]
) -> Callable[[KafkaError | None, Any], None]:
    def note(error: KafkaError | None, message: Any) -> None:
        if error is None:
            delivered[index] = message.partition(), message.offset()
        elif error.code() not in (KafkaError._PURGE_QUEUE, KafkaError._PURGE_INFLIGHT):
            failures.append(f"{topic}: {error.str()}")

    return note


def _already(resolved: Sequence[Entry]) -> str:
    first = resolved[0]
    assert first.resolved is not None
    more = f" (and {len(resolved) - 1} more)" if len(resolved) > 1 else ""
    return (
        f"dead letter {first.short_id}{more} was {first.resolved.resolution.value} by {first.resolved.resolved_by} "
        "already; redrive it once more with --again"
    )
