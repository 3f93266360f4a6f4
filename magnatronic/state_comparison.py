"""Holds what an agent's changelogs say against what the log gives, and makes the records that mend them.

In: for each input partition what lies in its changelog, and what its lanes hold by the log. Out: comparisons of states
and timers with examples, and messages for the changelog. Canonical bytes are compared; trace contexts are no part of a
decision. A state past its expiry may lie there or not: nobody sees it any more.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from typing import Final

from replay.lane_states import LaneTimer, PartitionState
from replay.selection import Place
from sinks.comparison import HASH_BITS, MOST_EXAMPLES, Comparison, Difference, DifferenceKind, shown
from streams.changelog import (
    REBUILD_KEY,
    STATE_PREFIX,
    Parked,
    Restored,
    Timer,
    effect_key,
    parked_key,
    parked_message,
    state_key,
    timer_key,
    timer_value,
)
from streams.errors import StateError
from streams.state import StateCodec, changelog_topic
from streams.transactor import Outgoing

__all__ = ["StateComparison", "whole_changelog"]

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(slots=True)
class _Table:
    """The rows of one kind."""

    name: str
    rows: list[int] = field(default_factory=lambda: [0, 0])
    sums: list[int] = field(default_factory=lambda: [0, 0])
    counts: dict[DifferenceKind, int] = field(default_factory=lambda: dict.fromkeys(DifferenceKind, 0))
    examples: list[Difference] = field(default_factory=list)

    def add(self, place: str, sides: tuple[bytes | None, bytes | None]) -> bool:
        """Count a row as stored and as rebuilt; whether the two are the same."""
        for number, side in enumerate(sides):
            if side is not None:
                digest = sha256(place.encode() + b"\0" + side).digest()
                self.rows[number] += 1
                self.sums[number] = (self.sums[number] + int.from_bytes(digest[: HASH_BITS // 8])) % 2**HASH_BITS
        stored, rebuilt = sides
        if stored == rebuilt:
            return True
        kind = DifferenceKind.CHANGED
        if stored is None:
            kind = DifferenceKind.MISSING
        elif rebuilt is None:
            kind = DifferenceKind.SURPLUS
        self.counts[kind] += 1
        if len(self.examples) < MOST_EXAMPLES:
            said = ("", "", "")
            if stored is not None and rebuilt is not None:
                said = ("it", *shown(stored.decode(errors="replace"), rebuilt.decode(errors="replace")))
            self.examples.append(Difference(kind, f"{self.name} {place}", *said))
        return False

    def result(self) -> Comparison:
        return Comparison(
            self.name,
            stored_rows=self.rows[0],
            rebuilt_rows=self.rows[1],
            stored_hash=self.sums[0],
            rebuilt_hash=self.sums[1],
            missing=self.counts[DifferenceKind.MISSING],
            surplus=self.counts[DifferenceKind.SURPLUS],
            changed=self.counts[DifferenceKind.CHANGED],
            examples=tuple(self.examples),
        )


class StateComparison:
    """Compares the changelogs of ``group``, partition by partition."""

    def __init__(self, group: str, codec: StateCodec | None) -> None:
        self._group = group
        self._codec = codec
        agent = group.rpartition(".")[2]
        self._states = _Table(f"states of {agent}")
        self._timers = _Table(f"timers of {agent}")
        self.mending: dict[Place, list[Outgoing]] = {}
        """What makes the changelogs say what the log gives, by input partition."""

    @property
    def compared(self) -> tuple[Comparison, ...]:
        """States, and timers."""
        return self._states.result(), self._timers.result()

    def compare(self, place: Place, stored: Restored, rebuilt: PartitionState) -> None:
        """Compare one partition."""
        changelog, number = changelog_topic(self._group, place[0]), place[1]
        differing = [*self._differing_states(place, stored, rebuilt), *self._differing_timers(place, stored, rebuilt)]
        mending: list[Outgoing] = [(changelog, key, value, None, number) for key, value in differing]
        if mending:
            self.mending[place] = mending

    def _differing_states(
        self, place: Place, stored: Restored, rebuilt: PartitionState
    ) -> Iterator[tuple[bytes, bytes | None]]:
        for lane in sorted(stored.states.keys() | rebuilt.states.keys()):
            if lane in rebuilt.unknown:
                continue
            before, after = stored.states.get(lane), rebuilt.states.get(lane)
            if before != after and before is not None:
                before = self._canonical(before)
            if (before is None or after is None) and self._expired(before or after or b"", rebuilt.latest_ms):
                continue
            if not self._states.add(_row(place, lane), (before, after)):
                yield state_key(lane), after

    def _canonical(self, raw: bytes) -> bytes:
        """As this release writes it; what it can't read stays as it is."""
        if self._codec is None:
            return raw
        try:
            return self._codec.dump(self._codec.load(raw))
        except StateError:
            return raw

    def _expired(self, raw: bytes, latest_ms: int) -> bool:
        if self._codec is None:
            return False
        try:
            expires_at = self._codec.load(raw).expires_at
        except StateError:
            return False
        return expires_at is not None and expires_at <= _EPOCH + timedelta(milliseconds=latest_ms)

    def _differing_timers(
        self, place: Place, stored: Restored, rebuilt: PartitionState
    ) -> Iterator[tuple[bytes, bytes | None]]:
        there = {(timer.lane, timer.name): timer for timer in stored.timers}
        for lane, name in sorted(there.keys() | rebuilt.timers.keys()):
            if lane in rebuilt.unknown:
                continue
            before, after = there.get((lane, name)), rebuilt.timers.get((lane, name))
            wanted = None if after is None else _timer(after)
            sides = tuple(None if timer is None else _without_trace(timer) for timer in (before, wanted))
            if not self._timers.add(f"{_row(place, lane)} {name}", (sides[0], sides[1])):
                yield timer_key(lane, name), None if wanted is None else timer_value(wanted)


