"""The processor: runs one agent over its topics, each event exactly once.

In: records of the binding's topics. Out: the agent's events, its effects, its state's changes and dead letters, each
in one Kafka transaction with the offset of the input that caused it. Fetching has its own thread
(:mod:`streams.fetcher`), transactions another (:mod:`streams.transactor`); decoding, handlers and bookkeeping run on
the event loop, so no lock guards them. :mod:`streams.handling` turns one event into its messages.

Why results may be seen before they are committed: a lane's next event reads the state that the last one left in
memory, though its transaction may still be open or abort. Results are committed in the order in which they finished,
in one transaction after another, so a transaction that holds the later event holds the earlier one too or follows it.
An aborted transaction is made again from the same results; if that can't be (the partition was revoked, the producer
fenced), every later result of the partition is dropped together with its state, and the next owner starts from what
was committed.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Final

from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaException, Message, TopicPartition

from agents.context import Ports
from schemas.codec import Codec
from schemas.errors import RegistryError
from schemas.record import Record
from streams.binding import Binding
from streams.dispatch import Dispatcher, Lane
from streams.errors import (
    ClusterError,
    RecordRejectedError,
    StateError,
    TransactionAbortedError,
)
from streams.fetcher import Fetcher
from streams.handling import Handling
from streams.kafka import consumer_settings, instance_id, transactional_settings
from streams.offsets import OffsetTracker
from streams.partition import Partition, Work
from streams.state import StateCodec, StateStore, changelog_topic, ensure_changelogs, restore
from streams.stats import Stats
from streams.transactor import Outgoing, Transactor

__all__ = ["Processor"]

_MAX_MESSAGES: Final = 10_000
_MAX_BYTES: Final = 16 * 1024 * 1024
"""A transaction's bounds: it is over in a second or so, far from its timeout of ten."""
_TICK_S: Final = 1.0
_REVOKE_S: Final = 5.0
_RESTORE_S: Final = 120.0
_COMMITTED_S: Final = 60.0
_ABORTED_BACKOFF_S: Final = 0.05
_MAX_ABORTS: Final = 100

log = logging.getLogger(__name__)


