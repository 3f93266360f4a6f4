"""The state store: each lane's state in memory, its changes in a compacted changelog beside the input topic.

In: a partition's changelog, up to what the committed offset stands for. Out: the lanes' states, and changelog records
for their changes, which the processor commits in the transaction that carries the offset. State is disposable: it
lives in memory only, and a partition's next owner restores it from the changelog, which compaction keeps near one
record a lane.
"""

import time
from collections.abc import Collection, Iterable, Mapping
from datetime import UTC, datetime, timedelta
from heapq import heapify, heappop, heappush
from typing import Any, Final, Generic, TypeVar
from uuid import uuid4

from confluent_kafka import (
    OFFSET_BEGINNING,
    Consumer,
    IsolationLevel,
    KafkaError,
    KafkaException,
    Message,
    TopicPartition,
)
from confluent_kafka.admin import AdminClient, NewTopic, OffsetSpec
from pydantic import BaseModel, ConfigDict, ValidationError

from agents.step import LaneState
from streams.errors import ClusterError, MissingTopicError, StateError
from streams.kafka import reader_settings

__all__ = ["CHANGELOG_CONFIG", "StateCodec", "StateStore", "changelog_topic", "ensure_changelogs", "restore"]

CHANGELOG_CONFIG: Final[Mapping[str, str]] = {
    "cleanup.policy": "compact",
    # Small, short-lived segments: only closed ones are compacted, and a restore reads what is not yet.
    "segment.bytes": str(32 * 1024 * 1024),
    "segment.ms": str(10 * 60 * 1000),
    "min.cleanable.dirty.ratio": "0.1",
    # How long a restore may take without missing a tombstone.
    "delete.retention.ms": str(24 * 3600 * 1000),
}

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)
_METADATA_TIMEOUT_S: Final = 30.0
_LEADER_TIMEOUT_S: Final = 30.0
_LEADER_POLL_S: Final = 0.05
_NO_LEADER_YET: Final = frozenset(
    {
        KafkaError.LEADER_NOT_AVAILABLE,
        KafkaError.NOT_LEADER_FOR_PARTITION,
        KafkaError.UNKNOWN_TOPIC_OR_PART,
        KafkaError._UNKNOWN_PARTITION,
        KafkaError._UNKNOWN_TOPIC,
        KafkaError._NOENT,  # list_offsets' "No leaders found"
    }
)
"""What a broker says of a topic that was created a moment ago, or of a partition whose leader has just gone."""
_BATCH: Final = 2000

ModelT = TypeVar("ModelT", bound=BaseModel)


def changelog_topic(group: str, topic: str) -> str:
    """The changelog of ``group``'s state beside the input ``topic``: ``<group>.<topic>.changelog``."""
    return f"{group}.{topic}.changelog"


class _Stored(BaseModel, Generic[ModelT]):
    """A changelog record's value. Times are microseconds since the epoch. Unknown fields are a later release's."""

    model_config = ConfigDict(frozen=True, ser_json_bytes="base64", val_json_bytes="base64")

    v: int
    now: int
    expires: int | None = None
    value: ModelT


class StateCodec:
    """Lane states to changelog values and back: JSON, readable with any consumer, versioned by ``v``.

    ``state_type`` is the agent's model; it may gain fields that have defaults.
    """

    def __init__(self, state_type: type[BaseModel]) -> None:
        self._stored = _Stored[state_type]  # type: ignore[valid-type]

    def dump(self, state: LaneState) -> bytes:
        """The changelog value of ``state``."""
        expires = b"null" if state.expires_at is None else b"%d" % _micros(state.expires_at)
        value: str = state.value.model_dump_json()
        return b'{"v":1,"now":%d,"expires":%b,"value":%b}' % (_micros(state.now), expires, value.encode())

    def load(self, data: bytes) -> LaneState:
        """The state that ``data`` holds.

        Raises:
            StateError: it is none of this model.
        """
        try:
            stored = self._stored.model_validate_json(data)
        except ValidationError as error:
            raise StateError(
                f"a changelog value can't be read as state: {error.errors(include_url=False)[:2]}"
            ) from error
        if stored.v != 1:
            raise StateError(f"a changelog value has version {stored.v}, written by a later release; upgrade this one")
        expires_at = None if stored.expires is None else _EPOCH + timedelta(microseconds=stored.expires)
        return LaneState(stored.value, _EPOCH + timedelta(microseconds=stored.now), expires_at)


