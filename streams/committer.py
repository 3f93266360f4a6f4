"""The transaction half of a processor: what is finished, in order, one Kafka transaction after another.

In: :class:`~streams.partition.Entry` values as they finish, and works whose effects are to be journalled though they
still run. Out: transactions, each with an offset for every input partition that it touches (a journal-only one too) and
the group's metadata read before its entries are selected, so that a zombie's is fenced; and word to whoever waits.

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
from collections.abc import Callable, Collection
from functools import partial
from typing import Any, Final

from confluent_kafka import TopicPartition

from streams.background import Background
from streams.dispatch import RANKS
from streams.errors import ClusterError, RecordRejectedError, TransactionAbortedError
from streams.offsets import METADATA_LIMIT
from streams.partition import Entry, Partition, Work
from streams.stats import Stats
from streams.transactor import Outgoing, Transactor

__all__ = ["Committer"]

_MAX_MESSAGES: Final = 10_000
_MAX_BYTES: Final = 16 * 1024 * 1024
"""A transaction's bounds: it is over in a second or so, far from its timeout of ten."""
_BESIDE_OTHERS: Final = 125
"""Messages of a rank in a transaction where a more urgent one may be waiting for its end; or as many as follow."""
_BESIDE_A_SECOND: Final = 12_000
_MOST_BESIDE: Final = 2000
"""Where transactions take long, as with replicas, larger ones take hardly longer, and small ones could not keep up."""
_BEHIND_URGENT: Final = 100
"""The same where more urgent ones are in the transaction, which each of these delays; or as many as those."""
_ABORTED_BACKOFF_S: Final = 0.05
_MAX_ABORTS: Final = 100
_NEARLY_FULL: Final = METADATA_LIMIT // 2
_ROOM_AGAIN: Final = METADATA_LIMIT // 4
"""What is fetched already needs room too: 9,000 more offsets take 1,500 bytes at most."""

log = logging.getLogger(__name__)


