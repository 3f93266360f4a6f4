"""The state store: each lane's state in memory, its changes in a compacted changelog beside the input topic.

In: lane states as they lie in the changelog, and what steps make of them. Out: each lane's state for its next event,
the bytes for the changelog, and the changelogs themselves as topics. State is disposable: it lives in memory only, and
a partition's next owner restores it (:mod:`streams.restore`) from the changelog, which compaction keeps near one record
a key. Most lanes are idle: a finished task's marker stays for a month. So a lane's state is kept as the bytes that lie
in the changelog, and parsed when an event asks.
"""

import re
import time
from base64 import b64encode
from collections.abc import Collection, Mapping
from datetime import UTC, datetime, timedelta
from heapq import heapify, heappop, heappush
from typing import Any, Final, Generic, TypeVar

import orjson
from confluent_kafka import (
    KafkaError,
    KafkaException,
)
from confluent_kafka.admin import AclOperation, AdminClient, NewTopic, TopicMetadata
from pydantic import BaseModel, ConfigDict, ValidationError

from agents.step import LaneState
from schemas.encryption import Cipher
from schemas.personal import blank
from streams.access import denied, lacking, refusal
from streams.errors import ClusterError, MissingTopicError, StateError
from streams.kafka import MAX_MESSAGE_BYTES

__all__ = ["CHANGELOG_CONFIG", "StateCodec", "StateStore", "changelog_topic", "ensure_changelogs"]

CHANGELOG_CONFIG: Final[Mapping[str, str]] = {
    "cleanup.policy": "compact",
    # Small, short-lived segments: only closed ones are compacted, and a restore reads what is not yet.
    "segment.bytes": str(32 * 1024 * 1024),
    "segment.ms": str(10 * 60 * 1000),
    "min.cleanable.dirty.ratio": "0.1",
    # How long a restore may take without missing a tombstone.
    "delete.retention.ms": str(24 * 3600 * 1000),
    # Effects and parked events lie there too, with their headers.
    "max.message.bytes": str(MAX_MESSAGE_BYTES),
}

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)
_METADATA_TIMEOUT_S: Final = 30.0
_KNOWN_S: Final = 3.0
_KNOWN_POLL_S: Final = 0.1
_PARSED_BYTES: Final = 1024 * 1024
_EXPIRED_AT_ONCE: Final = 5_000
_HEAD: Final = re.compile(rb'\{"v":[12],"now":(-?\d+),"expires":(-?\d+|null),')
"""What :meth:`StateCodec.dump` begins with: the times are had without parsing the model."""
_LIFE_SHIFT: Final = 11

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
    subjects: tuple[str, ...] = ()
    value: ModelT
    sealed: bytes = b""


class StateCodec:
    """Lane states to changelog values and back: JSON, readable with any consumer, versioned by ``v``.

    ``state_type`` is the agent's model; it may gain fields that have defaults. What is about data subjects is version
    2: it names them, and what is personal in it is blank in ``value``, which lies whole in ``sealed`` (``cipher``).
    """

    def __init__(self, state_type: type[BaseModel], cipher: Cipher | None = None) -> None:
        self._state_type = state_type
        self._stored = _Stored[state_type]  # type: ignore[valid-type]
        self._cipher = cipher

    def dump(self, state: LaneState) -> bytes:
        """The changelog value of ``state``.

        Raises:
            SubjectForgottenError: it is about a data subject whose key was destroyed.
            KeyStoreError: a data subject's key can't be had.
        """
        if state.data_subjects:
            return self._dump_sealed(state)
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
            said = error.errors(include_url=False, include_input=False)[:2]
            raise StateError(f"a changelog value can't be read as state: {said}") from None
        if stored.v not in (1, 2):
            raise StateError(f"a changelog value has version {stored.v}, written by a later release; upgrade this one")
        value, erased = (stored.value, False) if not stored.sealed else self._open(stored)
        expires_at = None if stored.expires is None else _EPOCH + timedelta(microseconds=stored.expires)
        return LaneState(value, _EPOCH + timedelta(microseconds=stored.now), expires_at, stored.subjects, erased)

    def _dump_sealed(self, state: LaneState) -> bytes:
        bare = blank(state.value)
        stored = {
            "v": 2,
            "now": _micros(state.now),
            "expires": None if state.expires_at is None else _micros(state.expires_at),
            "subjects": state.data_subjects,
            "value": bare.model_dump(mode="json"),
        }
        if bare is not state.value:
            if self._cipher is None:
                raise StateError("a state about data subjects can't be kept without a key store")
            sealed = self._cipher.seal(state.data_subjects, self._bound, state.value.model_dump_json().encode())
            stored["sealed"] = b64encode(sealed).decode()
        return orjson.dumps(stored)

    def _open(self, stored: "_Stored[Any]") -> tuple[BaseModel, bool]:
        try:
            plain = None if self._cipher is None else self._cipher.open(stored.subjects, self._bound, stored.sealed)
            return (stored.value, True) if plain is None else (self._state_type.model_validate_json(plain), False)
        except ValueError as error:
            said = (
                error.errors(include_url=False, include_input=False)[:2]
                if isinstance(error, ValidationError)
                else error
            )
            raise StateError(f"a changelog value's sealed state can't be opened: {said}") from None

    @property
    def _bound(self) -> tuple[bytes, ...]:
        return b"state", self._state_type.__qualname__.encode()


