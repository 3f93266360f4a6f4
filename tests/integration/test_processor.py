import asyncio
import random
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from confluent_kafka import Consumer, KafkaError, KafkaException, Producer, TopicPartition
from confluent_kafka.admin import AlterConfigOpType, ConfigEntry, ConfigResource, NewTopic
from pydantic import BaseModel, ConfigDict

from agents.agent import Agent, Failure
from agents.context import Context, LlmRequest, LlmResponse, Message, Ports, Purpose
from agents.errors import EffectFailedError
from schemas.codec import Codec
from schemas.events import (
    AlertRaised,
    DeadLettered,
    LlmCalled,
    Severity,
    StepAssigned,
    StepCompleted,
    StepFailed,
    TaskSubmitted,
)
from schemas.metadata import Envelope, Metadata, deterministic_id
from schemas.record import Record
from schemas.topics import TOPICS, key_of
from streams.binding import Binding
from streams.errors import ClusterError, FencedError, MissingTopicError, StateError
from streams.kafka import producer_settings, reader_settings
from streams.processor import Processor
from streams.state import StateCodec, changelog_topic, restore

OUTPUTS = ("work.results.normal", "tasks.lifecycle.normal", "effects", "dead-letters")
CODEC = Codec()
PARTITIONS = 3
LARGE = random.Random(1).randbytes(700_000).hex()  # that no compression makes small enough


ALERT = AlertRaised(
    source="s", alert_id="a", rule="r", severity=Severity.WARNING, message=LARGE[:9000], value=1, threshold=1
)


class Total(BaseModel):
    model_config = ConfigDict(frozen=True)

    sum: int = 0
    count: int = 0


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
        ctx.emit(
            StepCompleted(
                task_id=event.task_id,
                step_id=event.step_id,
                attempt=event.attempt,
                capability=event.capability,
                objective=event.objective,
                answer=answer,
            )
        )

    async def on_failure(self, event: StepAssigned, failure: Failure, ctx: Context[Total]) -> None:
        if event.parameters.get("on_failure") == "fail":
            raise ValueError("and failed again")
        ctx.emit(
            StepFailed(
                task_id=event.task_id,
                step_id=event.step_id,
                attempt=event.attempt,
                error_type=failure.error_type,
                message=failure.message,
                retryable=failure.retryable,
            )
        )


class FlakyModel:
    """Fails so often, then answers."""

    name = "flaky"

    def __init__(self, failures: int, *, retryable: bool = True, answer: str = "yes") -> None:
        self.calls = 0
        self._answer = answer
        self._failures = failures
        self._retryable = retryable

    async def complete(self, request: LlmRequest) -> LlmResponse:
        self.calls += 1
        if self.calls <= self._failures:
            raise EffectFailedError("RateLimited", "slow down", retryable=self._retryable)
        return LlmResponse(text=self._answer, provider="test", model="test", prompt_tokens=2, completion_tokens=1)


class Bench:
    """An input topic, an agent on it, and a view of what it committed."""

    def __init__(self, kafka: Any) -> None:
        self.kafka = kafka
        self.agent = Adder(kafka.unique("adder"))
        self.topic = f"{kafka.unique('work')}.normal"
        kafka.create_topics(self.topic, PARTITIONS)
        self.binding = Binding(self.agent, (self.topic,), backoff_s=0.01, max_backoff_s=0.05)
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
        async with asyncio.timeout(timeout_s):
            while not done():  # noqa: ASYNC110 - the processor has no event for it
                await asyncio.sleep(0.02)

    async def process(self, count: int, **settings: Any) -> Processor:
        async with self.running(**settings) as processor:
            await self.until(lambda: processor.stats.events_in >= count)
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


def read_committed(config: dict[str, Any], topic: str) -> Iterator[Record]:
    consumer = Consumer(reader_settings(config, "test-reader"))
    try:
        partitions = consumer.list_topics(topic, timeout=20).topics[topic].partitions
        waiting = set(partitions)
        consumer.assign([TopicPartition(topic, partition, 0) for partition in partitions])
        while waiting:
            for message in consumer.consume(1000, 1.0 if len(waiting) == len(partitions) else 0.2):
                error = message.error()
                if error is None:
                    yield Record.from_message(message)
                elif error.code() == KafkaError._PARTITION_EOF:
                    waiting.discard(message.partition())
                else:
                    raise KafkaException(error)
    finally:
        consumer.close()


