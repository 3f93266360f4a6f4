"""Partitions that belong to nobody though the group is stable: noticed, and shared out anew.

In: a group and its topics. Out: a rebalance, when nothing but that helps. Members that die between the two rounds of a
cooperative rebalance and come back in their slots get the first round's assignment from the broker, and what moved then
is nobody's until the next rebalance (docs/decisions/0012). So each processor looks every ten seconds; where a partition
was nobody's twice in a row a guest joins the group and leaves it again, which makes the members share.
"""

import logging
import random
import struct
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

from confluent_kafka import Consumer, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient

from streams.handover import Place
from streams.kafka import guest_settings

__all__ = ["OwnerWatch", "places_of"]

_INTERVAL_S: Final = 10.0
_REQUEST_S: Final = 5.0
_SURE: Final = 2
"""Looks in a row. Between the rounds of a rebalance a partition is nobody's too, for as long as it is given up."""
_MOST_PATIENT: Final = 60
_STABLE: Final = "Stable"
_GUEST_S: Final = 30.0
"""A rebalance waits for members that have died, until their session is over."""

log = logging.getLogger(__name__)


class OwnerWatch:
    """Watches over ``group``'s partitions of ``topics`` as its member ``name``, on a thread of its own.

    The first member by name acts at the second look, the next one at the third, if it is still of use then. A rebalance
    that did not help is tried again ever more seldom. ``away_topic`` is one that the group may read, but no member
    subscribes to: a guest that could be given one of the group's partitions would move it.
    """

    def __init__(
        self,
        name: str,
        kafka: Mapping[str, Any],
        group: str,
        topics: Sequence[str],
        *,
        away_topic: str,
        interval_s: float = _INTERVAL_S,
    ) -> None:
        self._name = name
        self._kafka = dict(kafka)
        self._group = group
        self._topics = list(topics)
        self._away_topic = away_topic
        self._interval_s = interval_s
        self._looks: dict[Place, int] = {}
        self._patience = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._main, name=f"{name}-owners", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """Look no more; a guest leaves within a second."""
        self._over.set()

    def _main(self) -> None:
        # Not all processors of a process at the same moment.
        while not self._over.wait(self._interval_s * random.uniform(0.8, 1.2)):
            try:
                self._look()
            except (KafkaException, TimeoutError) as error:
                # The cluster is in trouble, or this may not be asked; the processor finds out by itself what matters.
                log.info("%s: can't see who owns the partitions of %s: %s", self._name, self._group, error)
                self._looks.clear()

    def _look(self) -> None:
        nobodys, place_in_line = self._nobodys()
        self._looks = {place: self._looks.get(place, 0) + 1 for place in nobodys}
        sure = [place for place, looks in self._looks.items() if looks >= _SURE]
        if not sure:
            if not nobodys:
                self._patience = 0
            return
        if place_in_line is None or max(self._looks.values()) < _SURE + place_in_line + self._patience:
            return
        log.warning(
            "%s: %s belong to nobody though group %s is stable; makes the group share them out",
            self._name,
            ", ".join(f"{topic}[{number}]" for topic, number in sorted(sure)),
            self._group,
        )
        self._be_guest()
        self._looks.clear()
        self._patience = min(_MOST_PATIENT, self._patience * 2 + 1)

    def _nobodys(self) -> tuple[set[Place], int | None]:
        """The partitions that no member has, none where the group is not stable; and this member's place in line."""
        # A client for each look: one that is kept costs threads and connections all the time. These are its old calls,
        # which block. The newer describe_consumer_groups ends the process (an assertion of librdkafka's about its count
        # of references) when it times out while the coordinator is being looked for.
        admin = AdminClient(guest_settings(self._kafka, self._name))
        found = [group for group in admin.list_groups(self._group, timeout=_REQUEST_S) if group.error is None]
        if len(found) != 1 or found[0].state != _STABLE:
            return set(), None
        members = found[0].members
        owned = {place for member in members for place in places_of(member.assignment)}
        there = set()
        for name in self._topics:
            topic = admin.list_topics(name, timeout=_REQUEST_S).topics.get(name)
            if topic is not None and topic.error is None:
                there |= {(name, number) for number in topic.partitions}
        line = sorted(member.client_id for member in members)
        return there - owned, line.index(self._name) if self._name in line else None

    def _be_guest(self) -> None:
        """Join until the group has settled with this guest, then leave."""
        let_in = threading.Event()

        def joined(consumer: Consumer, _: list[TopicPartition]) -> None:
            consumer.incremental_assign([])
            let_in.set()

        def gone(consumer: Consumer, _: list[TopicPartition]) -> None:
            consumer.incremental_unassign([])

        guest = Consumer(guest_settings(self._kafka, self._name, group=self._group))
        try:
            guest.subscribe([self._away_topic], on_assign=joined, on_revoke=gone, on_lost=gone)
            deadline = time.monotonic() + _GUEST_S
            while not (let_in.is_set() or self._over.is_set()) and time.monotonic() < deadline:
                guest.poll(0.1)
        finally:
            guest.close()


def places_of(assignment: bytes) -> list[Place]:
    """The partitions in a member's assignment, as the consumer protocol writes it (ConsumerProtocolAssignment)."""
    if not assignment:
        return []
    version_and_topics = struct.Struct(">hi")
    _, topics = version_and_topics.unpack_from(assignment)
    at, places = version_and_topics.size, []
    for _ in range(topics):
        (length,) = struct.unpack_from(">h", assignment, at)
        at += 2
        topic = assignment[at : at + length].decode()
        at += length
        (count,) = struct.unpack_from(">i", assignment, at)
        at += 4
        places += [(topic, number) for number in struct.unpack_from(f">{count}i", assignment, at)]
        at += 4 * count
    return places
