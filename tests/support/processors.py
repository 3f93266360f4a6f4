"""A processor under test: an agent that does as it is told, on a topic of its own, and what it committed."""

import asyncio
import random
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

from confluent_kafka import Consumer, KafkaError, KafkaException, Producer, TopicPartition

from agents.agent import Agent, Failure
from agents.answering import step_failed
from agents.context import Context, LlmRequest, LlmResponse, Message, Purpose
from agents.errors import EffectFailedError
from schemas.codec import Codec
from schemas.events import (
    AlertRaised,
    DeadLettered,
    Severity,
    StepAssigned,
    StepCompleted,
    StepFailed,
)
from schemas.metadata import Envelope, Metadata, deterministic_id
from schemas.record import Record
from schemas.topics import TOPICS, key_of
from streams.binding import Binding, RetryPolicy
from streams.kafka import passes, producer_settings, reader_settings
from streams.processor import Processor
from tests.support.steps import Total, completed

OUTPUTS = ("work.results.normal", "tasks.lifecycle.normal", "effects", "dead-letters")
CODEC = Codec()
PARTITIONS = 3
LARGE = random.Random(1).randbytes(700_000).hex()  # that no compression makes small enough


ALERT = AlertRaised(
    source="s", alert_id="a", rule="r", severity=Severity.WARNING, message=LARGE[:9000], value=1, threshold=1
)


class Adder(Agent[Total]):
    """Adds up each task's numbers. The event's ``objective`` says what to do with ``parameters["number"]``."""

    version = "1"
    consumes = (StepAssigned,)
    emits = (StepCompleted, StepFailed, AlertRaised)
    state_type = Total

    def __init__(self, name: str) -> None:
        self.name = name  # type: ignore[misc]

    def lane(self, event: StepAssigned) -> str:  # type: ignore[override]
        if event.objective == "nowhere":
            raise LookupError("no lane for it")
        return event.task_id

    async def handle(self, event: StepAssigned, ctx: Context[Total]) -> None:
        before = ctx.state or Total()
        ctx.state = Total(sum=before.sum + int(event.parameters.get("number", "0")), count=before.count + 1)
        match event.objective:
            case "fail":
                raise RuntimeError("told to fail")
            case "ask":
                await ctx.llm(LlmRequest(purpose=Purpose.ANSWER, messages=(Message(role="user", content="?"),)))
            case "wait":
                await asyncio.sleep(0.002 * random.random())
            case "hang":
                await asyncio.Event().wait()
            case "forget":
                ctx.state = None
            case "alert":
                ctx.emit(ALERT)
        answer = LARGE if event.objective == "large" else str(ctx.state.sum if ctx.state else 0)
        ctx.emit(completed(event, answer))

    async def on_failure(self, event: StepAssigned, failure: Failure, ctx: Context[Total]) -> None:
        if event.parameters.get("on_failure") == "fail":
            raise ValueError("and failed again")
        ctx.emit(step_failed(event, failure))


class FlakyModel:
    """Fails so often, then answers."""

    name = "flaky"

    def __init__(self, failures: int, *, retryable: bool = True, answer: str = "yes") -> None:
        self.calls = 0
        self._answer = answer
        self._failures = failures
        self._retryable = retryable

    async def complete(self, request: LlmRequest, *, idempotency_key: str) -> LlmResponse:
        self.calls += 1
        if self.calls <= self._failures:
            raise EffectFailedError("RateLimited", "slow down", retryable=self._retryable)
        return LlmResponse(text=self._answer, provider="test", model="test", prompt_tokens=2, completion_tokens=1)