def _micros(time: datetime) -> int:
    return (time - _EPOCH) // _MICROSECOND


class StateStore:
    """The lane states of one input partition. It takes ``states``, values of ``codec`` by lane, as its own.

    Expiry goes by record time, as for the events themselves (:func:`agents.step.live_state`), never by the clock: what
    is forgotten here is what no event of the partition would see any more.

    A lane's state is kept as bytes; of what was used last, a few MiB are kept parsed, in two generations: what is used
    goes into the young one, and when that is full it becomes the old one, whose states are forgotten unless they
    are used again. A lane that expires is filed under a time at or after its expiry; it is looked at then, and filed
    again if it was given longer by now. That takes 8 bytes a lane, and no change of order.
    """

    __slots__ = ("_codec", "_ends", "_filed", "_old", "_raw", "_young", "_young_bytes")

    def __init__(self, codec: StateCodec | None = None, states: dict[str, bytes] | None = None) -> None:
        """``codec`` is None for an agent without state.

        Raises:
            StateError: a value is none of this release's.
        """
        self._codec = codec
        self._raw: dict[str, bytes] = {} if states is None else states
        self._young: dict[str, LaneState] = {}
        self._old: dict[str, LaneState] = {}
        self._young_bytes = 0
        # By the second since the epoch at whose beginning all of them are past their expiry; and a heap of the keys.
        self._filed: dict[int, list[str]] = {}
        self._ends: list[int] = []
        if codec is not None:
            self._file_all()

    def _file_all(self) -> None:
        filed, match = self._filed, _HEAD.match
        for lane, raw in self._raw.items():
            head = match(raw)
            if head is None:
                now, expires = self._times(lane, raw)
            elif (found := head[2]) == b"null":
                continue
            else:
                now, expires = int(head[1]), int(found)
            if expires is not None:
                filed.setdefault(_end_of(now, expires), []).append(lane)
        self._ends = list(filed)
        heapify(self._ends)

    def __len__(self) -> int:
        """How many lanes have state."""
        return len(self._raw)

    def get(self, lane: str) -> LaneState | None:
        """The lane's state, which may be past its expiry (see :func:`agents.step.live_state`).

        Raises:
            StateError: what lies in the changelog is none of the agent's model.
        """
        state = self._young.get(lane)
        if state is not None:
            return state
        raw = self._raw.get(lane)
        if raw is None or self._codec is None:
            return None
        state = self._old.get(lane)
        if state is None:
            state = self._load(lane, raw)
        self._keep(lane, state, raw)
        return state

    def set(self, lane: str, state: LaneState | None, raw: bytes | None = None) -> None:
        """Put or delete the lane's state. ``raw`` is what the codec made of it for the changelog; made here if None."""
        if state is None:
            self._raw.pop(lane, None)
            self._young.pop(lane, None)
            self._old.pop(lane, None)
            return
        if raw is None:
            if self._codec is None:
                raise StateError(f"lane {lane!r} can't have state: its agent has no `state_type`")
            raw = self._codec.dump(state)
        if state.expires_at is not None:
            self._file(lane, state.now, state.expires_at)
        self._raw[lane] = raw
        self._keep(lane, state, raw)

    def _keep(self, lane: str, state: LaneState, raw: bytes) -> None:
        self._young[lane] = state
        self._young_bytes += len(raw)
        if self._young_bytes > _PARSED_BYTES:
            self._old, self._young, self._young_bytes = self._young, {}, 0

    def _file(self, lane: str, now: datetime, expires_at: datetime) -> None:
        """See to it that the lane is filed, at its expiry or before."""
        before = self._young.get(lane)
        if before is not None:
            if before.expires_at is not None and before.expires_at <= expires_at:
                return
        elif (raw := self._raw.get(lane)) is not None:
            _, filed_for = self._times(lane, raw)
            if filed_for is not None and filed_for <= _micros(expires_at):
                return
        since_epoch, life = expires_at - _EPOCH, expires_at - now
        expires_s = since_epoch.days * 86_400 + since_epoch.seconds + 1
        self._put(_end(life.days * 86_400 + life.seconds, expires_s), lane)

    def _put(self, end: int, lane: str) -> None:
        filed = self._filed.get(end)
        if filed is None:
            self._filed[end] = [lane]
            heappush(self._ends, end)
        else:
            filed.append(lane)

    def _times(self, lane: str, raw: bytes) -> tuple[int, int | None]:
        """The state's last decision time and its expiry, in microseconds since the epoch."""
        head = _HEAD.match(raw)
        if head is not None:
            return int(head[1]), None if head[2] == b"null" else int(head[2])
        state = self._load(lane, raw)
        return _micros(state.now), None if state.expires_at is None else _micros(state.expires_at)

    def _load(self, lane: str, raw: bytes) -> LaneState:
        assert self._codec is not None
        try:
            return self._codec.load(raw)
        except StateError as error:
            raise StateError(f"lane {lane!r}: {error}") from error

    def expire(self, timestamp_ms: int, busy: Collection[str]) -> list[str]:
        """Forget states that are past their expiry at this record time, and return their lanes, to be tombstoned.

        A state is forgotten at the latest a second, or a two-thousandth of its life, after its expiry, and 5,000 at a
        time: the others come up with the next call. ``busy`` lanes have events waiting, which may be older; theirs
        come up again later.
        """
        expired: list[str] = []
        again: list[tuple[int, str]] = []
        while self._ends and self._ends[0] * 1000 <= timestamp_ms and len(expired) < _EXPIRED_AT_ONCE:
            end = self._ends[0]
            lanes = self._filed[end]
            while lanes and len(expired) < _EXPIRED_AT_ONCE:
                lane = lanes.pop()
                raw = self._raw.get(lane)
                if raw is None:
                    continue
                now, expires = self._times(lane, raw)
                if expires is None:
                    continue
                if expires > timestamp_ms * 1000:
                    again.append((_end_of(now, expires), lane))
                elif lane in busy:
                    again.append((end, lane))
                else:
                    self.set(lane, None)
                    expired.append(lane)
            if not lanes:
                heappop(self._ends)
                del self._filed[end]
        for end, lane in dict.fromkeys(again):
            self._put(end, lane)
        return expired


