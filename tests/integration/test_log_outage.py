"""A log that stops answering while it is read."""

import os
import signal
from pathlib import Path

import pytest
from confluent_kafka import Producer

from magnatronic.broker import EmbeddedBroker, TopicSpec, create_topics
from replay.errors import LogReadError
from replay.kafka_log import KafkaLog
from replay.selection import Selection

RECORDS, PARTITIONS = 6000, 3


def test_silence_is_an_error_and_the_read_goes_on_later(tmp_path: Path) -> None:
    with EmbeddedBroker(tmp_path / "kafka") as broker:
        kafka = {"bootstrap.servers": broker.bootstrap_servers, "log_level": 0}
        create_topics(kafka, [TopicSpec("t", PARTITIONS)], replication_factor=1)
        producer = Producer(kafka)
        for number in range(RECORDS):
            producer.produce("t", os.urandom(1000), partition=number % PARTITIONS)
            producer.poll(0)
        assert producer.flush(30) == 0
        selection = Selection(topics=frozenset({"t"}))
        little = {"queued.max.messages.kbytes": 200, "fetch.message.max.bytes": 50_000}
        with KafkaLog({**kafka, **little}, idle_timeout_s=1.5) as log:
            reading = log.read(selection)
            batches = [next(reading)]
            os.kill(broker.pid, signal.SIGSTOP)
            try:
                with pytest.raises(LogReadError, match=r"nothing came for 1\.5 s.*not at their end: t/"):
                    batches += reading
                seen = {(record.partition, record.offset) for batch in batches for record in batch.records}
                assert 0 < len(seen) < RECORDS
                with pytest.raises(LogReadError, match="reading t: "):
                    log.spans(["t"])
            finally:
                os.kill(broker.pid, signal.SIGCONT)
        with KafkaLog(kafka) as log:
            for later in log.read(selection, start=batches[-1].positions):
                again = {(record.partition, record.offset) for record in later.records}
                assert not again & seen
                seen |= again
    assert len(seen) == RECORDS
