"""The consumer's thread: fetches batches, serves rebalances, and never lets the group think that it is gone.

In: a consumer's settings and topics. Out: calls of a :class:`FetchListener`, batches on the event loop's thread, in
order. The loop never blocks on Kafka, and Kafka's callbacks never touch the loop's data.
"""

import asyncio
import logging
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Final, Protocol

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition

from streams.errors import ClusterError, FencedError, MissingTopicError, ProcessorError

__all__ = ["FetchListener", "Fetcher"]

_POLL_S: Final = 0.2
_BATCH: Final = 500
_PAUSE_AFTER_S: Final = 1.0

log = logging.getLogger(__name__)


class FetchListener(Protocol):
    """Who gets what is fetched."""

    def received(self, messages: Sequence[Message]) -> None:
        """A batch; on the event loop's thread."""

    def prepare(self, consumer: Consumer, partitions: Sequence[TopicPartition]) -> Sequence[Any]:
        """Make ready to own ``partitions``, on the consumer's thread; it may block. Returns what ``assigned`` gets."""

    async def assigned(self, prepared: Sequence[Any]) -> list[TopicPartition]:
        """The partitions are ours now; returns them with the offset to start at."""

    async def revoked(self, partitions: Sequence[tuple[str, int]], *, lost: bool) -> None:
        """The partitions go to somebody else when this returns; with ``lost`` they already have."""


