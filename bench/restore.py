"""Restoring state: how long a partition's next owner reads changelogs before it goes on, and what the lanes take.

In: a broker. Out: seconds and records/s of :func:`streams.restore.restore` with the store made of it, beside a plain
consumer that reads the same records and keeps nothing, and the resident memory that a live lane takes. Two changelogs,
written in transactions as a processor writes them: one as compaction leaves it, a record a lane, and one that was never
compacted, with three records for each live lane: superseded states and tombstoned lanes are among them. Half of the
live lanes are tasks under way, half are finished tasks' markers, which expire.
"""

import gc
import itertools
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import get_context
from typing import Final

import psutil
from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, Producer, TopicPartition

from agents.coordinator import TaskState
from agents.step import LaneState
from bench.figures import Figure, ratio
from bench.samples import NOW, sentence
from magnatronic.broker.topics import TopicSpec, create_topics
from streams.changelog import state_key
from streams.kafka import reader_settings, transactional_settings
from streams.restore import restore
from streams.state import CHANGELOG_CONFIG, StateCodec, StateStore

__all__ = ["measure"]

PART: Final = "restore"
PARTITIONS: Final = 4
_MARKER_LIFE: Final = timedelta(days=30)
_OBJECTIVE_WORDS: Final = 54
"""With it the states of tasks under way and the markers of finished ones have 300 bytes on average."""
_SAMPLES: Final = 1000
_TRANSACTION: Final = 1000
_TIMEOUT_S: Final = 120.0
_BATCH: Final = 500


@dataclass(frozen=True, slots=True)
class _Run:
    consume_s: float
    consume_cpu_s: float
    records: int
    restore_s: float
    restore_cpu_s: float
    lanes: int
    payload_bytes: int
    resident_bytes: int


def measure(bootstrap_servers: str, *, lanes: int, rounds: int, log: Callable[[str], None]) -> list[Figure]:
    """Figures over ``rounds`` rounds with ``lanes`` live lanes in each changelog.

    Raises:
        RuntimeError: a restore did not give every live lane, or gave another.
    """
    figures: list[Figure] = []
    for topic, what, history in (
        ("bench.restore.compacted.changelog", "compacted", False),
        ("bench.restore.growing.changelog", "3 records a lane", True),
    ):
        _fill(bootstrap_servers, topic, lanes, history=history)
        runs = []
        for number in range(rounds):
            # Memory is that of a process which has done nothing else.
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                runs.append(pool.submit(_run, bootstrap_servers, topic).result())
            run = runs[-1]
            if run.lanes != lanes:
                raise RuntimeError(f"{topic}: {run.lanes} lanes were restored, {lanes} are live")
            log(f"{what}, round {number + 1}: {run.lanes:,} lanes of {run.records:,} records in {run.restore_s:.1f} s")
        figures += _figures(what, runs)
    return figures


def _figures(what: str, runs: list[_Run]) -> list[Figure]:
    lanes, records = runs[0].lanes, runs[0].records
    ours, plain = [run.records / run.restore_s for run in runs], [run.records / run.consume_s for run in runs]
    payload = runs[0].payload_bytes / lanes
    return [
        Figure(PART, f"{what}: restore", "s", tuple(run.restore_s for run in runs), f"{lanes:,} live lanes"),
        Figure(PART, f"{what}: restore, records", "records/s", tuple(ours), f"{records:,} records"),
        Figure(PART, f"{what}: plain consumer", "records/s", tuple(plain), "keeps nothing"),
        ratio(PART, f"{what}: restore / plain consumer, records/s", ours, plain, "more is better"),
        Figure(PART, f"{what}: restore, CPU", "s", tuple(run.restore_cpu_s for run in runs), "without the broker's"),
        ratio(
            PART,
            f"{what}: restore / plain consumer, CPU",
            [run.restore_cpu_s for run in runs],
            [run.consume_cpu_s for run in runs],
            "less is better",
        ),
        Figure(
            PART,
            f"{what}: memory a live lane",
            "bytes",
            tuple(run.resident_bytes / lanes for run in runs),
            f"{payload:.0f} of them are the lane's name and value",
        ),
    ]


