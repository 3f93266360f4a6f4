"""Whether a processor is ready and, when it is not, the cause by name: which event it waits for, and what that does.

In: what a processor shows of itself (:class:`Watched`), looked at once a second on its event loop. Out: :class:`Cause`
values, none while it is ready. A processor is not ready when it has not joined its group, restores state, can't commit,
or has a partition whose first unfinished offset stays the same for longer than a bound though that event is in its
hands. Waiting for an event that nobody produced is no stall, nor is a parked one: its offset is finished. A partition
that can't be read on, since somebody's transaction is open there, is one though nothing of it is in hand.
"""

import math
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

from streams.binding import Binding
from streams.holdups import HeldUp, Holdups

if TYPE_CHECKING:
    from streams.dispatch import Worker
    from streams.partition import Partition, Work

__all__ = ["Cause", "Kind", "Progress", "Readiness", "Watched", "stall_bound_s"]

Place = tuple[str, int]

_GRACE_S: Final = 30.0
"""What an event may take beyond one attempt's time limit before its partition counts as stalled."""
_UNBOUNDED_S: Final = 300.0
"""The same where attempts have no limit."""
_TROUBLE_S: Final = 5.0
"""A rebalance aborts a transaction or two; for longer than this it is no rebalance."""
_SHOWN: Final = 8


class Kind(StrEnum):
    """What keeps something from being ready."""

    STARTING = "starting"
    STOPPING = "stopping"
    NOT_JOINED = "not-joined"
    RESTORING = "restoring"
    NOT_COMMITTING = "not-committing"
    STALLED = "stalled"
    HELD_UP = "held-up"
    FAILED = "failed"
    STORE = "store"
    BLOCKED = "event-loop-blocked"
    UNREACHABLE = "kafka-unreachable"


@dataclass(frozen=True, slots=True)
class Cause:
    """Why ``part`` (a processor, a sink, or the process) is not ready; ``message`` is a sentence for people.

    ``topic``, ``partition``, ``offset``, ``event_type`` and ``lane`` name the event that is waited for, where there is
    one. ``since_s``: for how many seconds this has been so.
    """

    kind: Kind
    part: str
    message: str
    since_s: float = 0.0
    topic: str = ""
    partition: int = -1
    offset: int = -1
    event_type: str = ""
    lane: str = ""

    def as_dict(self) -> dict[str, Any]:
        """What is known of it, as JSON can hold it."""
        found: dict[str, Any] = {
            "kind": self.kind.value,
            "part": self.part,
            "message": self.message,
            "since_s": round(self.since_s, 1),
        }
        if self.topic:
            found |= {"topic": self.topic, "partition": self.partition}
        if self.offset >= 0:
            found |= {"offset": self.offset, "event_type": self.event_type, "lane": self.lane}
        return found


class Progress(NamedTuple):
    """How far a partition is: its first ``unfinished`` offset (-1 where nothing is known), how many offsets are
    ``in_flight``, and for how many seconds the first unfinished one has been the same; 0 when nothing is in flight.
    """

    topic: str
    partition: int
    unfinished: int
    in_flight: int
    since_s: float


class Watched(Protocol):
    """What is looked at of a processor, on its event loop's thread."""

    @property
    def name(self) -> str:
        """Its group and slot."""

    @property
    def binding(self) -> Binding:
        """Its agent and topics."""

    @property
    def joined(self) -> bool:
        """Whether it is a member of its group and works."""

    @property
    def restoring(self) -> Collection[Place]:
        """Partitions that it was given and whose state is being read."""

    @property
    def trouble(self) -> str:
        """Why nothing is committed at the moment; empty while all goes well."""

    @property
    def partitions(self) -> "Iterable[Partition]":
        """The partitions that it owns."""

    @property
    def workers(self) -> "Iterable[Worker[Work]]":
        """Its handlers that run."""


def stall_bound_s(binding: Binding) -> float:
    """For how long a partition's first unfinished event may be the same: an attempt's time limit, and some grace.

    Waits between attempts don't count towards it: an event that waits for long is parked, which finishes its offset.
    """
    return _GRACE_S + (_UNBOUNDED_S if binding.timeout_s is None else binding.timeout_s)