class Fetcher:
    """Runs a consumer in a thread.

    At most ``max_in_flight`` messages are handed out and not yet given back by :meth:`settle`. When nothing is given
    back for a while the partitions are paused and polling goes on, so that max.poll.interval.ms never passes.
    """

    def __init__(
        self,
        settings: Mapping[str, Any],
        topics: Sequence[str],
        listener: FetchListener,
        *,
        max_in_flight: int,
    ) -> None:
        self._name: str = settings["client.id"]
        self._topics = list(topics)
        self._listener = listener
        self._max_in_flight = max_in_flight
        self._low_water = max_in_flight * 3 // 4
        self._loop = asyncio.get_running_loop()
        # Each is written by one thread only: the number handed out by the consumer's, the number settled by the loop's.
        self._handed_out = 0
        self._settled = 0
        self._room = threading.Event()
        self._room.set()
        self._stopping = threading.Event()
        self._draining = threading.Event()
        # The client's handle must not be used while close() frees it. Within close() the last revocation still needs
        # it, and holds close() up for as long.
        self._alive = threading.Lock()
        self._closing = False
        self._rebalancing = False
        self._consumer = Consumer(dict(settings))
        self.finished: asyncio.Future[None] = self._loop.create_future()
        self._thread = threading.Thread(target=self._main, name=f"{self._name}-fetch", daemon=True)

    @property
    def in_flight(self) -> int:
        """Messages handed out and not settled."""
        return self._handed_out - self._settled

    def start(self) -> None:
        """Subscribe and begin."""
        self._thread.start()

    def settle(self, count: int) -> None:
        """``count`` messages are done with; to be called on the event loop's thread."""
        self._settled += count
        if not self._room.is_set() and self._handed_out - self._settled <= self._low_water:
            self._room.set()

    def drain(self) -> None:
        """Fetch nothing more, but stay in the group."""
        self._draining.set()
        self._room.set()

    def stop(self) -> None:
        """Leave; ``finished`` is done when the consumer is closed."""
        self._stopping.set()
        self.drain()

    def group_metadata(self) -> Any | None:
        """The group metadata for a transaction, None while this consumer is no member of its group.

        The member id is asked for second: had the membership been lost before the metadata was read, it would be empty,
        because only the listener's ``revoked``, which needs the loop's thread too, lets the consumer join again. A
        transaction with the metadata of no member would not be fenced.
        """
        with self._alive:
            if self._closing and not self._rebalancing:
                return None
            metadata = self._consumer.consumer_group_metadata()
            return metadata if self._consumer.memberid() else None

    def high_watermark(self, topic: str, partition: int) -> int:
        """The partition's end as of the latest fetch; negative when nothing was fetched yet."""
        with self._alive:
            if self._closing:
                return -1
            _, high = self._consumer.get_watermark_offsets(TopicPartition(topic, partition), cached=True)
            return int(high)

    def _main(self) -> None:
        error: Exception | None = None
        try:
            self._consumer.subscribe(
                self._topics, on_assign=self._on_assign, on_revoke=self._on_revoke, on_lost=self._on_lost
            )
            while not self._stopping.is_set():
                self._fetch()
        except Exception as caught:  # noqa: BLE001 - handed over to the loop's thread
            error = caught
        with self._alive:
            self._closing = True
        try:
            self._consumer.close()
        except Exception as caught:  # noqa: BLE001 - the same
            error = error or caught
        self._loop.call_soon_threadsafe(self._finish, error)

    def _finish(self, error: Exception | None) -> None:
        if self.finished.done():
            return
        if error is None:
            self.finished.set_result(None)
        elif isinstance(error, KafkaException):
            self.finished.set_exception(_meaning(self._name, error.args[0]))
        else:
            self.finished.set_exception(error)

    def _fetch(self) -> None:
        if self._draining.is_set() or not self._has_room():
            self._wait_paused()
            return
        # consume() waits until it has all that it was asked for; so wait for one, then take what else is there.
        first = self._consumer.poll(_POLL_S)
        if first is None:
            return
        self._hand_out([first, *self._consumer.consume(_BATCH - 1, 0)])

    def _has_room(self) -> bool:
        if self._handed_out - self._settled < self._max_in_flight:
            return True
        self._room.clear()
        if self._handed_out - self._settled <= self._low_water:
            return True
        # Pausing throws away what was prefetched, so it is not done for the short waits of a busy processor.
        return self._room.wait(_PAUSE_AFTER_S) and not self._draining.is_set()

    def _wait_paused(self) -> None:
        paused = self._consumer.assignment()
        self._consumer.pause(paused)
        while not self._stopping.is_set() and (self._draining.is_set() or not self._room.is_set()):
            message = self._consumer.poll(_POLL_S / 4)
            if message is not None:
                self._hand_out([message])  # of a partition assigned meanwhile
        if not self._stopping.is_set():
            self._consumer.resume(self._consumer.assignment())

    def _hand_out(self, messages: list[Message]) -> None:
        good = []
        for message in messages:
            error = message.error()
            if error is None:
                good.append(message)
            elif error.code() in (
                KafkaError._FATAL,
                KafkaError._FENCED,
                KafkaError.FENCED_INSTANCE_ID,
                KafkaError.UNKNOWN_TOPIC_OR_PART,
                KafkaError.TOPIC_AUTHORIZATION_FAILED,
                KafkaError.GROUP_AUTHORIZATION_FAILED,
                KafkaError._UNKNOWN_TOPIC,
            ):
                raise _meaning(self._name, error)
            else:
                log.warning("%s: %s", self._name, error.str())
        if good:
            self._handed_out += len(good)
            self._loop.call_soon_threadsafe(self._listener.received, good)

    def _on_assign(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        prepared = self._listener.prepare(consumer, partitions)
        placed = asyncio.run_coroutine_threadsafe(self._listener.assigned(prepared), self._loop).result()
        consumer.incremental_assign(placed)

    def _on_revoke(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        self._give_up(consumer, partitions, lost=False)

    def _on_lost(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        self._give_up(consumer, partitions, lost=True)

    def _give_up(self, consumer: Consumer, partitions: list[TopicPartition], *, lost: bool) -> None:
        places = [(partition.topic, partition.partition) for partition in partitions]
        self._rebalancing = True
        try:
            asyncio.run_coroutine_threadsafe(self._listener.revoked(places, lost=lost), self._loop).result()
        finally:
            with self._alive:
                self._rebalancing = False
        consumer.incremental_unassign(partitions)


def _meaning(name: str, error: KafkaError) -> ProcessorError:
    said = f"{name}: {error.name()}: {error.str()}"
    if error.code() in (KafkaError._FENCED, KafkaError.FENCED_INSTANCE_ID) or "fenced" in error.str().lower():
        return FencedError(f"{said}; another process runs with this slot")
    if error.code() in (KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_TOPIC):
        return MissingTopicError(f"{said}; create the topic, then start again")
    return ClusterError(said)
