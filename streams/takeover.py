"""Taking a partition over: where its last owner stopped, and what it left behind.

In: the partitions that the group has assigned. Out: :class:`~streams.partition.Partition` values that can go on: the
committed offset with its finished-offset map, and what the changelog holds. Everything here blocks; it runs on a thread
of the fetcher's.
"""

import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition

from streams.access import denied
from streams.errors import ClusterError, RestoreCancelledError, StateError
from streams.offsets import OffsetTracker
from streams.partition import Partition
from streams.restore import restore
from streams.state import StateCodec, StateStore, changelog_topic

__all__ = ["committed_offsets", "take_over"]

_RESTORE_S: Final = 120.0
_COMMITTED_S: Final = 60.0
_SLICE_S: Final = 0.9
_AGAIN_S: Final = 0.05
_PASSING: Final = frozenset(
    {
        KafkaError._TIMED_OUT,
        KafkaError.NOT_COORDINATOR,
        KafkaError.COORDINATOR_NOT_AVAILABLE,
        KafkaError.COORDINATOR_LOAD_IN_PROGRESS,
    }
)
"""The coordinator is away or moves. The client asks for the new one, but not again for what was to be known."""


def take_over(
    kafka: Mapping[str, Any],
    group: str,
    consumer: Consumer,
    partitions: Sequence[TopicPartition],
    codec: StateCodec | None,
    *,
    cancelled: threading.Event,
) -> list[Partition]:
    """Fetch committed offsets, which waits for open transactions, then restore what belongs to them.

    Raises:
        RestoreCancelledError: ``cancelled`` was set meanwhile.
        StateError: a changelog and its offset don't fit together, or it can't be read.
        AccessError: this user may not read the group's offsets, or a changelog.
        ClusterError: the cluster did not answer in time.
    """
    committed = committed_offsets(kafka, group, consumer, partitions, cancelled)
    changelogs = [(changelog_topic(group, place.topic), place.topic, place.partition) for place in committed]
    restored = restore(kafka, changelogs, timeout_s=_RESTORE_S, cancelled=cancelled)
    prepared = []
    for place, (changelog, _, number) in zip(committed, changelogs, strict=True):
        found = restored[changelog, number]
        if place.offset < 0 and not found.empty:
            raise StateError(
                f"{changelog}[{number}] is not empty, but group {group} has no offset for {place.topic}[{number}]; "
                "it was lost. Set it again, or delete the changelog"
            )
        if found.rebuilding or (place.offset > 0 and found.end == 0):
            said = "a rebuild has written only a part of it" if found.rebuilding else "what it held was lost"
            raise StateError(
                f"group {group} has finished {place.topic}[{number}] up to offset {place.offset}, but {changelog}"
                f"[{number}] is no whole changelog: {said}. Make it again from the log: magnatronic rebuild state "
                f"--agent {group.rpartition('.')[2]}"
            )
        # The first transaction needs an offset to send; where the log was trimmed, 0 stands for its beginning.
        tracker = OffsetTracker(max(place.offset, 0), (place.metadata or "") if place.offset >= 0 else "")
        state = StateStore(codec, found.states)
        prepared.append(Partition(place.topic, number, tracker, state, changelog, found))
    return prepared


def committed_offsets(
    kafka: Mapping[str, Any],
    group: str,
    consumer: Consumer,
    partitions: Sequence[TopicPartition],
    cancelled: threading.Event,
) -> list[TopicPartition]:
    """What ``group`` has committed, with its metadata; waits for open transactions.

    Raises:
        RestoreCancelledError: ``cancelled`` was set meanwhile.
        AccessError: this user may not read the group's offsets.
        ClusterError: the cluster did not answer in time.
    """
    deadline = time.monotonic() + _COMMITTED_S
    while True:
        try:
            committed: list[TopicPartition] = consumer.committed(list(partitions), timeout=_SLICE_S)
            break
        except KafkaException as error:
            cause: KafkaError = error.args[0]
            if cancelled.is_set():
                raise RestoreCancelledError(f"{group}: the partitions went away meanwhile") from error
            if (refused := denied(group, kafka, cause, group=group)) is not None:
                raise refused from error
            if cause.code() not in _PASSING:
                raise ClusterError(f"{group}: committed offsets can't be had: {cause.str()}") from error
            if time.monotonic() > deadline:
                raise ClusterError(f"{group}: no committed offsets within {_COMMITTED_S:g} s: {cause.str()}") from error
            cancelled.wait(_AGAIN_S)
    for place in committed:
        if place.error is not None:
            if (refused := denied(group, kafka, place.error, topic=place.topic, group=group)) is not None:
                raise refused
            raise ClusterError(f"{group}: {place.topic}[{place.partition}]: {place.error.str()}")
    return committed
