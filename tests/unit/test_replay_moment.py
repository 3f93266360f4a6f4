"""What stood at a moment: lanes' states decided again, the policy in force, memory, and an agent as it was."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import pytest

from agents.agent import Agent
from agents.context import Context
from agents.coordinator import Coordinator, StepStatus, TaskState
from agents.decomposer import Decomposer
from agents.overseer import Overseer
from agents.researcher import Researcher
from agents.retriever import Retriever
from replay.agent_moment import agent_then
from replay.decide import Station
from replay.errors import UnknownIdError
from replay.golden import load
from replay.history import TaskHistory, decoded, read_history
from replay.moment import LaneThen, lane_sheet, lanes_at
from replay.sheet import Sheet, sheet_as_dict, sheet_page
from replay.standing import document_then, documents_then, policy_then
from replay.trace import trace_of
from schemas.events import (
    AgentHeartbeat,
    AgentRegistered,
    ChunkEmbedded,
    DocumentIndexed,
    DocumentRemoved,
    DocumentSubmitted,
    Event,
    Health,
    PolicyPromoted,
    PolicyProposed,
    PolicyRolledBack,
    ProcessorStats,
)
from streams.bindings import bind
from tests.support.tape import BEGAN, CODEC, Tape, TapeLog

HISTORIES: Final = Path(__file__).parents[1] / "replay" / "histories"
AGENTS: Final[tuple[Agent[Any], ...]] = (Decomposer(), Coordinator(), Retriever(), Researcher(), Overseer())
STATIONS: Final = tuple(Station(agent, frozenset(bind(agent).topics)) for agent in AGENTS)


@lru_cache
def recorded(name: str) -> TaskHistory:
    """A history that real agents left in a real Kafka."""
    pinned = load(HISTORIES / f"{name}.jsonl")
    return read_history(TapeLog(pinned.records), pinned.id, CODEC)


def after(history: TaskHistory, kind: str, number: int = 0, ms: int = 0) -> datetime:
    """``ms`` after the ``number``-th event of ``kind`` was appended."""
    times = [entry.time for entry in history.entries if entry.type == kind]
    return times[number] + timedelta(milliseconds=ms)


async def lanes(history: TaskHistory, time: datetime, stations: Sequence[Station] = STATIONS) -> dict[str, LaneThen]:
    found = await lanes_at(history, time, stations=stations, codec=CODEC)
    return {f"{lane.agent} {lane.lane.removeprefix(history.id)}".strip(): lane for lane in found}


def task_state(lane: LaneThen) -> TaskState:
    assert lane.state is not None
    assert isinstance(lane.state.value, TaskState)
    return lane.state.value


async def test_between_two_events_only_what_had_happened_by_then_counts() -> None:
    history = recorded("revised")
    before = await lanes(history, after(history, "StepAssessed", 0))
    (step,) = task_state(before["coordinator"]).steps
    assert (step.status, step.revision, step.finding) == (StepStatus.ASSIGNED, 0, "")
    assert [entry.type for entry in before["coordinator"].open] == ["StepAssessed"]

    sent_back = await lanes(history, after(history, "StepAssigned", 1))
    (step,) = task_state(sent_back["coordinator"]).steps
    assert (step.status, step.revision) == (StepStatus.ASSIGNED, 1)
    assert "does not support" in step.finding
    assert sent_back["coordinator"].open == ()
    assert [entry.type for entry in sent_back["retriever /1"].open] == ["StepAssigned"]
    assert sent_back["retriever /1"].last is not None

    done = await lanes(history, after(history, "TaskCompleted"))
    assert task_state(done["coordinator"]).finished
    assert not any(lane.open for lane in done.values())
    assert all(lane.doubt is None for lane in done.values())


async def test_before_an_agent_had_work_it_has_no_lane() -> None:
    history = recorded("revised")
    assert list(await lanes(history, after(history, "TaskSubmitted"))) == ["decomposer"]
    assert await lanes(history, after(history, "TaskSubmitted", ms=-1)) == {}


async def test_timers_run_until_they_fire_or_are_cancelled() -> None:
    history = recorded("expired")
    assigned = await lanes(history, after(history, "StepAssigned"))
    assert list(assigned["coordinator"].timers) == ["deadline"]
    fired = await lanes(history, after(history, "TimerFired"))
    assert [entry.type for entry in fired["coordinator"].open] == ["TimerFired"]
    ended = await lanes(history, after(history, "StepCancelRequested"))
    assert ended["coordinator"].timers == {}
    assert task_state(ended["coordinator"]).finished


async def test_a_step_that_was_sent_again_has_its_lane_back() -> None:
    history = recorded("redriven")
    failed = await lanes(history, after(history, "TaskFailed"))
    assert failed["retriever /1"].open == ()
    again = await lanes(history, after(history, "StepAssigned", 1))
    assert [entry.redriven_for for entry in again["retriever /1"].open] == ["retriever"]


@pytest.mark.parametrize("name", sorted(path.stem for path in HISTORIES.glob("*.jsonl")))
async def test_every_moment_of_every_history_can_be_told(name: str) -> None:
    history = recorded(name)
    times = sorted({entry.time for entry in history.entries})
    for time in times[:: max(1, len(times) // 5)]:
        known = history.until(time)
        assert all(entry.time <= time for entry in known.entries)
        trace_of(known)
        found = await lanes_at(history, time, stations=STATIONS, codec=CODEC)
        assert all(lane.since is None or lane.since <= time for lane in found)
        assert sheet_page(lane_sheet(history, time, found))


async def test_a_step_that_was_stopped_leaves_no_doubt() -> None:
    history = recorded("cancelled")
    found = await lanes(history, after(history, "StepCancelled"))
    assert found["retriever /1"].last is not None
    assert found["retriever /1"].open == ()
    assert all(lane.doubt is None for lane in found.values())


class Forgetful(Coordinator):
    """The same agent, but for what it emits."""

    async def handle(self, event: Event, ctx: Context[TaskState]) -> None:
        await super().handle(event, ctx)
        ctx.outputs.emitted.clear()


async def test_a_state_that_other_code_decided_is_said_to_be_uncertain() -> None:
    history = recorded("revised")
    stations = [replace(each, agent=Forgetful()) if each.agent.name == "coordinator" else each for each in STATIONS]
    time = after(history, "TaskCompleted")
    found = await lanes_at(history, time, stations=stations, codec=CODEC)
    (note,) = lane_sheet(history, time, found).notes
    assert "coordinator" in note
    assert "not certain: output unexpected" in note


def rows(sheet: Sheet, title: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = sheet_as_dict(sheet)[title]
    return found


def at(ms: int) -> datetime:
    return BEGAN + timedelta(milliseconds=ms)


def test_the_policy_in_force_is_the_last_promoted_or_rolled_back_to() -> None:
    tape = Tape()
    for number, ms in ((1, 10), (2, 30)):
        tape.add(PolicyProposed(name="p", version=number, content=f'{{"limit":{number}}}', rationale="why"), ms)
        tape.add(PolicyPromoted(name="p", version=number, content=f'{{"limit":{number}}}', evidence="w"), ms + 10)
    tape.add(PolicyRolledBack(name="p", version=2, to_version=1, reason="worse"), 50)
    tape.add(PolicyPromoted(name="other", version=9, content="{}"), 15)

    def version(ms: int) -> Any:
        return policy_then(tape.log(), CODEC, "p", at(ms)).facts["version in force"]

    assert [version(ms) for ms in (5, 15, 20, 39, 40, 50)] == [None, None, 1, 1, 2, 1]
    sheet = policy_then(tape.log(), CODEC, "p", at(45))
    assert sheet.texts == {"version 2": '{\n  "limit": 2\n}'}
    assert [row["what"] for row in rows(sheet, "history")] == ["proposed", "promoted", "proposed", "promoted"]
    with pytest.raises(UnknownIdError, match="no policy 'q'; there are: other, p"):
        policy_then(tape.log(), CODEC, "q", at(45))


def library() -> Tape:
    """A document indexed at 20, changed to two chunks at 40, removed at 60; and one that is never indexed."""
    tape = Tape()
    known: dict[str, Any] = {"model": "m", "model_version": "1"}

    def chunk(name: str, ms: int, text: str) -> None:
        event = ChunkEmbedded(
            chunk_id=name, document_id="d1", ordinal=0, title="D", text=text, tokens=2, vector=(1.0,), **known
        )
        tape.add(event, ms, by="embedder@1", about="d1")

    def indexed(ms: int, cause: Any, *chunks: str) -> None:
        event = DocumentIndexed(document_id="d1", content_hash="", chunk_ids=chunks, **known)
        tape.add(event, ms, by="embedder@1", cause=cause, about="d1")

    first = tape.add(DocumentSubmitted(document_id="d1", title="One", text="a"), 10, about="d1")
    chunk("c1", 20, "old text")
    indexed(20, first, "c1")
    second = tape.add(DocumentSubmitted(document_id="d1", title="Two", text="b"), 30, about="d1")
    chunk("c2", 40, "new text")
    indexed(40, second, "c1", "c2")
    removed = tape.add(DocumentRemoved(document_id="d1"), 50, about="d1")
    indexed(60, removed)
    tape.add(DocumentSubmitted(document_id="d2", title="Waits", text="c"), 15, about="d2")
    return tape


def test_memory_holds_the_chunks_that_stood_then() -> None:
    log = library().log()

    def then(ms: int) -> tuple[Any, Any, list[str]]:
        sheet = document_then(log, CODEC, "d1", at(ms))
        return sheet.facts["title"], sheet.facts["state"], [row["text"] for row in rows(sheet, "chunks that stood")]

    assert then(5) == ("", "not there yet", [])
    assert then(10) == ("One", "not indexed yet", [])
    assert then(20) == ("One", "indexed", ["old text"])
    assert then(35) == ("Two", "not indexed yet", ["old text"])
    assert then(40) == ("Two", "indexed", ["old text", "new text"])
    assert then(55) == ("Two", "removal not yet done", ["old text", "new text"])
    assert then(60) == ("Two", "removed", [])
    with pytest.raises(UnknownIdError, match="no document 'nope'"):
        document_then(log, CODEC, "nope", at(60))


def test_all_documents_are_listed_as_they_stood() -> None:
    log = library().log()

    def then(ms: int) -> dict[str, tuple[int, str]]:
        sheet = documents_then(log, CODEC, at(ms))
        return {row["document"]: (row["chunks"], row["state"]) for row in rows(sheet, "documents")}

    assert then(5) == {}
    assert then(20) == {"d1": (1, "indexed"), "d2": (0, "not indexed yet")}
    assert then(40) == {"d1": (2, "indexed"), "d2": (0, "not indexed yet")}
    assert then(60) == {"d2": (0, "not indexed yet")}


async def agent_sheet(name: str, time: datetime, *histories: str, tape: Tape | None = None) -> Sheet:
    records = [record for each in histories for record in load(HISTORIES / f"{each}.jsonl").records]
    log = TapeLog((*records, *(() if tape is None else tape.records)))
    station = next(each for each in STATIONS if each.agent.name == name)
    return await agent_then(log, CODEC, station, time)


async def test_an_agents_open_lanes_are_those_of_the_moment() -> None:
    history = recorded("revised")
    sheet = await agent_sheet("retriever", after(history, "StepAssigned", 0, ms=1), "revised")
    (lane,) = rows(sheet, "open lanes")
    assert (lane["lane"], lane["waits for an end"]) == (f"{history.id}/1", "StepAssigned")
    assert rows(sheet, "decided last") == []
    ended = await agent_sheet("retriever", after(history, "TaskCompleted"), "revised")
    assert rows(ended, "open lanes") == []
    assert [row["emitted"] for row in rows(ended, "decided last")] == ["StepCompleted", "StepCompleted"]
    assert ended.facts["versions"] == "1"


async def test_an_agent_with_state_has_its_tasks_open_until_they_end() -> None:
    history = recorded("revised")
    sheet = await agent_sheet("coordinator", after(history, "StepCompleted"), "revised")
    (lane,) = rows(sheet, "open lanes")
    assert '"status":"assigned"' in lane["kept"]
    assert lane["waits for an end"] == ""
    ended = await agent_sheet("coordinator", after(history, "TaskCompleted"), "revised", "answer")
    assert history.id not in {row["key"] for row in rows(ended, "open lanes")}


async def test_a_step_that_was_given_up_is_open_no_more_until_it_is_sent_again() -> None:
    history = recorded("redriven")
    given_up = await agent_sheet("retriever", after(history, "DeadLettered"), "redriven")
    assert rows(given_up, "open lanes") == []
    assert {row["emitted"] for row in rows(given_up, "decided last")} == {"StepFailed", "DeadLettered"}


async def test_instances_and_figures_are_those_of_the_moment() -> None:
    tape = Tape()
    for instance, version, ms in (("a", "1", 0), ("b", "2", 5000)):
        tape.add(AgentRegistered(name="retriever", instance=instance, version=version), ms)
    tape.add(AgentHeartbeat(name="retriever", instance="a", health=Health.READY), 1000)
    tape.add(AgentHeartbeat(name="retriever", instance="a", health=Health.BUSY, in_flight=7), 9000)
    for ms, agent in ((1500, "retriever"), (1600, "retriever"), (1700, "overseer"), (9000, "retriever")):
        stats = ProcessorStats(
            source="s",
            agent=agent,
            instance="a",
            interval_s=1,
            events_in=10,
            events_out=5,
            failures=0,
            dead_letters=0,
            in_flight=1,
            lag=3,
            p50_ms=1,
            p99_ms=2,
        )
        tape.add(stats, ms)
    sheet = await agent_sheet("retriever", at(2000), tape=tape)
    (told,) = rows(sheet, "instances")
    assert (told["instance"], told["version"], told["health"]) == ("a", "1", "ready")
    assert told["heard"] == "1.00 s before"
    (figures,) = rows(sheet, "the minute before")
    assert (figures["in"], figures["lag"]) == (20, 3)
    assert not any("directory" in note for note in sheet.notes)
    later = await agent_sheet("retriever", datetime(2030, 1, 1, tzinfo=UTC), tape=tape)
    assert len(rows(later, "instances")) == 2
    assert rows(later, "the minute before") == []
    assert any("figures" in note for note in later.notes)


def test_undecodable_records_are_passed_over() -> None:
    tape = library()
    tape.raw("embeddings", b"d1", b"\x00\x01nonsense", 45)
    tape.raw("policies", b"p", b"nonsense", 45)
    assert len(rows(document_then(tape.log(), CODEC, "d1", at(46)), "chunks that stood")) == 2
    with pytest.raises(UnknownIdError):
        policy_then(tape.log(), CODEC, "p", at(50))


def test_a_sheet_is_escaped_and_machine_readable() -> None:
    tape = Tape()
    tape.add(PolicyPromoted(name="p", version=1, content='"<script>"', evidence="<b>"), 0)
    sheet = policy_then(tape.log(), CODEC, "p", at(1))
    page = sheet_page(sheet)
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert sheet_as_dict(sheet)["since"] == at(0).isoformat()
    assert decoded(tape.records[0], CODEC).time == at(0)
