"""Whom a step is about goes on to all that follows from it: outputs, effects, state, timers, dead letters."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict

from agents.agent import Agent, Failure
from agents.context import Context, Ports, RecallRequest
from agents.coordinator import Coordinator, StepProgress, StepStatus, TaskState
from agents.decomposer import Decomposer
from agents.embedder import Embedder
from agents.errors import EffectFailedError
from agents.journal import Journal
from agents.memory.chunking import Chunker
from agents.overseer import Overseer
from agents.researcher import Researcher
from agents.retriever import Retriever
from agents.step import LaneState, run_failure, run_step
from schemas.codec import Codec
from schemas.encryption import SubjectCipher
from schemas.errors import SubjectForgottenError
from schemas.events import (
    DocumentSubmitted,
    Effect,
    Event,
    Evidence,
    MemoryRecalled,
    PersonalText,
    PlannedStep,
    PlanProposed,
    Priority,
    StepAssigned,
    StepCompleted,
    StepFailed,
    TaskCancelRequested,
    TaskSubmitted,
)
from schemas.metadata import Envelope, Metadata, deterministic_id
from schemas.personal import blank
from schemas.record import Record
from streams.changelog import Timer, timer_value
from streams.errors import StateError
from streams.messages import Messages, about_nobody
from streams.state import StateCodec, StateStore
from tests.support.keys import ADA, BOB, EVE, MemoryKeys

NOW = datetime(2026, 1, 1, tzinfo=UTC)
CODEC = Codec(cipher=SubjectCipher(MemoryKeys()))


class Notes(BaseModel):
    model_config = ConfigDict(frozen=True)

    text: PersonalText = ""
    count: int = 0


class Noter(Agent[Notes]):
    name, version = "noter", "1"
    consumes, emits = (StepAssigned,), (StepCompleted, StepFailed)
    state_type = Notes

    async def handle(self, event: StepAssigned, ctx: Context[Notes]) -> None:
        if event.objective == "recall":
            await ctx.recall("who?")
        if event.objective == "recall and fail":
            hits = await ctx.recall("who?")
            raise EffectFailedError("Known", hits[0].text, retryable=False)
        ctx.emit(
            StepCompleted(
                task_id=event.task_id, step_id=event.step_id, attempt=1, capability="c", objective="o", answer="a"
            )
        )
        ctx.timer("later", ctx.now + timedelta(hours=1))
        ctx.state = Notes(text=event.objective, count=1)

    async def on_failure(self, event: StepAssigned, failure: Failure, ctx: Context[Notes]) -> None:
        ctx.emit(
            StepFailed(task_id=event.task_id, step_id=event.step_id, attempt=1, error_type="E", message=failure.message)
        )


class Memory:
    model = "m"

    async def recall(self, request: RecallRequest) -> tuple[Evidence, ...]:
        common = {"chunk_id": "c", "document_id": "d", "title": "t"}
        return Evidence(**common, text="Bob", data_subjects=(BOB,)), Evidence(**common, text="nobody")


def assigned(objective: str, *subjects: str) -> Envelope:
    event = StepAssigned(task_id="t", step_id="t/1", capability="c", objective=objective)
    metadata = Metadata("cause", "/clients/x", "t", NOW, correlation_id="t", data_subjects=subjects)
    return Envelope(event, metadata)


def journal_of(cause: Envelope, *recorded: Effect, replaying: bool = False) -> Journal:
    ports = Ports(memory=Memory())
    return Journal(
        agent="noter",
        source="/agents/noter@1",
        key="t",
        cause=cause.metadata,
        ports=ports,
        recorded=recorded,
        replaying=replaying,
    )


ARGUMENTS: dict[str, Any] = {"timestamp_ms": int(NOW.timestamp() * 1000), "priority": Priority.NORMAL}


async def test_outputs_and_state_are_about_whom_the_event_and_the_state_are_about() -> None:
    cause = assigned("note", ADA)
    before = LaneState(Notes(text="Eve", count=1), NOW, data_subjects=(EVE,))
    result = await run_step(Noter(), cause, state=before, journal=journal_of(cause), **ARGUMENTS)
    assert result.outputs[0].metadata.data_subjects == (ADA, EVE)
    assert result.state is not None
    assert result.state.data_subjects == (ADA, EVE)


async def test_what_is_recalled_counts_live_and_in_replay_alike() -> None:
    cause = assigned("recall", ADA)
    journal = journal_of(cause)
    live = await run_step(Noter(), cause, state=None, journal=journal, **ARGUMENTS)
    assert live.outputs[0].metadata.data_subjects == (ADA, BOB)
    [made] = journal.performed
    assert made.metadata.data_subjects == (ADA, BOB)
    assert isinstance(made.event, MemoryRecalled)

    replayed = await run_step(
        Noter(), cause, state=None, journal=journal_of(cause, made.event, replaying=True), **ARGUMENTS
    )
    assert replayed.outputs == live.outputs
    # The id of an effect about somebody does not depend on what was asked.
    guess = ("cause", "noter", "MemoryRecalled", "", made.event.request_hash, 0, 0)
    assert made.metadata.id != deterministic_id(*guess)
    plain = journal_of(assigned("recall"))
    await run_step(Noter(), assigned("note"), state=None, journal=plain, **ARGUMENTS)
    assert plain.data_subjects == ()


async def test_a_failure_is_about_what_was_recalled_before_it() -> None:
    cause = assigned("recall and fail", ADA)
    journal = journal_of(cause)
    with pytest.raises(EffectFailedError):
        await run_step(Noter(), cause, state=None, journal=journal, **ARGUMENTS)
    failure = Failure("Known", "Bob", retryable=False)
    live = await run_failure(Noter(), cause, failure, state=None, journal=journal, **ARGUMENTS)
    assert live.outputs[0].metadata.data_subjects == (ADA, BOB)
    recorded = [made.event for made in journal.performed if isinstance(made.event, Effect)]
    replay = journal_of(cause, *recorded, replaying=True)
    assert (await run_failure(Noter(), cause, failure, state=None, journal=replay, **ARGUMENTS)).outputs == live.outputs


def test_state_is_sealed_in_the_changelog() -> None:
    keys = MemoryKeys()
    codec = StateCodec(Notes, SubjectCipher(keys))
    state = LaneState(Notes(text="Ada earns much", count=3), NOW, NOW + timedelta(days=1), (ADA, BOB))
    raw = codec.dump(state)
    assert b"Ada" not in raw
    assert raw == StateCodec(Notes, SubjectCipher(MemoryKeys())).dump(state)
    assert codec.load(raw) == state
    # Expiry is seen without opening it.
    later = int((NOW + timedelta(days=3)).timestamp() * 1000)
    assert StateStore(StateCodec(Notes), {"l": raw}).expire(later, ()) == ["l"]

    keys.forget(BOB)
    gone = StateCodec(Notes, SubjectCipher(keys))
    bare = LaneState(Notes(count=3), NOW, NOW + timedelta(days=1), (ADA, BOB), erased=True)
    assert gone.load(raw) == StateCodec(Notes).load(raw) == bare
    with pytest.raises(SubjectForgottenError):
        gone.dump(state)
    # Nothing personal, nothing to seal: a finished task's marker stays readable.
    marker = LaneState(Notes(count=4), NOW, None, (ADA, BOB))
    assert gone.load(gone.dump(marker)) == marker
    with pytest.raises(StateError, match="sealed state can't be opened"):
        codec.load(raw[:-12] + b"AAAAAAAAAA" + raw[-2:])
    plain = LaneState(Notes(text="x"), NOW)
    assert codec.dump(plain) == StateCodec(Notes).dump(plain)


def test_a_timer_remembers_whom_it_is_about() -> None:
    timer = Timer("l", "n", NOW, "s", "c", "e", "")
    assert b"data_subjects" not in timer_value(timer)
    about = Timer("l", "n", NOW, "s", "c", "e", "", (ADA,))
    assert ADA.encode() in timer_value(about)


def record_of(cause: Envelope) -> Record:
    encoded = CODEC.encode(cause.event, cause.metadata)
    return Record("work.c.normal", 0, 7, 0, b"t", encoded.value, encoded.headers)


@pytest.mark.parametrize("readable", [True, False])
def test_a_dead_letter_is_about_whom_its_event_is_about(readable: bool) -> None:
    cause = assigned("what does Ada earn", ADA)
    record = record_of(cause)
    messages = Messages(Noter(), CODEC)
    told = cause.metadata if readable else None
    topic, key, value, headers, _ = messages.dead_letter(record, told, "E", "Ada is unknown", 1)
    letter = CODEC.decode(Record(topic, 0, 1, 0, key, value, headers or ()))
    assert letter.metadata.data_subjects == (ADA,)
    assert b"Ada is" not in (value or b"") + b"".join(text or b"" for _, text in headers or ())
    assert letter.event.__dict__["error"] == "Ada is unknown"
    keys = MemoryKeys()
    keys.forget(ADA)
    forgotten = Messages(Noter(), Codec(cipher=SubjectCipher(keys)))
    _, _, value, headers, _ = forgotten.dead_letter(record, told, "E", "Ada is unknown", 1)
    bare = Codec().decode(Record(topic, 0, 1, 0, key, value, headers or ()))
    assert (bare.event.__dict__["error"], bare.metadata.data_subjects) == ("", ())


def step(objective: str) -> PlannedStep:
    return PlannedStep(step_id="t/1", capability="retrieve", objective=objective)


ERASED: list[tuple[Agent[Any], Event, BaseModel | None, list[str]]] = [
    (Decomposer(), TaskSubmitted(task_id="t", objective="Ada"), None, ["PlanRejected"]),
    (Coordinator(), PlanProposed(task_id="t", objective="Ada", steps=(step("Ada"),)), None, ["TaskFailed"]),
    (
        Coordinator(),
        StepFailed(task_id="t", step_id="t/1", attempt=1, error_type="E", message="Ada"),
        TaskState(
            objective="Ada",
            steps=(
                StepProgress(step=step("Ada"), status=StepStatus.ASSIGNED),
                StepProgress(step=step("Ada").model_copy(update={"step_id": "t/2"}), status=StepStatus.ASSIGNED),
            ),
        ),
        ["StepCancelRequested", "TaskFailed"],
    ),
    (Coordinator(), TaskCancelRequested(task_id="t", requested_by="x"), TaskState(finished=True), []),
    (Retriever(), assigned("Ada").event, None, ["StepFailed"]),
    (Researcher(), assigned("Ada").event, None, ["StepFailed"]),
    (
        Overseer(),
        StepCompleted(task_id="t", step_id="t/1", attempt=1, capability="c", objective="Ada", answer="Ada"),
        None,
        ["StepFailed"],
    ),
]


@pytest.mark.parametrize(("agent", "event", "state", "emitted"), ERASED, ids=lambda value: type(value).__name__)
async def test_agents_answer_what_was_erased_so_that_nobody_waits(
    agent: Agent[Any], event: Event, state: BaseModel | None, emitted: list[str]
) -> None:
    cause = about_nobody(Envelope(event, Metadata("c", "/x", "t", NOW, data_subjects=(ADA,))))
    before = None if state is None else LaneState(blank(state), NOW)
    journal = Journal(agent=agent.name, source=agent.source, key="t", cause=cause.metadata)
    failure = Failure("SubjectForgotten", "its content is gone", retryable=False)
    result = await run_failure(agent, cause, failure, state=before, journal=journal, **ARGUMENTS)
    assert [type(output.event).__name__ for output in result.outputs] == emitted
    for output in result.outputs:
        assert output.metadata.data_subjects == ()
        assert "Ada" not in output.event.model_dump_json()
        encoded = CODEC.encode(output.event, output.metadata)
        assert CODEC.decode(Record("x", 0, 0, 0, b"t", *encoded)).event == output.event


def test_chunks_of_documents_about_people_have_ids_that_tell_nothing() -> None:
    embedder = Embedder("m", "1", Chunker(lambda texts: [len(text.split()) for text in texts]))
    document = DocumentSubmitted(document_id="d", title="Ada", text="Ada earns much. Bob earns less.")
    other = document.model_copy(update={"text": "Nobody earns anything. That is all."})
    plain, opaque = embedder._identified(document), embedder._identified(document, "e1")
    assert plain.keys() != embedder._identified(other).keys()
    assert opaque.keys() == embedder._identified(other, "e1").keys()
    assert opaque.keys() != embedder._identified(document, "e2").keys()
    assert list(opaque.values()) == list(plain.values())


def test_about_nobody() -> None:
    bare = about_nobody(assigned("what does Ada earn", ADA))
    assert bare.erased
    assert (bare.event.__dict__["objective"], bare.metadata.data_subjects) == ("", ())