def whole_changelog(group: str, place: Place, stored: Restored, rebuilt: PartitionState) -> list[Outgoing]:
    """All that belongs into a changelog partition that was lost: states, timers, parked events and the copies of
    effects of what is not finished. A marker comes first and goes last: nobody starts with a part of it.
    """
    changelog, number = changelog_topic(group, place[0]), place[1]
    due_ms = int(time.time() * 1000)
    content: dict[bytes, Outgoing] = {}
    for lane, raw in rebuilt.states.items():
        content[state_key(lane)] = (changelog, state_key(lane), raw, None, number)
    for (lane, name), timer in rebuilt.timers.items():
        key = timer_key(lane, name)
        content[key] = (changelog, key, timer_value(_timer(timer)), None, number)
    for waiting in rebuilt.waiting:
        key = parked_key(waiting.record.offset)
        content[key] = parked_message(changelog, Parked(waiting.record, waiting.attempts, due_ms))
    for (event_id, sequence), record in rebuilt.copies.items():
        key = effect_key(event_id, sequence)
        headers = list(record.headers)
        content[key] = (changelog, key, record.value, headers, number)  # type: ignore[assignment]
    left_over = [key for key in _keys(stored) if key not in content]
    return [
        (changelog, REBUILD_KEY, b"{}", None, number),
        *content.values(),
        *((changelog, key, None, None, number) for key in left_over),
        (changelog, REBUILD_KEY, None, None, number),
    ]


def _keys(stored: Restored) -> Iterator[bytes]:
    """What an earlier, unfinished rebuild has written."""
    yield from (STATE_PREFIX + lane.encode() for lane in stored.states)
    yield from (timer_key(timer.lane, timer.name) for timer in stored.timers)
    yield from (parked_key(parked.record.offset) for parked in stored.parked)
    yield from (record.key or b"" for records in stored.effects.values() for record in records)


def _row(place: Place, lane: str) -> str:
    return f"{place[0]}[{place[1]}] {lane}"


def _timer(timer: LaneTimer) -> Timer:
    told = timer.subject, timer.correlation, timer.cause, timer.traceparent, timer.data_subjects
    return Timer(timer.lane, timer.name, timer.due, *told)


def _without_trace(timer: Timer) -> bytes:
    told = timer.subject, timer.correlation, timer.cause, "", timer.data_subjects
    return timer_value(Timer(timer.lane, timer.name, timer.due, *told))
