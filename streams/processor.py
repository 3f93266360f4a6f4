"""The processor: runs one agent over its topics, each event exactly once.

In: records of the binding's topics. Out: the agent's events, its effects, its state's changes and dead letters, each
in one Kafka transaction with the offset of the input that caused it. Fetching has its own thread
(:mod:`streams.fetcher`), transactions another (:mod:`streams.committer`); decoding, handlers and bookkeeping run on
the event loop, so no lock guards them. :mod:`streams.handling` turns one event into its messages.

An event that waits for another attempt holds its lane, and nobody else. When the wait is long, the lane's events are
parked: written to the changelog, so that their offsets are finished and the next owner goes on waiting where this one
left off.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from confluent_kafka import Consumer, Message, TopicPartition

from agents.context import Ports
from schemas.codec import Codec
from streams.background import Background
from streams.binding import Binding
from streams.committer import Committer
from streams.dispatch import Worker, rank_of
from streams.fetcher import Fetcher
from streams.firing import Firing
from streams.handling import Handling
from streams.intake import Intake
from streams.kafka import consumer_settings, instance_id, transactional_ids, transactional_settings
from streams.lease import Lease
from streams.messages import Messages
from streams.ownerless import OwnerWatch
from streams.partition import Partition, Work
from streams.rights import check_rights
from streams.state import StateCodec, changelog_topic, ensure_changelogs
from streams.stats import Stats
from streams.suspects import owner_left, owner_marker
from streams.takeover import take_over
from streams.transactor import Transactor

if TYPE_CHECKING:
    from streams.tracing import Tracer

__all__ = ["Processor"]

_TICK_S: Final = 1.0
_REVOKE_S: Final = 5.0
_CANCEL_S: Final = 1.0
_MARKED_S: Final = 5.0
_CLOSE_S: Final = 5.0

log = logging.getLogger(__name__)


class Processor:
    """One instance of an agent's processor.

    ``kafka`` holds librdkafka settings (bootstrap.servers and security), ``slot`` names this instance within its group:
    no two living processes may share one, and a restarted process should have its old one
    (:class:`streams.slots.SlotLock`). ``commit_interval_s`` is the least time between two commits: 0 commits as soon
    as the last commit is through. ``drain_timeout_s`` bounds a graceful stop's wait for running handlers.
    ``cancelled`` holds the steps that are not to be run, by step_id, with the reason; its owner adds to it. ``tracer``
    gets the spans of committed steps, None where nothing is traced.
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
        cancelled: Mapping[str, str] | None = None,
        tracer: "Tracer | None" = None,
    ) -> None:
        self.binding = binding
        self.stats = Stats()
        self._codec = codec
        self._kafka = dict(kafka)
        self._slot = slot
        self._commit_interval_s = commit_interval_s
        self._drain_timeout_s = drain_timeout_s
        self._session_timeout_ms = session_timeout_ms
        self._cancelled: Mapping[str, str] = {} if cancelled is None else cancelled
        self._tracer = tracer
        agent = binding.agent
        self.name = instance_id(binding.group, slot)
        self._state_codec = None if agent.state_type is None else StateCodec(agent.state_type, codec.cipher)
        self._handling = Handling(
            binding,
            codec,
            ports or Ports(),
            self._state_codec,
            self.stats,
            lambda work: self._committer.journal(work),
            lambda partition: self._lease.hold(partition),
        )
        self._owned: dict[tuple[str, int], Partition] = {}
        self._stop = asyncio.Event()
        self._failure: BaseException | None = None
        self._joined = False
        self._fetcher: Fetcher
        self._owner_watch: OwnerWatch
        self._transactor: Transactor
        self._committer: Committer
        self._lease: Lease
        self._intake: Intake
        self._firing: Firing

    @property
    def joined(self) -> bool:
        """Whether it is a member of its group, has its partitions (maybe none) and works."""
        return self._joined and self._failure is None

    @property
    def partitions(self) -> Collection[Partition]:
        """What it owns now; to be looked at on the event loop's thread."""
        return self._owned.values()

    @property
    def workers(self) -> Collection[Worker[Work]]:
        """What runs now."""
        return self._intake.dispatcher.workers if hasattr(self, "_intake") else ()

    @property
    def restoring(self) -> Collection[tuple[str, int]]:
        """The partitions that it has been given, but whose state is still being restored."""
        return self._fetcher.restoring if hasattr(self, "_fetcher") else ()

    @property
    def trouble(self) -> str:
        """Why nothing is committed at the moment; empty while all goes well."""
        if self._failure is not None:
            return str(self._failure)
        return self._committer.trouble if hasattr(self, "_committer") else "it starts"

    def stop(self) -> None:
        """Stop gracefully: fetch nothing more, finish and commit what is in flight, leave. :meth:`run` returns then."""
        self._stop.set()

    async def run(self) -> None:
        """Work until :meth:`stop`. Cancelling it leaves at once; what is not committed is done again by the next owner.

        Raises:
            ProcessorError: it had to stop; ``retryable`` says whether a new processor may do better.
        """
        loop = asyncio.get_running_loop()
        thread = Background(f"{self.name}-commit")
        group, slot = self.binding.group, self._slot
        self._transactor = Transactor(
            *(transactional_settings(self._kafka, group, slot, each) for each in transactional_ids(group, slot))
        )
        background: list[asyncio.Task[None]] = []
        try:
            await thread.run(self._open)
            self._assemble(thread)
            background = [loop.create_task(self._committer.run()), loop.create_task(self._tick_forever())]
            background.append(loop.create_task(self._lease.keep()))
            for task in background:
                task.add_done_callback(self._task_done)
            self._fetcher.start()
            self._owner_watch.start()
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
            await self._close(thread)
        if self._failure is not None:
            raise self._failure

    async def _close(self, thread: Background) -> None:
        self._transactor.abandon()
        closed = thread.run(self._transactor.close)
        thread.close()
        done, _ = await asyncio.wait([closed], timeout=_CLOSE_S)
        if not done:
            log.warning("%s: Kafka does not answer; an open transaction is left to its timeout", self.name)

    def _open(self) -> None:
        check_rights(self.name, self._kafka, self.binding)
        if ensure_changelogs(self._kafka, self.binding.group, self.binding.topics):
            # Nobody could say who may read what was not there.
            check_rights(self.name, self._kafka, self.binding)
        self._transactor.open()

    def _assemble(self, thread: Background) -> None:
        binding = self.binding
        ranks = {rank_of(topic) for topic in binding.topics}
        self._fetcher = Fetcher(
            consumer_settings(self._kafka, binding.group, self._slot, session_timeout_ms=self._session_timeout_ms),
            binding.topics,
            self,
            max_in_flight=binding.max_in_flight,
        )
        self._fetcher.finished.add_done_callback(self._fetcher_finished)
        self._owner_watch = OwnerWatch(
            self.name,
            self._kafka,
            binding.group,
            binding.topics,
            away_topic=changelog_topic(binding.group, binding.topics[0]),
        )
        self._committer = Committer(
            self.name,
            self._transactor,
            thread,
            group=self._fetcher.group_metadata,
            settle=self._fetcher.settle,
            journal=self._handling.journal_entry,
            refused=self._handling.refused,
            room=lambda partition: self._fetcher.hold((partition.topic, partition.number), held=partition.full),
            stats=self.stats,
            interval_s=self._commit_interval_s,
            ranks=ranks,
        )
        self._lease = Lease(self._committer.add)
        self._firing = Firing(
            binding.agent,
            Messages(binding.agent, self._codec),
            lambda: self._owned.values(),
            self._committer.add,
            self.stats,
        )
        self._intake = Intake(
            self.name,
            binding,
            self._codec,
            self._handling,
            self._committer,
            self._firing,
            owned=self._owned,
            settle=self._fetcher.settle,
            cancelled=self._cancelled,
            fail=self._fail,
            stats=self.stats,
            tracer=self._tracer,
        )

    async def _drain(self) -> None:
        self._fetcher.drain()
        self._committer.hurry()
        deadline = time.monotonic() + self._drain_timeout_s
        while (left := self._unfinished()) and time.monotonic() < deadline and self._failure is None:
            await self._committer.through(0.05)
        if left:
            log.info("%s: stops with %d events unfinished; their next owner does them", self.name, left)

    def _unfinished(self) -> int:
        """Fetched events that are still to be committed, but for those that wait for another attempt."""
        held = 0
        for partition in self._owned.values():
            for lane in partition.lanes.values():
                if lane.held:
                    held += sum(work.settles for work in lane.items)
        parked = sum(1 for worker in self.workers if worker.item is not None and not worker.item.settles)
        return max(self._fetcher.in_flight - held + parked, int(self._committer.pending))

    async def _leave(self) -> None:
        self._owner_watch.stop()
        self._fetcher.stop()
        # Closing the consumer calls `revoked`, which commits what is finished.
        await asyncio.wait([self._fetcher.finished])
        self._intake.dispatcher.close()
        await self._intake.dispatcher.cancel(lambda _: True, _CANCEL_S)
        self._firing.stop()

    def _fail(self, error: BaseException) -> None:
        if self._failure is None:
            self._failure = error
            for partition in self._owned.values():
                partition.owned = False
            # What would be done from here on is another owner's.
            self._intake.dispatcher.close()
        self._stop.set()
        self._committer.wake()
        self._committer.release()

    def _task_done(self, task: "asyncio.Task[None]") -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fail(error)

    def _fetcher_finished(self, finished: "asyncio.Future[None]") -> None:
        if (error := finished.exception()) is not None:
            self._fail(error)

    # What the fetcher calls.

    def prepare(
        self, consumer: Consumer, partitions: Sequence[TopicPartition], cancelled: threading.Event
    ) -> list[Partition]:
        """Fetch committed offsets, which waits for open transactions, then restore what belongs to them."""
        if not partitions:
            return []
        started = time.monotonic()
        prepared = take_over(
            self._kafka, self.binding.group, consumer, partitions, self._state_codec, cancelled=cancelled
        )
        self.stats.restore_s = time.monotonic() - started
        return prepared

    async def assigned(self, prepared: Sequence[Partition]) -> list[TopicPartition]:
        """Own the prepared partitions; what they were restored with goes on."""
        places = []
        self.stats.assigned += len(prepared)
        for partition in prepared:
            self._owned[partition.topic, partition.number] = partition
            self._intake.suspects.suspect(partition)
            self._committer.add(owner_marker(partition))
            # 0 where nothing was committed; OFFSET_BEGINNING would be looked up first, which takes half a second.
            places.append(TopicPartition(partition.topic, partition.number, partition.tracker.first_unfinished or 0))
            if partition.deaths:
                log.warning(
                    "%s: the last owner of %s[%d] ended without a word (%d in a row); each run is counted for now",
                    *(self.name, partition.topic, partition.number, partition.deaths),
                )
        # No event should run before the log says that the partition has an owner.
        deadline = time.monotonic() + _MARKED_S
        while time.monotonic() < deadline and not self._stop.is_set():
            if not any(partition.owned and partition.uncommitted for partition in prepared):
                break
            await self._committer.through(0.1)
        for partition in prepared:
            self._intake.parking.restore(partition)
        self._firing.look()
        self._joined = True
        if places:
            log.info("%s: owns %s", self.name, ", ".join(f"{place.topic}[{place.partition}]" for place in places))
        return places

    async def revoked(self, partitions: Sequence[tuple[str, int]], *, lost: bool) -> None:
        """Give partitions up: their handlers are cancelled and, unless ``lost``, what is finished is committed."""
        leaving = [self._owned[place] for place in partitions if place in self._owned]
        if lost:
            self.stats.lost += len(leaving)
        else:
            self.stats.revoked += len(leaving)
        gone = set(map(id, leaving))
        dropped = [0, 0, 0]
        for partition in leaving:
            if lost:
                partition.owned = False
            for lane in partition.lanes.values():
                dropped[partition.rank] += sum(work.settles for work in lane.items)
                for work in lane.items:
                    self._intake.parking.left(work)
                lane.items.clear()
        running = sum(1 for worker in self.workers if worker.item and id(worker.item.partition) in gone)
        await self._intake.dispatcher.cancel(lambda work: id(work.partition) in gone, _CANCEL_S)
        if not lost:
            for partition in leaving:
                self._committer.add(owner_left(partition))
        deadline = time.monotonic() + _REVOKE_S
        while not lost and self._failure is None and time.monotonic() < deadline:
            if not any(partition.uncommitted for partition in leaving):
                break
            await self._committer.through(0.1)
        for partition in leaving:
            partition.owned = False
            del self._owned[partition.topic, partition.number]
        self._committer.wake()
        if leaving:
            log.info(
                "%s: gave up %d partitions (%d events waited, %d ran)", self.name, len(leaving), sum(dropped), running
            )
        for rank, count in enumerate(dropped):
            self._fetcher.settle(count, rank)

    def received(self, messages: Sequence[Message]) -> None:
        """Handle a batch."""
        self._intake.received(messages)

    def cancel_step(self, step_id: str, reason: str) -> None:
        """End the step, whether it runs, waits in its lane or waits for another attempt.

        What it decided is dropped, what it paid for is recorded. ``cancelled`` should have it too, for what arrives
        later.
        """
        if hasattr(self, "_intake"):
            self._intake.cancel_step(step_id, reason)

    # What is due each second.

    async def _tick_forever(self) -> None:
        """Offsets that moved without results, expired state, hung handlers, figures."""
        while True:
            await asyncio.sleep(_TICK_S)
            stats = self.stats
            stats.in_flight = self._fetcher.in_flight
            stats.parked = self._intake.parking.parked
            lag = 0
            for partition in self._owned.values():
                partition.expire_due = True
                partition.end = end = self._fetcher.high_watermark(partition.topic, partition.number)
                first = partition.tracker.first_unfinished or 0
                lag += max(0, end - first)
                self._intake.suspects.clear(partition, end)
            stats.lag = lag
            self._cancel_hung()
            self._committer.wake()

    def _cancel_hung(self) -> None:
        """A handler waits for nothing but its effects, which have a time limit; one that does is ended here."""
        limit = self._handling.hung_after_s
        if limit is None:
            return
        now = asyncio.get_running_loop().time()
        for worker in self._intake.dispatcher.workers:
            work = worker.item
            if work is None or worker.task is None or now - worker.since <= limit:
                continue
            trial = work.tried()
            if not trial.hung and now - trial.began > limit:
                trial.hung = True
                worker.cancel()
