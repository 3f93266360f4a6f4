"""Golden histories: what agents decided once, they decide again; and what changes a decision is seen and named."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Final

import orjson
import pytest

from agents.agent import Agent
from agents.context import Context
from agents.coordinator import Coordinator, TaskState
from agents.overseer import Overseer
from replay.decide import Station
from replay.errors import PinnedFileError
from replay.findings import Verdict
from replay.golden import SUFFIX, Pinned, check, dump, load, told
from replay.history import decoded
from schemas.codec import Codec
from schemas.events import ChangeMarked, Event, Queried, StepAssessed, StepCompleted, TimerFired, Waited
from tests.replay.racing import FirstRacer, Racer, SecondRacer
from tests.replay.stations import RACER_TOPICS, stations_of, system_stations

HISTORIES: Final = Path(__file__).parent / "histories"
PATHS: Final = sorted(HISTORIES.glob(f"*{SUFFIX}"))
MOST_BYTES: Final = 200_000
CODEC: Final = Codec()


def history(name: str) -> Pinned:
    return load(HISTORIES / f"{name}{SUFFIX}")


def events(pinned: Pinned) -> list[Event]:
    entries = [decoded(record, CODEC) for record in pinned.records]
    return [entry.event for entry in entries if entry.event is not None]


def kinds(pinned: Pinned) -> set[str]:
    return {type(event).__name__ for event in events(pinned)}


async def differences(pinned: Pinned, *changed: Agent[Any]) -> str:
    """What ``changed`` would decide otherwise, in words; the other agents are today's."""
    names = {agent.name: agent for agent in changed}
    stations = [replace(each, agent=names.get(each.agent.name, each.agent)) for each in stations_of(pinned)]
    return told(await check(pinned, stations=stations, codec=CODEC))


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
async def test_what_was_decided_is_decided_again(path: Path) -> None:
    pinned = load(path)
    found = await check(pinned, stations=stations_of(pinned), codec=CODEC)
    assert not found, told(found)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_history_is_small_and_names_no_machine(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text) < MOST_BYTES
    assert load(path).name == path.stem
    asked = [orjson.loads(event.result) for event in events(load(path)) if isinstance(event, Queried) and event.result]
    instances = {entry["instance"] for entries in asked for entry in entries}
    assert all(instance.startswith("recorder-") for instance in instances)
    assert not any(b"file://" in (record.value or b"") for record in load(path).records)


def test_every_agent_and_every_special_course_is_among_them() -> None:
    pinned = {path.stem: load(path) for path in PATHS}
    steps = [step for each in pinned.values() for step in each.steps]
    assert {step.agent for step in steps} == {station.agent.name for station in system_stations()} | {"racer"}
    assert len([event for event in events(pinned["revised"]) if isinstance(event, StepAssessed)]) == 2
    (assessed,) = [event for event in events(pinned["paraphrase"]) if isinstance(event, StepAssessed)]
    assert assessed.claims[0].embedding_similarity is not None
    assert {"StepFailed", "TaskCompleted"} <= kinds(pinned["failed-step"])
    assert {"TimerFired", "TaskExpired", "StepCancelRequested", "StepCancelled"} <= kinds(pinned["expired"])
    assert {"TaskCancelRequested", "TaskCancelled", "StepCancelled"} <= kinds(pinned["cancelled"])
    assert {"PlanRejected", "TaskFailed"} <= kinds(pinned["rejected-plan"]) & kinds(pinned["hopeless-plan"])
    assert {"DeadLettered", "DeadLetterResolved", "StepFailed", "StepCompleted"} <= kinds(pinned["redriven"])
    assert {"DocumentSubmitted", "DocumentRemoved", "ChunkEmbedded"} <= kinds(pinned["document"])
    assert any(getattr(event, "error", "") for event in events(pinned["effect-error"]))
    assert len([event for event in events(pinned["race"]) if isinstance(event, Waited)]) == 3
    assert {record.topic for record in pinned["priority-high"].records} >= {"tasks.high", "work.results.high"}
    assert {record.topic for record in pinned["priority-low"].records} >= {"tasks.low", "work.results.low"}
    assert len(pinned["unreadable"].unreadable) == 1
    assert {step.verdict for step in steps} == {Verdict.SAME, Verdict.CANCELLED}


def test_the_file_is_exact_and_notices_a_change_by_hand(tmp_path: Path) -> None:
    for path in PATHS:
        assert dump(load(path), CODEC) == path.read_text(encoding="utf-8"), path.stem
    path = tmp_path / "answer.jsonl"
    text = (HISTORIES / "answer.jsonl").read_text(encoding="utf-8")
    for changed, said in (
        (text.replace('"time_ms":1', '"time_ms":2', 1), "another SHA-256"),
        (text.replace('"golden history":1', '"golden history":9', 1), "format 9"),
        ("{}\n", "is no golden history"),
        ("poison", "is no golden history"),
    ):
        path.write_text(changed, encoding="utf-8")
        with pytest.raises(PinnedFileError, match=said):
            load(path)
    with pytest.raises(PinnedFileError, match="can't be read: No such file"):
        load(tmp_path / "missing")


