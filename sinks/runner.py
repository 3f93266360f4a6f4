"""Feeds a sink from the log.

In: a :class:`~sinks.sink.Sink`, a codec and Kafka client settings. Out: the sink's writes, from a thread of its own.
The consumer belongs to a group, so that many runners share the partitions, but starts where the store says that it
stands. Only committed records are read. Transactions leave control records, so progress is told by positions: the
consumer's end-of-partition events carry them past what is never delivered. A store that fails is tried again for as
long as it may help, while the consumer keeps its place in the group; nothing is skipped, and an error that stays stops
the runner and is found in :attr:`SinkRunner.error`.
"""

import logging
import random
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, KafkaException, Message, TopicPartition

from schemas.errors import UnavailableError
from schemas.record import Record
from sinks.decoding import Decoder, decoded
from sinks.errors import HistoryLostError, LogError, ReplacedError, SinkError
from sinks.kafka_reading import LogEnds, Place, cannot_read, consumer_settings, read_from, stays
from sinks.pending import Pending
from sinks.sink import Sink, SinkRecord

__all__ = ["SinkRunner"]

_log = logging.getLogger(__name__)

_ENDS_BACKOFF_S: Final = 0.1
_BACKLOG_S: Final = 1.0


class SinkRunner:
    """Runs ``sink`` in a thread of its own.

    ``kafka`` holds librdkafka settings (``bootstrap.servers``, security). ``group`` is the consumer group, by default
    ``sink-<name>``; ``instance`` makes it a static member ``<group>-<instance>``, which takes its place again at once
    after a crash. A batch is written when it holds ``batch_size`` records or ``batch_bytes`` bytes, or ``linger_s``
    seconds after its first record. From the runner's thread ``on_batch`` is called with the records and seconds of each
    write, ``on_error`` when it stops by an error.
    """

    def __init__(
        self,
        sink: Sink,
        *,
        codec: Decoder,
        kafka: Mapping[str, Any],
        group: str | None = None,
        instance: str | None = None,
        batch_size: int = 5_000,
        batch_bytes: int = 8 * 1024 * 1024,
        linger_s: float = 0.3,
        backoff_s: tuple[float, float] = (0.1, 5.0),
        on_batch: Callable[[int, float], None] | None = None,
        on_error: Callable[[BaseException], None] | None = None,
    ) -> None:
        self.sink = sink
        self.group = group or f"sink-{sink.name}"
        self._codec = codec
        self._kafka = dict(kafka)
        self._instance = instance
        self._batch_size = batch_size
        self._batch_bytes = batch_bytes
        self._linger_s = linger_s
        self._backoff_s = backoff_s
        self._on_batch = on_batch
        self._on_error = on_error
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()
        self._give_up_at = float("inf")
        self._hurried = 0
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self._written: dict[Place, int] = {}
        self._assigned: frozenset[Place] | None = None
        self._records = 0
        self._backlog = 0
        self._trouble: tuple[float, str] | None = None
        self._ends = LogEnds(kafka)
        self._writing = threading.Lock()
        # The rest belongs to the runner's thread.
        self._consumer: Consumer | None = None
        self._pending = Pending()
        self._holding = False
        self._replaced = False
        self._looked_at = 0.0

    @property
    def error(self) -> BaseException | None:
        """What stopped the runner, if something did."""
        return self._error

    @property
    def records_written(self) -> int:
        """How many records the sink has taken since the start."""
        return self._records

    @property
    def partitions(self) -> int | None:
        """How many partitions it has; None before it is a member of its group, or after it lost them all."""
        assigned = self._assigned
        return None if assigned is None else len(assigned)

    @property
    def backlog(self) -> int:
        """How many offsets were still to be written, as of the last second; unlike :meth:`lag` it asks nobody."""
        return self._backlog

    @property
    def trouble(self) -> tuple[float, str] | None:
        """What the store has failed with, and since when (``time.monotonic()``); None while it works."""
        return self._trouble

    def start(self) -> None:
        """Start the thread. The store is opened there; :meth:`wait_caught_up` or :attr:`error` tell how it went."""
        if self._thread is not None:
            raise RuntimeError(f"the runner of sink {self.sink.name} was started already")
        self._thread = threading.Thread(target=self._run, name=f"sink-{self.sink.name}", daemon=True)
        self._thread.start()

    def stop(self, timeout_s: float = 30.0) -> None:
        """Write what was read, close consumer and sink, and wait for the thread.

        A store that still fails after ``timeout_s`` is left as it is: its offsets say where to go on.

        Raises:
            SinkError: the thread did not end in time.
        """
        if self._thread is None:
            return
        self._give_up_at = time.monotonic() + timeout_s
        self._stopping.set()
        self._thread.join(timeout_s + 10)
        if self._thread.is_alive():
            raise SinkError(f"sink {self.sink.name} did not stop within {timeout_s + 10:g} s; its store still works")

    @contextmanager
    def between_batches(self) -> Iterator[None]:
        """While it is entered nothing is written: for moments, since the runner's thread waits. Entering waits for the
        batch that is being written.
        """
        with self._writing:
            yield

    def lag(self) -> dict[Place, int] | None:
        """How many offsets each assigned partition is behind its end, open transactions included; None before the
        first assignment.

        Raises:
            LogError: the cluster doesn't answer.
        """
        with self._changed:
            assigned = self._assigned
        if assigned is None:
            return None
        ends = self._ends.of(assigned)
        with self._changed:
            return {place: max(0, end - self._written.get(place, 0)) for place, end in ends.items()}

    def caught_up(self) -> bool:
        """Whether all that was produced before the call and committed is in the store; see :meth:`wait_caught_up`.

        Raises:
            LogError: the cluster doesn't answer.
        """
        lag = self.lag()
        return lag is not None and not any(lag.values())

    def wait_caught_up(self, timeout_s: float = 30.0) -> bool:
        """Wait until all that was produced before the call and committed is in the store; False when ``timeout_s``
        pass first.

        Only the partitions assigned to this runner count. The mark is the partitions' end, not the last stable offset:
        a transaction's markers reach its partitions one by one, after the commit was answered, and what it wrote should
        count all the same. So open transactions are waited for too, for as long as the timeout allows.

        Raises:
            SinkError: the runner has stopped by an error (its cause), or was never started or was stopped.
            LogError: the cluster didn't answer in ``timeout_s`` seconds.
        """
        deadline = time.monotonic() + timeout_s
        with self._changed:
            self._hurried += 1
        try:
            if not self._wait_for(lambda: self._assigned is not None, deadline):
                return False
            with self._changed:
                assigned = self._assigned or frozenset()
            ends = self._ends_by(deadline, assigned)

            def reached() -> bool:
                mine = self._assigned
                return mine is not None and all(
                    place not in mine or self._written.get(place, 0) >= end for place, end in ends.items()
                )

            return self._wait_for(reached, deadline)
        finally:
            with self._changed:
                self._hurried -= 1

    def _wait_for(self, condition: Callable[[], bool], deadline: float) -> bool:
        with self._changed:
            while True:
                if self._error is not None:
                    raise SinkError(f"sink {self.sink.name} has stopped: {self._error}") from self._error
                if self._thread is None or self._stopping.is_set():
                    raise SinkError(f"sink {self.sink.name} is not running")
                if condition():
                    return True
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                self._changed.wait(min(left, 0.5))

    def _ends_by(self, deadline: float, places: frozenset[Place]) -> dict[Place, int]:
        """Where ``places`` end; a topic's leader may be away for a moment."""
        while True:
            try:
                return self._ends.of(places)
            except LogError:
                if time.monotonic() >= deadline or self._stopping.wait(_ENDS_BACKOFF_S):
                    raise

    # The runner's thread

    def _run(self) -> None:
        opened = False
        try:
            self._patiently(self.sink.open)
            opened = True
            if self._stopping.is_set():
                return
            self._consumer = Consumer(consumer_settings(self._kafka, self.group, self._instance), logger=_log)
            self._consumer.subscribe(
                list(self.sink.topics), on_assign=self._on_assign, on_revoke=self._on_revoke, on_lost=self._on_lost
            )
            while not self._stopping.is_set():
                self._take(self._poll(self._patience()))
                if self._due():
                    self._flush()
                self._look()
            self._flush()
        except BaseException as error:  # noqa: BLE001 - a thread has nobody to raise to; callers find it in `error`
            self._fail(error)
        finally:
            self._close(opened)

    def _close(self, opened: bool) -> None:
        self._stopping.set()
        closings: list[tuple[str, Callable[[], None]]] = []
        if self._consumer is not None:
            closings.append(("consumer", self._consumer.close))
        if opened:
            closings.append(("store", self.sink.close))
        for what, close in closings:
            try:
                close()
            except (SinkError, KafkaException, RuntimeError) as error:
                _log.exception("sink %s: its %s did not close", self.sink.name, what)
                if self._error is None:
                    self._fail(error)
        with self._changed:
            self._changed.notify_all()

    def _fail(self, error: BaseException) -> None:
        _log.error("sink %s stops: %s", self.sink.name, error, exc_info=error)
        with self._changed:
            self._error = error
            self._changed.notify_all()
        if self._on_error is not None:
            self._on_error(error)

    def _patience(self) -> float:
        """How long to wait for records: a waiting caller is not kept, an idle runner does not spin."""
        return 0.02 if self._hurried or self._pending.moved else 0.1

    def _due(self) -> bool:
        linger_s = 0.02 if self._hurried else self._linger_s
        return self._pending.due(self._batch_size, self._batch_bytes, linger_s)

    def _poll(self, wait_s: float) -> list[Message]:
        """Some messages. Few at a time where they are large, since all of them are in memory at once."""
        assert self._consumer is not None
        at_most = max(1, min(1_000, int(self._batch_bytes / self._pending.record_bytes)))
        try:
            return list(self._consumer.consume(at_most, wait_s))
        except KafkaException as error:
            cause = error.args[0]
            if stays(cause):
                raise cannot_read(self.sink.name, self.group, "its topics", cause) from error
            _log.warning("sink %s: %s", self.sink.name, cause.str())
            return []

    def _take(self, messages: Sequence[Message]) -> None:
        for message in messages:
            place = (message.topic() or "", message.partition() or 0)
            failure = message.error()
            if failure is None:
                if self._assigned is None or place not in self._assigned:
                    continue  # revoked while it was on its way
                record = Record.from_message(message)
                if record.offset < self._position(place):
                    continue  # read again after a rebalance
                self._pending.add(self._decoded(record))
                self._move(place, record.offset + 1)
            elif failure.code() == KafkaError._PARTITION_EOF:
                self._move(place, message.offset() or 0)
            elif failure.code() == KafkaError._AUTO_OFFSET_RESET:
                self._out_of_range(place)
            elif stays(failure):
                raise cannot_read(self.sink.name, self.group, message.topic() or "its topics", failure)
            else:
                _log.warning("sink %s: %s", self.sink.name, failure.str())

    def _move(self, place: Place, position: int) -> None:
        if self._assigned is None or place not in self._assigned:
            return
        if position > self._position(place):
            self._pending.move(place, position)

    def _decoded(self, record: Record) -> SinkRecord:
        while True:
            try:
                return decoded(self._codec, record)
            except UnavailableError as error:
                if not error.retryable or self._stopping.is_set():
                    raise
                _log.warning("sink %s waits: %s", self.sink.name, error)
                self._stopping.wait(1.0)

    def _flush(self) -> None:
        """Write what was read: the data and the store's offsets, then the group's, which serve monitoring only."""
        if self._replaced:
            self._start_over()
        if not self._pending.moved:
            return
        # What is written is looked up at each try: while a store is down, partitions can be taken away.
        try:
            self._patiently(self._write)
        except ReplacedError as error:
            _log.info("sink %s: %s", self.sink.name, error)
            self._start_over()
            return
        moved, count = self._pending.moved, len(self._pending.records)
        self._pending.clear()
        with self._changed:
            self._written.update(moved)
            self._records += count
            self._changed.notify_all()
        if self._consumer is not None and moved:
            places = [TopicPartition(topic, partition, offset) for (topic, partition), offset in moved.items()]
            try:
                self._consumer.commit(offsets=places, asynchronous=True)
            except KafkaException as error:
                _log.info("sink %s: the group's offsets were not committed: %s", self.sink.name, error.args[0].str())

    def _write(self) -> None:
        with self._writing:
            started = time.monotonic()
            self.sink.write(self._pending.records, dict(self._pending.moved))
        if self._on_batch is not None:
            self._on_batch(len(self._pending.records), time.monotonic() - started)

    def _look(self) -> None:
        now = time.monotonic()
        if self._consumer is None or now - self._looked_at < _BACKLOG_S:
            return
        self._looked_at = now
        if self._replaced or self._is_replaced():
            self._start_over()
        backlog = 0
        for place in self._assigned or ():
            # What the last fetch said, without asking: the end is -1001 before the first.
            _, high = self._consumer.get_watermark_offsets(TopicPartition(*place), cached=True)
            backlog += max(0, high - self._position(place))
        self._backlog = backlog

    def _is_replaced(self) -> bool:
        try:
            return self.sink.replaced()
        except SinkError as error:
            _log.info("sink %s: %s", self.sink.name, error)
            return False

    def _start_over(self) -> None:
        """Another store is in use: go on where that stands."""
        assert self._consumer is not None
        stored: Mapping[Place, int] = {}

        def ask() -> None:
            nonlocal stored
            stored = self.sink.offsets()

        self._patiently(ask)
        self._replaced = False
        self._pending.clear()
        with self._changed:
            self._written = {place: stored.get(place, 0) for place in self._assigned or ()}
            self._changed.notify_all()
        read_from(self._consumer, self._written)

    def _patiently(self, work: Callable[[], None]) -> None:
        """Do ``work``, again and again while its errors say that this may help, keeping the place in the group."""
        wait, longest = self._backoff_s
        while True:
            try:
                work()
            except SinkError as error:
                if not error.retryable or time.monotonic() >= self._give_up_at:
                    raise
                _log.warning("sink %s: %s; next try in %.1f s", self.sink.name, error, wait)
                self._trouble = (time.monotonic() if self._trouble is None else self._trouble[0], str(error))
                self._hold(wait * random.uniform(0.8, 1.2))
                wait = min(2 * wait, longest)
            else:
                self._trouble = None
                break
        if self._holding:
            self._holding = False
            if self._consumer is not None:
                assignment = self._consumer.assignment()
                self._consumer.resume(assignment)
                read_from(
                    self._consumer,
                    {(at.topic, at.partition): self._position((at.topic, at.partition)) for at in assignment},
                )

    def _hold(self, seconds: float) -> None:
        """Let ``seconds`` pass without reading on, but answer the group, which would give the partitions away."""
        until = min(time.monotonic() + seconds, self._give_up_at)
        if self._consumer is None:
            self._stopping.wait(max(0.0, until - time.monotonic()))
            return
        if not self._holding:
            self._holding = True
            self._consumer.pause(self._consumer.assignment())
        while (left := until - time.monotonic()) > 0:
            self._take(self._poll(min(left, 0.1)))

    def _on_assign(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        stored: Mapping[Place, int] = {}

        def ask() -> None:
            nonlocal stored
            # Asking takes the sink to the store in use, where the partitions that we had stand elsewhere.
            self._replaced = self._replaced or (self._assigned is not None and self.sink.replaced())
            stored = self.sink.offsets()

        wait, longest = self._backoff_s
        while True:  # not _patiently: a callback of the consumer must not poll it
            try:
                ask()
                self._trouble = None
                break
            except SinkError as error:
                if not error.retryable or self._stopping.is_set():
                    raise
                self._trouble = (time.monotonic() if self._trouble is None else self._trouble[0], str(error))
                _log.warning("sink %s: %s; next try in %.1f s", self.sink.name, error, wait)
                self._stopping.wait(wait)
                wait = min(2 * wait, longest)
        starts = [
            TopicPartition(at.topic, at.partition, stored.get((at.topic, at.partition), OFFSET_BEGINNING))
            for at in partitions
        ]
        consumer.incremental_assign(starts)
        places = {(at.topic, at.partition) for at in partitions}
        self._keep(consumer, places)
        if self._holding:
            consumer.pause(consumer.assignment())
        with self._changed:
            for place in places:
                self._written[place] = stored.get(place, 0)
            self._assigned = (self._assigned or frozenset()) | places
            self._changed.notify_all()

    def _on_revoke(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        if not self._stopping.is_set() and not self._holding and self._pending.moved and not self._replaced:
            try:
                self._flush_once()
            except SinkError as error:
                _log.warning("sink %s: not written before its partitions went: %s", self.sink.name, error)
        self._on_lost(consumer, partitions)

    def _flush_once(self) -> None:
        self._write()
        with self._changed:
            self._written.update(self._pending.moved)
            self._records += len(self._pending.records)
        self._pending.clear()

    def _on_lost(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        """Forget what was read of ``partitions``; whoever has them next starts where the store stands."""
        gone = {(at.topic, at.partition) for at in partitions}
        self._pending.drop(gone)
        with self._changed:
            # None where nothing is left: a member that lost all it had can't say that it has seen it all.
            self._assigned = ((self._assigned or frozenset()) - gone) or None
            for place in gone:
                self._written.pop(place, None)
            self._changed.notify_all()
        if not self._stopping.is_set():
            consumer.incremental_unassign(partitions)
            self._keep(consumer, gone)
            if self._holding:
                consumer.pause(consumer.assignment())

    def _keep(self, consumer: Consumer, moved: Collection[Place]) -> None:
        """Amid a rebalance, see to it that reading goes on at the right place where nothing moved: librdkafka pauses
        those partitions meanwhile, and to resume them alone goes wrong (:func:`~sinks.kafka_reading.read_from`).
        """
        kept = (self._assigned or frozenset()).difference(moved)
        if kept:
            read_from(consumer, {place: self._position(place) for place in kept})

    def _position(self, place: Place) -> int:
        return self._pending.moved.get(place, self._written.get(place, 0))

    def _out_of_range(self, place: Place) -> None:
        """The log does not hold the offset: retention went past it, or this is another log than the store saw."""
        assert self._consumer is not None
        topic, partition = place
        position = self._position(place)
        try:
            low, high = self._consumer.get_watermark_offsets(TopicPartition(topic, partition), timeout=30)
        except KafkaException as error:
            raise LogError(f"{topic}[{partition}] does not hold offset {position}: {error.args[0].str()}") from error
        if position > high:
            raise HistoryLostError(
                f"{topic}[{partition}] ends at offset {high}, but the store of sink {self.sink.name} has seen it up to "
                f"{position}: the topic was made anew or lost its end. Restore the log, or start with an empty store"
            )
        if position < low:
            _log.warning(
                "sink %s: %s[%d] begins at offset %d, the store stands at %d: retention removed what lies between",
                *(self.sink.name, topic, partition, low, position),
            )
        read_from(self._consumer, {place: max(low, position)})
