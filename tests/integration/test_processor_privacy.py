"""A processor and data subjects, on a real Kafka: what it writes is sealed, and what was erased is not decided on."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
from pydantic import BaseModel, ConfigDict

from agents.agent import Agent, Failure
from agents.answering import step_failed
from agents.context import Context, LlmRequest, LlmResponse, Message, Ports, Purpose, RecallRequest
from schemas.codec import Codec
from schemas.encryption import SubjectCipher
from schemas.events import (
    DeadLettered,
    Event,
    Evidence,
    LlmCalled,
    PersonalText,
    StepAssigned,
    StepCompleted,
    StepFailed,
)
from schemas.metadata import Envelope, Metadata, deterministic_id
from schemas.record import Record
from schemas.topics import key_of
from streams.binding import Binding, RetryPolicy
from streams.processor import Processor
from streams.state import changelog_topic
from tests.support.keys import ADA, BOB, MemoryKeys
from tests.support.processors import Bench, bench_on, read_committed
from tests.support.steps import completed

if TYPE_CHECKING:
    from tests.conftest import KafkaForTests

SECRET = "Quorzapple"


class Notes(BaseModel):
    model_config = ConfigDict(frozen=True)

    said: PersonalText = ""
    count: int = 0


class Secretary(Agent[Notes]):
    """Notes what it is told, asks a model or recalls where told to, and answers with all it knows."""

    version = "1"
    consumes = (StepAssigned,)
    emits = (StepCompleted, StepFailed)
    state_type = Notes

    def __init__(self, name: str) -> None:
        self.name = name  # type: ignore[misc]

    async def handle(self, event: StepAssigned, ctx: Context[Notes]) -> None:
        before = ctx.state or Notes()
        said = f"{before.said} {event.objective}".strip()
        if event.parameters.get("ask"):
            said += (await ctx.llm(_request(said))).text
        if event.parameters.get("recall"):
            said += (await ctx.recall(said))[0].text
            await ctx.llm(_request(said))
        if event.parameters.get("fail"):
            raise RuntimeError(f"what is {said}")
        ctx.state = Notes(said=said, count=before.count + 1)
        ctx.emit(completed(event, said))

    async def on_failure(self, event: StepAssigned, failure: Failure, ctx: Context[Notes]) -> None:
        assert SECRET not in event.objective or failure.error_type != "SubjectForgotten"
        ctx.emit(step_failed(event, failure))


def _request(said: str) -> LlmRequest:
    return LlmRequest(purpose=Purpose.ANSWER, messages=(Message(role="user", content=said),))


class Outside:
    """A model that waits to be let go, and a memory of what Bob is."""

    name, model = "outside", "outside"

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.go = asyncio.Event()

    async def complete(self, request: LlmRequest, *, idempotency_key: str) -> LlmResponse:
        self.asked.set()
        await self.go.wait()
        return LlmResponse(text=f" {SECRET} answered", provider="p", model="m", prompt_tokens=3, cost_usd=0.5)

    async def recall(self, request: RecallRequest) -> tuple[Evidence, ...]:
        return (Evidence(chunk_id="c", document_id="d", title="t", text=f" {SECRET} of Bob", data_subjects=(BOB,)),)


class Office:
    def __init__(self, kafka: Any) -> None:
        self.bench: Bench = bench_on(kafka, Secretary(kafka.unique("secretary")))
        self.keys = MemoryKeys()
        self.outside = Outside()
        self._codec = self._fresh()
        policy = RetryPolicy(attempts=2, backoff_s=0.01, max_backoff_s=0.05)
        self.binding = Binding(self.bench.agent, (self.bench.topic,), retry=policy)

    def _fresh(self) -> Codec:
        return Codec(cipher=SubjectCipher(self.keys))

    def send(self, task: str, *subjects: str, objective: str = f"{SECRET} asks", **parameters: str) -> None:
        self.bench.sent += 1
        number = self.bench.sent
        event = StepAssigned(
            task_id=task,
            step_id=f"{task}/{number}",
            capability="research",
            objective=objective,
            parameters=parameters,
        )
        metadata = Metadata(
            id=deterministic_id(self.bench.topic, number),
            source="/clients/test",
            subject=task,
            time=self.bench.metadata(task).time,
            correlation_id=task,
            data_subjects=subjects,
        )
        value, headers = self._codec.encode(event, metadata)
        self.bench.send_raw(key_of(event).encode(), value, headers)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Processor]:
        self.bench.flush()
        processor = Processor(
            self.binding,
            codec=self._fresh(),
            kafka=self.bench.kafka.config,
            ports=Ports(llm=self.outside, memory=self.outside),
            slot=0,
            session_timeout_ms=6000,
        )
        task = asyncio.create_task(processor.run())
        try:
            yield processor
        finally:
            processor.stop()
            await task

    async def process(self, count: int) -> Processor:
        async with self.running() as processor:
            await self.bench.until(lambda: processor.stats.events_in >= count)
        return processor

    def written(self, topic: str) -> list[tuple[Record, Envelope]]:
        codec = self._fresh()
        found = [(record, codec.decode(record)) for record in read_committed(self.bench.kafka.config, topic)]
        return [each for each in found if each[1].metadata.source == self.bench.agent.source]

    def events(self, topic: str) -> list[Event]:
        return [envelope.event for _, envelope in self.written(topic)]

    def raw(self) -> bytes:
        """Every byte of what it wrote, and of its changelog."""
        topics = ("work.results.normal", "tasks.lifecycle.normal", "effects", "dead-letters")
        records = [record for topic in topics for record, _ in self.written(topic)]
        records += read_committed(self.bench.kafka.config, changelog_topic(self.binding.group, self.bench.topic))
        headers = [text or b"" for record in records for _, text in record.headers]
        return b"\n".join([*(record.value or b"" for record in records), *headers])


@pytest.fixture
def office(kafka: "KafkaForTests") -> Office:
    return Office(kafka)


async def test_all_that_it_writes_is_sealed(office: Office) -> None:
    office.outside.go.set()
    office.send("t1", ADA, ask="yes")
    office.send("t1", ADA, objective=f"{SECRET} again")
    office.send("t1", ADA, objective=f"{SECRET} fails", fail="yes")
    office.send("t2", objective="nobody")
    await office.process(4)
    answers = [event.answer for event in office.events("work.results.normal") if isinstance(event, StepCompleted)]
    assert sorted(answers) == sorted(
        ["nobody", f"{SECRET} asks {SECRET} answered", f"{SECRET} asks {SECRET} answered {SECRET} again"]
    )
    (letter,) = [event for event in office.events("dead-letters") if isinstance(event, DeadLettered)]
    assert letter.error.endswith(f"{SECRET} fails")
    assert {envelope.metadata.data_subjects for _, envelope in office.written("effects")} == {(ADA,)}
    assert SECRET.encode() not in office.raw()
    assert b"nobody" in office.raw()


async def test_what_was_erased_before_it_came_is_answered_without_it(office: Office) -> None:
    office.send("t1", ADA)
    office.send("t2", BOB)
    office.keys.forget(ADA)
    processor = await office.process(2)
    (failed,) = [event for event in office.events("tasks.lifecycle.normal") if isinstance(event, StepFailed)]
    assert (failed.task_id, failed.error_type, failed.retryable) == ("t1", "SubjectForgotten", False)
    assert [event.task_id for event in office.events("work.results.normal") if isinstance(event, StepCompleted)] == [
        "t2"
    ]
    assert office.events("dead-letters") == []
    assert (processor.stats.erased, processor.stats.dead_letters) == (1, 0)


async def test_state_that_was_erased_is_not_decided_on(office: Office) -> None:
    office.send("t1", ADA)
    await office.process(1)
    office.keys.forget(ADA)
    office.send("t1", objective="about nobody, in a lane about Ada")
    await office.process(1)
    (failed,) = [event for event in office.events("tasks.lifecycle.normal") if isinstance(event, StepFailed)]
    assert failed.error_type == "SubjectForgotten"


@pytest.mark.parametrize(("parameter", "subjects", "gone"), [("ask", (ADA,), ADA), ("recall", (ADA,), BOB)])
async def test_a_subject_who_is_forgotten_while_a_step_runs(
    office: Office, parameter: str, subjects: tuple[str, ...], gone: str
) -> None:
    office.send("t1", *subjects, **{parameter: "yes"})
    async with office.running() as processor:
        await asyncio.wait_for(office.outside.asked.wait(), 30)
        office.keys.forget(gone)
        for cipher in (processor._codec.cipher,):
            assert isinstance(cipher, SubjectCipher)
            cipher.drop(gone)
        office.outside.go.set()
        await office.bench.until(lambda: processor.stats.events_in >= 1)
    assert office.events("work.results.normal") == []
    (failed,) = [event for event in office.events("tasks.lifecycle.normal") if isinstance(event, StepFailed)]
    assert failed.error_type == "SubjectForgotten"
    assert SECRET.encode() not in office.raw()
    # What it cost is known all the same.
    called = [event for event in office.events("effects") if isinstance(event, LlmCalled)]
    assert [event.cost_usd for event in called] == [0.5]
    assert office.events("dead-letters") == []


async def test_a_key_store_that_is_away_is_waited_for(office: Office) -> None:
    office.send("t1", ADA, ask="yes")
    async with office.running() as processor:
        await asyncio.wait_for(office.outside.asked.wait(), 30)
        cipher = processor._codec.cipher
        assert isinstance(cipher, SubjectCipher)
        office.keys.away = True
        cipher.drop(ADA)
        office.outside.go.set()
        await asyncio.sleep(1.5)
        assert processor.stats.events_in == 0
        office.keys.away = False
        await office.bench.until(lambda: processor.stats.events_in >= 1)
    assert [type(event) for event in office.events("work.results.normal")] == [StepCompleted]
    assert len([event for event in office.events("effects") if isinstance(event, LlmCalled)]) == 1


async def test_who_names_people_that_nobody_knows_gets_a_dead_letter(office: Office) -> None:
    """Anybody who may write can name key ids; neither garbage nor a name without a key may stop the processor."""
    unknown = f"ds-{'f' * 32}"
    for headers in ({"ce_datasubjects": unknown}, {"ce_datasubjects": unknown, "ce_sealed": "garbage"}):
        plain = Codec()
        event = StepAssigned(task_id="t1", step_id="t1/1", capability="research", objective="harmless")
        value, known = plain.encode(event, office.bench.metadata("t1"))
        office.bench.sent += 1
        office.bench.send_raw(b"t1", value, [*known, *((name, text.encode()) for name, text in headers.items())])
    office.send("t2", ADA, objective="fine")
    processor = await office.process(3)
    letters = [event for event in office.events("dead-letters") if isinstance(event, DeadLettered)]
    assert sorted(letter.error_type for letter in letters) == ["KeyStoreError", "MalformedError"]
    assert [key_of(event) for event in office.events("work.results.normal")] == ["t2"]
    assert processor.stats.dead_letters == 2