def _end(life_s: int, expires_s: int) -> int:
    """Under which second a state is filed that lives so long from its last decision, to that second since the epoch.

    Never before its expiry, and few different ones, or a heap of a million would be had for a month's markers.
    """
    step = 1 << (life_s >> _LIFE_SHIFT).bit_length()
    return -(-expires_s // step) * step


def _end_of(now: int, expires: int) -> int:
    """The same from microseconds since the epoch."""
    return _end((expires - now) // 1_000_000, -(-expires // 1_000_000))


def _topics(admin: AdminClient, wanted: Collection[str]) -> tuple[dict[str, TopicMetadata], list[str]]:
    """All topics, and which of ``wanted`` are not among them; a topic is known a moment after it was created."""
    deadline = time.monotonic() + _KNOWN_S
    while True:
        known: dict[str, TopicMetadata] = admin.list_topics(timeout=_METADATA_TIMEOUT_S).topics
        missing = sorted(set(wanted) - known.keys())
        if not missing or time.monotonic() > deadline:
            return known, missing
        time.sleep(_KNOWN_POLL_S)


def ensure_changelogs(kafka: Mapping[str, Any], group: str, topics: Collection[str]) -> bool:
    """See to it that the input ``topics`` exist and that each has its changelog; whether one is new.

    A changelog has its input's number of partitions and copies. Blocks.

    Raises:
        MissingTopicError: an input topic does not exist.
        StateError: a changelog has another number of partitions than its input.
        AccessError: an input topic is hidden from this user, or a changelog is missing and it may not create it.
        ClusterError: the cluster did not answer or refused.
    """
    admin = AdminClient(dict(kafka))
    try:
        known, missing = _topics(admin, topics)
        if missing:
            if lacks := lacking(kafka, {topic: [AclOperation.READ] for topic in missing}):
                raise refusal(group, kafka, lacks.values())
            raise MissingTopicError(
                f"{group} reads {', '.join(missing)}, which the cluster lacks; create the topics first"
            )
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
                cause: KafkaError = error.args[0]
                if cause.code() != KafkaError.TOPIC_ALREADY_EXISTS:
                    refused = denied(group, kafka, cause, topic=changelog, to="CREATE")
                    raise refused or ClusterError(f"can't create {changelog}: {cause.str()}") from error
        return bool(new)
    except KafkaException as error:
        raise ClusterError(f"{group}: the cluster's topics can't be had: {error.args[0].str()}") from error
