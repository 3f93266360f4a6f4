"""The consumer's thread: fetches, serves rebalances, and never lets the group think that it is gone.

In: a consumer's settings and topics. Out: calls of a :class:`FetchListener`, batches on the event loop's thread, those
of a partition in order, urgent ones first. The loop never blocks on Kafka, and Kafka's callbacks never touch the loop's
data; the thread polls on whatever the loop does, except while partitions are given up, which has a bound.

An assignment is accepted at once, with nothing to fetch, and its partitions are added when they are restored. So a
restore of minutes delays no other partition and no other member, and max.poll.interval.ms has nothing to do with it.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

import orjson
from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition

from streams.access import denied
from streams.backlog import Backlog
from streams.dispatch import rank_of
from streams.errors import ClusterError, FencedError, MissingTopicError, ProcessorError
from streams.handover import FetchListener, Handover, Place

__all__ = ["FetchListener", "Fetcher"]

_POLL_S: Final = 0.2
_BUSY_POLL_S: Final = 0.01
"""Nothing wakes a poll but a message, so it is short while something else may happen soon: a restore is through, a
paused partition may go on."""
_BATCH: Final = 500
_CHUNK: Final = 128
"""Messages handed out at a time: two milliseconds or so of the loop's work."""
_MIXED_CHUNK: Final = 64
"""The same where ranks differ. An urgent message waits for about two of them."""
_PAUSE_AFTER_S: Final = 0.5
_REVOKE_S: Final = 15.0

_FATAL: Final = frozenset(
    {
        KafkaError._FATAL,
        KafkaError._FENCED,
        KafkaError.FENCED_INSTANCE_ID,
        KafkaError.TOPIC_AUTHORIZATION_FAILED,
        KafkaError.GROUP_AUTHORIZATION_FAILED,
    }
)
_MISSING: Final = frozenset({KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_TOPIC})
_MISSING_S: Final = 5.0
"""A topic that was just created is not known to every broker at once."""
_LOOK_S: Final = 0.5
_STATISTICS_MS: Final = 3000
_BROKERLESS: Final = 2
"""Statistics in a row. A client that begins with its bootstrap servers again has no broker for a moment."""

log = logging.getLogger(__name__)


