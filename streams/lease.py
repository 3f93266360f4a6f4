"""The lease: whether this process may still call the outside world for a partition.

In: looks at the clock, from the event loop's turns and before each call. Out: leave to call, at once or after a
transaction that carries the partition's offset. A process that was stopped (SIGSTOP, a machine that slept) may have
lost its partitions long ago, and their next owners may have committed the very results that its handlers are about to
ask for. When it wakes up nobody has told it yet: its handlers' timers are due before any heartbeat is answered. What
can tell is the broker, which fences a transaction that carries offsets. So after a pause each partition needs one of
these before calls are made for it again, and one before the first. For a process that was only slow that is one commit
more.
"""

import asyncio
import time
from collections.abc import Callable
from typing import Final

from streams.partition import Entry, Partition

__all__ = ["Lease"]

_TURN_S: Final = 0.25
_PAUSE_S: Final = 1.0
"""Nobody starts another worker in this one's place sooner, and a session is six times as long at least."""
_CLOCK: Final = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
"""It goes on while the machine sleeps, where the system has such a clock."""


def _now() -> float:
    return time.clock_gettime(_CLOCK)


class Lease:
    """Belongs to one processor; all of it is for the event loop's thread.

    ``add`` has an entry committed, with the offset of its partition. ``now`` gives seconds by a clock that also counts
    while the process does not run.
    """

    def __init__(self, add: Callable[[Entry], None], *, now: Callable[[], float] = _now) -> None:
        self._add = add
        self._now = now
        self._seen = now()
        self._pauses = 0

    async def keep(self) -> None:
        """Look at the clock several times a second, until cancelled."""
        while True:
            self._look()
            await asyncio.sleep(_TURN_S)

    def _look(self) -> None:
        now = self._now()
        if now - self._seen > _PAUSE_S:
            self._pauses += 1
        self._seen = now

    async def hold(self, partition: Partition) -> None:
        """Return when the process still owns ``partition`` for sure. Who does not own it any more is cancelled here."""
        while True:
            self._look()
            pauses = self._pauses
            if partition.leased == pauses:
                return
            through: asyncio.Future[None] = asyncio.get_running_loop().create_future()

            def committed(through: "asyncio.Future[None]" = through) -> None:
                if not through.done():
                    through.set_result(None)

            self._add(Entry(partition, [], committed=committed))
            await through
            partition.leased = max(partition.leased, pauses)
