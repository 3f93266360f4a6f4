"""Reading history: from Kafka and from an archive, raw and decoded; writing the archive; and the memory that all take.

In: a broker. Out: events/s on one core (each reader is a process bound to one, its client's threads included) beside a
plain consumer that reads the same records and keeps nothing; peak memory over three lengths of the log; the archive's
size beside what Kafka sends for the same records. The logs are written in transactions with lz4, as processors write:
small events in three lengths, and a mix in which each tenth is a step's result of 7 kB.
"""

import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Final, Self

import orjson
import psutil
import pyarrow as pa
from confluent_kafka import Consumer, Producer, TopicPartition

from bench.figures import Figure, ratio
from bench.kafka import make_topics
from bench.samples import completion, metadata_for, step_completed, submission
from replay.archive import ArchiveLog, Archiver, Header
from replay.kafka_log import KafkaLog
from replay.log import Log
from replay.selection import Selection
from schemas.codec import Codec
from schemas.events import Event
from schemas.topics import key_of
from streams.interpreter import collecting_seldom
from streams.kafka import transactional_settings

__all__ = ["measure"]

PART: Final = "log"
PARTITIONS: Final = 4
_TRANSACTION: Final = 1000
_PLAIN: Final = "plain consumer"
_RAW: Final = "raw"
_DECODED: Final = "decoded"
_WRITTEN: Final = "written"


@dataclass(frozen=True, slots=True)
class _Task:
    """What a process does with all of ``topic``; with an ``archive`` it reads, or writes, that."""

    servers: str
    topic: str
    how: str
    archive: Path | None = None


@dataclass(frozen=True, slots=True)
class _Run:
    events: int
    seconds: float
    cpu_s: float
    peak_mib: float
    received_bytes: int = 0

    @property
    def rate(self) -> float:
        return self.events / self.seconds


