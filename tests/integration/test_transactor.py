"""What a transaction's end means when the group knows its member by another id."""

import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING

import pytest
from confluent_kafka import Consumer, TopicPartition

from streams.errors import FencedError, TransactionAbortedError
from streams.kafka import consumer_settings, transactional_settings
from streams.transactor import Transactor

if TYPE_CHECKING:
    from tests.conftest import KafkaForTests


@contextmanager
def member(kafka: "KafkaForTests", group: str, topic: str) -> Iterator[Consumer]:
    """A member of the group in slot 0, which it does not give up when it ends."""
    consumer = Consumer(consumer_settings(kafka.config, group, 0))
    consumer.subscribe([topic])
    deadline = time.monotonic() + 30
    while not consumer.assignment():
        consumer.poll(0.1)
        assert time.monotonic() < deadline
    try:
        yield consumer
    finally:
        consumer.close()


def test_a_transaction_of_the_own_consumers_earlier_membership_may_be_tried_again(kafka: "KafkaForTests") -> None:
    """A consumer whose session ran out joins again, as a static member with a new id, and nobody else is to blame."""
    group, source, target = kafka.unique("group"), kafka.topic("source"), kafka.topic("target")
    with closing(Transactor(transactional_settings(kafka.config, group, 0))) as transactor:
        transactor.open()
        with member(kafka, group, source) as before:
            earlier = before.consumer_group_metadata()
        with member(kafka, group, source) as again:
            messages = [(target, b"k", b"v", None, -1)]
            offsets = [TopicPartition(source, 0, 1)]
            with pytest.raises(TransactionAbortedError, match="FENCED_INSTANCE_ID"):
                transactor.commit(messages, offsets, earlier)
            transactor.commit(messages, offsets, again.consumer_group_metadata())
            (committed,) = again.committed([TopicPartition(source, 0)], timeout=20)
            assert committed.offset == 1


def test_another_process_in_the_slot_fences_for_good(kafka: "KafkaForTests") -> None:
    group, source, target = kafka.unique("group"), kafka.topic("source"), kafka.topic("target")
    with (
        closing(Transactor(transactional_settings(kafka.config, group, 0))) as transactor,
        closing(Transactor(transactional_settings(kafka.config, group, 0))) as other,
    ):
        transactor.open()
        with member(kafka, group, source) as consumer:
            metadata = consumer.consumer_group_metadata()
            other.open()
            with pytest.raises(FencedError, match="another process runs with this slot"):
                transactor.commit([(target, b"k", b"v", None, -1)], [TopicPartition(source, 0, 1)], metadata)