def _micros(time: datetime) -> int:
    return (time - _EPOCH) // _MICROSECOND


class StateStore:
    """The lane states of one input partition.

    Expiry goes by record time, as for the events themselves (:func:`agents.step.live_state`), never by the clock: what
    is forgotten here is what no event of the partition would see any more.
    """

    __slots__ = ("_expiring", "_states")

    def __init__(self, states: Mapping[str, LaneState] | None = None) -> None:
        self._states: dict[str, LaneState] = dict(states or {})
        # A heap; entries whose lane has another expiry by now are stale and fall out when they come up.
        self._expiring = [
            (state.expires_at, lane) for lane, state in self._states.items() if state.expires_at is not None
        ]
        heapify(self._expiring)

    def __len__(self) -> int:
        """How many lanes have state."""
        return len(self._states)

    def get(self, lane: str) -> LaneState | None:
        """The lane's state, which may be past its expiry (see :func:`agents.step.live_state`)."""
        return self._states.get(lane)

    def set(self, lane: str, state: LaneState | None) -> None:
        """Put or delete the lane's state."""
        if state is None:
            self._states.pop(lane, None)
            return
        self._states[lane] = state
        if state.expires_at is not None:
            heappush(self._expiring, (state.expires_at, lane))

    def expire(self, timestamp_ms: int, busy: Collection[str]) -> list[str]:
        """Forget the states that are past their expiry at this record time, and return their lanes, to be tombstoned.

        ``busy`` lanes have events waiting, which may be older; theirs come up again later.
        """
        now = _EPOCH + timedelta(milliseconds=timestamp_ms)
        expired, later = [], []
        while self._expiring and self._expiring[0][0] <= now:
            entry = heappop(self._expiring)
            state = self._states.get(entry[1])
            if state is None or state.expires_at != entry[0]:
                continue
            if entry[1] in busy:
                later.append(entry)
            else:
                del self._states[entry[1]]
                expired.append(entry[1])
        for entry in later:
            heappush(self._expiring, entry)
        return expired


def ensure_changelogs(kafka: Mapping[str, Any], group: str, topics: Iterable[str], *, stateful: bool) -> None:
    """See to it that the input ``topics`` exist and, for a stateful agent, that each has its changelog.

    A changelog has its input's number of partitions and copies. Blocks.

    Raises:
        MissingTopicError: an input topic does not exist.
        StateError: a changelog has another number of partitions than its input.
        ClusterError: the cluster did not answer or refused.
    """
    admin = AdminClient(dict(kafka))
    try:
        known = admin.list_topics(timeout=_METADATA_TIMEOUT_S).topics
        missing = sorted(set(topics) - known.keys())
        if missing:
            raise MissingTopicError(
                f"{group} reads {', '.join(missing)}, which the cluster lacks; create the topics first"
            )
        if not stateful:
            return
        wanted = {changelog_topic(group, topic): topic for topic in topics}
        new = []
        for changelog, topic in wanted.items():
            partitions = known[topic].partitions
            if changelog not in known:
                copies = max(len(partition.replicas) for partition in partitions.values())
                new.append(NewTopic(changelog, len(partitions), copies, config=dict(CHANGELOG_CONFIG)))
            elif len(known[changelog].partitions) != len(partitions):
                raise StateError(
                    f"{topic} has {len(partitions)} partitions and {changelog} {len(known[changelog].partitions)}; "
                    "keys would no longer find their state. Rebuild the group from its beginning"
                )
        for changelog, future in admin.create_topics(new, operation_timeout=_METADATA_TIMEOUT_S).items() if new else ():
            try:
                future.result(_METADATA_TIMEOUT_S)
            except KafkaException as error:
                if error.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:
                    raise ClusterError(f"can't create {changelog}: {error.args[0].str()}") from error
    except KafkaException as error:
        raise ClusterError(f"{group}: the cluster's topics can't be had: {error.args[0].str()}") from error


