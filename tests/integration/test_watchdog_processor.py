"""An event that hangs or eats up its process: the watchdog ends it, and the next life counts runs and gives it up."""

import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

from confluent_kafka import Consumer, KafkaError, Producer, TopicPartition

from magnatronic.letters import DEAD_LETTERS, Filter, LetterReader
from schemas.codec import Codec
from schemas.events import StepAssigned, StepCompleted
from schemas.metadata import Metadata
from schemas.record import Record
from schemas.topics import all_topics
from streams.guard import FATAL
from streams.kafka import producer_settings, reader_settings

CODEC = Codec()
REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS = "work.results.normal"
EVENTS = 30

WORKER = """
import asyncio, os, sys

from agents.agent import Agent
from schemas.codec import Codec
from schemas.events import StepAssigned, StepCompleted
from streams.binding import Binding
from streams.processor import Processor
from streams.watchdog import Watchdog

servers, topic, name, loop_timeout_s = sys.argv[1:]

class Worker(Agent):
    version, consumes, emits = "1", (StepAssigned,), (StepCompleted,)

    async def handle(self, event, ctx):
        if event.objective == "spin":
            while True:
                pass
        if event.objective == "eat":
            held = []
            while True:
                held.append(bytearray(os.urandom(1024) * 4096))
        ctx.emit(StepCompleted(task_id=event.task_id, step_id=event.step_id, attempt=1, capability=event.capability,
                               objective=event.objective, answer="done"))

Worker.name = name

async def main():
    processor = Processor(Binding(Worker(), (topic,)), codec=Codec(), session_timeout_ms=6000,
                          kafka={"bootstrap.servers": servers})
    running = asyncio.create_task(processor.run())
    with Watchdog(loop_timeout_s=float(loop_timeout_s), memory_limit_mib=600):
        while processor.stats.dead_letters == 0 or processor.stats.in_flight:
            if running.done():
                break
            await asyncio.sleep(0.05)
        await asyncio.sleep(1)
    processor.stop()
    await running

asyncio.run(main())
"""


def completed(kafka: Any, source: str) -> Counter[str]:
    """How often each step was completed."""
    found: Counter[str] = Counter()
    consumer = Consumer(reader_settings(kafka.config, f"test-{uuid4()}"))
    try:
        waiting = set(consumer.list_topics(RESULTS, timeout=20).topics[RESULTS].partitions)
        consumer.assign([TopicPartition(RESULTS, number, 0) for number in waiting])
        while waiting:
            for message in consumer.consume(1000, 0.3):
                if (error := message.error()) is None:
                    envelope = CODEC.decode(Record.from_message(message))
                    if envelope.metadata.source == source and isinstance(envelope.event, StepCompleted):
                        found[envelope.event.step_id] += 1
                elif error.code() == KafkaError._PARTITION_EOF:
                    waiting.discard(message.partition())
    finally:
        consumer.close()
    return found


def test_who_takes_the_process_down_is_given_up_and_the_others_are_done_once(kafka: Any) -> None:
    known, topics = kafka.admin.list_topics(timeout=20).topics, all_topics()
    for name in (RESULTS, DEAD_LETTERS, "effects"):
        if name not in known:
            kafka.create_topics(name, 1, {"max.message.bytes": str(topics[name].max_message_bytes)})
    with ThreadPoolExecutor(2) as side_by_side:
        spinning = side_by_side.submit(taken_down, kafka, "spin", 1.5, "stood still")
        taken_down(kafka, "eat", 60, "over its limit of 600")
        spinning.result()


def taken_down(kafka: Any, objective: str, loop_timeout_s: float, reason: str) -> None:
    agent, topic = kafka.unique("worker"), f"{kafka.unique('work')}.normal"
    kafka.create_topics(topic)
    producer = Producer(producer_settings(kafka.config, "scene"))
    good = [f"t/{number}" for number in range(EVENTS)]
    for step_id in [*good[: EVENTS // 2], "bad", *good[EVENTS // 2 :]]:
        said = objective if step_id == "bad" else "work"
        event = StepAssigned(task_id=step_id, step_id=step_id, capability="research", objective=said)
        metadata = Metadata(id=str(uuid4()), source="/clients/test", subject=step_id, time=datetime.now(UTC))
        value, headers = CODEC.encode(event, metadata)
        producer.produce(topic, value, step_id.encode(), headers=headers)
    assert producer.flush(20) == 0

    command = [sys.executable, "-c", WORKER, kafka.bootstrap_servers, topic, agent, str(loop_timeout_s)]
    deaths = 0
    for _ in range(6):
        ended = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=60, check=False)
        if ended.returncode == 0:
            break
        assert ended.returncode == -FATAL, ended.stderr
        assert reason in ended.stderr
        assert "in handle" in ended.stderr
        deaths += 1
    assert deaths == 4  # the first is not counted, three more are; the fifth life gives it up
    (letter,) = filter(Filter(agent=agent), LetterReader(kafka.config, CODEC).entries())
    assert (letter.place.topic, letter.place.offset >= EVENTS // 2) == (topic, True)
    assert completed(kafka, f"/agents/{agent}@1") == Counter(dict.fromkeys(good, 1))
