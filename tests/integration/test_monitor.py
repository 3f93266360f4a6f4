"""The Faust app on a real Kafka, started as Faust's users start theirs: ``faust -A streams.monitor worker``."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Consumer, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic

from magnatronic.broker import EmbeddedBroker
from schemas.codec import Codec
from schemas.events import (
    AgentHeartbeat,
    AgentRegistered,
    AlertCleared,
    AlertRaised,
    Event,
    Health,
    TaskCancelled,
    TaskCompleted,
)
from schemas.metadata import Envelope, Metadata, deterministic_id
from schemas.record import Record
from schemas.topics import key_of, topic_name
from streams.directory import SILENT_AFTER_MS
from streams.figures import STEP_MS, Sample
from streams.kafka import producer_settings, reader_settings, transactional_settings
from tests.integration.conftest import clean_environment
from tests.unit.alert_log import minutes, placed, taken

CODEC = Codec()
FAUST = Path(sys.executable).with_name("faust")
FINE: dict[str, Any] = {"events_in": 10, "events_out": 10, "p50_ms": 10.0, "p99_ms": 40.0}
FAILING: dict[str, Any] = {"events_in": 5, "failures": 5}
STALLED: dict[str, Any] = {"in_flight": 3, "lag": 3, "stalled": "it waits"}


class Scene:
    """A Kafka whose topics take the producers' timestamps, so that minutes of figures need no minutes."""

    def __init__(self, servers: str, folder: Path) -> None:
        self.config = {"bootstrap.servers": servers}
        self.folder = folder
        self._producer = Producer(producer_settings(self.config, "scene"))
        self._workers: list[Worker] = []

    def create_topics(self) -> None:
        admin = AdminClient(dict(self.config))
        config = {"message.timestamp.type": "CreateTime"}
        counts = {"telemetry": 1, "agents.directory": 1, "alerts": 1, "task.outcomes": 3}
        topics = [NewTopic(name, count, 1, config=config) for name, count in counts.items()]
        for created in admin.create_topics(topics, operation_timeout=30).values():
            created.result(30)
        while not counts.keys() <= admin.list_topics(timeout=20).topics.keys():
            time.sleep(0.05)

    def send(self, event: Event, at_ms: int, *, source: str = "/processors/test", told_us: int | None = None) -> None:
        time_ = datetime.fromtimestamp((told_us or at_ms * 1000) / 1e6, UTC)
        key = key_of(event)
        metadata = Metadata(deterministic_id(key, time_.isoformat(), repr(event)), source, key, time_)
        value, headers = CODEC.encode(event, metadata)
        self._producer.produce(topic_name(event), value, key.encode(), headers=headers, timestamp=at_ms)
        self._producer.poll(0)

    def tell(self, samples: Iterable[Sample]) -> None:
        for sample in samples:
            self.send(sample.stats, sample.at_ms, told_us=sample.told_us)
        self.flush()

    def flush(self) -> None:
        assert self._producer.flush(30) == 0

    def told(self, topic: str) -> list[Envelope]:
        """All that lies in the topic's only partition now."""
        consumer = Consumer(reader_settings(self.config, "reader"))
        try:
            place = TopicPartition(topic, 0, 0)
            consumer.list_topics(topic, timeout=20)
            _, end = consumer.get_watermark_offsets(place, timeout=20)
            consumer.assign([place])
            found: list[Envelope] = []
            read = 0
            while read < end:
                for message in consumer.consume(500, 0.2):
                    if message.error() is None:
                        found.append(CODEC.decode(Record.from_message(message)))
                    read = consumer.position([place])[0].offset
            return found
        finally:
            consumer.close()

    def alerts(self, *rules: str) -> dict[str, Envelope]:
        """Every alert of these rules by its event's id."""
        found = {each.metadata.id: each for each in self.told("alerts")}
        return {event_id: each for event_id, each in found.items() if _rule(each.event) in rules}

    def verdicts(self) -> list[AgentHeartbeat]:
        found = [each.event for each in self.told("agents.directory") if each.metadata.source == "/monitor"]
        return [each for each in found if isinstance(each, AgentHeartbeat)]

    def worker(self, **settings: str) -> "Worker":
        self._workers.append(Worker(self, settings))
        return self._workers[-1]

    def close(self) -> None:
        for worker in self._workers:
            worker.close()


