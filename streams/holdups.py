"""Open transactions that hold up reading: which partitions can't be read on though more lies there, and since when.

In: a processor's partitions, looked at once a second on its event loop. Out: :class:`HeldUp` values. A reader of
committed records stops at the first open transaction of a partition. Most are over in a moment, but a producer that
lives and hangs holds all readers up until its transaction's timeout. Brokers are asked only about partitions that stand
still though more was appended, in a thread, and once for as long as nothing changes there.
"""

import logging
import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import wait
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from confluent_kafka import Consumer, IsolationLevel, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient, OffsetSpec

from streams.kafka import reader_settings

if TYPE_CHECKING:
    from streams.partition import Partition

__all__ = ["HeldUp", "Holdups"]

Place = tuple[str, int]

_SUSPECTED_S: Final = 3.0
_HELD_UP_S: Final = 12.0
"""Magnatronic's own transactions time out after 10 s, and their markers are written within another."""
_AGAIN_S: Final = 2.0
_TIMEOUT_S: Final = 5.0
_SOURCE: Final = "ce_source"

log = logging.getLogger(__name__)


class HeldUp(NamedTuple):
    """A partition whose reading an open transaction holds up at ``offset``, its first record's.

    ``waiting`` counts the offsets from there on, ``for_s`` for how many seconds it has been so, as far as is known.
    ``since_ms`` is when that record was appended (milliseconds since the epoch) and ``source`` who says to have written
    it; 0 and empty where that is not known.
    """

    topic: str
    partition: int
    offset: int
    waiting: int
    for_s: float
    since_ms: int = 0
    source: str = ""


class _Seen:
    """What is known of one partition."""

    __slots__ = ("asked_at", "clear", "end", "position", "since_ms", "source", "stable", "stable_at", "still_at")

    def __init__(self, position: int, now: float) -> None:
        self.position = position
        self.end = -1
        self.still_at = now
        self.asked_at = -_AGAIN_S
        self.clear = -1
        """The end up to which it is known that nothing is open."""
        self.stable = -1
        """The last stable offset, where it is below the end."""
        self.stable_at = now
        self.since_ms = 0
        self.source = ""


class Holdups:
    """Looks for them among one processor's partitions. ``kafka`` holds librdkafka settings."""

    def __init__(
        self, kafka: Mapping[str, Any], *, suspected_after_s: float = _SUSPECTED_S, held_up_after_s: float = _HELD_UP_S
    ) -> None:
        self._kafka = dict(kafka)
        self._suspected_after_s = suspected_after_s
        self._held_up_after_s = held_up_after_s
        self._seen: dict[Place, _Seen] = {}
        self._asking: threading.Thread | None = None

    def look(self, partitions: "Iterable[Partition]", now: float) -> list[HeldUp]:
        """What is held up, as of the last answers; asks anew where that is due. ``now`` is ``time.monotonic()``."""
        before, self._seen = self._seen, {}
        suspects: dict[Place, int] = {}
        found = []
        for partition in partitions:
            position, end = partition.tracker.position, partition.end
            if end <= position:
                continue
            place = partition.topic, partition.number
            seen = before.get(place)
            if seen is None or seen.position != position:
                seen = _Seen(position, now)
            self._seen[place] = seen
            seen.end = end
            if seen.clear >= end or now - seen.still_at < self._suspected_after_s:
                continue
            if now - seen.asked_at >= _AGAIN_S:
                suspects[place] = position
            if seen.stable >= 0 and (for_s := now - seen.stable_at) >= self._held_up_after_s:
                at = seen.stable
                found.append(HeldUp(*place, at, end - at, for_s, seen.since_ms, seen.source))
        if suspects and (self._asking is None or not self._asking.is_alive()):
            for place in suspects:
                self._seen[place].asked_at = now
            asked = {place: self._seen[place] for place in suspects}
            self._asking = threading.Thread(target=self._ask, args=(asked, now), name="holdups", daemon=True)
            self._asking.start()
        return found

    def _ask(self, asked: Mapping[Place, _Seen], now: float) -> None:
        try:
            for place, stable in self._last_stable(asked).items():
                seen = asked[place]
                if stable >= seen.end:
                    seen.clear, seen.stable = stable, -1
                elif stable != seen.stable:
                    # First, since with the offset it is known.
                    seen.since_ms, seen.source = self._first_of(place, stable)
                    seen.stable, seen.stable_at = stable, now
        except Exception:  # it is asked again; what is told of a holdup is worth less than the work
            log.debug("open transactions can't be looked for", exc_info=True)

    def _last_stable(self, places: Iterable[Place]) -> dict[Place, int]:
        # A new client each time: an old one goes on asking those that were leaders when it first looked.
        admin = AdminClient({"log_level": 5, **self._kafka})
        answers = admin.list_offsets(
            {TopicPartition(*place): OffsetSpec.latest() for place in places},
            isolation_level=IsolationLevel.READ_COMMITTED,
            request_timeout=_TIMEOUT_S,
        )
        wait(answers.values(), _TIMEOUT_S + 1)
        found = {}
        for at, answer in answers.items():
            try:
                if answer.done():
                    found[at.topic, at.partition] = int(answer.result().offset)
            except KafkaException as error:
                log.debug("%s[%d]: %s", at.topic, at.partition, error.args[0].str())
        return found

    def _first_of(self, place: Place, offset: int) -> tuple[int, str]:
        """When the record there was appended, and its source."""
        settings = reader_settings(self._kafka, "magnatronic-holdups")
        consumer = Consumer({**settings, "isolation.level": "read_uncommitted", "log_level": 5})
        try:
            consumer.assign([TopicPartition(*place, offset)])
            for _ in range(int(_TIMEOUT_S)):
                message = consumer.poll(1.0)
                if message is not None and message.error() is None:
                    source = dict(message.headers() or ()).get(_SOURCE) or b""
                    return int(message.timestamp()[1]), source.decode(errors="replace")
        finally:
            consumer.close()
        return 0, ""
