"""The intake: what becomes of a fetched message, from its bytes to its end.

In: fetched messages of owned partitions, and works that another attempt or an earlier owner brings back. Out: each
event handled in its lane and given to the commit, each message of which nothing is to be handled given to it at once.

Most events are alone in their lane, and their handler does not wait. Such a one gets neither a lane nor a task, and
what it was made from is forgotten at its end. A batch is first decoded, then handled, which is quicker than one event
after the other, as long as it is small: both the code and the events then stay in the machine's caches.
"""

import asyncio
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from confluent_kafka import Message

from agents.step import concerns, lane_of
from agents.turns import handlers_only
from schemas.codec import Codec
from schemas.errors import UnavailableError
from schemas.events import StepAssigned, TimerFired
from schemas.metadata import REDRIVE_HEADER
from schemas.record import Record
from streams.binding import Binding
from streams.committer import Committer
from streams.dispatch import Dispatcher, Lane, rank_of
from streams.errors import ClusterError
from streams.firing import Firing
from streams.handling import Handling
from streams.parking import Parking
from streams.partition import Partition, Work
from streams.stats import Stats
from streams.suspects import Suspects

if TYPE_CHECKING:
    from streams.tracing import Tracer

__all__ = ["Intake"]

_TIMED: Final = 64
_TIMED_MASK: Final = 15
"""So many of a second's handlers are timed, and of the others one in sixteen."""