def _rule(event: Event) -> str:
    assert isinstance(event, AlertRaised | AlertCleared)
    return event.rule


class Worker:
    """A Faust worker process."""

    def __init__(self, scene: Scene, settings: dict[str, str]) -> None:
        self.log = scene.folder / "faust.log"
        environment = clean_environment(
            MAGNATRONIC_KAFKA_BOOTSTRAP_SERVERS=scene.config["bootstrap.servers"],
            MAGNATRONIC_MONITOR_INSTANCE="test",
            **settings,
        )
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [str(FAUST), "-A", "streams.monitor", "-l", "info", "worker"],
                stdout=log,
                stderr=log,
                cwd=scene.folder,
                env=environment,
            )

    def kill(self) -> None:
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait(20)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(20)

    def until(self, done: Callable[[], bool], timeout_s: float = 240.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not done():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.2)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    folder = tmp_path_factory.mktemp("monitor")
    with EmbeddedBroker(folder / "kafka") as broker:
        made = Scene(broker.bootstrap_servers, folder)
        made.create_topics()
        yield made


@pytest.fixture
def scene(shared: Scene) -> Iterator[Scene]:
    """One Kafka for all tests, which run in their order; each has agents and tasks of its own."""
    try:
        yield shared
    finally:
        shared.close()


def steps_ago(minutes_: int) -> int:
    """A window's end some minutes ago, in ms since the epoch."""
    now_ms = int(time.time() * 1000) - minutes_ * 60_000
    return now_ms - now_ms % STEP_MS


def test_killed_at_any_moment_it_raises_the_same_alerts_and_loses_none(scene: Scene) -> None:
    start = steps_ago(20)
    first = minutes("retriever", "a", FINE, FAILING, FAILING, FINE, FINE, FAILING, FINE, FINE, start_ms=start)
    second = minutes("researcher", "b", FINE, FINE, STALLED, STALLED, FINE, FINE, FINE, STALLED, start_ms=start)
    samples = placed(sorted([*first, *second], key=lambda each: each.at_ms))
    expected = taken(samples)
    assert len(expected.alerts) >= 6
    ids = {alert.id for alert in expected.alerts}
    watched = "error-rate", "stall"

    worker = scene.worker()
    for part in (samples[:360], samples[360:700]):
        known = len(scene.alerts(*watched))
        scene.tell(part)
        # Killed as soon as it has said something of this part, in the midst of its work.
        worker.until(lambda known=known: len(scene.alerts(*watched)) > known)  # type: ignore[misc]
        worker.kill()
        worker = scene.worker()
    scene.tell(samples[700:])
    worker.until(lambda: ids <= scene.alerts(*watched).keys())
    found = scene.alerts(*watched)
    assert found.keys() == ids
    for alert in expected.alerts:
        assert found[alert.id].event == alert.event
        assert found[alert.id].metadata.time == alert.at
    degraded = [each for each in scene.verdicts() if each.health is Health.DEGRADED]
    assert {each.name for each in degraded} == {"retriever", "researcher"}
    assert worker.stop() == 0


