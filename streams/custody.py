"""Custody of a group's partitions while no processor works on them: what was committed is read, changelogs are written.

In: a group, its topics and, where a processor of this process has made room for it, that one's slot. Out: committed
offsets, what the changelogs hold, and transactions that put records into them. Whoever has custody is a member of the
group and owns all its partitions, and each transaction sends the offsets that are committed already with the group's
metadata: a processor that starts, or one that wakes up, ends it or is fenced, as among processors.
"""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Final, Self

from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient, MemberDescription

from streams.changelog import Restored
from streams.errors import ClusterError, GroupBusyError, TransactionAbortedError
from streams.kafka import consumer_settings, instance_id, passes, transactional_ids, transactional_settings
from streams.restore import restore
from streams.state import changelog_topic, ensure_changelogs
from streams.takeover import committed_offsets
from streams.transactor import Outgoing, Transactor

__all__ = ["Custody"]

Place = tuple[str, int]

_LEAVE_S: Final = 20.0
"""How long members that have stopped may still be listed: a static one is until its session has timed out."""
_JOIN_S: Final = 60.0
_ASK_S: Final = 10.0
_AGAIN_S: Final = 0.3
_POLL_S: Final = 0.1
_RESTORE_S: Final = 120.0
_MOST_MESSAGES: Final = 5_000
_MOST_BYTES: Final = 8 * 1024 * 1024
_TRIES: Final = 5
_SLOT: Final = "rebuild"


