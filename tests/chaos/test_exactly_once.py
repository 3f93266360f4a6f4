import random
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from confluent_kafka import Consumer, KafkaError, KafkaException, Producer, TopicPartition

from schemas.codec import Codec
from schemas.events import StepAssigned, StepCompleted
from schemas.metadata import Metadata, deterministic_id
from schemas.record import Record
from streams.kafka import producer_settings, reader_settings

EVENTS = 50_000
TASKS = 700
PARTITIONS = 4
KILLS = 7
SEED = 20261121
OUTPUT = "work.results.normal"
WORKER = Path(__file__).with_name("summing_worker.py")
CODEC = Codec()


class Workers:
    """Worker processes by slot; a killed one comes back with its slot."""

    def __init__(self, servers: str, topic: str, name: str, logs: Path) -> None:
        self._arguments = [sys.executable, str(WORKER), servers, topic, name]
        self._logs = logs
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, slot: str) -> None:
        with self._path(slot).open("ab") as log:
            self._processes[slot] = subprocess.Popen([*self._arguments, slot], stdout=log, stderr=log)

    def kill(self, slot: str) -> None:
        process = self._processes.pop(slot)
        assert process.poll() is None, f"worker {slot} ended by itself:\n{self.log(slot)}"
        process.kill()
        process.wait(20)

    def log(self, slot: str) -> str:
        return "\n".join(self._path(slot).read_text(errors="replace").splitlines()[-30:])

    def _path(self, slot: str) -> Path:
        return self._logs / f"{slot}.log"

    def check(self) -> None:
        for slot, process in self._processes.items():
            assert process.poll() is None, f"worker {slot} ended by itself:\n{self.log(slot)}"

    def stop(self) -> None:
        for slot, process in self._processes.items():
            deadline = time.monotonic() + 30
            while f"process {process.pid} can be stopped" not in self._path(slot).read_text(errors="replace"):
                assert time.monotonic() < deadline, f"worker {slot} did not start:\n{self.log(slot)}"
                time.sleep(0.05)
            process.send_signal(signal.SIGTERM)
        for slot, process in self._processes.items():
            assert process.wait(30) == 0, f"worker {slot} did not stop well:\n{self.log(slot)}"
        self._processes.clear()

    def end(self) -> None:
        for process in self._processes.values():
            process.kill()
            process.wait(20)


@contextmanager
def workers(servers: str, topic: str, name: str, logs: Path) -> Iterator[Workers]:
    running = Workers(servers, topic, name, logs)
    try:
        yield running
    finally:
        running.end()


def test_kills_lose_nothing_and_double_nothing(kafka: Any, tmp_path: Path) -> None:
    rng = random.Random(SEED)
    name, topic = kafka.unique("summer"), f"{kafka.unique('work')}.normal"
    kafka.create_topics(topic, PARTITIONS)
    if OUTPUT not in kafka.admin.list_topics(timeout=20).topics:
        kafka.create_topics(OUTPUT, 2)
    producer = Producer(producer_settings(kafka.config, "chaos"))
    expected: dict[str, list[str]] = defaultdict(list)
    sums: dict[str, int] = defaultdict(int)

    def send(first: int, last: int) -> None:
        for number in range(first, last):
            task, addend = f"t{rng.randrange(TASKS)}", rng.randrange(-50, 1000)
            sums[task] += addend
            expected[task].append(str(sums[task]))
            produce(producer, topic, task, number, addend)
        assert producer.flush(60) == 0

    with workers(kafka.bootstrap_servers, topic, name, tmp_path) as running:
        # The second worker joins while the first one works: partitions move under load.
        running.start("0")
        chunk = EVENTS // (KILLS + 1)
        send(0, chunk)
        until(lambda: committed(kafka.config, name, topic) > 0, 60, running)
        running.start("1")
        for kill in range(1, KILLS + 1):
            send(kill * chunk, EVENTS if kill == KILLS else (kill + 1) * chunk)
            victim = str(rng.randrange(2))
            time.sleep(rng.uniform(0.2, 2.5))
            running.kill(victim)
            if kill == KILLS // 2:
                # Once it stays away for longer than its session: the other one takes over and gives back.
                time.sleep(7)
            running.start(victim)
        until(lambda: committed(kafka.config, name, topic) == EVENTS, 90, running)
        running.stop()

    assert answers(kafka.config, f"/agents/{name}@1") == expected


def produce(producer: Producer, topic: str, task: str, number: int, addend: int) -> None:
    event = StepAssigned(
        task_id=task,
        step_id=f"{task}/{number}",
        capability="research",
        objective="add",
        parameters={"number": str(addend)},
    )
    metadata = Metadata(
        id=deterministic_id(topic, number),
        source="/clients/chaos",
        subject=task,
        time=datetime.now(UTC),
        correlation_id=task,
    )
    value, headers = CODEC.encode(event, metadata)
    while True:
        try:
            producer.produce(topic, value, task.encode(), headers=headers)
            return
        except BufferError:
            producer.poll(0.1)


def until(done: Any, timeout_s: float, running: Workers) -> None:
    deadline = time.monotonic() + timeout_s
    while not done():
        running.check()
        assert time.monotonic() < deadline, f"no end in sight:\n{running.log('0')}\n{running.log('1')}"
        time.sleep(0.2)


def committed(config: dict[str, Any], name: str, topic: str) -> int:
    """How many events the group has put behind it: its input has no gaps, so offsets are counts."""
    consumer = Consumer({**config, "group.id": f"magnatronic.{name}"})
    try:
        places = consumer.committed([TopicPartition(topic, number) for number in range(PARTITIONS)], timeout=30)
        return sum(max(place.offset, 0) for place in places)
    finally:
        consumer.close()


def answers(config: dict[str, Any], source: str) -> dict[str, list[str]]:
    """Every committed running sum, by task, in the order of the log."""
    found: dict[str, list[str]] = defaultdict(list)
    consumer = Consumer(reader_settings(config, "chaos-reader"))
    try:
        waiting = set(consumer.list_topics(OUTPUT, timeout=20).topics[OUTPUT].partitions)
        consumer.assign([TopicPartition(OUTPUT, number, 0) for number in waiting])
        while waiting:
            for message in consumer.consume(1000, 0.2):
                error = message.error()
                if error is not None:
                    if error.code() != KafkaError._PARTITION_EOF:
                        raise KafkaException(error)
                    waiting.discard(message.partition())
                    continue
                envelope = CODEC.decode(Record.from_message(message))
                if envelope.metadata.source == source:
                    assert isinstance(envelope.event, StepCompleted)
                    found[envelope.event.task_id].append(envelope.event.answer)
    finally:
        consumer.close()
    return found