class Fetcher:
    """Runs a consumer in a thread.

    At most ``max_in_flight`` messages are handed out and not yet given back by :meth:`settle`, and of low and normal
    rank fewer (:func:`streams.dispatch.shares`). Behind them a bounded backlog waits; a rank whose backlog is full is
    paused while the others are fetched on. ``revoke_timeout_s`` bounds the listener's ``revoked``: a loop that is
    stuck for longer has lost the partitions.
    """

    def __init__(
        self,
        settings: Mapping[str, Any],
        topics: Sequence[str],
        listener: FetchListener,
        *,
        max_in_flight: int,
        revoke_timeout_s: float = _REVOKE_S,
    ) -> None:
        self._name: str = settings["client.id"]
        self._topics = list(topics)
        self._ranks = {topic: rank_of(topic) for topic in topics}
        self._only = next(iter(self._ranks.values()))
        self._alone = len(set(self._ranks.values())) == 1
        self._listener = listener
        self._loop = asyncio.get_running_loop()
        self._backlog = Backlog(max_in_flight, self._ranks)
        self._handover = Handover(
            self._name,
            listener,
            self._loop,
            timeout_s=revoke_timeout_s,
            done=self._wake_up,
            discard=self._forget,
        )
        self._batch = max(1, min(_BATCH, max_in_flight))
        self._delivering = False
        self._sated = False
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._draining = threading.Event()
        # What the consumer has to fetch, and of that what is paused: for the consumer's thread alone.
        self._assigned: dict[Place, TopicPartition] = {}
        self._paused: set[Place] = set()
        self._held: frozenset[Place] = frozenset()
        self._taken_away = False
        self._missing: dict[str, tuple[float, KafkaError]] = {}
        self._looked = 0.0
        self._patient = True
        # The client's handle must not be used while close() frees it. Within close() the last revocation still needs
        # it, and holds close() up for as long.
        self._alive = threading.Lock()
        self._closing = False
        self._rebalancing = False
        self._told = False
        self._settings = {**settings, "statistics.interval.ms": _STATISTICS_MS, "stats_cb": self._count_brokers}
        self._brokerless = 0
        self._consumer = Consumer(self._settings)
        self.finished: asyncio.Future[None] = self._loop.create_future()
        self._thread = threading.Thread(target=self._main, name=f"{self._name}-fetch", daemon=True)

    @property
    def in_flight(self) -> int:
        """Messages handed out and not settled."""
        return self._backlog.in_flight

    @property
    def restoring(self) -> list[Place]:
        """The partitions that are assigned but still being restored."""
        return self._handover.restoring

    def start(self) -> None:
        """Subscribe and begin."""
        self._thread.start()

    def settle(self, count: int, rank: int) -> None:
        """``count`` messages of ``rank`` are done with; to be called on the event loop's thread."""
        self._backlog.settle(count, rank)
        if len(self._backlog) and not self._delivering:
            self._delivering = True
            self._loop.call_soon(self._deliver)

    def hold(self, place: Place, *, held: bool) -> None:
        """Fetch nothing more of one partition, or fetch it again; to be called on the event loop's thread."""
        self._held = self._held | {place} if held else self._held - {place}

    def drain(self) -> None:
        """Fetch and hand out nothing more, but stay in the group."""
        self._draining.set()
        self._wake_up()

    def stop(self) -> None:
        """Leave; ``finished`` is done when the consumer is closed."""
        self._stopping.set()
        self.drain()

    def group_metadata(self) -> Any | None:
        """The group metadata for a transaction, None while this consumer is no member of its group, or may be one
        again whose listener has not heard yet what it lost.

        The member id is asked for second: had the membership been lost before the metadata was read, it would be empty,
        because only the listener's ``revoked``, which needs the loop's thread too, lets the consumer join again. A
        transaction with the metadata of no member would not be fenced. Where partitions were lost, or ``revoked`` took
        too long, the consumer does join again before; that is known before it does, so it is asked last.
        """
        with self._alive:
            if self._closing and not self._rebalancing:
                return None
            try:
                metadata = self._consumer.consumer_group_metadata()
            except RuntimeError:
                return None  # close() is leaving the group
            return metadata if self._consumer.memberid() and not self._handover.unsettled else None

    def high_watermark(self, topic: str, partition: int) -> int:
        """The partition's end as of the latest fetch; negative when nothing was fetched yet."""
        with self._alive:
            if self._closing:
                return -1
            _, high = self._consumer.get_watermark_offsets(TopicPartition(topic, partition), cached=True)
            return int(high)

    # The event loop's thread.

    def _deliver(self) -> None:
        self._delivering = False
        if self._draining.is_set():
            return
        messages = self._backlog.take(_CHUNK if self._alone else _MIXED_CHUNK)
        if not messages:
            return
        self._listener.received(messages)
        if self._sated and not self._backlog.full(self._only):
            self._wake.set()
        if len(self._backlog):
            # In the loop's next turn, so that what these messages need is done in between.
            self._delivering = True
            self._loop.call_soon(self._deliver)

    def _forget(self, places: set[Place]) -> None:
        # Who gets them back begins anew, with all there is to fetch.
        self._held -= places
        self._backlog.discard(places)

    def _fetched(self) -> None:
        if not self._delivering:
            self._deliver()

    def _finish(self, error: Exception | None) -> None:
        if self.finished.done():
            return
        if error is None:
            self.finished.set_result(None)
        elif isinstance(error, KafkaException):
            self.finished.set_exception(self._meaning(error.args[0]))
        else:
            self.finished.set_exception(error)

    # The consumer's thread.

    def _wake_up(self) -> None:
        self._wake.set()

    def _main(self) -> None:
        error: Exception | None = None
        try:
            while not self._stopping.is_set():
                self._work()
        except Exception as caught:  # noqa: BLE001 - handed over to the loop's thread
            error = caught
        try:
            self._close()
        except Exception as caught:  # noqa: BLE001 - the same
            error = error or caught
        self._loop.call_soon_threadsafe(self._finish, error)

    def _work(self) -> None:
        """Be a member until told to stop, or until only a new client can be one."""
        self._consumer.subscribe(
            self._topics, on_assign=self._on_assign, on_revoke=self._on_revoke, on_lost=self._on_lost
        )
        try:
            while not self._stopping.is_set():
                self._add_ready()
                self._steer()
                if self._missing:
                    self._look_for_missing()
                self._take_in(self._next())
                if self._brokerless >= _BROKERLESS:
                    log.warning("%s: its client has forgotten every broker; joins with a new one", self._name)
                    self._begin_anew()
                    return
        except (FencedError, KafkaException) as error:
            if not self._fenced_itself(error):
                raise
            log.warning("%s: its session timed out, and it was taken for its own rival; joins anew", self._name)
            self._begin_anew()

    def _fenced_itself(self, error: Exception) -> bool:
        """Whether it was not another process that fenced this one.

        A client whose session times out forgets its member id, and may send one more heartbeat before it joins again.
        A broker that still has the member says FENCED_INSTANCE_ID to that, which ends the client for good (librdkafka's
        issue 3437). It happens where the broker or the coordinator was away for the session's timeout. A member that
        was really fenced still has its id.
        """
        if isinstance(error, KafkaException):
            error = self._meaning(error.args[0])
        return isinstance(error, FencedError) and not self._consumer.memberid()

    def _begin_anew(self) -> None:
        """Take a new client. Where the old one could not tell what it had lost, the listener hears it here."""
        places = sorted({*self._assigned, *self._handover.restoring})
        if places:
            self._handover.give_up(self._consumer, places, lost=True)
        self._told = True
        self._close()
        self._told = False
        self._assigned.clear()
        self._paused.clear()
        self._brokerless = 0
        with self._alive:
            self._consumer = Consumer(self._settings)
            self._closing = False

    def _close(self) -> None:
        with self._alive:
            self._closing = True
        self._handover.end()
        self._consumer.close()

    def _count_brokers(self, statistics: str) -> None:
        """Notice that the client has no broker left to ask, which it does not get over (librdkafka 2.12).

        A broker that is fenced answers a look at the metadata with no broker at all; it may be the only one, and have
        been paused. The client then forgets all that it knows and begins with its bootstrap servers again. But where a
        second look was under way, the answer to that calls it off, and nobody is asked for anything ever after.
        """
        brokers = orjson.loads(statistics)["brokers"].values()
        known = any(broker["source"] in ("configured", "learned") for broker in brokers)
        self._brokerless = 0 if known else self._brokerless + 1

    def _add_ready(self) -> None:
        placed = self._handover.ready()
        if placed:
            self._consumer.incremental_assign(placed)
            self._assigned.update({(at.topic, at.partition): at for at in placed})

    def _steer(self) -> None:
        """Pause what is not to be fetched now, resume what is: all of it is decided here."""
        if self._draining.is_set():
            closed = set(self._ranks.values())
        elif self._alone:
            # Pausing throws away what the client has fetched, so a busy processor's short waits are left to its queue.
            # That won't do where messages of another rank stand behind.
            self._patient = self._patient or not self._backlog.full(self._only)
            closed = set() if self._patient else {self._only}
        else:
            closed = {rank for rank in set(self._ranks.values()) if self._backlog.full(rank)}
        wanted = {place for place in self._assigned if self._ranks[place[0]] in closed} if closed else set()
        if held := self._held:
            wanted |= held & self._assigned.keys()
        if wanted != self._paused:
            self._consumer.resume([TopicPartition(*place) for place in self._paused - wanted])
            self._consumer.pause([TopicPartition(*place) for place in wanted - self._paused])
            self._paused = wanted

    def _next(self) -> list[Message]:
        """What there is to be had, after a wait when there is nothing."""
        if self._alone and self._patient and self._backlog.full(self._only):
            self._wake.clear()
            self._sated = True
            if self._backlog.full(self._only) and not self._draining.is_set():
                self._patient = self._wake.wait(_PAUSE_AFTER_S)
            self._sated = False
            return []
        # consume() waits until it has all that it was asked for; so wait for one, then take what else is there.
        first = self._consumer.poll(
            _BUSY_POLL_S if self._paused or self._missing or self._handover.restoring else _POLL_S
        )
        messages = [] if first is None else [first, *self._consumer.consume(self._batch - 1, 0)]
        if self._taken_away:
            # One call may fetch messages and then serve the revocation of their partition.
            self._taken_away = False
            messages = [one for one in messages if one.error() or (one.topic(), one.partition()) in self._assigned]
        return messages

    def _take_in(self, messages: list[Message]) -> None:
        good = [message for message in messages if message.error() is None]
        for message in messages if len(good) < len(messages) else ():
            error = message.error()
            if error is None:
                continue
            if error.code() in _MISSING:
                self._missing.setdefault(str(message.topic()), (time.monotonic() + _MISSING_S, error))
            elif error.code() in _FATAL:
                raise self._meaning(error, message.topic() or "")
            else:
                log.warning("%s: %s", self._name, error.str())
        if good:
            self._backlog.add(good)
            self._loop.call_soon_threadsafe(self._fetched)

    def _look_for_missing(self) -> None:
        """Believe that a topic is missing when it has been for a while.

        Raises:
            MissingTopicError: it is.
        """
        now = time.monotonic()
        if now - self._looked < _LOOK_S:
            return
        self._looked = now
        try:
            # All of them: the client looks at its subscription anew only then.
            known = self._consumer.list_topics(timeout=_LOOK_S).topics
        except KafkaException:
            return  # nobody can say
        for topic, (deadline, error) in list(self._missing.items()):
            found = known.get(topic)
            if found is not None and found.error is None:
                del self._missing[topic]
            elif now > deadline:
                raise self._meaning(error)

    def _on_assign(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        # Accepted, but nothing to be fetched yet.
        consumer.incremental_assign([])
        if not self._draining.is_set():
            self._handover.begin(consumer, [(at.topic, at.partition) for at in partitions])

    def _on_revoke(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        self._give_up(consumer, partitions, lost=False)

    def _on_lost(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        self._give_up(consumer, partitions, lost=True)

    def _give_up(self, consumer: Consumer, partitions: list[TopicPartition], *, lost: bool) -> None:
        places = [(partition.topic, partition.partition) for partition in partitions]
        if self._told:
            # A client that is replaced gives up what it still has.
            self._unassign(consumer, places)
            return
        self._rebalancing = self._taken_away = True
        try:
            if lost:
                # Before the listener hears of it: until this the client sends heartbeats without a member id, for
                # which it is fenced (see _fenced_itself).
                with self._handover.telling_later():
                    try:
                        self._unassign(consumer, places)
                    finally:
                        self._handover.give_up(consumer, places, lost=True)
            else:
                self._handover.give_up(consumer, places, lost=False)
                self._unassign(consumer, places)
        finally:
            with self._alive:
                self._rebalancing = False

    def _unassign(self, consumer: Consumer, places: Sequence[Place]) -> None:
        # Those that were still being restored were never added.
        ours = [self._assigned.pop(place) for place in places if place in self._assigned]
        if paused := self._paused.intersection(places):
            consumer.resume([TopicPartition(*place) for place in paused])
            self._paused -= paused
        consumer.incremental_unassign(ours)

    def _meaning(self, error: KafkaError, topic: str = "") -> ProcessorError:
        return denied(self._name, self._settings, error, topic=topic, to="READ") or _meaning(self._name, error)


def _meaning(name: str, error: KafkaError) -> ProcessorError:
    said = f"{name}: {error.name()}: {error.str()}"
    if error.code() in (KafkaError._FENCED, KafkaError.FENCED_INSTANCE_ID) or "fenced" in error.str().lower():
        return FencedError(f"{said}; another process runs with this slot")
    if error.code() in _MISSING:
        return MissingTopicError(
            f"{said}; create the topic (if it was deleted, what it held is gone), then start again"
        )
    return ClusterError(said)
