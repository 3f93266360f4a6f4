"""Watches from outside how the groups get on: what they committed, and when each partition last moved.

In: groups and their input partitions. Out: counts and times. Answers that don't come, because a broker is down, are
waited for; nothing here disturbs the groups.
"""

import threading
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Final

from confluent_kafka import KafkaException

from tests.chaos.harness.log import Committed, LogView, Place

__all__ = ["Observer"]

_EVERY_S: Final = 0.1
_TIMEOUT_S: Final = 2.0
_STANDSTILL_S: Final = 1.0


class Observer:
    """Looks at the committed offsets of ``groups`` ten times a second, in a thread of its own.

    Each group reads the topics of ``places`` that it has commits for, and no two groups share a topic.
    """

    def __init__(self, bootstrap_servers: str, groups: Sequence[str], places: Sequence[Place]) -> None:
        self._view = LogView(bootstrap_servers)
        self._groups = groups
        self._places = places
        self._watching = False
        self._latest: dict[Place, Committed] = {}
        self._moved_at = time.monotonic()
        self.standstills: list[tuple[float, float]] = []
        """Times of a second and more in which no partition moved: from, to (monotonic seconds)."""
        self._moves: dict[Place, list[float]] = {place: [] for place in places}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="observer", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join(10)
        self._view.close()

    def _run(self) -> None:
        while not self._stopping.wait(_EVERY_S):
            for group in self._groups:
                try:
                    found = self._view.committed(group, self._places, _TIMEOUT_S)
                except KafkaException:
                    continue
                now = time.monotonic()
                for place, committed in found.items():
                    before = self._latest.get(place)
                    count = committed.count()
                    if count and (before is None or count > before.count()):
                        self._latest[place] = committed
                        self._moves[place].append(now)
                        if self._watching and now - self._moved_at > _STANDSTILL_S:
                            self.standstills.append((self._moved_at, now))
                        self._moved_at = now

    def watch(self, on: bool) -> None:
        """Measure standstills from now on, or not: there is nothing to be done."""
        if on and not self._watching:
            self._moved_at = time.monotonic()
        self._watching = on

    def done(self) -> int:
        """How many offsets are committed as done, over all partitions."""
        return sum(committed.count() for committed in list(self._latest.values()))

    def lag(self, ends: Mapping[Place, int]) -> int:
        """How many offsets up to the partitions' last ones, ``ends``, are not done."""
        lag = 0
        for place, last in list(ends.items()):
            done = self._latest.get(place)
            lag += max(0, last + 1 - (0 if done is None else done.count()))
        return lag

    def behind(self, ends: Mapping[Place, int]) -> int:
        """How many of the partitions, whose last offsets are ``ends``, are not done to that."""
        return sum(
            1 for place, last in ends.items() if (done := self._latest.get(place)) is None or done.offset <= last
        )

    def moved(self, places: Iterable[Place], *, since: float) -> bool:
        """Whether each of ``places`` has had a commit since then (monotonic seconds)."""
        return all(self._moves[place] and self._moves[place][-1] >= since for place in places)

    def slowest(self, places: Collection[Place], *, since: float) -> float | None:
        """When the last of ``places`` had its first commit since then; None while one has had none."""
        if not places or not self.moved(places, since=since):
            return None
        return max(next(at for at in self._moves[place] if at >= since) for place in places)
