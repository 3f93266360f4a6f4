"""A task as it went: what came from outside, what every step left, and an order in which all of it can happen again.

In: all records of a task with their events. Out: :class:`Past`. Its order keeps to the offsets of each partition, to
causes before what they caused, and else to append times: real time was one such order, and clocks of brokers may lie.
"""

from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from hashlib import sha256
from heapq import heappop, heappush

from replay.recorded import Left, Recorded, agent_of, redriven_for
from schemas.events import (
    DeadLettered,
    DeadLetterResolved,
    Effect,
    LlmCalled,
    StepCancelled,
    TaskCancelled,
    TaskCompleted,
    TaskExpired,
    TaskFailed,
    TaskSubmitted,
)
from schemas.metadata import Envelope
from schemas.record import Record

__all__ = ["OUTCOMES", "Item", "Past", "Place"]

OUTCOMES = (TaskCompleted, TaskFailed, TaskExpired, TaskCancelled)

Item = tuple[Record, Envelope]
Place = tuple[str, int, int]
"""Topic, partition and offset."""


class Past:
    """One task's history. ``agents`` are the names of those that are simulated: what others wrote came from outside."""

    def __init__(self, task_id: str, history: Sequence[Item], agents: Collection[str]) -> None:
        self.task_id = task_id
        self.items = _in_order(history)
        self._agents = frozenset(agents)
        self._recorded = Recorded(history)
        self.order: dict[Place, tuple[int, int]] = {}
        """When (milliseconds since the epoch, never back) and as which a record came."""
        self._copies: Counter[str] = Counter()
        self._by_id: dict[tuple[str, str], Item] = {}
        self.effects: dict[str, list[Effect]] = defaultdict(list)
        """What each agent asked of the outside over the whole task, in order."""
        self.submitted: Item | None = None
        self.outcome: Item | None = None
        at = 0
        for rank, (record, envelope) in enumerate(self.items):
            at = max(at, record.timestamp_ms)
            self.order[_place(record)] = at, rank
            event = envelope.event
            if isinstance(event, Effect):
                self.effects[event.agent].append(event)
            elif not redriven_for(record):
                self._copies[envelope.metadata.id] += 1
                self._by_id.setdefault((envelope.metadata.id, record.topic), (record, envelope))
            if isinstance(event, TaskSubmitted) and self.submitted is None:
                self.submitted = record, envelope
            elif isinstance(event, OUTCOMES) and self.outcome is None:
                self.outcome = record, envelope
        self.ends_ms = at
        """When the last of its records came."""
        self._versions = self._newest()

    @property
    def erased(self) -> bool:
        """Whether personal fields of any of its events can't be read any more."""
        return any(envelope.erased for _, envelope in self.items)

    @property
    def personal(self) -> bool:
        """Whether any of its events names data subjects."""
        return any(envelope.metadata.data_subjects for _, envelope in self.items)

    def inputs(self) -> list[Item]:
        """What came from outside, in order: events that none of the agents wrote, and records that were sent again."""
        return [
            item
            for item in self.items
            if not isinstance(item[1].event, Effect | StepCancelled | DeadLettered | DeadLetterResolved)
            and (redriven_for(item[0]) or not self._is_ours(item[1]))
        ]

    def _is_ours(self, envelope: Envelope) -> bool:
        return agent_of(envelope.metadata.source) in self._agents

    def twin(self, event_id: str, topic: str) -> Item | None:
        """The recorded event of this id in the topic, the first if it was written twice."""
        return self._by_id.get((event_id, topic))

    def place_of(self, record: Record) -> tuple[int, int] | None:
        """When and as which the record came; None for one that is not of this history."""
        return self.order.get(_place(record))

    def take(self, agent: str, event_id: str, record: Record, handled: int) -> Left:
        """What the agent's handling of the event, after ``handled`` others of it, left; each thing is given once."""
        return self._recorded.take(agent, event_id, record, more=handled + 1 < self._copies[event_id])

    def version(self, agent: str, left: Left) -> str:
        """Whose decisions the handling that left this was: a version of the agent, empty where nothing tells."""
        return left.source.partition("@")[2] or self._versions.get(agent, "")

    def _newest(self) -> dict[str, str]:
        newest = {}
        for _, envelope in self.items:
            name, _, version = envelope.metadata.source.removeprefix("/agents/").partition("@")
            if name in self._agents:
                newest[name] = version
        return newest

    def calls(self) -> list[LlmCalled]:
        """All calls of language models, failed ones too."""
        return [effect for effects in self.effects.values() for effect in effects if isinstance(effect, LlmCalled)]

    def digest(self) -> str:
        """The SHA-256 (hex) over places and values of all its records."""
        digest = sha256()
        for record, _ in self.items:
            value = record.value or b""
            digest.update(f"{record.topic}/{record.partition}/{record.offset}/{len(value)}\n".encode() + value)
        return digest.hexdigest()


def _place(record: Record) -> Place:
    return record.topic, record.partition, record.offset


def _in_order(history: Sequence[Item]) -> list[Item]:
    """Topological by partition and causation, by time where these leave it open; a circle is cut at its earliest."""
    items = sorted(history, key=lambda item: (item[0].timestamp_ms, item[0].topic, item[0].partition, item[0].offset))
    by_id: dict[str, int] = {}
    for index, (record, envelope) in enumerate(items):
        if not isinstance(envelope.event, Effect | DeadLettered) and not redriven_for(record):
            by_id.setdefault(envelope.metadata.id, index)
    after: list[list[int]] = [[] for _ in items]
    waits = [0] * len(items)
    last: dict[tuple[str, int], int] = {}
    for index in sorted(range(len(items)), key=lambda index: items[index][0].offset):
        record, envelope = items[index]
        before = [last.get((record.topic, record.partition)), by_id.get(envelope.metadata.causation_id)]
        last[record.topic, record.partition] = index
        for earlier in before:
            if earlier is not None and earlier != index:
                after[earlier].append(index)
                waits[index] += 1
    ready = [index for index, count in enumerate(waits) if count == 0]
    ordered: list[Item] = []
    done = [False] * len(items)
    while len(ordered) < len(items):
        index = heappop(ready) if ready else done.index(False)
        if done[index]:
            continue
        done[index] = True
        ordered.append(items[index])
        for later in after[index]:
            waits[later] -= 1
            if waits[later] == 0:
                heappush(ready, later)
    return ordered