class Readiness:
    """Watches one processor. ``stalled_after_s`` is the bound for its partitions, by default :func:`stall_bound_s`.
    ``holdups`` looks for open transactions, None for not at all.

    ``causes`` is what the last :meth:`check` found, ``progress`` how far each partition was; other threads may read
    them.
    """

    def __init__(
        self, processor: Watched, *, stalled_after_s: float | None = None, holdups: Holdups | None = None
    ) -> None:
        self._processor = processor
        self._holdups = holdups
        self._bound_s = stall_bound_s(processor.binding) if stalled_after_s is None else stalled_after_s
        self._since: dict[tuple[Any, ...], float] = {}
        self.causes: tuple[Cause, ...] = ()
        self.progress: tuple[Progress, ...] = ()

    @property
    def stalled(self) -> str:
        """The causes in words, for :class:`schemas.events.ProcessorStats`; empty while it is ready."""
        return "; ".join(cause.message for cause in self.causes)

    def check(self, now: float | None = None) -> tuple[Cause, ...]:
        """Look at the processor; ``now`` is ``time.monotonic()`` unless given."""
        now = time.monotonic() if now is None else now
        seen: set[tuple[Any, ...]] = set()
        self.causes = tuple(self._look(now, seen))
        # What was not seen this time begins anew when it comes back.
        self._since = {key: since for key, since in self._since.items() if key in seen}
        return self.causes

    def _for_s(self, now: float, seen: set[tuple[Any, ...]], *key: Any) -> float:
        """For how long ``key`` has been seen at each look."""
        seen.add(key)
        return now - self._since.setdefault(key, now)

    def _look(self, now: float, seen: set[tuple[Any, ...]]) -> Iterable[Cause]:
        processor = self._processor
        name = processor.name
        trouble, restoring = processor.trouble, processor.restoring
        if not processor.joined and not restoring:
            for_s = self._for_s(now, seen, Kind.NOT_JOINED)
            said = f"{name} is not in its group {processor.binding.group}, for {for_s:.0f} s"
            said += f": {trouble}" if trouble else ""
            yield Cause(Kind.NOT_JOINED, name, said, for_s)
        for topic, number in sorted(restoring):
            for_s = self._for_s(now, seen, Kind.RESTORING, topic, number)
            said = f"{name} restores the state of {topic}[{number}], for {for_s:.0f} s"
            yield Cause(Kind.RESTORING, name, said, for_s, topic, number)
        if trouble and processor.joined:
            for_s = self._for_s(now, seen, Kind.NOT_COMMITTING)
            if for_s >= _TROUBLE_S:
                said = f"{name} has committed nothing for {for_s:.0f} s: {trouble}"
                yield Cause(Kind.NOT_COMMITTING, name, said, for_s)
        progress = []
        shown = 0
        for partition in processor.partitions:
            in_flight, offset = len(partition.tracker), partition.tracker.first_unfinished
            for_s = 0.0
            if in_flight and offset is not None:
                for_s = self._for_s(now, seen, Kind.STALLED, partition.topic, partition.number, offset)
            at = -1 if offset is None else offset
            progress.append(Progress(partition.topic, partition.number, at, in_flight, for_s))
            if for_s >= self._bound_s and shown < _SHOWN:
                cause = self._explain(partition, at, for_s, now)
                if cause is not None:
                    shown += 1
                    yield cause
        self.progress = tuple(progress)
        if self._holdups is not None:
            for held in self._holdups.look(processor.partitions, now)[:_SHOWN]:
                yield _held_up(name, held)

    def _explain(self, partition: "Partition", offset: int, for_s: float, now: float) -> Cause | None:
        """What the event at ``offset`` waits for. None: it is not here, so nothing says that there is one."""
        found = self._find(partition, offset, now)
        if found is None:
            return None
        work, doing = found
        event_type = "" if work is None or work.envelope is None else type(work.envelope.event).__name__
        lane = "" if work is None else work.lane
        where = f"{partition.topic}[{partition.number}]@{offset}"
        what = ", ".join(part for part in (event_type, f"lane {lane}" if lane else "") if part)
        name = self._processor.name
        said = f"{name} has not come past {where}{f' ({what})' if what else ''} for {for_s:.0f} s: it {doing}"
        return Cause(
            Kind.STALLED, name, said, for_s, partition.topic, partition.number, offset, event_type=event_type, lane=lane
        )

    def _find(self, partition: "Partition", offset: int, now: float) -> "tuple[Work | None, str] | None":
        running = {}
        for worker in self._processor.workers:
            work = worker.item
            if work is None or work.partition is not partition:
                continue
            doing = _running(work, worker.since, now)
            if work.offset == offset:
                return work, doing
            running[work.lane] = f"waits for offset {work.record.offset} of its lane, which {doing}"
        for key, lane in partition.lanes.items():
            for work in lane.items:
                if work.offset != offset:
                    continue
                if key in running:
                    return work, running[key]
                first = lane.items[0]
                doing = f"waits for one of {self._processor.binding.concurrency} handlers to be free"
                if lane.held:
                    doing = f"waits for attempt {_attempt(first)}{_due(first)}"
                return (
                    work,
                    doing if work is first else f"waits for offset {first.record.offset} of its lane, which {doing}",
                )
        if partition.uncommitted:
            trouble = self._processor.trouble
            return None, f"is finished and waits for its commit{f': {trouble}' if trouble else ''}"
        return None


def _held_up(name: str, held: HeldUp) -> Cause:
    since = f" since {datetime.fromtimestamp(held.since_ms / 1000, UTC):%Y-%m-%d %H:%M:%S} UTC" if held.since_ms else ""
    said = (
        f"{name} can't read on in {held.topic}[{held.partition}] for {held.for_s:.0f} s: a transaction of "
        f"{held.source or 'an unknown producer'} is open at offset {held.offset}{since}, and {held.waiting} offsets "
        "wait behind it. It ends at its producer's transaction.timeout.ms; `kafka-transactions.sh --describe-producers "
        f"--topic {held.topic} --partition {held.partition}` names the producer"
    )
    return Cause(Kind.HELD_UP, name, said, held.for_s, held.topic, held.partition, held.offset)


def _running(work: "Work", since: float, now: float) -> str:
    began = since if work.trial is None else max(since, work.trial.began)
    if began == math.inf:
        return "waits for its turn to run alone, since it may have ended its last process"
    return f"runs for {max(0.0, now - began):.0f} s in attempt {_attempt(work)}"


def _due(work: "Work") -> str:
    if work.trial is None or not work.trial.due:
        return ""
    return f", due at {datetime.fromtimestamp(work.trial.due, UTC):%H:%M:%S} UTC"


def _attempt(work: "Work") -> int:
    return 1 if work.trial is None else work.trial.attempt