class Committer:
    """Commits what is added to it, until it is cancelled.

    ``group`` gives the consumer group's metadata, None while there is no membership; ``settle(count, rank)`` gives
    fetched messages back; ``journal(work)`` makes the entry for a running work's new effects, if it has any;
    ``refused(entry, index, error)`` mends an entry with a message that the broker will never take.
    ``room(partition)`` is told when a partition's finished-offset map is nearly full, and when it no longer is.
    ``ranks`` are those of the partitions: where there are several, an urgent result waits for no large transaction.
    """

    def __init__(
        self,
        name: str,
        transactor: Transactor,
        thread: Background,
        *,
        group: Callable[[], Any | None],
        settle: Callable[[int, int], None],
        journal: Callable[[Work], Entry | None],
        refused: Callable[[Entry, int, str], None],
        room: Callable[[Partition], None],
        stats: Stats,
        interval_s: float,
        ranks: Collection[int] = RANKS,
    ) -> None:
        self._name = name
        self._transactor = transactor
        self._thread = thread
        self._group = group
        self._settle = settle
        self._journal = journal
        self._refused = refused
        self._room = room
        self._stats = stats
        self._interval_s = interval_s
        # By rank: only within a partition does the order matter, and a partition has one rank.
        self._finished: tuple[deque[Entry], ...] = (deque(), deque(), deque())
        self._most_urgent = min(ranks, default=0)
        self._takes_s = 0.0
        self._selected: list[Entry] = []
        self._journalling: list[Work] = []
        self._wake = asyncio.Event()
        self._through = asyncio.Event()
        self._hurry = False
        self._diagnose = False
        self._aborts = 0
        self.trouble = ""
        """Why nothing is committed at the moment; empty while all goes well."""

    @property
    def pending(self) -> bool:
        """Whether anything waits for its commit."""
        return bool(any(self._finished) or self._selected or self._journalling)

    def add(self, entry: Entry) -> None:
        """Commit ``entry`` after all that was added before."""
        partition = entry.partition
        partition.uncommitted += 1
        self._finished[partition.rank].append(entry)
        if not self._wake.is_set():
            self._wake.set()

    def journal(self, work: Work) -> None:
        """Commit the new effects of ``work`` with the next transaction, unless it finishes before."""
        self._journalling.append(work)
        self._wake.set()

    def wake(self) -> None:
        """Look whether something is to be done."""
        self._wake.set()

    def hurry(self) -> None:
        """Wait no longer between commits: the processor stops."""
        self._hurry = True
        self._wake.set()

    async def through(self, timeout_s: float) -> None:
        """Wait until the next transaction is through, or ``timeout_s`` seconds."""
        self._through.clear()
        self._wake.set()
        try:
            async with asyncio.timeout(timeout_s):
                await self._through.wait()
        except TimeoutError:
            pass

    def release(self) -> None:
        """Let those who wait in :meth:`through` go on."""
        self._through.set()

    async def run(self) -> None:
        """Commit for ever.

        Raises:
            ProcessorError: it can't go on.
        """
        last = 0.0
        while True:
            await self._wake.wait()
            wait = self._interval_s - (time.monotonic() - last)
            if wait > 0 and not self._hurry:
                await asyncio.sleep(wait)
            self._wake.clear()
            last = started = time.monotonic()
            # Read before results are selected: were the membership lost in between, the transaction would be fenced.
            group = self._group()
            if group is None:
                self._drop_disowned()
                if self.pending:
                    self.trouble = "the group has not let it in again"
                    await asyncio.sleep(_ABORTED_BACKOFF_S)
                    self._wake.set()
                continue
            messages, offsets = self._select()
            if offsets:
                try:
                    commit = partial(self._transactor.commit, messages, offsets, group, diagnose=self._diagnose)
                    await self._thread.run(commit)
                except TransactionAbortedError as error:
                    await self._aborted(error)
                    continue
                except RecordRejectedError as error:
                    self._rejected(error)
                    continue
                self._done(time.monotonic() - started)
            self._through.set()
            if offsets and (any(self._finished) or self._journalling):
                self._wake.set()

    def _select(self) -> tuple[list[Outgoing], list[TopicPartition]]:
        """The messages and offsets of the next transaction; their entries are in ``_selected``."""
        again = bool(self._selected)
        selected = self._selected = [entry for entry in self._selected if self._kept(entry)]
        messages: list[Outgoing] = []
        done: dict[Partition, list[int]] = {}
        if again and selected:
            for entry in selected:  # of an aborted transaction; their offsets are out of the trackers already
                messages += entry.messages
                done.setdefault(entry.partition, [])
        else:
            if self._journalling:
                self._add_journals()
            self._take(selected, messages, done)
        places = []
        held_back = False
        for partition, offsets in done.items():
            checkpoint = partition.tracker.checkpoint(offsets)
            if checkpoint is None:
                continue
            if checkpoint.cutoff is not None:
                held_back |= self._hold_back(partition, checkpoint.cutoff)
            self._watch_room(partition, len(checkpoint.metadata))
            places.append(TopicPartition(partition.topic, partition.number, checkpoint.offset, checkpoint.metadata))
        if held_back:
            messages = [message for entry in self._selected for message in entry.messages]
        return messages, places if self._selected else []

    def _take(self, selected: list[Entry], messages: list[Outgoing], done: dict[Partition, list[int]]) -> None:
        """Take what is finished, the most urgent first; where ranks are mixed, of each only so much."""
        beside = min(_MOST_BESIDE, max(_BESIDE_OTHERS, int(self._takes_s * _BESIDE_A_SECOND)))
        for rank, finished in enumerate(self._finished):
            most = _MAX_MESSAGES if rank == self._most_urgent else beside
            if messages:
                most = min(most, max(len(messages), _BEHIND_URGENT))
            size, most = 0, len(messages) + most
            while finished and len(messages) < most and size < _MAX_BYTES:
                entry = finished.popleft()
                partition = entry.partition
                if not partition.owned:
                    self._settle(entry.settles, partition.rank)
                    continue
                selected.append(entry)
                if entry.messages:
                    messages += entry.messages
                    size += entry.bytes
                offsets = done.get(partition)
                if offsets is None:
                    offsets = done[partition] = []
                if entry.offset >= 0:
                    offsets.append(entry.offset)

    def _add_journals(self) -> None:
        """Effects of steps that still run; those of finished ones are among their messages."""
        works, self._journalling = self._journalling, []
        for work in works:
            if work.partition.owned and (entry := self._journal(work)) is not None:
                self.add(entry)

    def _hold_back(self, partition: Partition, cutoff: int) -> bool:
        """Put back what the finished-offset map has no room for, and what is about later events. That keeps the order
        within a lane, whose events follow one another.
        """
        back = [entry for entry in self._selected if entry.partition is partition and entry.order >= cutoff]
        if back:
            held = set(map(id, back))
            self._selected = [entry for entry in self._selected if id(entry) not in held]
            self._finished[partition.rank].extendleft(reversed(back))
        return bool(back)

    def _watch_room(self, partition: Partition, used: int) -> None:
        # An earlier owner may have left the map full. What makes room again has then to be fetched first.
        full = used > (_ROOM_AGAIN if partition.full else _NEARLY_FULL) and not partition.tracker.refetching
        if full is not partition.full:
            partition.full = full
            self._room(partition)

    def _kept(self, entry: Entry) -> bool:
        if entry.partition.owned:
            return True
        self._settle(entry.settles, entry.partition.rank)
        return False

    def _drop_disowned(self) -> None:
        self._selected = [entry for entry in self._selected if self._kept(entry)]
        for finished in self._finished:
            kept = [entry for entry in finished if self._kept(entry)]
            finished.clear()
            finished.extend(kept)
        self._journalling = [work for work in self._journalling if work.partition.owned]

    def _done(self, took_s: float) -> None:
        stats = self._stats
        selected, self._selected = self._selected, []
        now = time.monotonic()
        settled = [0, 0, 0]
        events = outputs = dead = 0
        for entry in selected:
            partition = entry.partition
            partition.uncommitted -= 1
            settled[partition.rank] += entry.settles
            if entry.committed is not None:
                entry.committed()
            if type(entry) is Work and entry.outputs >= 0:
                events += 1
                outputs += entry.outputs
                dead += entry.dead
        stats.events_in += events
        stats.events_out += outputs
        stats.dead_letters += dead
        stats.latencies.extend(
            now - entry.since for entry in selected[:: 1 + len(selected) // 64] if isinstance(entry, Work)
        )
        stats.commit_latencies.append(took_s)
        self._takes_s += (took_s - self._takes_s) / 8
        stats.transactions += 1
        self._diagnose = False
        self._aborts = 0
        self.trouble = ""
        for rank, count in enumerate(settled):
            if count:
                self._settle(count, rank)

    async def _aborted(self, error: TransactionAbortedError) -> None:
        """The same results go into the next transaction, those excepted whose partition is gone by then."""
        self._stats.aborted += 1
        self._aborts += 1
        # A rebalance moves on by itself; if it is a message, the second try finds out which.
        self._diagnose = self._aborts > 1
        self.trouble = f"{self._aborts} transactions in a row were aborted: {error}"
        log.info("%s: %s; trying again", self._name, error)
        if self._aborts > _MAX_ABORTS:
            raise ClusterError(f"{self._name}: {self.trouble}")
        await asyncio.sleep(min(1.0, _ABORTED_BACKOFF_S * self._aborts))
        self._wake.set()

    def _rejected(self, error: RecordRejectedError) -> None:
        """One message can't be had by the broker: its event fails, and the rest is committed without it."""
        at = error.index
        for entry in self._selected:
            if at < len(entry.messages):
                log.warning("%s: %s refuses an output: %s", self._name, entry.messages[at][0], error)
                self._refused(entry, at, str(error))
                break
            at -= len(entry.messages)
        self._wake.set()