def restore(
    kafka: Mapping[str, Any],
    partitions: Iterable[tuple[str, int]],
    codec: StateCodec,
    *,
    timeout_s: float,
) -> dict[tuple[str, int], dict[str, LaneState]]:
    """Read changelog ``partitions`` and return their lanes' states. Blocks; the time is bounded by the live lanes.

    Call it after the group's committed offsets were fetched (which waits for open transactions). Their commit markers
    may reach the changelog a little later than the offsets, so it is read to where its high watermark was, however
    long the last stable offset takes to get there: a dead owner's open transaction ends at its timeout.

    Raises:
        StateError: the changelog can't be read as this agent's state.
        ClusterError: the cluster did not answer within ``timeout_s`` seconds.
    """
    places = [TopicPartition(topic, partition, OFFSET_BEGINNING) for topic, partition in partitions]
    if not places:
        return {}
    deadline = time.monotonic() + timeout_s
    try:
        ends = _high_watermarks(kafka, places, deadline)
        consumer = Consumer(reader_settings(kafka, f"restore-{uuid4()}"))
        try:
            return _read(consumer, ends, codec, deadline)
        finally:
            consumer.close()
    except KafkaException as error:
        raise ClusterError(f"changelogs can't be read: {error.args[0].str()}") from error


def _high_watermarks(
    kafka: Mapping[str, Any], places: list[TopicPartition], deadline: float
) -> dict[tuple[str, int], int]:
    admin = AdminClient(dict(kafka))  # bound: a client that is collected takes its unanswered requests with it
    leaders_by = min(deadline, time.monotonic() + _LEADER_TIMEOUT_S)
    ends: dict[tuple[str, int], int] = {}
    wanted = {TopicPartition(place.topic, place.partition): OffsetSpec.latest() for place in places}
    while True:
        left = max(deadline - time.monotonic(), 1.0)
        futures = admin.list_offsets(wanted, isolation_level=IsolationLevel.READ_UNCOMMITTED, request_timeout=left)
        leaderless = {}
        for place, future in futures.items():
            try:
                ends[place.topic, place.partition] = future.result().offset
            except KafkaException as error:
                if error.args[0].code() not in _NO_LEADER_YET or time.monotonic() > leaders_by:
                    raise
                leaderless[place] = wanted[place]
        if not leaderless:
            return ends
        wanted = leaderless
        time.sleep(_LEADER_POLL_S)


def _read(
    consumer: Consumer, ends: Mapping[tuple[str, int], int], codec: StateCodec, deadline: float
) -> dict[tuple[str, int], dict[str, LaneState]]:
    raw: dict[tuple[str, int], dict[str, bytes]] = {place: {} for place in ends}
    waiting = {place for place, end in ends.items() if end > 0}
    consumer.assign([TopicPartition(topic, partition, OFFSET_BEGINNING) for topic, partition in waiting])
    while waiting:
        if time.monotonic() > deadline:
            raise ClusterError(f"the changelogs {sorted(waiting)} did not come to their end in time; is a broker down?")
        first = consumer.poll(0.5)
        for message in [] if first is None else [first, *consumer.consume(_BATCH, 0)]:
            place = message.topic(), message.partition()
            error = message.error()
            if error is None:
                _apply(raw[place], message)
            elif error.code() != KafkaError._PARTITION_EOF:
                if not error.retriable() and error.code() not in _NO_LEADER_YET:
                    raise KafkaException(error)
            elif message.offset() >= ends[place]:
                waiting.discard(place)
    # Only what is live is parsed: of the same lane's many records, the last.
    return {place: {lane: codec.load(value) for lane, value in lanes.items()} for place, lanes in raw.items()}


def _apply(lanes: dict[str, bytes], message: Message) -> None:
    key, value = message.key(), message.value()
    if key is None:
        raise StateError(f"{message.topic()}[{message.partition()}]@{message.offset()} has no key; who wrote it?")
    if value is None:
        lanes.pop(key.decode(), None)
    else:
        lanes[key.decode()] = value
