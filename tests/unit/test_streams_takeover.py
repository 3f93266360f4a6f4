"""Committed offsets are asked for until the group's coordinator is there."""

import threading
from typing import Any

import pytest
from confluent_kafka import KafkaError, KafkaException, TopicPartition

from streams import takeover
from streams.errors import ClusterError, RestoreCancelledError


class Offsets:
    """Answers as a consumer whose coordinator has trouble so often."""

    def __init__(self, *troubles: int) -> None:
        self.troubles = list(troubles)

    def committed(self, partitions: list[TopicPartition], timeout: float) -> list[TopicPartition]:
        if self.troubles:
            raise KafkaException(KafkaError(self.troubles.pop(0)))
        return [TopicPartition(at.topic, at.partition, 7) for at in partitions]


class ReachedError(Exception):
    """The offsets are known; the restore begins."""


@pytest.fixture
def take_over(monkeypatch: pytest.MonkeyPatch) -> Any:
    def restore(*_: Any, **__: Any) -> None:
        raise ReachedError

    def take_over(offsets: Offsets, cancelled: threading.Event | None = None) -> None:
        at = [TopicPartition("topic", 0)]
        takeover.take_over({}, "group", offsets, at, None, cancelled=cancelled or threading.Event())

    monkeypatch.setattr(takeover, "restore", restore)
    return take_over


def test_a_coordinator_that_moves_is_waited_for(take_over: Any) -> None:
    moving = Offsets(
        KafkaError.NOT_COORDINATOR,
        KafkaError.COORDINATOR_NOT_AVAILABLE,
        KafkaError.COORDINATOR_LOAD_IN_PROGRESS,
        KafkaError._TIMED_OUT,
    )
    with pytest.raises(ReachedError):
        take_over(moving)
    assert moving.troubles == []


def test_other_errors_and_a_cancelled_restore_end_it(take_over: Any) -> None:
    with pytest.raises(ClusterError, match="committed offsets can't be had"):
        take_over(Offsets(KafkaError.INVALID_GROUP_ID))
    cancelled = threading.Event()
    cancelled.set()
    with pytest.raises(RestoreCancelledError):
        take_over(Offsets(KafkaError.NOT_COORDINATOR), cancelled)
