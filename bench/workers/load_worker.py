"""The load on a running system: submits tasks and times their outcomes, in a process of its own.

In: one JSON argument, :class:`Load`. Out: one JSON line, :class:`Timing`. A task's time runs from just before it is
sent to the moment a read_committed consumer has its outcome.
"""

import sys
import threading
import time
from dataclasses import asdict, dataclass

import orjson
from confluent_kafka import Consumer, TopicPartition
from confluent_kafka.admin import AdminClient

from bench.kafka import stable_offsets
from magnatronic.client import Client
from schemas.codec import Codec
from schemas.events import Event, TaskCompleted, TaskSubmitted
from schemas.metadata import Metadata
from schemas.record import Record

__all__ = ["OUTCOMES", "Load", "Timing"]

OUTCOMES = "task.outcomes"
_SILENCE_S = 60.0


@dataclass(frozen=True, slots=True)
class Load:
    """``questions`` to ask: all at once, or each when the one before is answered."""

    bootstrap_servers: str
    partitions: int
    prefix: str
    questions: list[str]
    one_by_one: bool = False


@dataclass(frozen=True, slots=True)
class Timing:
    """``seconds`` from the first submission to the last outcome, and each task's own in ``tasks``.

    ``failed`` says of every task that was not completed what became of it.
    """

    seconds: float
    tasks: list[float]
    failed: list[str]


def drive(load: Load) -> Timing:
    """Submit the load and wait for every outcome.

    Raises:
        RuntimeError: a task has two outcomes, or none came for a minute.
    """
    settings = {
        "bootstrap.servers": load.bootstrap_servers,
        "group.id": "bench-load",
        "isolation.level": "read_committed",
        "enable.auto.commit": False,
        "fetch.wait.max.ms": 100,
    }
    consumer = Consumer(settings)
    ends = stable_offsets(AdminClient({"bootstrap.servers": load.bootstrap_servers}), OUTCOMES, load.partitions)
    consumer.assign([TopicPartition(OUTCOMES, number, end) for number, end in enumerate(ends)])
    consumer.poll(0.5)
    tasks = [
        TaskSubmitted(task_id=f"{load.prefix}-{number:06d}", objective=question)
        for number, question in enumerate(load.questions)
    ]
    sent: dict[str, float] = {}
    seen: dict[str, float] = {}
    failed: list[str] = []

    def note(event: Event, _: Metadata) -> None:
        assert isinstance(event, TaskSubmitted)
        sent[event.task_id] = time.perf_counter()

    try:
        with Client(load.bootstrap_servers, name="bench") as client:
            start = time.perf_counter()
            if load.one_by_one:
                for task in tasks:
                    client.publish([task], on_sent=note)
                    failed += _collect(consumer, seen, len(seen) + 1)
            else:
                sender = threading.Thread(target=client.publish, args=(tasks,), kwargs={"on_sent": note}, daemon=True)
                sender.start()
                failed = _collect(consumer, seen, len(tasks))
                sender.join()
    finally:
        consumer.close()
    return Timing(max(seen.values()) - start, [seen[key] - at for key, at in sent.items()], failed)


def _collect(consumer: Consumer, seen: dict[str, float], wanted: int) -> list[str]:
    """Read outcomes until ``seen`` has ``wanted``; those that are no TaskCompleted, in words."""
    codec = Codec()
    failed: list[str] = []
    last = time.monotonic()
    while len(seen) < wanted:
        message = consumer.poll(0.2)
        now = time.perf_counter()
        if message is None:
            if time.monotonic() - last > _SILENCE_S:
                raise RuntimeError(f"{len(seen)} of {wanted} outcomes, and none for {_SILENCE_S:g} s")
            continue
        if message.error() is not None:
            raise RuntimeError(f"reading {OUTCOMES} failed: {message.error()}")
        last = time.monotonic()
        key = (message.key() or b"").decode()
        if key in seen:
            raise RuntimeError(f"task {key} has two outcomes")
        seen[key] = now
        event = codec.decode(Record.from_message(message)).event
        if not isinstance(event, TaskCompleted):
            failed.append(f"{type(event).__name__}: {event}")
    return failed


if __name__ == "__main__":
    print(orjson.dumps(asdict(drive(Load(**orjson.loads(sys.stdin.buffer.read()))))).decode())
