"""Restoring: what a partition's next owner reads before its first event.

In: changelog partitions, up to what the committed offsets stand for. Out: what the last record of each key says
(:class:`streams.changelog.Restored`): the lanes' states as bytes, and journal, timers, parked events and counts.
"""

import threading
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, wait
from typing import Any, Final
from uuid import uuid4

from confluent_kafka import (
    Consumer,
    IsolationLevel,
    KafkaError,
    KafkaException,
    Message,
    TopicPartition,
)
from confluent_kafka.admin import AdminClient, OffsetSpec

from schemas.record import Record
from streams.access import denied
from streams.changelog import STATE_PREFIX, Restored
from streams.errors import ClusterError, RestoreCancelledError, StateError
from streams.kafka import LEADERLESS, passes, reader_settings

__all__ = ["restore"]

_LEADER_TIMEOUT_S: Final = 30.0
_LEADER_POLL_S: Final = 0.05
_BATCH: Final = 500
"""Few enough to lie in the processor's cache: 10,000 take a third more CPU."""
_POLL_S: Final = 0.1
"""How long a restore waits for anything before it looks whether it is still wanted."""
_LATEST: Final = OffsetSpec.latest()

_Place = tuple[str, int]


def restore(
    kafka: Mapping[str, Any],
    places: Iterable[tuple[str, str, int]],
    *,
    timeout_s: float,
    cancelled: threading.Event,
) -> dict[tuple[str, int], Restored]:
    """Read changelog partitions and return what they hold. Blocks; the time is bounded by the live keys.

    ``places`` are changelog, its input topic and the partition's number; the answer is by changelog and number. States
    are not parsed.

    Call it after the group's committed offsets were fetched (which waits for open transactions). Their commit markers
    may reach the changelog a little later than the offsets, so it is read to where its high watermark was, however
    long the last stable offset takes to get there: a dead owner's open transaction ends at its timeout.

    Raises:
        StateError: a changelog has what can't be read.
        AccessError: this user may not read a changelog.
        ClusterError: nothing came from the cluster for ``timeout_s`` seconds.
        RestoreCancelledError: ``cancelled`` was set, some tenths of a second ago at most.
    """
    inputs = {(changelog, number): topic for changelog, topic, number in places}
    if not inputs:
        return {}
    try:
        return _Restore(kafka, inputs, timeout_s, cancelled).run()
    except KafkaException as error:
        changelogs = ", ".join(sorted({changelog for changelog, _ in inputs}))
        refused = denied("a restore", kafka, error.args[0], topic=changelogs, to="READ")
        raise refused or ClusterError(f"changelogs can't be read: {error.args[0].str()}") from error


class _Restore:
    """One run of :func:`restore`."""

    def __init__(
        self, kafka: Mapping[str, Any], inputs: Mapping[_Place, str], timeout_s: float, cancelled: threading.Event
    ) -> None:
        self._kafka = kafka
        self._inputs = inputs
        self._timeout_s = timeout_s
        self._cancelled = cancelled

    def run(self) -> dict[_Place, Restored]:
        ends = self._high_watermarks()
        consumer = Consumer(reader_settings(self._kafka, f"restore-{uuid4()}"))
        try:
            return self._read(consumer, ends)
        finally:
            consumer.close()

    def _still_wanted(self) -> None:
        if self._cancelled.is_set():
            raise RestoreCancelledError(f"the restore of {len(self._inputs)} changelog partitions was cancelled")

    def _high_watermarks(self) -> dict[_Place, int]:
        leaders_by = time.monotonic() + min(self._timeout_s, _LEADER_TIMEOUT_S)
        ends: dict[_Place, int] = {}
        wanted = [TopicPartition(topic, number) for topic, number in self._inputs]
        while True:
            # Bound: a client that is collected takes its unanswered requests along. At level 6 it tells of its
            # clean-up. A new one each time: it would go on asking those that were leaders when it first looked.
            admin = AdminClient({"log_level": 5, **self._kafka})
            futures = admin.list_offsets(
                dict.fromkeys(wanted, _LATEST),
                isolation_level=IsolationLevel.READ_UNCOMMITTED,
                request_timeout=max(self._timeout_s, 1.0),
            )
            waiting: set[Future[Any]] = set(futures.values())
            while waiting:
                self._still_wanted()
                waiting = wait(waiting, _POLL_S).not_done
            leaderless = []
            for place, future in futures.items():
                try:
                    ends[place.topic, place.partition] = future.result().offset
                except KafkaException as error:
                    if error.args[0].code() not in LEADERLESS or time.monotonic() > leaders_by:
                        raise
                    leaderless.append(place)
            if not leaderless:
                return ends
            wanted = leaderless
            self._cancelled.wait(_LEADER_POLL_S)

    def _read(self, consumer: Consumer, ends: Mapping[_Place, int]) -> dict[_Place, Restored]:
        # By topic, then number: a pair for each record would take a fifth of the time.
        states: dict[str, dict[int, dict[str, bytes]]] = {topic: {} for topic, _ in ends}
        others: dict[_Place, dict[bytes, Record]] = {}
        for topic, number in ends:
            states[topic][number] = {}
            others[topic, number] = {}
        waiting = {place for place, end in ends.items() if end > 0}
        # The client takes half a second to ask for the beginning by name. A compacted log's first offset is 0; were
        # this one's another, it would be reset to it.
        consumer.assign([TopicPartition(topic, number, 0) for topic, number in waiting])
        prefix, cut = STATE_PREFIX, len(STATE_PREFIX)
        quiet_since = time.monotonic()
        while waiting:
            self._still_wanted()
            first = consumer.poll(_POLL_S)
            if first is None:
                if time.monotonic() - quiet_since > self._timeout_s:
                    raise ClusterError(
                        f"nothing came from the changelogs {sorted(waiting)} for {self._timeout_s:g} s, and they are "
                        "not at their end; is a broker down?"
                    )
                continue
            quiet_since = time.monotonic()
            for message in [first, *consumer.consume(_BATCH, 0)]:
                if message.error() is not None:
                    place = message.topic(), message.partition()
                    if _is_end(message) and message.offset() >= ends[place]:
                        waiting.discard(place)
                    continue
                key, value = message.key(), message.value()
                if key is None:
                    raise StateError(
                        f"{message.topic()}[{message.partition()}]@{message.offset()} has no key; who wrote it?"
                    )
                if key.startswith(prefix):
                    lanes = states[message.topic()][message.partition()]
                    if value is None:
                        lanes.pop(key[cut:].decode(), None)
                    else:
                        lanes[key[cut:].decode()] = value
                elif value is None:
                    others[message.topic(), message.partition()].pop(key, None)
                else:
                    others[message.topic(), message.partition()][key] = Record.from_message(message)
        found = {}
        for place, topic in self._inputs.items():
            found[place] = Restored.of(states[place[0]][place[1]], others[place].values(), topic)
            found[place].end = ends[place]
        return found


def _is_end(message: Message) -> bool:
    """Whether it tells of the partition's (last stable) end; otherwise of what will pass.

    Raises:
        KafkaException: it tells of what won't.
    """
    error = message.error()
    assert error is not None
    if not passes(error) and error.code() not in LEADERLESS:
        raise KafkaException(error)
    return bool(error.code() == KafkaError._PARTITION_EOF)