# A change of code is seen, and what keeps the old decisions passes.


class Stricter(Overseer):
    """Answers count as grounded a little less."""

    async def handle(self, event: StepCompleted, ctx: Context[Any]) -> None:
        await super().handle(event, ctx)
        (assessed,) = ctx.outputs.emitted
        assert isinstance(assessed, StepAssessed)
        ctx.outputs.emitted[0] = assessed.model_copy(update={"groundedness": 0.5})


class StricterVersion2(Stricter):
    version = "2"


class StricterWithPredecessor(Stricter):
    version = "2"
    predecessors: ClassVar = {"1": Overseer}


class StricterByChange(Stricter):
    async def handle(self, event: StepCompleted, ctx: Context[Any]) -> None:
        if ctx.changed("stricter"):
            await super().handle(event, ctx)
        else:
            await Overseer.handle(self, event, ctx)


@pytest.mark.parametrize("agent", [Stricter(), StricterVersion2()])
async def test_a_changed_decision_is_named_by_agent_event_and_field(agent: Agent[Any]) -> None:
    pinned = history("answer")
    (step,) = [step for step in pinned.steps if step.agent == "overseer"]
    said = await differences(pinned, agent)
    assert said.startswith(
        f"answer: overseer@1 on StepCompleted {step.event_id} ({step.place}) is decided otherwise in groundedness: "
    )
    assert "0.5" in said
    assert "`predecessors`" in said
    assert "ctx.changed(...)" in said


@pytest.mark.parametrize("agent", [StricterWithPredecessor(), StricterByChange()])
async def test_a_changed_decision_that_keeps_the_old_one_passes(agent: Agent[Any]) -> None:
    for name in ("answer", "revised", "rejected-answer", "compare"):
        assert await differences(history(name), agent) == ""


class Asking(Coordinator):
    """Asks the directory where it need not."""

    async def handle(self, event: Event, ctx: Context[TaskState]) -> None:
        await ctx.directory("nobody")
        await super().handle(event, ctx)


class Deaf(Coordinator):
    """Passes over timers, which are no events for it."""

    consumes = tuple(kind for kind in Coordinator.consumes if kind is not TimerFired)  # type: ignore[assignment]


async def test_a_new_call_and_a_step_no_longer_handled_are_named() -> None:
    said = await differences(history("answer"), Asking())
    assert "answer: coordinator@2 on PlanProposed" in said
    assert "it asks for Queried" in said
    said = await differences(history("expired"), Deaf())
    assert "expired: coordinator@2 on TimerFired" in said
    assert "is not handled any more, and was when it was recorded" in said


async def test_a_step_that_is_handled_now_and_was_not_is_named() -> None:
    pinned = history("answer")
    fewer = replace(pinned, steps=pinned.steps[:-1])
    (found,) = await check(fewer, stations=stations_of(pinned), codec=CODEC)
    assert "is handled now, and was not when it was recorded" in found.message
    assert found.agent == pinned.steps[-1].agent


async def test_what_was_no_event_must_stay_none() -> None:
    pinned = history("unreadable")
    (found,) = await check(replace(pinned, unreadable=()), stations=system_stations(), codec=CODEC)
    assert "nobody knows schema id" in found.message
    answer = history("answer")
    (found,) = await check(
        replace(answer, unreadable=(answer.steps[0].place,)), stations=system_stations(), codec=CODEC
    )
    assert "was no event when it was recorded" in found.message


# An agent through its versions: tests/replay/racing.py, recorded by each of them in turn.


def racer(agent: Agent[Any]) -> Sequence[Station]:
    return [Station(agent, frozenset(RACER_TOPICS))]


async def test_each_version_is_needed_for_what_it_decided() -> None:
    pinned = history("versions")
    assert [(step.version, step.verdict) for step in pinned.steps] == [("1", "same"), *[("2", "same")] * 3]
    marks = [event for event in events(pinned) if isinstance(event, ChangeMarked)]
    assert [(mark.change, mark.taken, mark.attempt) for mark in marks] == [("polite", False, 2), ("polite", True, 1)]

    class Forgetful(Racer):
        predecessors: ClassVar = {}

    said = told(await check(pinned, stations=racer(Forgetful()), codec=CODEC))
    assert "versions: racer@1 on StepAssigned" in said
    assert "racer@2" not in said

    class Unchanged(SecondRacer):
        predecessors: ClassVar = {"1": FirstRacer}

    (found,) = await check(pinned, stations=racer(Unchanged()), codec=CODEC)
    assert found.event_id == pinned.steps[3].event_id, "the one that the change applied to"
    assert found.field == "request.messages.0.content"


def test_a_history_can_be_checked_without_a_running_loop() -> None:
    pinned = history("race")
    assert asyncio.run(check(pinned, stations=stations_of(pinned), codec=CODEC)) == []