class Intake:
    """Belongs to one processor; all of it is for the event loop's thread.

    ``owned`` are its partitions by topic and number. ``settle(count, rank)`` gives fetched messages back, ``cancelled``
    holds the steps that are not to be run, by step_id, with the reason, and ``fail(error)`` ends the processor.
    """

    def __init__(
        self,
        name: str,
        binding: Binding,
        codec: Codec,
        handling: Handling,
        committer: Committer,
        firing: Firing,
        *,
        owned: Mapping[tuple[str, int], Partition],
        settle: Callable[[int, int], None],
        cancelled: Mapping[str, str],
        fail: Callable[[BaseException], None],
        stats: Stats,
        tracer: "Tracer | None",
    ) -> None:
        self._name = name
        self._agent = binding.agent
        self._consumes = frozenset(binding.agent.consumes)
        self._decode = codec.decode
        self._handling = handling
        self._commit = committer.add
        self._firing = firing
        self._owned = owned
        self._settle = settle
        self._cancelled = cancelled
        self._fail = fail
        self._stats = stats
        self._tracer = tracer
        self._redriven_to_us = REDRIVE_HEADER, binding.agent.name.encode()
        self.dispatcher: Dispatcher[Work] = Dispatcher(
            self._handle,
            concurrency=binding.concurrency,
            idle=_lane_idle,
            failed=fail,
            ranks={rank_of(topic) for topic in binding.topics},
        )
        self.suspects = Suspects(
            handling, committer.add, max_crashes=binding.max_crashes, max_in_flight=binding.max_in_flight
        )
        self.parking = Parking(binding, self.dispatcher, committer.add, handling.journal_entry, self._lane_of)

    def received(self, messages: Sequence[Message]) -> None:
        """Decode a batch, then handle each event, or put it into its lane."""
        try:
            works = self._decoded(messages)
            with handlers_only():
                self._begin(works)
        except Exception as error:  # noqa: BLE001 - handed on: the processor ends with it
            self._fail(error)

    def _decoded(self, messages: Sequence[Message]) -> list[Work]:
        now = time.monotonic()
        owned, read = self._owned, self._read
        works = []
        for message in messages:
            topic, number, offset = message.topic(), message.partition(), message.offset()
            partition = owned.get((topic, number))
            if partition is None or not partition.tracker.begin(offset):
                self._settle(1, rank_of(topic) if partition is None else partition.rank)
                continue
            headers = message.headers() or ()
            record = Record(topic, number, offset, message.timestamp()[1], message.key(), message.value(), headers)
            work = Work(partition, record, now)
            if headers and headers[-1][0] == REDRIVE_HEADER and headers[-1] != self._redriven_to_us:
                # Sent once more for another agent that had failed on it.
                self._skip(work)
                continue
            if read(work):
                works.append(work)
            elif not partition.owned:
                return []  # the processor has failed
        return works

    def _begin(self, works: list[Work]) -> None:
        handle, dispatcher = self._handle, self.dispatcher
        rank, at_once = -1, False
        for work in works:
            partition = work.partition
            lane = partition.lanes.get(work.lane)
            if lane is None:
                if rank != partition.rank:
                    rank = partition.rank
                    at_once = dispatcher.at_once(rank)
                if at_once:
                    rest = handle(work)
                    if rest is not None:
                        dispatcher.go_on(self._new_lane(work), work, rest)
                        rank = -1
                    continue
                lane = self._new_lane(work)
            dispatcher.submit(lane, work)
            rank = -1
            if lane.held:
                self.parking.behind(lane, work)

    def _read(self, work: Work) -> bool:
        """Decode the work's event and tell its lane. False: there is nothing to run; it is another's, or no event."""
        agent = self._agent
        try:
            work.envelope = envelope = self._decode(work.record)
            event = envelope.event
            kind = type(event)
            if kind not in self._consumes or (kind is TimerFired and not concerns(agent, event)):
                # Another agent's: several types share a topic. Its offset goes with the next commit.
                work.envelope = None
                self._skip(work)
                return False
            work.lane = lane_of(agent, event) if kind is TimerFired else agent.lane(event)
        except UnavailableError as error:
            # Nobody can say what the bytes mean now; going on would change the order of their lane.
            place = f"{work.partition.topic}[{work.partition.number}]@{work.order}"
            self._fail(ClusterError(f"{self._name}: {place}: {error}"))
            return False
        except Exception as error:  # noqa: BLE001 - hostile bytes, or an agent that can't tell the lane
            work.envelope = None
            self._handling.unreadable(work, error)
            self._finish(work)
            return False
        if self._tracer is not None:
            work.envelope, work.trace = self._tracer.begin(agent.name, envelope, work.record)
        return True

    def _lane_of(self, work: Work) -> Lane[Work] | None:
        """The lane of the work's event; None when there is nothing to run."""
        if not self._read(work):
            return None
        return work.partition.lanes.get(work.lane) or self._new_lane(work)

    def _new_lane(self, work: Work) -> Lane[Work]:
        lane = work.partition.lanes[work.lane] = Lane[Work](work.lane, work.partition.rank)
        return lane

    def _skip(self, work: Work) -> None:
        self._stats.skipped += 1
        self._finish(work)

    def _handle(self, work: Work) -> Coroutine[Any, Any, None] | None:
        """Handle the event; what is left of it when its handler waits is to be awaited."""
        began = 0.0
        if (self._cancelled or work.trial is not None) and self._is_cancelled(work):
            self._handling.cancelled(work)
            rest = None
        elif work.order < work.partition.suspect_until:
            rest = self.suspects.run(work)
        elif len(self._stats.handler_latencies) < _TIMED or not work.order & _TIMED_MASK:
            began = time.monotonic()
            if work.trial is None:
                self._stats.waits[work.partition.rank].append(began - work.since)
            rest = self._handling.begin(work)
            if rest is None:
                self._stats.handler_latencies.append(time.monotonic() - began)
        else:
            rest = self._handling.begin(work)
        if rest is not None:
            return self._handle_rest(work, rest, began)
        self._finish(work)
        return None

    async def _handle_rest(self, work: Work, rest: Coroutine[Any, Any, float | None], began: float) -> None:
        try:
            wait_s = await rest
        except asyncio.CancelledError:
            # Its partition is revoked, and the event its next owner's.
            self._settle(work.settles, work.partition.rank)
            self.parking.left(work)
            raise
        finally:
            if began:
                self._stats.handler_latencies.append(time.monotonic() - began)
        if wait_s is None:
            self._finish(work)
        else:
            self.parking.wait(work.partition.lanes[work.lane], work, wait_s)

    def _finish(self, work: Work) -> None:
        if not work.settles:
            self.parking.left(work)
        self._commit(work)
        if work.partition.timers.changed:
            self._firing.look()

    def cancel_step(self, step_id: str, reason: str) -> None:
        """End the step, whether it runs, waits in its lane or waits for another attempt."""
        for worker in list(self.dispatcher.workers):
            work = worker.item
            if work is not None and _is_step(work, step_id):
                work.tried().cancelled = reason
                worker.cancel()
        for partition in self._owned.values():
            lane = partition.lanes.get(step_id)
            if lane is None:
                continue
            for work in lane.items:
                if _is_step(work, step_id):
                    work.tried().cancelled = reason
            if lane.held:
                self.dispatcher.release(lane)

    def _is_cancelled(self, work: Work) -> bool:
        if work.trial is not None and work.trial.cancelled is not None:
            return True
        reason = self._cancelled.get(work.lane)
        if reason is None or not _is_step(work, work.lane):
            return False
        work.tried().cancelled = reason
        return True


def _lane_idle(lane: Lane[Work], work: Work) -> None:
    work.partition.lanes.pop(lane.key, None)


def _is_step(work: Work, step_id: str) -> bool:
    event = None if work.envelope is None else work.envelope.event
    return isinstance(event, StepAssigned) and event.step_id == step_id