def _fill(bootstrap_servers: str, topic: str, lanes: int, *, history: bool) -> None:
    """Write ``lanes`` live lanes to ``topic``; with ``history`` three records for each of them."""
    kafka = {"bootstrap.servers": bootstrap_servers}
    # Compaction would go on while it is measured, and each round would read less.
    config = {**CHANGELOG_CONFIG, "cleanup.policy": "delete"}
    create_topics(kafka, [TopicSpec(topic, PARTITIONS, config)], replication_factor=1)
    producer = Producer({**transactional_settings(kafka, topic, 0), "queue.buffering.max.messages": 100_000})
    producer.init_transactions(30)
    records = _history(lanes) if history else _final(lanes)
    while batch := list(itertools.islice(records, _TRANSACTION)):
        producer.begin_transaction()
        for number, value in batch:
            producer.produce(topic, value, state_key(f"task-{number:032d}"), number % PARTITIONS)
        producer.commit_transaction(30)


def _values() -> tuple[list[bytes], list[bytes]]:
    """States of tasks under way, and markers of finished ones; as many of each as are needed to tell them apart."""
    codec, rng = StateCodec(TaskState), random.Random(7)
    open_tasks, markers = [], []
    for number in range(_SAMPLES):
        now = NOW + timedelta(seconds=number)
        under_way = TaskState(objective=sentence(rng, _OBJECTIVE_WORDS), deadline=now + _MARKER_LIFE)
        open_tasks.append(codec.dump(LaneState(under_way, now)))
        markers.append(codec.dump(LaneState(TaskState(finished=True), now, now + _MARKER_LIFE)))
    return open_tasks, markers


def _final(lanes: int) -> Iterator[tuple[int, bytes | None]]:
    """Each live lane's last state."""
    open_tasks, markers = _values()
    for number in range(lanes):
        yield number, (open_tasks if number % 2 else markers)[number // 2 % _SAMPLES]


def _history(lanes: int) -> Iterator[tuple[int, bytes | None]]:
    """Three records for each live lane: its state, its last one, and the life and end of half as many other lanes."""
    open_tasks, _ = _values()
    last = _final(lanes)
    for number in range(0, lanes, 2):
        gone = lanes + number // 2
        first = open_tasks[number % _SAMPLES]
        yield from ((number, first), (gone, first), (number + 1, first))
        yield next(last)
        yield gone, None
        yield next(last)


def _run(bootstrap_servers: str, topic: str) -> _Run:
    consume_s, consume_cpu_s, records = _consume(bootstrap_servers, topic)
    gc.collect()
    process = psutil.Process()
    before = process.memory_info().rss
    started, cpu = time.monotonic(), time.process_time()
    kafka = {"bootstrap.servers": bootstrap_servers}
    places = [(topic, topic, number) for number in range(PARTITIONS)]
    restored = restore(kafka, places, timeout_s=_TIMEOUT_S, cancelled=threading.Event())
    payload = 0
    codec = StateCodec(TaskState)
    stores = [StateStore(codec, partition.states) for partition in restored.values()]
    restore_s, restore_cpu_s = time.monotonic() - started, time.process_time() - cpu
    for partition in restored.values():
        payload += sum(len(lane) + len(value) for lane, value in partition.states.items())
    del restored
    gc.collect()
    resident = process.memory_info().rss - before
    return _Run(consume_s, consume_cpu_s, records, restore_s, restore_cpu_s, sum(map(len, stores)), payload, resident)


def _consume(bootstrap_servers: str, topic: str) -> tuple[float, float, int]:
    """Seconds and CPU seconds that a plain consumer takes for all records, and how many there were."""
    started, cpu = time.monotonic(), time.process_time()
    # The restore's client settings: with the client's defaults a full local queue stops fetching for a second.
    consumer = Consumer(reader_settings({"bootstrap.servers": bootstrap_servers}, "bench-restore"))
    records, open_partitions = 0, PARTITIONS
    consumer.assign([TopicPartition(topic, number, OFFSET_BEGINNING) for number in range(PARTITIONS)])
    while open_partitions:
        for message in consumer.consume(_BATCH, 0.1):
            error = message.error()
            if error is None:
                records += 1
            elif error.code() == KafkaError._PARTITION_EOF:
                open_partitions -= 1
            else:
                raise RuntimeError(f"reading {topic} failed: {error}")
    took, took_cpu = time.monotonic() - started, time.process_time() - cpu
    consumer.close()
    return took, took_cpu, records
