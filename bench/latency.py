"""One hop's latency: from ``produce`` of an event to the moment a read_committed consumer has its committed output.

In: a broker. Out: milliseconds at the median and the 99th percentile, at 200 and at 1,000 events/s, through our
processor in a process of its own. The events are encoded beforehand; both clocks are this process's.
"""

import tempfile
import threading
import time
from collections.abc import Sequence
from typing import Any, Final

from confluent_kafka import Consumer, Producer, TopicPartition
from confluent_kafka.admin import AdminClient

from bench.figures import Figure, percentile
from bench.kafka import make_topics, stable_offsets
from bench.samples import metadata_for, submission
from bench.step import OURS_TARGET, PARTITIONS
from bench.trial import Worker
from bench.workers.task import WorkerTask
from schemas.codec import Codec

__all__ = ["measure"]

PART: Final = "latency"
RATES: Final = (200, 1000)
SOURCE: Final = "tasks.high"
_WARM_UP_S: Final = 2.0
_SLICES: Final = 4
_TIMEOUT_S: Final = 30.0


def measure(bootstrap_servers: str, *, seconds: float) -> list[Figure]:
    """Figures for each of :data:`RATES`, after two seconds of warm-up; a sample for each quarter of ``seconds``.

    Raises:
        RuntimeError: an event had no output within 30 s, or the worker ended.
    """
    make_topics(bootstrap_servers, [SOURCE, OURS_TARGET], PARTITIONS)
    figures = []
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        task = WorkerTask(bootstrap_servers, "bench-latency", SOURCE, OURS_TARGET, PARTITIONS, folder)
        worker = Worker("processor_worker", task)
        try:
            _probe(bootstrap_servers, worker, rate=50, seconds=1.0, name="start")
            for rate in RATES:
                delays = _probe(bootstrap_servers, worker, rate=rate, seconds=_WARM_UP_S + seconds, name=str(rate))
                delays = delays[int(rate * _WARM_UP_S) :]
                size = len(delays) // _SLICES
                slices = [delays[place * size : (place + 1) * size] for place in range(_SLICES)]
                for label, share in (("p50", 0.5), ("p99", 0.99)):
                    found = tuple(percentile(part, share) * 1000 for part in slices)
                    figures.append(Figure(PART, f"{label} at {rate:,} events/s", "ms", found, "produce to committed"))
        finally:
            worker.stop()
    return figures


def _probe(bootstrap_servers: str, worker: Worker, *, rate: int, seconds: float, name: str) -> list[float]:
    """Seconds from produce to committed output of each event, in the order in which they were sent."""
    codec = Codec()
    encoded: list[tuple[str, bytes, Any]] = []
    for number in range(int(rate * seconds)):
        event = submission(number, f"latency-{name}")
        made = codec.encode(event, metadata_for(event))
        encoded.append((event.task_id, made.value, made.headers))
    consumer = Consumer(
        {
            "bootstrap.servers": bootstrap_servers,
            "group.id": "bench-latency-reader",
            "isolation.level": "read_committed",
            "enable.auto.commit": False,
            "fetch.wait.max.ms": 100,
        }
    )
    ends = stable_offsets(AdminClient({"bootstrap.servers": bootstrap_servers}), OURS_TARGET, PARTITIONS)
    consumer.assign([TopicPartition(OURS_TARGET, number, end) for number, end in enumerate(ends)])
    consumer.poll(0.5)
    sent: dict[bytes, float] = {}
    sender = threading.Thread(target=_send, args=(bootstrap_servers, encoded, rate, sent), daemon=True)
    sender.start()
    seen: dict[bytes, float] = {}
    moved = time.monotonic()
    try:
        while len(seen) < len(encoded):
            message = consumer.poll(0.2)
            now = time.perf_counter()
            if message is None:
                worker.cpu_s()  # raises when the worker has ended
                if time.monotonic() - moved > _TIMEOUT_S:
                    raise RuntimeError(f"{len(seen)} of {len(encoded)} outputs after {_TIMEOUT_S:g} s of silence")
                continue
            if message.error() is not None:
                raise RuntimeError(f"reading {OURS_TARGET} failed: {message.error()}")
            key = message.key() or b""
            if key in seen:
                raise RuntimeError(f"two outputs for {key!r}")
            seen[key] = now
            moved = time.monotonic()
        sender.join()
    finally:
        consumer.close()
    return [seen[key] - at for key, at in sent.items()]


def _send(
    bootstrap_servers: str, encoded: Sequence[tuple[str, bytes, Any]], rate: int, sent: dict[bytes, float]
) -> None:
    """Produce at an even pace that does not depend on answers; what is late is sent at once."""
    producer = Producer({"bootstrap.servers": bootstrap_servers, "linger.ms": 0, "partitioner": "murmur2_random"})
    start = time.perf_counter()
    for number, (key, value, headers) in enumerate(encoded):
        wait = start + number / rate - time.perf_counter()
        if wait > 0:
            time.sleep(wait)
        sent[key.encode()] = time.perf_counter()
        producer.produce(SOURCE, value, key, headers=headers)
        producer.poll(0)
    producer.flush(30)
