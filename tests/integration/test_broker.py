"""The embedded broker on the real JVM: restarts, crashes, owners that die, folders in use, topics."""

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from confluent_kafka import Consumer, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, ConfigResource

from magnatronic.broker import (
    DataFolderInUseError,
    EmbeddedBroker,
    JavaProcessError,
    TopicError,
    TopicSpec,
    create_topics,
    ensure_topics,
)
from magnatronic.broker.process import free_ports
from schemas.topics import all_topics

if TYPE_CHECKING:
    from tests.conftest import KafkaForTests

QUIET = {"log_level": 0}


def _produce(bootstrap_servers: str, topic: str, values: list[bytes]) -> None:
    producer = Producer({"bootstrap.servers": bootstrap_servers, "acks": "all", **QUIET})
    for value in values:
        producer.produce(topic, value, partition=0)
    assert producer.flush(20) == 0


def _read(bootstrap_servers: str, topic: str, count: int) -> list[bytes | None]:
    consumer = Consumer({"bootstrap.servers": bootstrap_servers, "group.id": "reader", **QUIET})
    try:
        consumer.assign([TopicPartition(topic, 0, 0)])
        return [message.value() for message in consumer.consume(count, timeout=20)]
    finally:
        consumer.close()


def _cluster_id(bootstrap_servers: str) -> str:
    return str(AdminClient({"bootstrap.servers": bootstrap_servers, **QUIET}).list_topics(timeout=10).cluster_id)


def _wait_until_down(broker: EmbeddedBroker) -> None:
    deadline = time.monotonic() + 20
    while broker.running:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_data_outlives_restart_crash_and_change_of_ports(tmp_path: Path) -> None:
    broker = EmbeddedBroker(tmp_path / "kafka")
    with broker:
        first = broker.bootstrap_servers
        cluster = _cluster_id(first)
        config = {"bootstrap.servers": first}
        create_topics(config, [TopicSpec("kept", 1)], replication_factor=1)
        _produce(first, "kept", [b"1", b"2"])
        with pytest.raises(DataFolderInUseError, match=f"in use by process {os.getpid()}; stop that one"):
            EmbeddedBroker(tmp_path / "kafka").start()
        with pytest.raises(DataFolderInUseError, match="runs already"):
            broker.start()
        assert broker.running
    with pytest.raises(JavaProcessError, match="not running"):
        _ = broker.bootstrap_servers

    broker.start()
    second = broker.bootstrap_servers
    assert _cluster_id(second) == cluster
    assert second != first
    _produce(second, "kept", [b"3"])
    os.kill(broker.pid, signal.SIGKILL)
    _wait_until_down(broker)

    # Nobody stopped it: a new start puts the dead one away.
    with broker:
        assert _cluster_id(broker.bootstrap_servers) == cluster
        assert _read(broker.bootstrap_servers, "kept", 3) == [b"1", b"2", b"3"]


OWNER = """
import sys, time
from pathlib import Path
from magnatronic.broker import EmbeddedBroker
broker = EmbeddedBroker(Path(sys.argv[1])).start()
print(broker.pid, flush=True)
time.sleep(600)
"""


def test_sigkill_of_the_owner_stops_the_jvm_and_frees_the_folder(tmp_path: Path) -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(tmp_path / "kafka")], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    pid = int(owner.stdout.readline())
    owner.stdout.close()
    assert psutil.pid_exists(pid)
    owner.send_signal(signal.SIGKILL)
    while psutil.Process(owner.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    # At once, with the owner not even waited for and its JVM on the way out: the new start waits for the old lock.
    with EmbeddedBroker(tmp_path / "kafka") as broker:
        assert not psutil.pid_exists(pid)
        assert broker.pid != pid
    owner.wait()


def test_a_jvm_that_cannot_start_shows_its_last_lines(tmp_path: Path) -> None:
    port = free_ports(1)[0]
    with EmbeddedBroker(tmp_path / "one", port=port) as broker:
        assert broker.bootstrap_servers == f"127.0.0.1:{port}"
        other = EmbeddedBroker(tmp_path / "two", port=port)
        with pytest.raises(JavaProcessError, match=r"(?s)Kafka ended with exit status 1 .*Address already in use"):
            other.start()
        assert not other.running
    # The failed start left nothing behind that hinders a good one.
    with other:
        assert other.bootstrap_servers == f"127.0.0.1:{port}"


def test_a_data_folder_of_something_else_is_told(tmp_path: Path) -> None:
    folder = tmp_path / "kafka"
    (folder / "log").mkdir(parents=True)
    (folder / "log" / "meta.properties").write_text("version=1\nnode.id=77\ncluster.id=abc\n")
    with pytest.raises(JavaProcessError, match=r"(?s)before it was ready; its last lines:.*node"):
        EmbeddedBroker(folder).start()


def _settings_of(config: dict[str, Any], topic: str) -> dict[str, str]:
    resource = ConfigResource(ConfigResource.Type.TOPIC, topic)
    admin = AdminClient(config)
    answer = next(iter(admin.describe_configs([resource]).values())).result(10)
    return {name: entry.value for name, entry in answer.items()}


def test_all_topics_are_made_as_described(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with EmbeddedBroker(tmp_path / "kafka") as broker:
        config: dict[str, Any] = {"bootstrap.servers": broker.bootstrap_servers, **QUIET}
        assert set(ensure_topics(config, partitions=3, replication_factor=1)) == set(all_topics())
        present = AdminClient(config).list_topics(timeout=10).topics
        for name, topic in all_topics().items():
            assert len(present[name].partitions) == (topic.partitions or 3)
        settings = _settings_of(config, "dead-letters")
        assert settings["message.timestamp.type"] == "LogAppendTime"
        assert settings["retention.ms"] == "-1"
        assert settings["max.message.bytes"] == str(all_topics()["dead-letters"].max_message_bytes)
        assert settings["cleanup.policy"] == "delete"
        assert _settings_of(config, "telemetry")["retention.ms"] == str(all_topics()["telemetry"].retention_ms)

        caplog.set_level(logging.WARNING)
        assert ensure_topics(config, partitions=3, replication_factor=1) == []
        assert caplog.messages == []

        other = TopicSpec("documents", 5, {"retention.ms": "1000"})
        assert create_topics(config, [other], replication_factor=1) == []
        assert any("topic documents has 3 partitions, 5 are wanted" in message for message in caplog.messages)
        assert "topic documents has retention.ms=-1, wanted is 1000" in caplog.messages
        assert _settings_of(config, "documents")["retention.ms"] == "-1"


def test_a_refused_topic_is_named(kafka: "KafkaForTests") -> None:
    with pytest.raises(TopicError, match="Kafka refused topic bad name: "):
        create_topics(kafka.config, [TopicSpec("bad name", 1)], replication_factor=1)
    with pytest.raises(TopicError, match=r"Kafka refused topic .*replication"):
        create_topics(kafka.config, [TopicSpec(kafka.unique("wide"), 1)], replication_factor=3)


def test_two_that_create_the_same_topics_at_once_both_succeed(kafka: "KafkaForTests") -> None:
    name = kafka.unique("shared")
    code = (
        "import sys; from magnatronic.broker import TopicSpec, create_topics;"
        f"create_topics({{'bootstrap.servers': {kafka.bootstrap_servers!r}}}, [TopicSpec(f'{name}-{{i}}', 2) for i in "
        "range(20)], replication_factor=1)"
    )
    running = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    assert [process.wait(60) for process in running] == [0, 0]
