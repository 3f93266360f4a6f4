"""One transaction after another: transactional producers that take turns, and what their errors mean.

In: messages, the offsets that they answer and the consumer group's metadata. Out: all of it committed, or none and an
error that says what to do next. Everything here blocks; the processor calls it from one thread of its own.

Why two producers (docs/decisions/0013): while the markers of a producer's last transaction are being written, which is
after its commit has returned, the coordinator answers CONCURRENT_TRANSACTIONS. Asked to add offsets, librdkafka asks
again after retry.backoff.ms; asked to add a record's partition, it waits for a fixed 20 ms. One producer alone would
have to have its offsets through before it is given the first record. With two the markers are written by the time it
is a producer's turn again, and records and offsets travel side by side. A transaction begins when the one before has
ended, so one is open at most, and the group's coordinator keeps the offset that was written last, whichever markers
come first.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import suppress
from functools import partial
from typing import Any, Final

from confluent_kafka import KafkaError, KafkaException, Message, Producer, TopicPartition
from confluent_kafka.admin import AclOperation

from streams.access import denied, lacking, refusal
from streams.errors import (
    AccessError,
    ClusterError,
    FencedError,
    MissingTopicError,
    RecordRejectedError,
    TransactionAbortedError,
)

__all__ = ["Outgoing", "Transactor"]

Outgoing = tuple[str, bytes | None, bytes | None, list[tuple[str, bytes]] | None, int]
"""A message to be produced: topic, key, value, headers, partition (-1: by the key)."""

_INIT_TIMEOUT_S: Final = 60.0
_CALL_TIMEOUT_S: Final = 10.0
_PATIENCE_S: Final = 30.0
_METADATA_TIMEOUT_S: Final = 5.0
_FULL_QUEUE_POLL_S: Final = 0.05
_HEAD_START_S: Final = 0.0015
"""The client asks for the first records' partitions 1 ms after they came. That has to be before it asks for offsets:
while the coordinator's replicas write down one, it answers CONCURRENT_TRANSACTIONS to the other, and only offsets are
asked for again soon. A single broker is through with one before it reads the other."""
_FENCED: Final = frozenset(
    {
        KafkaError._FENCED,
        KafkaError.FENCED_INSTANCE_ID,
        KafkaError.PRODUCER_FENCED,
        KafkaError.INVALID_PRODUCER_EPOCH,
    }
)
_REFUSALS: Final = frozenset(
    {
        KafkaError.MSG_SIZE_TOO_LARGE,
        KafkaError.RECORD_LIST_TOO_LARGE,
        KafkaError.INVALID_MSG,
        KafkaError.INVALID_MSG_SIZE,
        KafkaError.INVALID_RECORD,
        KafkaError.INVALID_TIMESTAMP,
        KafkaError.POLICY_VIOLATION,
    }
)
"""What a broker has against a record itself. All else is the cluster's trouble, such as a leader that is away for so
long that the record timed out: to give its event up for that would be wrong."""

log = logging.getLogger(__name__)


class Transactor:
    """Commits transactions under one transactional id, or in turns under several: ``settings`` of each producer."""

    def __init__(self, *settings: Mapping[str, Any]) -> None:
        self._settings = dict(settings[0])
        self._id: str = self._settings["transactional.id"]
        self._producers = [Producer(dict(each)) for each in settings]
        self._turn = 0
        self._head_start_s = _HEAD_START_S
        self._abandoned = threading.Event()

    @property
    def _producer(self) -> Producer:
        return self._producers[self._turn]

    def abandon(self) -> None:
        """Begin no call any more, and try none again: what is under way is not wanted now. For any thread."""
        self._abandoned.set()

    def open(self) -> None:
        """Fence every earlier producer of these ids and abort what it left open.

        Raises:
            AccessError: this user may not use the id.
            ClusterError: the cluster did not let it within a minute.
        """
        for producer in self._producers:
            self._call(partial(producer.init_transactions, _INIT_TIMEOUT_S), "init_transactions", _INIT_TIMEOUT_S)
        with suppress(KafkaException):
            if len(self._producer.list_topics(timeout=_METADATA_TIMEOUT_S).brokers) == 1:
                self._head_start_s = 0.0

    def commit(
        self, messages: Sequence[Outgoing], offsets: Sequence[TopicPartition], group: Any, *, diagnose: bool = False
    ) -> None:
        """Commit ``messages`` and ``offsets`` in one transaction, ``group`` being the consumer's group metadata.

        With ``diagnose`` each message's fate is looked at, which costs time but names the one that is refused.

        Raises:
            TransactionAbortedError: nothing was committed; a later transaction may carry the same.
            RecordRejectedError: nothing was committed, nor will be as long as that message is part of it.
            MissingTopicError: nothing was committed; a topic that it goes to is gone.
            AccessError: nothing was committed; this user lacks a right on a topic, the group or the id.
            FencedError: another producer has this id, or another member this place in the group.
            ClusterError: the cluster can't be reached, or refused for good.
        """
        refused: dict[int, KafkaError] = {}
        begun = False
        try:
            self._call(self._producer.begin_transaction, "begin_transaction")
            begun = True
            self._produce(messages, refused if diagnose else None)
            self._call(
                lambda: self._producer.send_offsets_to_transaction(list(offsets), group, _CALL_TIMEOUT_S),
                "send_offsets_to_transaction",
            )
            self._call(lambda: self._producer.commit_transaction(_CALL_TIMEOUT_S), "commit_transaction")
        except (TransactionAbortedError, RecordRejectedError, FencedError, AccessError) as failure:
            # Before it is aborted: the coordinator may have timed it out by now, which reads as if it were fenced.
            if not refused:
                self._check_topics({message[0] for message in messages}, rights=diagnose or _may_lack(failure))
            if isinstance(failure, FencedError | AccessError):
                raise
            if begun:
                self._abort()
                self._pass_on()
            for index, error in refused.items():
                raise RecordRejectedError(index, f"{error.name()}: {error.str()}") from None
            raise
        self._pass_on()

    def _pass_on(self) -> None:
        self._turn = (self._turn + 1) % len(self._producers)

    def _check_topics(self, topics: Set[str], *, rights: bool) -> None:
        """A record for a topic that was deleted times out as for a leader that is away. This tells them apart. One that
        this user may not even describe looks like a deleted one; ``rights`` asks for missing rights in any case.

        Raises:
            MissingTopicError: one of ``topics`` does not exist.
            AccessError: one can't be written by this user.
        """
        try:
            known = self._producer.list_topics(timeout=_METADATA_TIMEOUT_S).topics
        except KafkaException:
            return  # nobody can say; the transaction is tried again
        missing = sorted(topics - known.keys())
        if missing or rights:
            lacks = lacking(self._settings, {topic: [AclOperation.WRITE] for topic in topics})
            if lacks:
                raise refusal(self._id, self._settings, lacks.values())
        if missing:
            raise MissingTopicError(
                f"{self._id}: the cluster has no topic {', '.join(missing)}; create it and start again; nothing is lost"
            )

    def _produce(self, messages: Sequence[Outgoing], refused: dict[int, KafkaError] | None) -> None:
        if not messages:
            return
        produce, producer = self._producer.produce, self._producer
        registered = time.monotonic() + self._head_start_s
        index = 0
        while index < len(messages):
            try:
                if refused is None:
                    for topic, key, value, headers, partition in messages[index:] if index else messages:
                        produce(topic, value, key, partition, headers=headers or [])
                        index += 1
                else:
                    topic, key, value, headers, partition = messages[index]
                    note = _note(refused, index)
                    produce(topic, value, key, partition, headers=headers or [], on_delivery=note)
                    index += 1
            except BufferError:
                # The local queue is full; deliveries make room.
                producer.poll(_FULL_QUEUE_POLL_S)
            except KafkaException as error:
                cause: KafkaError = error.args[0]
                if cause.code() == KafkaError.MSG_SIZE_TOO_LARGE:
                    raise RecordRejectedError(index, f"{cause.name()}: {cause.str()}") from error
                raise self._meaning(cause, "produce") from error
        producer.poll(0)
        if (wait_s := registered - time.monotonic()) > 0:
            time.sleep(wait_s)

    def _abort(self) -> None:
        self._call(lambda: self._producer.abort_transaction(_CALL_TIMEOUT_S), "abort_transaction")

    def _call(self, call: Callable[[], Any], what: str, patience_s: float = _PATIENCE_S) -> None:
        """Make one transactional call; those that time out or say so are resumed by calling again."""
        deadline = time.monotonic() + patience_s
        while True:
            if self._abandoned.is_set():
                raise ClusterError(f"{self._id}: {what} was given up, since the processor ends")
            try:
                call()
                return
            except KafkaException as error:
                cause: KafkaError = error.args[0]
                if not cause.retriable() or cause.txn_requires_abort() or cause.fatal():
                    raise self._meaning(cause, what) from error
                if time.monotonic() > deadline:
                    raise ClusterError(
                        f"{self._id}: {what} got no answer for {patience_s:g} s: {cause.str()}"
                    ) from error
                log.info("%s: %s is tried again: %s", self._id, what, cause.str())

    def _meaning(self, error: KafkaError, what: str) -> Exception:
        said = f"{self._id}: {what} failed with {error.name()}: {error.str()}"
        if error.code() == KafkaError.FENCED_INSTANCE_ID and error.txn_requires_abort() and not error.fatal():
            # The group knows this process's own consumer by another member id since it joined again. Another process
            # with this slot would have fenced the producer before its consumer joined.
            return TransactionAbortedError(said)
        if (refused := denied(self._id, self._settings, error, to="WRITE")) is not None:
            return refused
        if error.code() in _FENCED:
            return FencedError(f"{said}; another process runs with this slot, or this one was paused for too long")
        if error.fatal():
            return ClusterError(said)
        if error.txn_requires_abort():
            return TransactionAbortedError(said)
        return ClusterError(said)

    def close(self) -> None:
        """Abort what is open and let go of the connections."""
        # It fails when none is open, or the id is fenced; either way nothing of it can commit any more.
        with suppress(KafkaException):
            self._producer.abort_transaction(1.0)
        for producer in self._producers:
            with suppress(KafkaException):
                producer.purge()
                producer.flush(0.1)
        # The client has no close; its threads and connections end with the object.
        del producer
        self._producers.clear()


def _may_lack(failure: BaseException) -> bool:
    """Whether it may be that a right is missing: it says so, or messages failed and it does not say why."""
    cause = failure.__cause__
    unexplained = isinstance(cause, KafkaException) and cause.args[0].code() == KafkaError._INCONSISTENT
    return unexplained or isinstance(failure, AccessError)


def _note(refused: dict[int, KafkaError], index: int) -> Callable[[KafkaError | None, Message], None]:
    def delivered(error: KafkaError | None, _: Message) -> None:
        if error is not None and error.code() in _REFUSALS:
            refused[index] = error

    return delivered