def measure(bootstrap_servers: str, *, events: int, rounds: int, log: Callable[[str], None]) -> list[Figure]:
    """Rates over ``rounds`` rounds of ``events`` // 10 events; memory of a hundredth, a tenth and all of ``events``.

    Raises:
        RuntimeError: a reader did not get every event.
    """
    lengths = (events // 100, events // 10, events)
    topics = {length: f"bench.log.{length}" for length in lengths}
    for length, topic in topics.items():
        _fill(bootstrap_servers, topic, (submission(number) for number in range(length)))
    _fill(bootstrap_servers, "bench.log.mixed", _mixed(lengths[1]))
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory(prefix="bench-archive-") as folder:
        for topic, what in ((topics[lengths[1]], "small"), ("bench.log.mixed", "mixed")):
            figures += _rates(bootstrap_servers, topic, what, lengths[1], rounds, Path(folder), log)
        figures += _memory(bootstrap_servers, topics, Path(folder), log)
    return figures


def _mixed(count: int) -> Iterator[Event]:
    results = [step_completed(number) for number in range(100)]
    for number in range(count):
        task = submission(number)
        yield results[number % 100] if number % 10 == 9 else completion(task) if number % 2 else task


def _fill(servers: str, topic: str, events: Iterable[Event]) -> None:
    make_topics(servers, [topic], PARTITIONS)
    producer = Producer(transactional_settings({"bootstrap.servers": servers}, "bench-log", topic))
    producer.init_transactions(30)
    codec = Codec()
    producer.begin_transaction()
    for number, event in enumerate(events, 1):
        encoded = codec.encode(event, metadata_for(event))
        headers: Any = encoded.headers
        producer.produce(topic, encoded.value, key_of(event), number % PARTITIONS, headers=headers)
        if number % _TRANSACTION == 0:
            producer.commit_transaction(30)
            producer.begin_transaction()
    producer.commit_transaction(30)


def _rates(
    servers: str, topic: str, what: str, events: int, rounds: int, folder: Path, log: Callable[[str], None]
) -> list[Figure]:
    runs: dict[str, list[_Run]] = {}
    size = 0
    for number in range(rounds):
        archive = folder / f"{what}-{number}"
        for name, task in (
            ("archive, written", _Task(servers, topic, _WRITTEN, archive)),
            (_PLAIN, _Task(servers, topic, _PLAIN)),
            ("Kafka, raw", _Task(servers, topic, _RAW)),
            ("Kafka, decoded", _Task(servers, topic, _DECODED)),
            ("archive, raw", _Task(servers, topic, _RAW, archive)),
            ("archive, decoded", _Task(servers, topic, _DECODED, archive)),
        ):
            run = _apart(task, events)
            runs.setdefault(name, []).append(run)
            log(f"{what}, round {number + 1}: {name} {run.rate:,.0f} events/s")
        size = sum(path.stat().st_size for path in archive.glob("*.parquet"))
    figures = [
        Figure(
            PART,
            f"{what}: {name}",
            "events/s",
            tuple(run.rate for run in each),
            f"{each[-1].cpu_s / events * 1e6:.1f} µs CPU each",
        )
        for name, each in runs.items()
    ]
    raw, plain = ([run.rate for run in runs[name]] for name in ("Kafka, raw", _PLAIN))
    received = runs[_PLAIN][-1].received_bytes
    note = f"{size / events:.0f} of {received / events:.0f} bytes each; less is better"
    figures.append(ratio(PART, f"{what}: Kafka, raw / {_PLAIN}", raw, plain))
    figures.append(ratio(PART, f"{what}: size, archive / Kafka", [size], [received], note))
    return figures


def _memory(servers: str, topics: dict[int, str], folder: Path, log: Callable[[str], None]) -> list[Figure]:
    figures = []
    for name, how, archived in (
        ("archive, written", _WRITTEN, True),
        ("Kafka, decoded", _DECODED, False),
        ("archive, decoded", _DECODED, True),
    ):
        peaks = []
        for length, topic in topics.items():
            task = _Task(servers, topic, how, folder / f"{length}" if archived else None)
            run = _apart(task, length)
            peaks.append(run.peak_mib)
            log(f"{name}, {length:,} events: {run.peak_mib:.0f} MiB, {run.rate:,.0f} events/s")
            figures.append(Figure(PART, f"{name}: peak memory, {length:,} events", "MiB", (run.peak_mib,)))
        figures.append(ratio(PART, f"{name}: memory, longest / shortest log", peaks[-1:], peaks[:1], "1 is flat"))
    return figures


def _apart(task: _Task, events: int) -> _Run:
    """Run it in a process of its own: memory is that of one that has done nothing else."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        run = pool.submit(_run, task).result()
    if run.events != events:
        raise RuntimeError(f"{task} gave {run.events} events, and there are {events}")
    return run


def _run(task: _Task) -> _Run:
    if task.how == _PLAIN:
        return _consume(task)
    codec = Codec()
    pa.array([b""])  # imports pandas, where that is installed
    with KafkaLog({"bootstrap.servers": task.servers}) as kafka, collecting_seldom(), _Watch() as watch:
        if task.how == _WRITTEN:
            assert task.archive is not None
            with Archiver(task.archive, Header("bench", "bench", (task.topic,)), kafka, codec) as archiver:
                return watch.run(archiver.run().records)
        log: Log = kafka if task.archive is None else ArchiveLog(task.archive)
        seen = 0
        for batch in log.read(Selection(topics=frozenset({task.topic}))):
            seen += len(batch.records)
            if task.how == _DECODED:
                for record in batch.records:
                    codec.decode(record)
        return watch.run(seen)


class _Watch:
    """One core, and from then on time, CPU and the most memory of this process."""

    def __enter__(self) -> Self:
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
        Path("/proc/self/clear_refs").write_text("5")  # the most memory is from now on
        self._cpu = psutil.Process().cpu_times()
        self._begun = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def run(self, events: int) -> _Run:
        seconds = time.perf_counter() - self._begun
        now = psutil.Process().cpu_times()
        status = Path("/proc/self/status").read_text()
        most = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))
        return _Run(events, seconds, now.user + now.system - self._cpu.user - self._cpu.system, most / 1024)


def _consume(task: _Task) -> _Run:
    """Read with nothing but the client; the bytes that came are what Kafka keeps of these records."""
    received = 0

    def heard(raw: str) -> None:
        nonlocal received
        received = sum(broker["rxbytes"] for broker in orjson.loads(raw)["brokers"].values())

    settings: dict[str, Any] = {
        "bootstrap.servers": task.servers,
        "group.id": "bench-log",
        "isolation.level": "read_committed",
        "enable.partition.eof": True,
        "fetch.queue.backoff.ms": 5,
        "fetch.wait.max.ms": 50,
        "statistics.interval.ms": 100,
        "stats_cb": heard,
    }
    with collecting_seldom(), _Watch() as watch:
        consumer = Consumer(settings)
        consumer.assign([TopicPartition(task.topic, number, 0) for number in range(PARTITIONS)])
        seen = ended = 0
        while ended < PARTITIONS:
            first = consumer.poll(0.1)
            messages = [] if first is None else [first, *consumer.consume(1000, timeout=0)]
            failed = sum(message.error() is not None for message in messages)
            seen, ended = seen + len(messages) - failed, ended + failed
        run = watch.run(seen)
    deadline = time.monotonic() + 0.5
    while time.monotonic() < deadline:
        consumer.poll(0.05)  # the last statistics
    consumer.close()
    return replace(run, received_bytes=received)
