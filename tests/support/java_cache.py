"""Kafka's classes, loaded and linked ahead of time (JEP 514), so that the suite's hundred JVMs start twice as fast.

In: a broker, which is started, used and stopped. Out: :data:`CACHE`, beside the packages that it was made with; what
runs the tests has every JVM take it (tests/conftest.py). A JVM that it does not fit starts without it.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

from confluent_kafka import Consumer, Producer, TopicPartition

from magnatronic.broker import EmbeddedBroker, TopicSpec, create_topics
from magnatronic.broker.java import find_java
from magnatronic.broker.node import KAFKA_JARS, NodeFiles

__all__ = ["CACHE", "JAVA_OPTIONS", "make", "options"]

CACHE: Final = Path(sys.prefix) / "kafka.aot"
JAVA_OPTIONS: Final = "JDK_JAVA_OPTIONS"
"""What every ``java`` reads before its arguments."""

_CLASSES_ONLY: Final = (
    "-XX:+IgnoreUnrecognizedVMOptions -XX:+UnlockDiagnosticVMOptions -XX:-AOTAdapterCaching -XX:-AOTStubCaching"
)
"""Machine code in the cache is for the same processor and options only; Java 25 warns of it at each start."""

_OLDEST_JAVA: Final = 25
_TOPIC: Final = "t"


def options() -> dict[str, str]:
    """Environment variables by which JVMs take the cache; none where there is none."""
    made = CACHE.exists() and CACHE.stat().st_size > 0
    return {JAVA_OPTIONS: f"{_CLASSES_ONLY} -XX:AOTCache={CACHE}"} if made else {}


def make() -> None:
    """Write the cache; an empty file where Java is too old for it.

    Raises:
        BrokerError: no broker can be had, or it can't be started.
        subprocess.CalledProcessError: Java could not write the cache.
    """
    java = find_java()
    if java.version < _OLDEST_JAVA:
        CACHE.write_bytes(b"")
        return
    with tempfile.TemporaryDirectory() as folder:
        data_dir, recorded = Path(folder) / "kafka", Path(folder) / "recorded"
        with EmbeddedBroker(data_dir):
            pass  # Formats the folder, which is a program of its own.
        os.environ[JAVA_OPTIONS] = f"{_CLASSES_ONLY} -XX:AOTMode=record -XX:AOTConfiguration={recorded}"
        with EmbeddedBroker(data_dir) as broker:
            _use(broker.bootstrap_servers)
        os.environ[JAVA_OPTIONS] = (
            f"{_CLASSES_ONLY} -XX:AOTMode=create -XX:AOTConfiguration={recorded} -XX:AOTCache={CACHE}"
        )
        command = NodeFiles(data_dir).command(java, KAFKA_JARS.fetch() / "*", "-Xmx512m", "kafka.Kafka")
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _use(servers: str) -> None:
    """What nearly every test has a broker do: a topic, a transaction with offsets, a group's member."""
    config = {"bootstrap.servers": servers, "log_level": 0}
    create_topics(config, [TopicSpec(_TOPIC, 1)], replication_factor=1)
    consumer = Consumer({**config, "group.id": "g", "auto.offset.reset": "earliest"})
    producer = Producer({**config, "transactional.id": "p"})
    producer.init_transactions(30)
    try:
        consumer.subscribe([_TOPIC])
        for last in (False, True):
            producer.begin_transaction()
            producer.produce(_TOPIC, b"v")
            if last:
                offsets = [TopicPartition(_TOPIC, 0, 1)]
                producer.send_offsets_to_transaction(offsets, consumer.consumer_group_metadata(), 30)
            producer.commit_transaction(30)
            assert consumer.poll(30) is not None
    finally:
        consumer.close()


if __name__ == "__main__":
    make()