class Processor:
    """One instance of an agent's processor.

    ``kafka`` holds librdkafka settings (bootstrap.servers and security), ``slot`` names this instance within its group:
    no two living processes may share one, and a restarted process should have its old one
    (:class:`streams.runner.SlotLock`). ``commit_interval_s`` is the least time between two commits: 0 commits as soon
    as the last commit is through. ``drain_timeout_s`` bounds a graceful stop's wait for running handlers.
    """

    def __init__(
        self,
        binding: Binding,
        *,
        codec: Codec,
        kafka: Mapping[str, Any],
        ports: Ports | None = None,
        slot: int | str = 0,
        commit_interval_s: float = 0.0,
        drain_timeout_s: float = 10.0,
        session_timeout_ms: int = 10_000,
    ) -> None:
        self.binding = binding
        self.stats = Stats()
        self._codec = codec
        self._kafka = dict(kafka)
        self._slot = slot
        self._commit_interval_s = commit_interval_s
        self._drain_timeout_s = drain_timeout_s
        self._session_timeout_ms = session_timeout_ms
        agent = binding.agent
        self.name = instance_id(binding.group, slot)
        self._consumes = frozenset(agent.consumes)
        self._state_codec = None if agent.state_type is None else StateCodec(agent.state_type)
        self._handling = Handling(binding, codec, ports or Ports(), self._state_codec, self.stats)
        self._partitions: dict[tuple[str, int], Partition] = {}
        self._finished: deque[Work] = deque()
        self._selected: list[Work] = []
        self._stop = asyncio.Event()
        self._wake = asyncio.Event()
        self._committed = asyncio.Event()
        self._failure: BaseException | None = None
        self._diagnose = False
        self._aborts = 0
        self._joined = False
        self._fetcher: Fetcher
        self._dispatcher: Dispatcher[Work]
        self._transactor: Transactor

    @property
    def joined(self) -> bool:
        """Whether it is a member of its group, has its partitions (maybe none) and works."""
        return self._joined and self._failure is None

    def stop(self) -> None:
        """Stop gracefully: fetch nothing more, finish and commit what is in flight, leave. :meth:`run` returns then."""
        self._stop.set()

    async def run(self) -> None:
        """Work until :meth:`stop`. Cancelling it leaves at once; what is not committed is done again by the next owner.

        Raises:
            ProcessorError: it had to stop; ``retryable`` says whether a new processor may do better.
        """
        loop = asyncio.get_running_loop()
        threads = ThreadPoolExecutor(1, f"{self.name}-commit")
        self._transactor = Transactor(transactional_settings(self._kafka, self.binding.group, self._slot))
        background: list[asyncio.Task[None]] = []
        try:
            await loop.run_in_executor(threads, self._open)
            self._dispatcher = Dispatcher(
                self._handle, concurrency=self.binding.concurrency, idle=_lane_idle, failed=self._fail
            )
            self._fetcher = Fetcher(
                consumer_settings(
                    self._kafka, self.binding.group, self._slot, session_timeout_ms=self._session_timeout_ms
                ),
                self.binding.topics,
                self,
                max_in_flight=self.binding.max_in_flight,
            )
            self._fetcher.finished.add_done_callback(self._fetcher_finished)
            self._fetcher.start()
            background = [loop.create_task(self._commit_forever(threads)), loop.create_task(self._tick_forever())]
            for task in background:
                task.add_done_callback(self._task_done)
            try:
                await self._stop.wait()
                if self._failure is None:
                    await self._drain()
            finally:
                await self._leave()
        finally:
            for task in background:
                task.cancel()
            await asyncio.gather(*background, return_exceptions=True)
            await loop.run_in_executor(threads, self._transactor.close)
            threads.shutdown(wait=False)
        if self._failure is not None:
            raise self._failure

    def _open(self) -> None:
        binding = self.binding
        ensure_changelogs(self._kafka, binding.group, binding.topics, stateful=binding.stateful)
        self._transactor.open()

    async def _drain(self) -> None:
        self._fetcher.drain()
        deadline = time.monotonic() + self._drain_timeout_s
        while self._fetcher.in_flight and time.monotonic() < deadline and self._failure is None:
            self._committed.clear()
            self._wake.set()
            await _wait(self._committed, 0.05)
        if self._fetcher.in_flight:
            log.info(
                "%s: stops with %d events unfinished; their next owner does them", self.name, self._fetcher.in_flight
            )

    async def _leave(self) -> None:
        self._fetcher.stop()
        # Closing the consumer calls `revoked`, which commits what is finished.
        await asyncio.wait([self._fetcher.finished])
        await self._dispatcher.cancel(lambda _: True, 1.0)

    def _fail(self, error: BaseException) -> None:
        if self._failure is None:
            self._failure = error
            for partition in self._partitions.values():
                partition.owned = False
        self._stop.set()
        self._wake.set()
        self._committed.set()

    def _task_done(self, task: "asyncio.Task[None]") -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fail(error)

    def _fetcher_finished(self, finished: "asyncio.Future[None]") -> None:
        if (error := finished.exception()) is not None:
            self._fail(error)

    # What the fetcher calls.

    def prepare(self, consumer: Consumer, partitions: Sequence[TopicPartition]) -> list[Partition]:
        """Fetch committed offsets, which waits for open transactions, then restore the state that belongs to them."""
        if not partitions:
            return []
        group = self.binding.group
        try:
            committed = consumer.committed(list(partitions), timeout=_COMMITTED_S)
        except KafkaException as error:
            raise ClusterError(f"{self.name}: committed offsets can't be had: {error.args[0].str()}") from error
        for place in committed:
            if place.error is not None:
                raise ClusterError(f"{self.name}: {place.topic}[{place.partition}]: {place.error.str()}")
        states: dict[tuple[str, int], Any] = {}
        if self._state_codec is not None:
            changelogs = [(changelog_topic(group, place.topic), place.partition) for place in committed]
            states = restore(self._kafka, changelogs, self._state_codec, timeout_s=_RESTORE_S)
        prepared = []
        for place in committed:
            changelog = changelog_topic(group, place.topic)
            state = states.get((changelog, place.partition), {})
            offset = place.offset if place.offset >= 0 else None
            if offset is None and state:
                raise StateError(
                    f"{changelog}[{place.partition}] holds {len(state)} lanes, but group {group} has no offset for "
                    f"{place.topic}[{place.partition}]; it was lost. Set it again, or delete the changelog"
                )
            tracker = OffsetTracker(offset, (place.metadata or "") if offset is not None else "")
            prepared.append(Partition(place.topic, place.partition, tracker, StateStore(state), changelog))
        return prepared

    async def assigned(self, prepared: Sequence[Partition]) -> list[TopicPartition]:
        """Own the prepared partitions."""
        self._joined = True
        places = []
        for partition in prepared:
            self._partitions[partition.topic, partition.number] = partition
            checkpoint = partition.tracker.checkpoint(())
            offset = OFFSET_BEGINNING if checkpoint is None else checkpoint.offset
            places.append(TopicPartition(partition.topic, partition.number, offset))
        if places:
            log.info("%s: owns %s", self.name, ", ".join(f"{place.topic}[{place.partition}]" for place in places))
        return places

    async def revoked(self, partitions: Sequence[tuple[str, int]], *, lost: bool) -> None:
        """Give partitions up: their handlers are cancelled and, unless ``lost``, what is finished is committed."""
        leaving = [self._partitions[place] for place in partitions if place in self._partitions]
        gone = set(map(id, leaving))
        dropped = 0
        for partition in leaving:
            if lost:
                partition.owned = False
            for lane in partition.lanes.values():
                dropped += len(lane.items)
                lane.items.clear()
        running = sum(1 for worker in self._dispatcher.workers if worker.item and id(worker.item.partition) in gone)
        await self._dispatcher.cancel(lambda work: id(work.partition) in gone, 1.0)
        deadline = time.monotonic() + _REVOKE_S
        while not lost and self._failure is None and time.monotonic() < deadline:
            if not any(partition.uncommitted for partition in leaving):
                break
            self._committed.clear()
            self._wake.set()
            await _wait(self._committed, 0.1)
        for partition in leaving:
            partition.owned = False
            del self._partitions[partition.topic, partition.number]
        self._wake.set()
        if leaving:
            log.info("%s: gave up %d partitions (%d events waited, %d ran)", self.name, len(leaving), dropped, running)
        self._fetcher.settle(dropped)

    def received(self, messages: Sequence[Message]) -> None:
        """Decode a batch and put each event into its lane."""
        now = time.monotonic()
        partitions, decode, consumes = self._partitions, self._codec.decode, self._consumes
        lane_of, submit = self.binding.agent.lane, self._dispatcher.submit
        settled = 0
        for message in messages:
            topic, number, offset = message.topic(), message.partition(), message.offset()
            partition = partitions.get((topic, number))
            if partition is None or not partition.tracker.begin(offset):
                settled += 1
                continue
            timestamp = message.timestamp()[1]
            record = Record(topic, number, offset, timestamp, message.key(), message.value(), message.headers() or ())
            work = Work(partition, record, now)
            try:
                envelope = decode(record)
                event = envelope.event
                if type(event) not in consumes:
                    # Another agent's: several types share a topic. Its offset goes with the next commit.
                    self.stats.skipped += 1
                    self._finish(work)
                    continue
                work.lane = key = lane_of(event)
                work.envelope = envelope
            except RegistryError as error:
                # Nobody can say what the bytes mean now; going on would change the order of their lane.
                self._fail(ClusterError(f"{self.name}: {topic}[{number}]@{offset}: {error}"))
                return
            except Exception as error:  # noqa: BLE001 - hostile bytes, or an agent that can't tell the lane
                self._handling.unreadable(work, error)
                self._finish(work)
                continue
            lane = partition.lanes.get(key)
            if lane is None:
                lane = partition.lanes[key] = Lane(key)
            submit(lane, work)
        if settled:
            self._fetcher.settle(settled)

    # Handlers.

    async def _handle(self, work: Work) -> None:
        try:
            await self._handling.handle(work)
        except asyncio.CancelledError:
            # Only a revoked partition's handlers are cancelled: the event is its next owner's.
            self._fetcher.settle(1)
            raise
        self._finish(work)

    def _finish(self, work: Work) -> None:
        work.partition.uncommitted += 1
        self._finished.append(work)
        if not self._wake.is_set():
            self._wake.set()

    # Transactions.

    async def _commit_forever(self, threads: ThreadPoolExecutor) -> None:
        loop = asyncio.get_running_loop()
        last = 0.0
        while True:
            await self._wake.wait()
            wait = self._commit_interval_s - (time.monotonic() - last)
            if wait > 0 and not self._stop.is_set():
                await asyncio.sleep(wait)
            self._wake.clear()
            last = started = time.monotonic()
            # Read before results are selected: were the membership lost in between, the transaction would be fenced.
            group = self._fetcher.group_metadata()
            if group is None:
                if self._finished or self._selected:
                    await asyncio.sleep(_ABORTED_BACKOFF_S)
                    self._drop_disowned()
                    self._wake.set()
                continue
            messages, offsets = self._select()
            if offsets:
                try:
                    commit = partial(self._transactor.commit, messages, offsets, group, diagnose=self._diagnose)
                    await loop.run_in_executor(threads, commit)
                except TransactionAbortedError as error:
                    await self._aborted(error)
                    continue
                except RecordRejectedError as error:
                    await self._rejected(error)
                    continue
                self._done(time.monotonic() - started)
            self._committed.set()
            if self._finished and offsets:
                self._wake.set()

    def _select(self) -> tuple[list[Outgoing], list[TopicPartition]]:
        """The messages and offsets of the next transaction; their works are in ``_selected``."""
        selected = [work for work in self._selected if self._kept(work)]
        self._selected = selected
        messages: list[Outgoing] = []
        done: dict[Partition, list[int]] = {}
        for work in selected:  # of an aborted transaction; their offsets are out of the trackers already
            messages += work.messages
            done.setdefault(work.partition, [])
        size = sum(work.bytes for work in selected)
        finished = self._finished
        taken = len(selected)
        if not taken:
            while finished and len(messages) < _MAX_MESSAGES and size < _MAX_BYTES:
                work = finished.popleft()
                if not self._kept(work):
                    continue
                selected.append(work)
                if work.messages:
                    messages += work.messages
                    size += work.bytes
                offsets = done.get(work.partition)
                if offsets is None:
                    done[work.partition] = [work.offset]
                else:
                    offsets.append(work.offset)
        places = []
        held_back = False
        for partition, offsets in done.items():
            checkpoint = partition.tracker.checkpoint(offsets)
            if checkpoint is None:
                continue
            if checkpoint.cutoff is not None:
                held_back |= self._hold_back(partition, checkpoint.cutoff)
            places.append(TopicPartition(partition.topic, partition.number, checkpoint.offset, checkpoint.metadata))
        if held_back:
            messages = [message for work in self._selected for message in work.messages]
        return messages, places if self._selected else []

    def _hold_back(self, partition: Partition, cutoff: int) -> bool:
        """Put results back that the finished-offset map has no room for. Within a lane that keeps the order."""
        back = [work for work in self._selected if work.partition is partition and work.offset >= cutoff]
        if back:
            held = set(map(id, back))
            self._selected = [work for work in self._selected if id(work) not in held]
            self._finished.extendleft(reversed(back))
        return bool(back)

    def _kept(self, work: Work) -> bool:
        if work.partition.owned:
            return True
        self._fetcher.settle(1)
        return False

    def _drop_disowned(self) -> None:
        self._selected = [work for work in self._selected if self._kept(work)]
        self._finished = deque(work for work in self._finished if self._kept(work))

    def _done(self, took_s: float) -> None:
        stats = self.stats
        selected, self._selected = self._selected, []
        now = time.monotonic()
        for work in selected:
            work.partition.uncommitted -= 1
            if work.envelope is None and not work.dead:
                continue
            stats.events_in += 1
            stats.events_out += work.outputs
            stats.dead_letters += work.dead
        stats.latencies.extend(now - work.since for work in selected[:: 1 + len(selected) // 64])
        stats.commit_latencies.append(took_s)
        stats.transactions += 1
        self._diagnose = False
        self._aborts = 0
        self._fetcher.settle(len(selected))

    async def _aborted(self, error: TransactionAbortedError) -> None:
        """The same results go into the next transaction, those excepted whose partition is gone by then."""
        self.stats.aborted += 1
        self._aborts += 1
        # A rebalance moves on by itself; if it is a message, the second try finds out which.
        self._diagnose = self._aborts > 1
        log.info("%s: %s; trying again", self.name, error)
        if self._aborts > _MAX_ABORTS:
            raise ClusterError(f"{self.name}: {self._aborts} transactions in a row were aborted: {error}")
        await asyncio.sleep(min(1.0, _ABORTED_BACKOFF_S * self._aborts))
        self._wake.set()

    async def _rejected(self, error: RecordRejectedError) -> None:
        """One message can't be had by the broker: its event fails, and the rest is committed without it."""
        at = error.index
        for work in self._selected:
            if at < len(work.messages):
                log.warning("%s: %s refuses an output: %s", self.name, work.messages[at][0], error)
                self._handling.rejected(work, at, str(error))
                break
            at -= len(work.messages)
        self._wake.set()

    async def _tick_forever(self) -> None:
        """What is due each second: offsets that moved without results, expired state, hung handlers, figures."""
        while True:
            await asyncio.sleep(_TICK_S)
            stats, partitions = self.stats, self._partitions.values()
            stats.in_flight = self._fetcher.in_flight
            for partition in partitions:
                partition.expire_due = True
            stats.lag = self._lag()
            self._cancel_hung()
            self._wake.set()

    def _lag(self) -> int:
        lag = 0
        for partition in self._partitions.values():
            high = self._fetcher.high_watermark(partition.topic, partition.number)
            first = partition.tracker.first_unfinished
            if first is not None and high > first:
                lag += high - first
        return lag

    def _cancel_hung(self) -> None:
        """A handler waits for nothing but its effects, which have a time limit; one that does is ended here."""
        limit = self._handling.hung_after_s
        if limit is None:
            return
        now = asyncio.get_running_loop().time()
        for worker in self._dispatcher.workers:
            if (
                worker.item is not None
                and worker.task is not None
                and now - worker.since > limit
                and not worker.item.hung
            ):
                worker.item.hung = True
                worker.task.cancel()


def _lane_idle(lane: Lane[Work], work: Work) -> None:
    work.partition.lanes.pop(lane.key, None)


async def _wait(event: asyncio.Event, timeout_s: float) -> None:
    try:
        async with asyncio.timeout(timeout_s):
            await event.wait()
    except TimeoutError:
        pass
