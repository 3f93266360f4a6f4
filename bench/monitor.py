"""How fast the Monitor catches up with a log of figures: a Faust worker behind a backlog of ProcessorStats.

In: a broker, and how many samples. Out: samples taken a second, and the worker's CPU. The backlog is that of a hundred
processors that tell each second; one more is stalled in the first and in the last minute. The time between the two
alerts that say so, by the broker's clock, is what the samples between them took.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import psutil
from confluent_kafka import Consumer, Producer, TopicPartition

from bench.figures import Figure
from magnatronic.broker.topics import TopicSpec, create_topics
from schemas.codec import Codec
from schemas.events import AgentHeartbeat, AlertRaised, Event, ProcessorStats, TaskCompleted
from schemas.metadata import Metadata, deterministic_id
from schemas.record import Record
from schemas.topics import key_of, topic_of
from streams.settings import variable

__all__ = ["measure"]

PART: Final = "monitor"
_AGENTS: Final = 10
_INSTANCES: Final = 10
_MARKER: Final = "marker"
_TELEMETRY: Final = topic_of(ProcessorStats).name
_ALERTS: Final = topic_of(AlertRaised).name
_DIRECTORY: Final = topic_of(AgentHeartbeat).name
_OUTCOMES: Final = topic_of(TaskCompleted).name
_MINUTE_MS: Final = 60_000
_TIMEOUT_S: Final = 300.0


def measure(bootstrap_servers: str, *, samples: int) -> list[Figure]:
    """Figures for a backlog of ``samples``, of which those of the first minute are not counted.

    Raises:
        RuntimeError: the worker ended, or had not caught up within five minutes.
    """
    # Figures in the records' own time: a backlog of minutes is then written in a second.
    topics = [TopicSpec(name, 1, {"message.timestamp.type": "CreateTime"}) for name in (_TELEMETRY, _DIRECTORY)]
    topics += [TopicSpec(name, 1, {"message.timestamp.type": "LogAppendTime"}) for name in (_ALERTS, _OUTCOMES)]
    create_topics({"bootstrap.servers": bootstrap_servers}, topics, replication_factor=1)
    seconds = samples // (_AGENTS * _INSTANCES)
    start_ms = int(time.time() * 1000) - (seconds + 60) * 1000
    _fill(bootstrap_servers, start_ms, seconds)
    with _worker(bootstrap_servers) as worker, _Stalls(bootstrap_servers, worker) as stalls:
        (first_ms, first_end_ms), (last_ms, last_end_ms) = stalls.next(), stalls.next()
        used = worker.cpu_times()
    counted = (last_end_ms - first_end_ms) // 1000 * _AGENTS * _INSTANCES
    all_of_them = seconds * _AGENTS * _INSTANCES
    return [
        Figure(PART, "catching up", "samples/s", (counted / (last_ms - first_ms) * 1000,)),
        Figure(PART, "CPU, its start included", "s/1k samples", ((used.user + used.system) / all_of_them * 1000,)),
    ]


def _fill(bootstrap_servers: str, start_ms: int, seconds: int) -> None:
    producer = Producer({"bootstrap.servers": bootstrap_servers, "linger.ms": 50, "compression.type": "lz4"})
    codec = Codec()
    for event, at_ms in _backlog(start_ms, seconds):
        time_ = datetime.fromtimestamp(at_ms / 1000, UTC)
        key = key_of(event)
        metadata = Metadata(deterministic_id(key, at_ms), f"/processors/{key}", key, time_)
        value, headers = codec.encode(event, metadata)
        producer.produce(_TELEMETRY, value, key.encode(), headers=headers, timestamp=at_ms)
        producer.poll(0)
    if left := producer.flush(60):
        raise RuntimeError(f"{left} records were not written to {_TELEMETRY}")


def _backlog(start_ms: int, seconds: int) -> Iterator[tuple[Event, int]]:
    for second in range(seconds):
        at_ms = start_ms + second * 1000
        for agent in range(_AGENTS):
            for instance in range(_INSTANCES):
                yield _stats(f"agent-{agent}", f"host-{instance}", stalled=""), at_ms
        stalled = second < 60 or second >= seconds - 60
        yield _stats(_MARKER, "a", stalled="it waits" if stalled else ""), at_ms
    # Nothing is judged before something younger is there.
    yield _stats(_MARKER, "a", stalled=""), start_ms + seconds * 1000 + _MINUTE_MS


def _stats(agent: str, instance: str, *, stalled: str) -> ProcessorStats:
    return ProcessorStats(
        source=f"{agent}/{instance}",
        agent=agent,
        instance=instance,
        interval_s=1.0,
        events_in=50,
        events_out=50,
        failures=0,
        dead_letters=0,
        in_flight=4,
        lag=4,
        p50_ms=12.5,
        p99_ms=80.0,
        stalled=stalled,
    )


@contextmanager
def _worker(bootstrap_servers: str) -> Iterator[psutil.Process]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAGNATRONIC_")}
    environment |= {variable("kafka_bootstrap_servers"): bootstrap_servers, variable("monitor_instance"): "bench"}
    with tempfile.TemporaryDirectory(prefix="bench-") as folder, (Path(folder) / "worker.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "faust", "-A", "streams.monitor", "-l", "warn", "worker", "--without-web"],
            stdout=log,
            stderr=log,
            env=environment | {"PYTHONPATH": str(Path(__file__).resolve().parent.parent)},
            cwd=folder,
        )
        try:
            yield psutil.Process(process.pid)
        finally:
            process.kill()
            process.wait()


class _Stalls:
    """The marker's alerts as they come."""

    def __init__(self, bootstrap_servers: str, worker: psutil.Process) -> None:
        self._worker = worker
        self._codec = Codec()
        self._consumer = Consumer({"bootstrap.servers": bootstrap_servers, "group.id": "bench-monitor"})
        self._consumer.assign([TopicPartition(_ALERTS, 0, 0)])

    def __enter__(self) -> "_Stalls":
        return self

    def __exit__(self, *_: object) -> None:
        self._consumer.close()

    def next(self) -> tuple[int, int]:
        """When the next alert was written, and the end of the window that it is about: ms since the epoch."""
        deadline = time.monotonic() + _TIMEOUT_S
        while time.monotonic() < deadline:
            message = self._consumer.poll(0.2)
            if not self._worker.is_running() or self._worker.status() == psutil.STATUS_ZOMBIE:
                raise RuntimeError("the Monitor ended early")
            if message is None or message.error() is not None:
                continue
            record = Record.from_message(message)
            told = self._codec.decode(record)
            if isinstance(told.event, AlertRaised) and told.event.source == f"{_MARKER}/a":
                return record.timestamp_ms, round(told.metadata.time.timestamp() * 1000)
        raise RuntimeError(f"the Monitor had not caught up after {_TIMEOUT_S:g} s")
