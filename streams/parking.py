"""Waiting for another attempt: the lane is held, and when the wait is long its events are parked in the changelog.

In: works whose attempt failed, works that arrive behind them, and what an earlier owner parked. Out: held lanes that
are released in time, and entries that park events: with them their offsets are finished, so that offsets move on
and a restart goes on waiting where this process left off. A lane's events are parked from its first one on without a
gap: a restart puts the parked ones before what is fetched.
"""

import asyncio
import time
from collections.abc import Callable

from streams.binding import Binding
from streams.changelog import Parked, parked_message
from streams.dispatch import Dispatcher, Lane
from streams.partition import Entry, Partition, Work

__all__ = ["Parking"]


class Parking:
    """Holds and parks for one processor.

    ``add`` has an entry committed, ``journal(work)`` makes the entry for a work's effects that are not committed yet,
    ``read(work)`` decodes a parked work and gives its lane. At most the binding's ``max_in_flight`` events are parked.
    """

    def __init__(
        self,
        binding: Binding,
        dispatcher: Dispatcher[Work],
        add: Callable[[Entry], None],
        journal: Callable[[Work], Entry | None],
        read: Callable[[Work], Lane[Work] | None],
    ) -> None:
        self._binding = binding
        self._dispatcher = dispatcher
        self._add = add
        self._journal = journal
        self._read = read
        self.parked = 0
        """How many events are parked now, those that run again included."""

    def wait(self, lane: Lane[Work], work: Work, wait_s: float) -> None:
        """Run ``work``, which runs now, again after so many seconds, and what is behind it in ``lane`` after that."""
        self._dispatcher.hold(lane, work)
        work.tried().due = time.time() + wait_s
        if wait_s >= self._binding.park_after_s and self._park(work, int((time.time() + wait_s) * 1000)):
            for behind in list(lane.items)[1:]:
                if not _is_parked(behind) and not self._park(behind, 0):
                    break
        self._release_later(lane, wait_s)

    def behind(self, lane: Lane[Work], work: Work) -> None:
        """Park ``work``, which has just come into a held lane, if what is before it is parked."""
        if len(lane.items) > 1 and _is_parked(lane.items[-2]):
            self._park(work, 0)

    def left(self, work: Work) -> None:
        """The parked ``work`` is finished, or another owner's."""
        self.parked -= not work.settles

    def restore(self, partition: Partition) -> None:
        """Put what an earlier owner parked back into its lanes; a lane waits until its first event is due."""
        now_ms, monotonic = time.time() * 1000, time.monotonic()
        waits: dict[str, float] = {}
        parked_events, partition.parked = partition.parked, []
        for parked in parked_events:
            work = Work(partition, parked.record, monotonic)
            work.offset, work.settles = -1, 0
            trial = work.tried()
            trial.parked, trial.attempt, trial.due = True, max(parked.attempt, 1), parked.due_ms / 1000
            self.parked += 1
            lane = self._read(work)
            if lane is None:
                continue
            if not lane.items and not lane.active and parked.due_ms > now_ms:
                waits[lane.key] = (parked.due_ms - now_ms) / 1000
                self._dispatcher.hold(lane, work)
            else:
                self._dispatcher.submit(lane, work)
        for key, wait_s in waits.items():
            self._release_later(partition.lanes[key], wait_s)

    def _park(self, work: Work, due_ms: int) -> bool:
        """Write the event to the changelog, if there is room; with that its offset is finished."""
        trial, partition = work.tried(), work.partition
        if not trial.parked:
            if self.parked >= self._binding.max_in_flight:
                return False
            self.parked += 1
        if (journalled := self._journal(work)) is not None:
            self._add(journalled)
        message = parked_message(partition.changelog, Parked(work.record, trial.attempt, due_ms))
        entry = Entry(partition, [message], offset=work.offset, order=work.order, settles=work.settles)
        trial.parked = True
        work.offset, work.settles = -1, 0
        self._add(entry)
        return True

    def _release_later(self, lane: Lane[Work], wait_s: float) -> None:
        first = lane.items[0]

        def release() -> None:
            # It may have been released before, and be held by another event now.
            if lane.held and lane.items and lane.items[0] is first:
                self._dispatcher.release(lane)

        asyncio.get_running_loop().call_later(wait_s, release)


def _is_parked(work: Work) -> bool:
    return work.trial is not None and work.trial.parked