class Bench:
    """An input topic, an agent on it, and a view of what it committed."""

    def __init__(self, kafka: Any, agent: Agent[Any] | None = None) -> None:
        self.kafka = kafka
        self.agent = agent or Adder(kafka.unique("adder"))
        self.topic = f"{kafka.unique('work')}.normal"
        kafka.create_topics(self.topic, PARTITIONS)
        self.binding = Binding(self.agent, (self.topic,), retry=RetryPolicy(backoff_s=0.01, max_backoff_s=0.05))
        self.sent = 0
        self._producer = Producer(producer_settings(kafka.config, "bench"))

    def send(self, task: str, objective: str = "add", number: int = 1, **parameters: str) -> None:
        self.sent += 1
        event = StepAssigned(
            task_id=task,
            step_id=f"{task}/{self.sent}",
            capability="research",
            objective=objective,
            parameters={"number": str(number), **parameters},
        )
        self.send_event(Envelope(event, self.metadata(task)))

    def metadata(self, task: str) -> Metadata:
        return Metadata(
            id=deterministic_id(self.topic, self.sent),
            source="/clients/test",
            subject=task,
            time=datetime.now(UTC),
            correlation_id=task,
        )

    def send_event(self, envelope: Envelope) -> None:
        value, headers = CODEC.encode(envelope.event, envelope.metadata)
        self.send_raw(key_of(envelope.event).encode(), value, headers)

    def send_raw(self, key: bytes, value: bytes, headers: Any = ()) -> None:
        while True:
            try:
                self._producer.produce(self.topic, value, key, headers=list(headers))
                return
            except BufferError:
                self._producer.poll(0.1)

    def flush(self) -> None:
        assert self._producer.flush(20) == 0

    def processor(self, **settings: Any) -> Processor:
        binding = settings.pop("binding", self.binding)
        defaults = {"slot": 0, "session_timeout_ms": 6000}
        return Processor(binding, codec=CODEC, kafka=self.kafka.config, **{**defaults, **settings})

    @asynccontextmanager
    async def running(self, **settings: Any) -> AsyncIterator[Processor]:
        self.flush()
        processor = self.processor(**settings)
        task = asyncio.create_task(processor.run())
        try:
            yield processor
        finally:
            processor.stop()
            await task

    async def until(self, done: Callable[[], bool], timeout_s: float = 40) -> None:
        await until(done, timeout_s=timeout_s)

    async def process(self, count: int, **settings: Any) -> Processor:
        async with self.running(**settings) as processor:
            await until(lambda: processor.stats.events_in >= count)
        assert processor.stats.events_in == count
        return processor

    def committed(self, topic: str) -> list[tuple[Record, Envelope]]:
        """What this bench's agent committed to an output topic."""
        decoded = [(record, CODEC.decode(record)) for record in read_committed(self.kafka.config, topic)]
        return [(record, envelope) for record, envelope in decoded if envelope.metadata.source == self.agent.source]

    def results(self) -> dict[str, list[str]]:
        answers: dict[str, list[str]] = defaultdict(list)
        for _, envelope in self.committed("work.results.normal"):
            assert isinstance(envelope.event, StepCompleted)
            answers[envelope.event.task_id].append(envelope.event.answer)
        return dict(answers)

    def letters(self) -> list[DeadLettered]:
        events = [envelope.event for _, envelope in self.committed("dead-letters")]
        assert all(isinstance(event, DeadLettered) for event in events)
        return [event for event in events if isinstance(event, DeadLettered)]

    def forget_group(self) -> bool:
        """False as long as the group still has its static member, which is until the session ends."""
        group = self.binding.group
        error = self.kafka.admin.delete_consumer_groups([group])[group].exception(10)
        assert error is None or error.args[0].code() == KafkaError.NON_EMPTY_GROUP
        return error is None

    def offsets(self) -> list[TopicPartition]:
        consumer = Consumer({**self.kafka.config, "group.id": self.binding.group})
        try:
            places = [TopicPartition(self.topic, partition) for partition in range(PARTITIONS)]
            return list(consumer.committed(places, timeout=20))
        finally:
            consumer.close()


async def until(
    done: Callable[[], bool], *, running: "asyncio.Task[None] | None" = None, timeout_s: float = 40
) -> None:
    """Wait until it is done; what ends ``running`` early is raised."""
    async with asyncio.timeout(timeout_s):
        while not done():
            if running is not None and running.done():
                running.result()
            await asyncio.sleep(0.02)


def read_committed(config: dict[str, Any], topic: str) -> Iterator[Record]:
    """All that is committed in the topic now."""
    consumer = Consumer(reader_settings(config, "test-reader"))
    try:
        partitions = consumer.list_topics(topic, timeout=20).topics[topic].partitions
        waiting = set(partitions)
        consumer.assign([TopicPartition(topic, partition, 0) for partition in partitions])
        while waiting:
            first = consumer.poll(0.2)
            for message in [] if first is None else [first, *consumer.consume(1000, 0)]:
                error = message.error()
                if error is None:
                    yield Record.from_message(message)
                elif error.code() == KafkaError._PARTITION_EOF:
                    waiting.discard(message.partition())
                elif not passes(error):
                    raise KafkaException(error)
    finally:
        consumer.close()


def bench_on(kafka: Any, agent: Agent[Any] | None = None) -> Bench:
    """A :class:`Bench`, with the topics that its agent writes to."""
    known = kafka.admin.list_topics(timeout=20).topics
    limits = {name: topic.max_message_bytes for topic in TOPICS for name in topic.names()}
    for name in OUTPUTS:
        if name not in known:
            kafka.create_topics(name, 2, {"max.message.bytes": str(limits[name])})
    return Bench(kafka, agent)
