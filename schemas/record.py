"""A record as it lies in the log, before it is decoded: the one shape that processors, sinks and replay read.

In: a Kafka client's message. Out: :class:`Record`, which :class:`schemas.codec.Codec` decodes.
"""

from collections.abc import Sequence
from typing import Protocol

from schemas.frozen import frozen

__all__ = ["Header", "KafkaMessage", "Record"]

Header = tuple[str, bytes | None]


class KafkaMessage(Protocol):
    """What a confluent_kafka ``Message`` offers, as far as it is used here."""

    def topic(self) -> str | None:
        """The topic's name."""

    def partition(self) -> int | None:
        """The partition's number."""

    def offset(self) -> int | None:
        """The offset in the partition."""

    def timestamp(self) -> tuple[int, int]:
        """Timestamp type and milliseconds since the epoch."""

    def key(self) -> bytes | None:
        """The raw key."""

    def value(self) -> bytes | None:
        """The raw value."""

    def headers(self) -> list[Header] | None:
        """The raw headers."""


@frozen
class Record:
    """A record and its place. ``timestamp_ms`` is the broker's append time, in milliseconds since the epoch."""

    topic: str
    partition: int
    offset: int
    timestamp_ms: int
    key: bytes | None
    value: bytes | None
    headers: Sequence[Header] = ()

    @classmethod
    def from_message(cls, message: KafkaMessage) -> "Record":
        """The record that a consumer's message carries."""
        return cls(
            message.topic() or "",
            message.partition() or 0,
            message.offset() or 0,
            message.timestamp()[1],
            message.key(),
            message.value(),
            message.headers() or (),
        )
