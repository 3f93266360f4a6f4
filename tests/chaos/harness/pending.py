"""What is still to be done though its offset is: parked events and timers, as the changelogs hold them.

In: a view of the log, groups and their input topics. Out: the offsets that are parked and the timers that are set. Each
look reads on where the last one ended, since a long run's changelogs are long.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Final

from streams.changelog import parked_key, timer_key
from streams.state import changelog_topic
from tests.chaos.harness.log import LogView, Place

__all__ = ["Pending"]

_PARKED: Final = parked_key(0)[:-1]
_TIMER: Final = timer_key("", "").partition(b"/")[0] + b"/"
_BETWEEN: Final = timer_key("", "")[-1:]


class Pending:
    """``parked`` holds the offsets of each place, ``timers`` the names by place; ``parkings`` counts what was seen to
    be parked.
    """

    def __init__(self, view: LogView, groups: Sequence[str], topics: Sequence[str]) -> None:
        self._view = view
        self._changelogs = {changelog_topic(group, topic): topic for group in groups for topic in topics}
        self._next: dict[str, dict[int, int]] = defaultdict(dict)
        self.parked: dict[Place, set[int]] = defaultdict(set)
        self.timers: dict[Place, set[str]] = defaultdict(set)
        self.parkings = 0

    def look(self) -> None:
        """Read the changelogs to their ends."""
        known = self._view.topics()
        for changelog, topic in self._changelogs.items():
            if changelog not in known:
                continue
            following = self._next[changelog]
            for record in self._view.read(changelog, since=dict(following)):
                following[record.partition] = record.offset + 1
                if record.key is not None:
                    self._take(record.key, (topic, record.partition), gone=record.value is None)

    def _take(self, key: bytes, place: Place, *, gone: bool) -> None:
        if key.startswith(_PARKED):
            offset = int(key.removeprefix(_PARKED))
            if gone:
                self.parked[place].discard(offset)
            else:
                self.parkings += offset not in self.parked[place]
                self.parked[place].add(offset)
        elif key.startswith(_TIMER):
            name = key.rpartition(_BETWEEN)[2].decode()
            if gone:
                self.timers[place].discard(name)
            else:
                self.timers[place].add(name)

    @property
    def nothing(self) -> bool:
        """Whether nothing was left at the last look."""
        return not any(self.parked.values()) and not any(self.timers.values())