def test_a_threshold_can_be_set_and_an_hour_s_budget_is_watched(scene: Scene) -> None:
    start = steps_ago(9)
    costly = {**FINE, "cost_usd": 0.01}
    samples = placed(minutes("spender", "a", *[costly] * 4, *[FAILING] * 2, start_ms=start - start % 60_000))
    worker = scene.worker(MAGNATRONIC_ALERT_COST_USD_PER_HOUR="1.5", MAGNATRONIC_ALERT_ERROR_RATE="0")
    scene.tell(samples)
    worker.until(lambda: bool(scene.alerts("cost")))
    (raised,) = [each.event for each in scene.alerts("cost").values()]
    assert isinstance(raised, AlertRaised)
    assert not [each for each in scene.alerts("error-rate").values() if each.event.source == "spender"]  # type: ignore[attr-defined]
    assert (raised.rule, raised.source, raised.threshold) == ("cost", "*", 1.5)


def test_a_second_outcome_of_a_task_is_told_and_an_aborted_one_is_none(scene: Scene) -> None:
    def outcome(event: Event, event_id: str, producer: Producer) -> None:
        key = key_of(event)
        value, headers = CODEC.encode(event, Metadata(event_id, "/agents/coordinator@2", key, datetime.now(UTC)))
        producer.produce("task.outcomes", value, key.encode(), headers=headers)

    done = {task: TaskCompleted(task_id=task, objective="x", answer="y", groundedness=1.0, steps=1) for task in "abc"}
    plain = Producer(producer_settings(scene.config, "coordinator"))
    transactional = Producer(transactional_settings(scene.config, "coordinator", 0))
    transactional.init_transactions(20)
    transactional.begin_transaction()
    outcome(TaskCancelled(task_id="a", objective="x", requested_by="ada"), "aborted", transactional)
    assert transactional.flush(20) == 0
    transactional.abort_transaction(20)
    for task, event in done.items():
        outcome(event, f"done-{task}", plain)
    outcome(done["b"], "done-b", plain)
    assert plain.flush(20) == 0
    worker = scene.worker()
    outcome(TaskCancelled(task_id="c", objective="x", requested_by="ada"), "cancelled-c", plain)
    assert plain.flush(20) == 0
    worker.until(lambda: bool(scene.alerts("conflict")))
    worker.kill()
    worker = scene.worker()
    outcome(TaskCancelled(task_id="b", objective="x", requested_by="ada"), "cancelled-b", plain)
    assert plain.flush(20) == 0
    worker.until(lambda: len(scene.alerts("conflict")) > 1)
    found = [each.event for each in scene.alerts("conflict").values()]
    raised = {each.source: each for each in found if isinstance(each, AlertRaised)}
    assert set(raised) == {"b", "c"}
    assert "TaskCompleted (done-c) and TaskCancelled (cancelled-c)" in raised["c"].message


def test_who_falls_silent_is_said_to_be_gone_once(scene: Scene) -> None:
    start = steps_ago(5)
    for name, instance in (("sleeper", "a"), ("sleeper", "b")):
        scene.send(AgentRegistered(name=name, instance=instance, version="1", capabilities=("retrieve",)), start)
        scene.send(AgentHeartbeat(name=name, instance=instance, health=Health.READY), start + 1)
    for number in range(1, 12):
        at = start + number * SILENT_AFTER_MS // 4
        scene.send(AgentHeartbeat(name="sleeper", instance="b", health=Health.READY), at)
    scene.flush()
    worker = scene.worker()

    def said_of(instance: str) -> list[Health]:
        return [each.health for each in scene.verdicts() if (each.name, each.instance) == ("sleeper", instance)]

    # Its own heartbeats tell the time when all others are silent.
    worker.until(lambda: bool(said_of("b")))
    assert said_of("a") == said_of("b") == [Health.GONE]


def test_it_says_what_it_misses(tmp_path: Path) -> None:
    done = subprocess.run(
        [str(FAUST), "-A", "streams.monitor", "worker"],
        capture_output=True,
        text=True,
        timeout=90,
        env=clean_environment(),
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 2
    assert "which Kafka? Set MAGNATRONIC_KAFKA_BOOTSTRAP_SERVERS" in done.stderr
    assert "Traceback" not in done.stderr