@pytest.fixture
def bench(kafka: Any) -> Bench:
    known = kafka.admin.list_topics(timeout=20).topics
    limits = {name: topic.max_message_bytes for topic in TOPICS for name in topic.names()}
    for name in OUTPUTS:
        if name not in known:
            kafka.create_topics(name, 2, {"max.message.bytes": str(limits[name])})
    return Bench(kafka)


async def test_every_event_once_each_lane_in_order(bench: Bench) -> None:
    rng = random.Random(3)
    expected: dict[str, list[str]] = defaultdict(list)
    sums: dict[str, int] = defaultdict(int)
    for _ in range(1500):
        task, number = f"t{rng.randrange(60)}", rng.randrange(-9, 99)
        sums[task] += number
        expected[task].append(str(sums[task]))
        bench.send(task, rng.choice(["add", "wait"]), number)
    processor = await bench.process(1500)
    assert bench.results() == expected
    assert processor.stats.events_out == 1500
    assert processor.stats.in_flight == 0 or processor.stats.transactions > 1
    assert sum(place.offset for place in bench.offsets()) == 1500


async def test_outputs_name_their_cause_and_their_effects(bench: Bench) -> None:
    model = FlakyModel(2)
    bench.send("t", "ask")
    processor = await bench.process(1, ports=Ports(llm=model))
    ((record, output),) = bench.committed("work.results.normal")
    assert output.metadata.causation_id == deterministic_id(bench.topic, 1)
    assert output.metadata.correlation_id == "t"
    assert record.key == b"t"
    effects = [envelope.event for _, envelope in bench.committed("effects")]
    assert [effect.error == "" for effect in effects if isinstance(effect, LlmCalled)] == [False, False, True]
    assert processor.stats.tokens == 3
    assert processor.stats.failures == 2
    assert bench.letters() == []


async def test_an_agent_that_gives_up_says_so_in_the_same_transaction(bench: Bench) -> None:
    bench.send("good")
    bench.send("bad", "ask")
    bench.send("broken", "fail", on_failure="fail")
    bench.send("wrong", "fail")
    processor = await bench.process(4, ports=Ports(llm=FlakyModel(99)))
    letters = {letter.key: letter for letter in bench.letters()}
    assert sorted(key or b"" for key in letters) == [b"bad", b"broken", b"wrong"]
    assert letters[b"bad"].error_type == "RateLimited"
    assert letters[b"bad"].attempts == 3
    assert letters[b"wrong"].attempts == 1
    assert "told to fail" in letters[b"broken"].error
    assert "ValueError: and failed again" in letters[b"broken"].error
    letter = letters[b"wrong"]
    assert letter.source_topic == bench.topic
    headers = list(zip(letter.header_names, letter.header_values, strict=True))
    restored = Record(bench.topic, 0, 0, 0, letter.key, letter.value, headers)
    assert CODEC.decode(restored).event.model_dump()["objective"] == "fail"
    failed = [envelope.event for _, envelope in bench.committed("tasks.lifecycle.normal")]
    assert sorted(event.task_id for event in failed if isinstance(event, StepFailed)) == ["bad", "wrong"]
    assert len(bench.committed("effects")) == 3
    assert bench.results() == {"good": ["1"]}
    assert processor.stats.dead_letters == 3


async def test_a_failed_event_leaves_no_state(bench: Bench) -> None:
    for objective in ("add", "fail", "add"):
        bench.send("t", objective, 10)
    await bench.process(3)
    assert bench.results() == {"t": ["10", "20"]}


async def test_bytes_that_are_no_event_are_kept_as_dead_letters(bench: Bench) -> None:
    bench.send("t")
    bench.send_raw(b"t", b"\x00\x00\x00\x00\x01garbage", [("h", b"1"), ("h", None)])
    bench.send_raw(b"t", b"")
    bench.send("t", "nowhere")
    bench.send("t")
    await bench.process(5)
    assert bench.results() == {"t": ["1", "2"]}
    letters = bench.letters()
    assert letters.pop().error == "no lane for it"
    assert [letter.value for letter in letters] == [b"\x00\x00\x00\x00\x01garbage", b""]
    assert letters[0].header_names == ("h", "h")
    assert all(letter.attempts == 0 and letter.error_type.endswith("Error") for letter in letters)


