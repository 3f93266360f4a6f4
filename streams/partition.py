"""What a processor holds for one input partition, for one event of it in flight, and for what is to be committed.

In: a partition's place, its committed offset and what was restored. Out: plain data; the processor does the work.
"""

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Final
from uuid import uuid4

from agents.journal import Journal
from schemas.events import Priority
from schemas.metadata import Envelope
from schemas.record import Record
from schemas.topics import priority_of
from streams.changelog import Restored
from streams.dispatch import Lane, rank_of
from streams.offsets import OffsetTracker
from streams.state import StateStore
from streams.timers import Timers
from streams.transactor import Outgoing

if TYPE_CHECKING:
    from streams.tracing import StepTrace

__all__ = ["AFTER_ALL", "LIFE", "NO_RECORD", "Entry", "Partition", "Trial", "Work"]

AFTER_ALL: Final = 2**62
"""The ``order`` of an entry that follows whatever else its partition has to commit."""
NO_RECORD: Final = Record("", -1, -1, 0, None, None)
"""The record of a work that is finished."""
LIFE: Final = uuid4().hex
"""Names this life of the process. A partition that it lost and gets back had no owner that died in between."""


class Partition:
    """An owned partition. When ``owned`` turns false nothing of it may be committed any more."""

    __slots__ = (
        "changelog",
        "deaths",
        "effects",
        "end",
        "expire_due",
        "few",
        "full",
        "lanes",
        "leased",
        "number",
        "owned",
        "parked",
        "priority",
        "rank",
        "runs",
        "state",
        "suspect_until",
        "timers",
        "topic",
        "tracker",
        "uncommitted",
    )

    def __init__(
        self,
        topic: str,
        number: int,
        tracker: OffsetTracker,
        state: StateStore,
        changelog: str,
        restored: Restored,
    ) -> None:
        self.topic = topic
        self.number = number
        self.priority: Priority = priority_of(topic)
        self.rank = rank_of(topic)
        self.tracker = tracker
        self.state = state
        self.changelog = changelog
        self.effects = restored.effects
        """Effects that an earlier owner journalled, by the id of the event whose handling is not finished."""
        self.timers = Timers(restored.timers)
        self.parked = restored.parked
        """Events that an earlier owner parked, until they are back in their lanes."""
        mine = restored.life == LIFE
        self.runs = _before_this_life(restored.runs) if mine else restored.runs
        """How often an event was running when its process ended, by offset."""
        self.deaths = 0 if restored.deaths is None else restored.deaths + (not mine)
        """How many owners in a row ended without giving the partition up."""
        self.suspect_until = 0
        """Events before this offset may have been what ended the last owner; each run of theirs is counted first."""
        self.lanes: dict[str, Lane[Work]] = {}
        self.owned = True
        self.uncommitted = 0
        """Entries that wait for their commit, those of the transaction under way included."""
        self.end = -1
        """Where the input partition ended as of its last fetch, looked at once a second; -1: not fetched yet."""
        self.expire_due = False
        """The next event looks for expired state and carries its tombstones."""
        self.leased = -1
        """After how many pauses of the process it was last known to be owned (streams.lease)."""
        self.few: asyncio.Semaphore | None = None
        """Lets few of the events run at once that were running when a process ended (streams.suspects)."""
        self.full = False
        """The finished-offset map has little room left; nothing more is fetched until it has."""


class Entry:
    """Something to commit: messages to produce, their size in bytes, and the input ``offset`` that is finished with
    them, -1 for none.

    ``order`` is the offset of the event that it is about: what is held back for want of room in the finished-offset map
    takes everything about later events with it. ``settles`` counts the fetched messages that are done with.
    ``committed`` is called when the transaction is through.
    """

    __slots__ = ("bytes", "committed", "messages", "offset", "order", "partition", "settles")

    def __init__(
        self,
        partition: Partition,
        messages: list[Outgoing],
        *,
        offset: int = -1,
        order: int = AFTER_ALL,
        settles: int = 0,
        committed: Callable[[], None] | None = None,
    ) -> None:
        self.partition = partition
        self.messages = messages
        self.bytes = sum(len(message[2] or b"") for message in messages)
        self.offset = offset
        self.order = order
        self.settles = settles
        self.committed = committed


class Trial:
    """What is known of a work that most works never need: attempts, journalled effects, why it is to end."""

    __slots__ = (
        "attempt",
        "began",
        "cancelled",
        "due",
        "durable",
        "hung",
        "journalled",
        "listed",
        "parked",
        "restored",
        "unrecordable",
        "waiters",
    )

    def __init__(self) -> None:
        self.attempt = 1
        self.parked = False
        """The changelog holds the event, and its offset is finished."""
        self.cancelled: str | None = None
        """Why a StepCancelRequested ends it."""
        self.hung = False
        self.began = 0.0
        """When its run began (event loop time), if later than its worker took it; infinite while it waits its turn."""
        self.due = 0.0
        """When it is to run again (seconds since the epoch); 0 when nobody has said so."""
        self.restored: tuple[int, ...] = ()
        """Sequence numbers of the effects that an earlier owner journalled."""
        self.journalled = 0
        """How many of the journal's performed effects have been given to the commit while the step ran."""
        self.durable = 0
        """How many of them are committed."""
        self.listed = False
        """It is among the works whose effects the next commit looks for."""
        self.unrecordable = False
        """An effect of it is too large to be recorded, which fails it when it finishes."""
        self.waiters: list[tuple[int, asyncio.Future[None]]] = []
        """Who waits until so many effects are committed."""


class Work(Entry):
    """One event in flight, and when it is finished what it leaves.

    What it was made from is forgotten then: thousands wait for their commit, and an event is dozens of objects.
    ``outputs`` is -1 until it is finished, and stays so if it is another agent's.
    """

    __slots__ = (
        "dead",
        "envelope",
        "journal",
        "key",
        "lane",
        "outputs",
        "record",
        "since",
        "timestamp_ms",
        "trace",
        "trial",
    )

    def __init__(self, partition: Partition, record: Record, since: float) -> None:
        self.partition = partition
        self.record = record
        self.key = record.key
        self.timestamp_ms = record.timestamp_ms
        self.offset = self.order = record.offset
        self.since = since
        self.settles = 1
        self.envelope: Envelope | None = None
        self.lane = ""
        self.messages = []
        self.bytes = 0
        self.outputs = -1
        self.dead = False
        self.committed = None
        self.journal: Journal | None = None
        """While it runs, or waits for another attempt."""
        self.trial: Trial | None = None
        self.trace: StepTrace | None = None
        """Where its trace is recorded."""

    def tried(self) -> Trial:
        """Its :class:`Trial`, made when it is first asked for."""
        if self.trial is None:
            self.trial = Trial()
        return self.trial


def _before_this_life(runs: dict[int, int]) -> dict[int, int]:
    """Counts without the run that was counted last, which did not end this process. All keep their place: what lies in
    the changelog is to be deleted when the event finishes.
    """
    return {offset: max(count - 1, 0) for offset, count in runs.items()}