class Custody:
    """Holds all partitions of ``group``'s ``topics`` while it is entered.

    ``slot`` is that of this process's processor, which rests; None joins as a member of its own. Only one thread uses
    it.
    """

    def __init__(self, kafka: Mapping[str, Any], group: str, topics: Sequence[str], *, slot: int | str | None) -> None:
        self._kafka = dict(kafka)
        self._group = group
        self._topics = tuple(topics)
        self._slot = slot
        self._owned: set[Place] = set()
        self._lost = False
        self._error: BaseException | None = None
        self._closing = threading.Event()
        self._changed = threading.Condition()
        self._consumer: Consumer | None = None
        self._poller: threading.Thread | None = None
        self._transactor: Transactor | None = None
        self._committed: dict[Place, TopicPartition] = {}

    def __enter__(self) -> Self:
        """Join, and wait until all partitions are ours.

        Raises:
            GroupBusyError: processors of the group work elsewhere.
            ClusterError: the cluster did not give us the partitions in time.
            ProcessorError: a topic is missing, or a right.
        """
        ensure_changelogs(self._kafka, self._group, self._topics)
        self.wait_alone()
        settings = consumer_settings(self._kafka, self._group, _SLOT if self._slot is None else self._slot)
        if self._slot is None:
            # It leaves the group when it is closed, so that processors that start next wait for nobody.
            del settings["group.instance.id"]
        consumer = self._consumer = Consumer(settings)
        try:
            known = consumer.list_topics(timeout=_ASK_S).topics
            wanted = {(topic, number) for topic in self._topics for number in known[topic].partitions}
            consumer.subscribe(
                list(self._topics), on_assign=self._assigned, on_revoke=self._revoked, on_lost=self._revoked
            )
            self._poller = threading.Thread(target=self._poll, name=f"{self._group}-custody", daemon=True)
            self._poller.start()
            with self._changed:
                self._changed.wait_for(lambda: self._owned >= wanted or self._error is not None, _JOIN_S)
            self._check()
            if not self._owned >= wanted:
                others = ", ".join(map(_told, self._others())) or "nobody that the cluster names"
                raise GroupBusyError(
                    f"group {self._group} gave only {len(self._owned)} of {len(wanted)} partitions within {_JOIN_S:g} "
                    f"s; the others are with {others}. Stop its processors"
                )
            places = [TopicPartition(*place) for place in sorted(wanted)]
            for at in committed_offsets(self._kafka, self._group, consumer, places, threading.Event()):
                self._committed[at.topic, at.partition] = at
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the partitions up."""
        self._closing.set()
        if self._poller is not None:
            self._poller.join()
        if self._consumer is not None:
            self._consumer.close()
        if self._transactor is not None:
            self._transactor.close()
        self._consumer = self._poller = self._transactor = None

    @property
    def committed(self) -> Mapping[Place, TopicPartition]:
        """What the group has committed, with the finished-offset maps; a negative offset where it has nothing."""
        return self._committed

    def restored(self) -> dict[Place, Restored]:
        """What each input partition's changelog holds.

        Raises:
            StateError: one can't be read.
        """
        self._check()
        changelogs = [(changelog_topic(self._group, topic), topic, number) for topic, number in self._committed]
        found = restore(self._kafka, changelogs, timeout_s=_RESTORE_S, cancelled=threading.Event())
        return {(topic, number): found[changelog, number] for changelog, topic, number in changelogs}

    def write(
        self, messages: Mapping[Place, Sequence[Outgoing]], on_written: Callable[[int], None] = lambda _: None
    ) -> None:
        """Commit ``messages`` for the changelogs of these input partitions, in order, in as many transactions as it
        takes; ``on_written`` is told how many were in each.

        Raises:
            FencedError: somebody else has the transactional id by now.
            ClusterError: a partition was taken away, or the cluster did not take it.
        """
        for place, all_of_it in messages.items():
            for some in _slices(all_of_it):
                self._commit(place, some)
                on_written(len(some))

    def _commit(self, place: Place, messages: Sequence[Outgoing]) -> None:
        if self._transactor is None:
            slot = _SLOT if self._slot is None else self._slot
            ids = transactional_ids(self._group, slot)
            made = Transactor(*(transactional_settings(self._kafka, self._group, slot, each) for each in ids))
            made.open()
            self._transactor = made
        at = self._committed[place]
        # As a processor's first transaction does where nothing was committed.
        offset = TopicPartition(at.topic, at.partition, max(at.offset, 0), at.metadata or "")
        for left in reversed(range(_TRIES)):
            self._check()
            assert self._consumer is not None
            try:
                self._transactor.commit(messages, [offset], self._consumer.consumer_group_metadata())
                return
            except TransactionAbortedError as error:
                if not left:
                    raise ClusterError(
                        f"the changelog of {at.topic}[{at.partition}] was not written: {error}"
                    ) from error
                time.sleep(_POLL_S)

    def _check(self) -> None:
        with self._changed:
            if self._error is not None:
                raise ClusterError(f"group {self._group}: {self._error}") from self._error
            if self._lost:
                raise GroupBusyError(
                    f"partitions of group {self._group} went to a processor that has started meanwhile; stop it and "
                    "run this again"
                )

    def wait_alone(self) -> None:
        """Wait until nobody is in the group but this process's processor. Entering does so too.

        Raises:
            GroupBusyError: somebody is after 20 s; the message says whom to stop.
        """
        deadline = time.monotonic() + _LEAVE_S
        while others := self._others():
            if time.monotonic() > deadline:
                agent = self._group.rpartition(".")[2]
                raise GroupBusyError(
                    f"processors of group {self._group} work: {', '.join(map(_told, others))}. Stop them first "
                    f"(`magnatronic run {agent}` or `run agents` there), then run this again"
                )
            time.sleep(1.0)

    def _others(self) -> list[MemberDescription]:
        self._find_coordinator()
        admin = AdminClient({"log_level": 2, **self._kafka})
        deadline = time.monotonic() + _LEAVE_S
        while True:
            try:
                described = admin.describe_consumer_groups([self._group], request_timeout=_ASK_S)[self._group].result()
                break
            except KafkaException as error:
                said: KafkaError = error.args[0]
                if said.code() == KafkaError.GROUP_AUTHORIZATION_FAILED or time.monotonic() > deadline:
                    raise ClusterError(
                        f"group {self._group} can't be described: {said.name()}: {said.str()}"
                    ) from error
                time.sleep(_AGAIN_S)
        own = None if self._slot is None else instance_id(self._group, self._slot)
        mine = None if self._consumer is None else self._consumer.memberid()
        return [
            member
            for member in described.members
            if member.member_id != mine and (own is None or member.group_instance_id != own)
        ]

    def _find_coordinator(self) -> None:
        """Wait until the group's coordinator answers: a broker that has just started reads its groups first. The calls
        that ask for members don't wait for that, and end the process where it takes them too long (streams.ownerless).
        """
        consumer = Consumer({**self._kafka, "group.id": self._group, "enable.auto.commit": False})
        try:
            committed_offsets(
                self._kafka, self._group, consumer, [TopicPartition(self._topics[0], 0)], threading.Event()
            )
        finally:
            consumer.close()

    # The consumer's thread.

    def _poll(self) -> None:
        consumer = self._consumer
        assert consumer is not None
        while not self._closing.is_set():
            message = consumer.poll(_POLL_S)
            failure = None if message is None else message.error()
            if failure is not None and not passes(failure):
                with self._changed:
                    self._error = KafkaException(failure)
                    self._changed.notify_all()
                return

    def _assigned(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        # Paused, and from no offset in particular: nothing is to be fetched.
        consumer.incremental_assign(partitions)
        consumer.pause(partitions)
        with self._changed:
            self._owned |= {(at.topic, at.partition) for at in partitions}
            self._changed.notify_all()

    def _revoked(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        with self._changed:
            self._owned -= {(at.topic, at.partition) for at in partitions}
            self._lost = self._lost or (bool(self._committed) and not self._closing.is_set())
        if not self._closing.is_set():
            consumer.incremental_unassign(partitions)


def _told(member: MemberDescription) -> str:
    return f"{member.group_instance_id or member.client_id} on {member.host.lstrip('/')}"


def _slices(messages: Sequence[Outgoing]) -> list[list[Outgoing]]:
    slices: list[list[Outgoing]] = []
    size = _MOST_BYTES
    for message in messages:
        length = len(message[2] or b"") + 200
        if size + length > _MOST_BYTES or len(slices[-1]) >= _MOST_MESSAGES:
            slices.append([])
            size = 0
        slices[-1].append(message)
        size += length
    return slices
