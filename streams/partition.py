"""What a processor holds for one input partition, and for one event of it that is in flight.

In: a partition's place, its committed offset and its restored state. Out: plain data; the processor does the work.
"""

from schemas.events import Priority
from schemas.metadata import Envelope
from schemas.record import Record
from schemas.topics import priority_of
from streams.dispatch import Lane
from streams.offsets import OffsetTracker
from streams.state import StateStore
from streams.transactor import Outgoing

__all__ = ["Partition", "Work"]


class Partition:
    """An owned partition. When ``owned`` turns false nothing of it may be committed any more."""

    __slots__ = (
        "changelog",
        "expire_due",
        "lanes",
        "number",
        "owned",
        "priority",
        "state",
        "topic",
        "tracker",
        "uncommitted",
    )

    def __init__(self, topic: str, number: int, tracker: OffsetTracker, state: StateStore, changelog: str) -> None:
        self.topic = topic
        self.number = number
        self.priority: Priority = priority_of(topic)
        self.tracker = tracker
        self.state = state
        self.changelog = changelog
        self.lanes: dict[str, Lane[Work]] = {}
        self.owned = True
        self.uncommitted = 0
        """Finished events that wait for their commit, those of the transaction under way included."""
        self.expire_due = False
        """The next event looks for expired state and carries its tombstones."""


class Work:
    """One event in flight, and when it is finished what it leaves: messages to produce and their size in bytes."""

    __slots__ = (
        "bytes",
        "dead",
        "envelope",
        "hung",
        "lane",
        "messages",
        "offset",
        "outputs",
        "partition",
        "record",
        "since",
    )

    def __init__(self, partition: Partition, record: Record, since: float) -> None:
        self.partition = partition
        self.record = record
        self.offset = record.offset
        self.since = since
        self.envelope: Envelope | None = None
        self.lane = ""
        self.messages: list[Outgoing] = []
        self.bytes = 0
        self.outputs = 0
        self.dead = False
        self.hung = False
