"""Which event takes its process down: after an owner that ended without giving its partition up, each run is counted.

In: works of a partition whose last owner died. Out: the same works' runs, each counted in the changelog before it
begins, and those that were counted too often dead-lettered instead. In a process that nothing has happened to, nothing
is counted: an owner's marker in the changelog, tombstoned when the partition is given up, tells the next owner.

Of the events that were running at one death few run at once, the square root of their number; those that were running
at two run one at a time. So what is counted again is the culprit, and not who ran beside it, and thousands of slow
calls that a dead process had under way don't wait for each other. With ``max_crashes`` counted runs and the first,
uncounted one, a process dies once more often. A run that ended, though its event waits for another attempt or another
owner, is taken back: no process died of it.
"""

import asyncio
import math
from collections.abc import Callable
from typing import Final

from streams.changelog import OWNER_KEY, owner_value, run_key, run_value
from streams.handling import Handling
from streams.partition import LIFE, Entry, Partition, Trial, Work

__all__ = ["Suspects", "owner_left", "owner_marker"]

_REACH: Final = 2
"""How many offsets a fetched event may take: transactions leave a marker each between records."""


def owner_marker(partition: Partition) -> Entry:
    """What says that the partition has an owner, after so many that died."""
    return Entry(
        partition, [(partition.changelog, OWNER_KEY, owner_value(partition.deaths, LIFE), None, partition.number)]
    )


def owner_left(partition: Partition) -> Entry:
    """What says that the owner gave the partition up in good order."""
    return Entry(partition, [(partition.changelog, OWNER_KEY, None, None, partition.number)])


class Suspects:
    """Counts and runs what may have ended the last owner. ``add`` has an entry committed."""

    def __init__(
        self, handling: Handling, add: Callable[[Entry], None], *, max_crashes: int, max_in_flight: int
    ) -> None:
        self._handling = handling
        self._add = add
        self._max_crashes = max_crashes
        self._reach = max_in_flight * _REACH
        self._alone = asyncio.Lock()

    def suspect(self, partition: Partition) -> None:
        """Suspect what its last owner, which died, may have been running."""
        if partition.deaths:
            partition.suspect_until = partition.tracker.position + self._reach
            partition.few = asyncio.Semaphore(max(1, math.isqrt(len(partition.runs))))

    def clear(self, partition: Partition, end: int) -> None:
        """Suspect nothing any more once all that was suspected is done, or all up to the partition's ``end``."""
        if not partition.suspect_until or partition.runs or end < 0:
            return
        if (partition.tracker.first_unfinished or 0) >= min(partition.suspect_until, end):
            partition.suspect_until = partition.deaths = 0
            self._add(owner_marker(partition))

    async def run(self, work: Work) -> float | None:
        """As :meth:`streams.handling.Handling.handle`, counted."""
        partition = work.partition
        runs = partition.runs.get(work.order, 0)
        if runs >= self._max_crashes:
            await self._handling.crashed(work, runs)
            return None
        trial = work.tried()
        trial.began = math.inf
        try:
            if runs == 0:
                return await self._counted(work, trial, 1)
            async with self._alone if runs > 1 or partition.few is None else partition.few:
                return await self._counted(work, trial, runs + 1)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if trial.cancelled is None or not work.partition.owned or task is None:
                raise
            task.uncancel()  # while it waited for its turn; the handler's own cancellation does not come here
            self._handling.cancelled(work)
            return None

    async def _counted(self, work: Work, trial: Trial, runs: int) -> float | None:
        partition, loop = work.partition, asyncio.get_running_loop()
        through = loop.create_future()

        def committed() -> None:
            if not through.done():
                through.set_result(None)

        self._count(work, runs, committed)
        try:
            await through
            trial.began = loop.time()
            wait_s = await self._handling.handle(work)
        except asyncio.CancelledError:
            if partition.owned:
                self._count(work, runs - 1)
            raise
        if wait_s is not None:
            self._count(work, runs - 1)
        return wait_s

    def _count(self, work: Work, runs: int, committed: Callable[[], None] | None = None) -> None:
        partition = work.partition
        if runs:
            partition.runs[work.order] = runs
        else:
            partition.runs.pop(work.order, None)
        message = (partition.changelog, run_key(work.order), run_value(runs) if runs else None, None, partition.number)
        self._add(Entry(partition, [message], order=work.order, committed=committed))