async def test_other_agents_events_are_passed_over(bench: Bench) -> None:
    bench.send("t")
    bench.send_event(Envelope(TaskSubmitted(task_id="t", objective="x"), bench.metadata("t")))
    processor = await bench.process(1)
    assert processor.stats.skipped == 1
    assert sum(place.offset for place in bench.offsets() if place.offset > 0) == 2
    assert bench.letters() == []


async def test_an_output_too_large_for_its_topic_fails_its_event(bench: Bench) -> None:
    bench.send("t", "large")
    bench.send("t", "add", 5)
    await bench.process(2)
    (letter,) = bench.letters()
    assert letter.error_type == "EventTooLargeError"
    assert "emit less" in letter.error
    assert bench.results() == {"t": ["5"]}
    assert len(bench.committed("tasks.lifecycle.normal")) == 1


async def test_an_effect_too_large_to_be_recorded_fails_its_event(bench: Bench) -> None:
    bench.send("t", "ask")
    bench.send("t", "add", 5)
    await bench.process(2, ports=Ports(llm=FlakyModel(0, answer="x" * 5_000_000)))
    (letter,) = bench.letters()
    assert letter.error_type == "EventTooLargeError"
    assert "LlmCalled" in letter.error
    assert bench.results() == {"t": ["5"]}
    assert [getattr(made.event, "error_type", "") for _, made in bench.committed("tasks.lifecycle.normal")] == [
        "EventTooLargeError"
    ]


async def test_an_output_that_only_the_broker_refuses_ends_as_a_dead_letter(
    bench: Bench,
) -> None:
    if "alerts" not in bench.kafka.admin.list_topics(timeout=20).topics:
        bench.kafka.create_topics("alerts")
    limit = ConfigEntry("max.message.bytes", "3000", incremental_operation=AlterConfigOpType.SET)
    resource = ConfigResource(ConfigResource.Type.TOPIC, "alerts", incremental_configs=[limit])
    bench.kafka.admin.incremental_alter_configs([resource])[resource].result(20)
    bench.send("a")
    bench.send("t", "alert", 3)
    bench.send("t", "add", 5)
    processor = await bench.process(3)
    (letter,) = bench.letters()
    assert letter.error_type == "OutputRefused"
    assert "MSG_SIZE_TOO_LARGE" in letter.error
    assert bench.results() == {"a": ["1"], "t": ["3", "8"]}
    assert bench.committed("alerts") == []
    assert processor.stats.aborted > 0


async def test_state_is_restored_by_the_next_owner(bench: Bench) -> None:
    for number in range(1, 31):
        bench.send(f"t{number % 10}", number=number)
    bench.send("t3", "forget")
    await bench.process(31)
    for number in range(10):
        bench.send(f"t{number}", number=100)
    await bench.process(10)
    results = bench.results()
    for number in range(10):
        before = 0 if number == 3 else sum(each for each in range(1, 31) if each % 10 == number)
        assert results[f"t{number}"][-1] == str(before + 100)
    changelog = changelog_topic(bench.binding.group, bench.topic)
    latest = {record.key: record.value for record in read_committed(bench.kafka.config, changelog)}
    assert len(latest) == 10
    assert bench.kafka.admin.list_topics(changelog).topics[changelog].partitions.keys() == set(range(PARTITIONS))


async def test_a_lost_offset_is_an_error_not_a_second_run(bench: Bench) -> None:
    bench.send("t")
    await bench.process(1)
    await bench.until(bench.forget_group)
    with pytest.raises(StateError, match="no offset"):
        await bench.processor().run()


async def test_a_slow_event_holds_back_nobody_and_is_done_by_the_next_owner(bench: Bench) -> None:
    bench.send("slow", "hang")
    for number in range(300):
        bench.send(f"t{number % 50}", number=number)
    processor = await bench.process(300, drain_timeout_s=0.1)
    assert processor.stats.events_in == 300
    metadata = [place.metadata for place in bench.offsets()]
    assert sum(1 for each in metadata if each) == 1
    # The same event again, and nothing of what was committed past it.
    binding = replace(bench.binding, max_attempts=1, timeout_s=0.05, max_backoff_s=0.05)
    second = await bench.process(1, binding=binding)
    assert second.stats.events_in == 1
    (letter,) = bench.letters()
    assert (letter.key, letter.error_type) == (b"slow", "HandlerHung")
    assert sum(map(len, bench.results().values())) == 300


