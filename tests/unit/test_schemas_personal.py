"""Every text of every event is decided on: personal or not; and what blanking leaves."""

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Annotated, get_args

import pytest
from pydantic import BaseModel

from agents.coordinator import StepProgress, TaskState
from agents.decomposer import PlanMarker
from agents.embedder import IndexedDocument
from schemas.avro_generation import shipped_types
from schemas.events import (
    Claim,
    Event,
    Evidence,
    MemoryRecalled,
    Personal,
    PlannedStep,
    StepCompleted,
    TaskSubmitted,
    TextsEmbedded,
)
from schemas.personal import blank, personal_fields

READABLE = frozenset(
    {
        # Ids and keys: what is about somebody must be found, counted and deleted without its content.
        *("task_id", "step_id", "document_id", "chunk_id", "chunk_ids", "event_id", "depends_on", "alert_id", "key_id"),
        *("data_subjects", "target", "lane", "key", "source_topic"),
        # Names of parts, kinds and versions.
        *("agent", "change", "capability", "capabilities", "consumes", "emits", "instance", "model", "model_version"),
        *("provider", "tool", "timer", "scope", "media_type", "error_type", "rule", "version", "name", "stalled"),
        # Who did something in the system, which is to be answered for: operators and programs, not data subjects.
        *("submitted_by", "requested_by", "approved_by", "denied_by", "resolved_by", "principal"),
    }
)
"""Names of fields with text that are never personal, whatever event they are in."""

READABLE_HERE = frozenset(
    {
        # The raw record of a dead letter is sealed already where it is about somebody.
        *("DeadLettered.value", "DeadLettered.header_names", "DeadLettered.header_values"),
        "DeadLetterResolved.reason",
        # The processes' own words, made of figures, names of rules and ids.
        *("ProcessorStats.source", "AlertRaised.source", "AlertRaised.message", "AlertCleared.source"),
        *("AccessDecided.source", "AccessDecided.action", "AccessDecided.resource", "AccessDecided.reason"),
        *("LogArchived.source", "LogArchived.archive", "LogArchived.cluster", "LogArchived.head"),
        # About agents, not about people.
        *("PolicyProposed.content", "PolicyProposed.rationale", "PolicyPromoted.content", "PolicyPromoted.evidence"),
        "PolicyRolledBack.reason",
    }
)


def models(model: type[BaseModel], seen: set[type[BaseModel]]) -> Iterator[type[BaseModel]]:
    if model not in seen:
        seen.add(model)
        yield model
        for info in model.model_fields.values():
            yield from nested(info.annotation, seen)


def nested(annotation: object, seen: set[type[BaseModel]]) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield from models(annotation, seen)
    for inner in get_args(annotation):
        yield from nested(inner, seen)


def holds_text(annotation: object) -> bool:
    return annotation in (str, bytes) or any(map(holds_text, get_args(annotation)))


def test_each_text_is_decided_on() -> None:
    seen: set[type[BaseModel]] = set()
    undecided, both = [], []
    roots: list[type[BaseModel]] = [*shipped_types().values(), TaskState, PlanMarker, IndexedDocument]
    for root in roots:
        for model in models(root, seen):
            for name, info in model.model_fields.items():
                marked = any(mark is Personal for mark in info.metadata)
                readable = name in READABLE or f"{model.__name__}.{name}" in READABLE_HERE
                if marked and readable:
                    both.append(f"{model.__name__}.{name}")
                if holds_text(info.annotation) and not marked and not readable:
                    undecided.append(f"{model.__name__}.{name}")
    assert not both
    assert not undecided, "mark them Personal, or say here why they are not"


def test_nested_values_keep_what_is_not_personal() -> None:
    event = StepCompleted(
        task_id="t",
        step_id="t/1",
        attempt=2,
        capability="research",
        objective="what does Ada earn",
        answer="much [1]",
        claims=(Claim(text="Ada earns much", chunk_ids=("c",)),),
        evidence=(Evidence(chunk_id="c", document_id="d", title="Pay", text="Ada: much", score=0.5),),
        model="m",
    )
    bare = blank(event)
    assert bare == StepCompleted(
        task_id="t",
        step_id="t/1",
        attempt=2,
        capability="research",
        objective="",
        answer="",
        claims=(Claim(text="", chunk_ids=("c",)),),
        evidence=(Evidence(chunk_id="c", document_id="d", title="", text="", score=0.5),),
        model="m",
    )
    assert blank(bare) is bare
    assert event.answer == "much [1]"


def test_state_is_blanked_like_events() -> None:
    step = PlannedStep(step_id="t/1", capability="retrieve", objective="o", parameters={"a": "b"})
    state = TaskState(objective="o", steps=(StepProgress(step=step, answer="x", groundedness=0.5),))
    bare = blank(state)
    assert bare.steps[0].step == PlannedStep(step_id="t/1", capability="retrieve", objective="")
    assert (bare.objective, bare.steps[0].answer, bare.steps[0].groundedness) == ("", "", 0.5)
    for marker in (TaskState(finished=True), PlanMarker(steps=3)):
        assert blank(marker) is marker


def test_effects_keep_their_place_and_figures() -> None:
    at = datetime(2026, 1, 1, tzinfo=UTC)
    common = {"task_id": "t", "agent": "a", "event_id": "e", "sequence": 3, "started_at": at, "latency_ms": 2.0}
    texts = TextsEmbedded(
        **common,
        request_hash="h",
        request="{}",
        model="m",
        model_version="1",
        dimensions=2,
        count=1,
        vectors=b"12345678",
    )
    bare = blank(texts)
    assert (bare.request_hash, bare.request, bare.vectors) == ("", "", b"")
    assert (bare.sequence, bare.count, bare.latency_ms) == (3, 1, 2.0)
    recalled = MemoryRecalled(**common, request_hash="h", request="q", model="m", hits=())
    assert personal_fields(MemoryRecalled) == ("request_hash", "request", "error", "hits")
    assert blank(recalled).hits == ()


def test_a_number_can_not_be_personal() -> None:
    class Odd(Event):
        """Odd."""

        age: Annotated[int, Personal]

    with pytest.raises(TypeError, match=r"Odd\.age"):
        personal_fields(Odd)


def test_an_optional_text_is_none_when_blank() -> None:
    class Maybe(Event):
        """May have a name."""

        name: Annotated[str | None, Personal] = None
        first: TaskSubmitted | None = None

    task = TaskSubmitted(task_id="t", objective="o")
    assert blank(Maybe(name="Ada")) == Maybe()
    assert blank(Maybe(first=task)).first == task.model_copy(update={"objective": ""})