async def test_a_graceful_stop_under_load_loses_and_repeats_nothing(bench: Bench) -> None:
    for number in range(3000):
        bench.send(f"t{number % 97}", "wait")
    done = 0
    while done < 3000:
        async with bench.running() as processor:
            target = min(3000 - done, random.randrange(1, 1200))
            await bench.until(lambda: processor.stats.events_in >= target)  # noqa: B023 - awaited right here
        done += processor.stats.events_in
    assert {task: len(answers) for task, answers in bench.results().items()} == {
        f"t{task}": len(range(task, 3000, 97)) for task in range(97)
    }


async def test_a_second_instance_with_the_same_slot_fences_the_first(bench: Bench) -> None:
    bench.send("t")
    bench.flush()
    first = bench.processor()
    running = asyncio.create_task(first.run())
    await bench.until(lambda: first.stats.events_in == 1)
    async with bench.running() as second:
        with pytest.raises(FencedError, match="slot"):
            await asyncio.wait_for(running, 20)
        bench.send("t")
        bench.flush()
        await bench.until(lambda: second.stats.events_in == 1)
    assert bench.results() == {"t": ["1", "2"]}


async def test_joins_and_leaves_lose_and_repeat_nothing(bench: Bench) -> None:
    processors = [bench.processor(slot=slot) for slot in ("a", "b")]
    enough = asyncio.Event()

    async def send() -> None:
        while not enough.is_set():
            for _ in range(50):
                bench.send(f"t{bench.sent % 61}", "wait")
            bench.flush()
            await asyncio.sleep(0.02)

    sender = asyncio.create_task(send())
    first = asyncio.create_task(processors[0].run())
    await bench.until(lambda: processors[0].stats.events_in > 200)
    second = asyncio.create_task(processors[1].run())
    await bench.until(lambda: processors[1].stats.events_in > 200)
    processors[0].stop()
    await first
    enough.set()
    await sender
    await bench.until(lambda: sum(each.stats.events_in for each in processors) == bench.sent)
    processors[1].stop()
    await second
    assert bench.results() == {
        f"t{task}": [str(n + 1) for n in range(len(range(task, bench.sent, 61)))] for task in range(61)
    }


async def test_backpressure_bounds_what_is_in_flight(bench: Bench) -> None:
    for number in range(900):
        bench.send(f"t{number}", "hang" if number < 40 else "add")
    binding = replace(bench.binding, concurrency=40, max_in_flight=100)
    most = 0
    async with bench.running(binding=binding, drain_timeout_s=0.1) as processor:
        deadline = time.monotonic() + 4
        while time.monotonic() < deadline:
            most = max(most, processor._fetcher.in_flight if hasattr(processor, "_fetcher") else 0)
            await asyncio.sleep(0.05)
    assert 100 <= most <= 100 + 500


async def test_a_missing_topic_is_told(bench: Bench) -> None:
    binding = replace(bench.binding, topics=("nowhere.normal",))
    with pytest.raises(MissingTopicError, match=r"nowhere\.normal"):
        await bench.processor(binding=binding).run()


async def test_a_restore_waits_for_the_leader_of_a_new_changelog(bench: Bench) -> None:
    changelog = f"{bench.topic}.late.changelog"
    places = [(changelog, number) for number in range(PARTITIONS)]
    restoring = asyncio.create_task(
        asyncio.to_thread(restore, bench.kafka.config, places, StateCodec(Total), timeout_s=20)
    )
    await asyncio.sleep(0.3)
    assert not restoring.done()
    created = bench.kafka.admin.create_topics([NewTopic(changelog, PARTITIONS, 1)])
    await asyncio.to_thread(created[changelog].result)
    assert await restoring == {place: {} for place in places}


async def test_a_restore_tells_of_a_changelog_that_stays_away(bench: Bench) -> None:
    with pytest.raises(ClusterError, match="changelogs can't be read"):
        await asyncio.to_thread(restore, bench.kafka.config, [("nowhere", 0)], StateCodec(Total), timeout_s=0.5)
