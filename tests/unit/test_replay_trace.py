"""The trace of a task: what led to what, who decided, what it took; on histories that are made up here."""

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from math import isfinite
from pathlib import Path
from typing import Any, Final

import pytest

from magnatronic.cli.options import Output
from magnatronic.cli.trace_tree import print_trace
from replay.errors import UnknownTaskError
from replay.golden import load
from replay.history import Entry, read_history
from replay.story import Line, story
from replay.trace import Decision, Letter, Trace, trace_of
from replay.trace_data import trace_as_dict
from replay.trace_page import trace_page
from schemas.events import (
    AssessedClaim,
    Assessment,
    ChunkEmbedded,
    DeadLettered,
    DeadLetterResolved,
    DocumentIndexed,
    DocumentSubmitted,
    Evidence,
    LlmCalled,
    MemoryRecalled,
    PlannedStep,
    PlanProposed,
    Resolution,
    StepAssessed,
    StepAssigned,
    StepCancelled,
    StepCancelRequested,
    StepCompleted,
    StepFailed,
    TaskCancelled,
    TaskCancelRequested,
    TaskCompleted,
    TaskFailed,
    TaskSubmitted,
    TextsEmbedded,
    TimerFired,
    ToolCalled,
    ToolStarted,
)
from schemas.record import Record
from tests.support.tape import BEGAN, CODEC, Tape, TapeLog

HISTORIES: Final = sorted((Path(__file__).parents[1] / "replay" / "histories").glob("*.jsonl"))

PASSAGE = Evidence(
    chunk_id="c1", document_id="d1", title="Widgets", heading="Care", text="Clean it with a dry cloth.", score=0.83
)


def trace(tape: Tape, id_: str = "t1") -> Trace:
    return trace_of(read_history(tape.log(), id_, CODEC))


def called(kind: type[Any], tape: Tape, cause: Record, agent: str, at: int, latency_ms: float, **fields: Any) -> Record:
    """An effect that began ``at`` and was appended when it was done, 1 ms later."""
    effect = kind(
        task_id=fields.pop("task_id", "t1"),
        agent=agent.partition("@")[0],
        event_id=tape.id_of(cause),
        request_hash="0" * 64,
        started_at=BEGAN + timedelta(milliseconds=at),
        latency_ms=latency_ms,
        **{"request": "{}", **fields},
    )
    return tape.add(effect, at + (int(latency_ms) if isfinite(latency_ms) else 0) + 1, by=agent, cause=cause)


def llm(tape: Tape, cause: Record, agent: str, at: int, latency_ms: float, **fields: Any) -> Record:
    given = {
        "provider": "scripted",
        "model": "m1",
        "request": json.dumps(
            {"purpose": "answer", "system": "Be brief.", "messages": [{"role": "user", "content": "How to clean it?"}]}
        ),
        "response": json.dumps({"text": "With a dry cloth [1].", "finish_reason": "stop"}),
        "prompt_tokens": 100,
        "completion_tokens": 10,
        "cost_usd": 0.002,
    }
    return called(LlmCalled, tape, cause, agent, at, latency_ms, **{**given, **fields})


def assigned(number: int = 1, **fields: Any) -> StepAssigned:
    given: dict[str, Any] = {"capability": "retrieve", "objective": f"part {number}"}
    return StepAssigned(task_id="t1", step_id=f"t1/{number}", **{**given, **fields})


def completed(number: int = 1, **fields: Any) -> StepCompleted:
    given: dict[str, Any] = {"attempt": 1, "capability": "retrieve", "objective": "part", "answer": "A dry cloth."}
    return StepCompleted(task_id="t1", step_id=f"t1/{number}", **{**given, **fields})


def assessed(number: int = 1, decision: Assessment = Assessment.ACCEPT, **fields: Any) -> StepAssessed:
    claim = AssessedClaim(
        text="It is cleaned dry.",
        chunk_ids=("c1",),
        lexical_similarity=0.61,
        embedding_similarity=0.87,
        grounded=decision is Assessment.ACCEPT,
    )
    given: dict[str, Any] = {"attempt": 1, "groundedness": 1.0, "claims": (claim,), "answer": "A dry cloth."}
    return StepAssessed(task_id="t1", step_id=f"t1/{number}", decision=decision, **{**given, **fields})


def plan(steps: int = 1) -> PlanProposed:
    planned = tuple(
        PlannedStep(step_id=f"t1/{n}", capability="retrieve", objective=f"part {n}") for n in range(1, steps + 1)
    )
    return PlanProposed(task_id="t1", objective="How to clean a widget?", steps=planned)


def begun(tape: Tape, steps: int = 1) -> Record:
    """A task that has its plan."""
    submitted = tape.add(TaskSubmitted(task_id="t1", objective="How to clean a widget?"), 0)
    return tape.add(plan(steps), 30, by="decomposer@2", cause=submitted)


def whole_task() -> Tape:
    """A step that is sent back once, then accepted."""
    tape = Tape()
    planned = begun(tape)
    first = tape.add(assigned(), 50, by="coordinator@2", cause=planned)
    called(
        MemoryRecalled,
        tape,
        first,
        "retriever@1",
        70,
        5,
        request='{"query":"clean a widget"}',
        model="minilm",
        hits=(PASSAGE,),
    )
    llm(tape, first, "retriever@1", 80, 100)
    done = tape.add(completed(answer="Bananas."), 200, by="retriever@1", cause=first)
    sent_back = assessed(decision=Assessment.REVISE, groundedness=0.0, finding="Bananas are not in the evidence.")
    judged = tape.add(sent_back, 220, by="overseer@3", cause=done)
    again = tape.add(assigned(revision=1, finding="Bananas."), 240, by="coordinator@2", cause=judged)
    llm(tape, again, "retriever@1", 300, 50)
    better = tape.add(completed(revision=1), 360, by="retriever@1", cause=again)
    accepted = tape.add(assessed(revision=1), 380, by="overseer@3", cause=better)
    outcome = TaskCompleted(task_id="t1", objective="x", answer="A dry cloth.")
    tape.add(outcome, 400, by="coordinator@2", cause=accepted)
    tape.add(TaskSubmitted(task_id="t2", objective="another"), 10)
    return tape


def test_each_decision_has_its_cause_calls_outputs_and_times() -> None:
    found = trace(whole_task())
    assert [(each.agent, each.version, each.cause.type) for each in found.decisions] == [
        ("decomposer", "2", "TaskSubmitted"),
        ("coordinator", "2", "PlanProposed"),
        ("retriever", "1", "StepAssigned"),
        ("overseer", "3", "StepCompleted"),
        ("coordinator", "2", "StepAssessed"),
        ("retriever", "1", "StepAssigned"),
        ("overseer", "3", "StepCompleted"),
        ("coordinator", "2", "StepAssessed"),
    ]
    retrieved = found.decisions[2]
    assert [entry.type for entry in retrieved.calls] == ["MemoryRecalled", "LlmCalled"]
    assert [entry.type for entry in retrieved.outputs] == ["StepCompleted"]
    assert retrieved.waited == timedelta(milliseconds=20)
    assert retrieved.called == timedelta(milliseconds=105)
    assert retrieved.took == timedelta(milliseconds=150)
    assert found.decisions[0].waited is None


def test_sums_and_the_longest_way_add_up() -> None:
    found = trace(whole_task())
    assert found.outcome is not None
    assert found.outcome.type == "TaskCompleted"
    assert found.wall == timedelta(milliseconds=400)
    sums = found.sums
    assert (sums.decisions, sums.calls, sums.llm_calls, sums.prompt_tokens, sums.completion_tokens) == (
        8,
        3,
        2,
        200,
        20,
    )
    assert sums.cost_usd == pytest.approx(0.004)
    assert sums.waited == timedelta(milliseconds=20 + 60)
    assert sums.called == timedelta(milliseconds=105 + 50)
    assert found.by_agent["retriever"].llm_calls == 2
    assert found.by_agent["coordinator"].calls == 0
    assert sum((hop.total for hop in found.path), timedelta()) == found.wall
    assert [hop.to.type for hop in found.path][-1] == "TaskCompleted"
    assert sum((hop.called for hop in found.path), timedelta()) == timedelta(milliseconds=155)


def test_calls_side_by_side_count_once_in_the_time_they_took() -> None:
    tape = Tape()
    step = tape.add(assigned(), 0)
    llm(tape, step, "researcher@1", 10, 100, sequence=0)
    llm(tape, step, "researcher@1", 50, 100, sequence=1)
    llm(tape, step, "researcher@1", 300, 50, sequence=2)
    llm(tape, step, "researcher@1", 310, 5, sequence=3)
    (decision,) = trace(tape).decisions
    assert decision.called == timedelta(milliseconds=140 + 50)
    assert decision.ended is None
    assert decision.took is None


def test_a_chain_stays_on_one_level_and_a_fork_has_branches() -> None:
    tape = Tape()
    planned = begun(tape, steps=2)
    for number in (1, 2):
        step = tape.add(assigned(number), 50, by="coordinator@2", cause=planned)
        tape.add(completed(number), 60 + number, by="retriever@1", cause=step)
    (root,) = story(trace(tape))
    assert name(root) == "TaskSubmitted"
    assert list(map(name, root.below)) == ["decomposer", "PlanProposed", "coordinator"]
    branches = root.below[2].below
    assert list(map(name, branches)) == ["StepAssigned", "StepAssigned"]
    assert [list(map(name, branch.below)) for branch in branches] == [["retriever", "StepCompleted"]] * 2


def test_a_branch_that_waits_for_an_answer_is_a_branch() -> None:
    tape = Tape()
    planned = begun(tape, steps=2)
    first, _ = (tape.add(assigned(number), 50, by="coordinator@2", cause=planned) for number in (1, 2))
    tape.add(completed(1), 60, by="retriever@1", cause=first)
    (root,) = story(trace(tape))
    assert list(map(name, root.below[2].below)) == ["StepAssigned", "StepAssigned"]


def name(line: Line) -> str:
    match line.what:
        case Decision() as decision:
            return decision.agent
        case Letter():
            return "letter"
        case entry:
            return entry.type


def flat(lines: tuple[Line, ...]) -> list[Line]:
    return [each for line in lines for each in (line, *flat(line.below))]


def test_a_task_that_failed_shows_its_dead_letter() -> None:
    tape = Tape()
    planned = begun(tape)
    step = tape.add(assigned(), 50, by="coordinator@2", cause=planned)
    for attempt, at in ((1, 60), (2, 1060)):
        llm(tape, step, "retriever@1", at, 10, attempt=attempt, error="APIStatusError: overloaded", response="")
    tape.add(dead(step, "retriever", attempts=2), 1080, by="retriever@1", cause=step)
    failed = StepFailed(task_id="t1", step_id="t1/1", attempt=1, error_type="E", message="overloaded", retryable=False)
    told = tape.add(failed, 1080, by="retriever@1", cause=step)
    tape.add(TaskFailed(task_id="t1", objective="x", reason="overloaded"), 1100, by="coordinator@2", cause=told)
    found = trace(tape)
    gave_up = next(each for each in found.decisions if each.agent == "retriever")
    assert gave_up.letter is not None
    assert gave_up.attempts == 2
    assert gave_up.letter.resolved == ()
    assert (found.sums.failed_calls, found.sums.repeats, found.sums.dead_letters) == (2, 1, 1)
    assert "letter" in map(name, flat(story(found)))
    page = trace_page(found)
    assert "RuntimeError: it broke" in page
    assert "2 attempts" in page
    assert "gave up" in page


def dead(record: Record, agent: str, attempts: int = 1) -> DeadLettered:
    return DeadLettered(
        source_topic=record.topic,
        source_partition=record.partition,
        source_offset=record.offset,
        source_timestamp=datetime.fromtimestamp(record.timestamp_ms / 1000, UTC),
        key=record.key,
        value=record.value,
        agent=agent,
        error_type="RuntimeError",
        error="it broke",
        attempts=attempts,
    )


def test_what_was_sent_again_hangs_below_its_dead_letter() -> None:
    tape = Tape()
    step = tape.add(assigned(), 0)
    llm(tape, step, "retriever@1", 10, 5, error="APIError: no", response="")
    tape.add(dead(step, "retriever"), 20, by="retriever@1", cause=step)
    resolved = DeadLetterResolved(
        source_topic=step.topic,
        source_partition=0,
        source_offset=step.offset,
        agent="retriever",
        resolution=Resolution.REDRIVEN,
        resolved_by="ops",
    )
    tape.add(resolved, 500, by="/clients/ops", about="t1")
    tape.again(step, 500, "retriever")
    llm(tape, step, "retriever@2", 510, 5)
    tape.add(completed(), 520, by="retriever@2", cause=step)
    found = trace(tape)
    first, second = found.decisions
    assert (first.version, second.version) == ("1", "2")
    assert first.letter is not None
    assert first.letter.again is second.cause
    assert len(first.calls) == len(second.calls) == 1
    assert first.outputs == ()
    assert second.cause.redriven_for == "retriever"
    assert second.waited == timedelta(milliseconds=10)
    assert "redriven by ops" in trace_page(found)
    assert [name(line) for line in story(found)] == ["StepAssigned"]


def test_a_stopped_step_says_so() -> None:
    tape = Tape()
    planned = begun(tape)
    step = tape.add(assigned(), 50, by="coordinator@2", cause=planned)
    asked = tape.add(TaskCancelRequested(task_id="t1", requested_by="me"), 60)
    order = StepCancelRequested(target="t1/1", task_id="t1", reason="enough")
    tape.add(order, 70, by="coordinator@2", cause=asked, about="t1")
    tape.add(StepCancelRequested(target="t2/1", task_id="t2", reason="other"), 70, by="coordinator@2", about="t2")
    tape.add(TaskCancelled(task_id="t1", objective="x", requested_by="me"), 70, by="coordinator@2", cause=asked)
    stopped = StepCancelled(
        task_id="t1", step_id="t1/1", attempt=1, agent="retriever", event_id=tape.id_of(step), reason="enough"
    )
    tape.add(stopped, 90, by="retriever@1", cause=step)
    found = trace(tape)
    decision = next(each for each in found.decisions if each.agent == "retriever")
    assert decision.cancelled is not None
    assert decision.took == timedelta(milliseconds=40)
    assert [entry.type for entry in found.roots] == ["TaskSubmitted", "TaskCancelRequested"]
    assert sum(entry.type == "StepCancelRequested" for entry in found.history.entries) == 1
    assert found.outcome is not None


def test_a_timer_hangs_below_the_decision_that_set_it() -> None:
    tape = Tape()
    planned = begun(tape)
    tape.add(assigned(), 50, by="coordinator@2", cause=planned)
    due = BEGAN + timedelta(seconds=5)
    fired = TimerFired(task_id="t1", agent="coordinator", lane="t1", timer="deadline", due=due)
    timer = tape.add(fired, 5001, by="coordinator@2", cause=planned)
    tape.add(TaskFailed(task_id="t1", objective="x", reason="late"), 5010, by="coordinator@2", cause=timer)
    found = trace(tape)
    setter = next(each for each in found.decisions if each.cause.type == "PlanProposed")
    assert [entry.type for entry in setter.timers] == ["TimerFired"]
    assert setter.took == timedelta(milliseconds=20)
    assert found.path[-1].decision.cause.type == "TimerFired"


def test_tools_show_their_start_and_their_result() -> None:
    tape = Tape()
    step = tape.add(assigned(), 0)
    request = '{"arguments":{"to":"x@example.org"},"tool":"mail"}'
    called(ToolStarted, tape, step, "executor@1", 10, 0, tool="mail", request=request, sequence=0)
    called(
        ToolCalled, tape, step, "executor@1", 10, 30, tool="mail", request=request, result='{"sent":true}', sequence=0
    )
    found = trace(tape)
    assert found.sums.calls == 1
    assert "x@example.org" in trace_page(found)


def test_a_task_under_way_says_what_waits_for_an_answer() -> None:
    tape = Tape()
    planned = begun(tape)
    tape.add(assigned(), 50, by="coordinator@2", cause=planned)
    found = trace(tape)
    assert found.outcome is None
    assert found.path[-1].to.type == "StepAssigned"
    assert trace_page(found).count("no answer yet") == 1
    assert "no answer yet" not in trace_page(trace(whole_task()))


def test_records_that_do_not_decode_and_orphans_have_their_place() -> None:
    tape = whole_task()
    tape.raw("work.results.normal", b"t1", b"\x00nonsense", 390)
    orphan = tape.add(assigned(9), 395, by="coordinator@2", cause="nobody-knows")
    found = trace(tape)
    assert [entry.type for entry in found.roots] == ["TaskSubmitted", "?", "StepAssigned"]
    assert found.roots[2].record == orphan
    assert all(entry.error for entry in found.roots if entry.type == "?")
    assert trace_page(found)


def test_events_that_name_each_other_as_cause_are_told_once() -> None:
    tape = Tape()
    tape.add(assigned(1), 0, by="a@1", cause="two", id_="one")
    tape.add(assigned(2), 1, by="b@1", cause="one", id_="two")
    tape.add(assigned(3), 2, by="c@1", cause="self", id_="self")
    found = trace(tape)
    lines = [line.what for line in flat(story(found))]
    entries = [what for what in lines if isinstance(what, Entry)]
    assert sorted(entry.id for entry in entries) == ["one", "self", "two"]
    assert trace_page(found)


def test_a_task_that_was_submitted_twice_is_told_with_both() -> None:
    tape = Tape()
    first = tape.add(TaskSubmitted(task_id="t1", objective="x"), 0, id_="submitted")
    tape.add(plan(), 10, by="decomposer@2", cause=first, id_="planned")
    tape.add(TaskSubmitted(task_id="t1", objective="x"), 20, id_="submitted")
    tape.add(plan(), 30, by="decomposer@2", cause=first, id_="planned")
    found = trace(tape)
    assert [(each.cause.record.offset, len(each.outputs)) for each in found.decisions] == [(0, 1), (1, 1)]
    assert len(found.roots) == 2


def test_a_document_has_a_trace_too() -> None:
    tape = whole_task()
    submitted = tape.add(DocumentSubmitted(document_id="d1", title="Widgets", text="Clean it."), 0, about="d1")
    embedded = {"model": "m", "model_version": "1"}
    request = '{"texts":["Clean it."]}'
    called(
        TextsEmbedded,
        tape,
        submitted,
        "embedder@1",
        40,
        10,
        task_id="d1",
        request=request,
        dimensions=2,
        count=1,
        vectors=b"12345678",
        **embedded,
    )
    chunk = ChunkEmbedded(
        chunk_id="c1", document_id="d1", ordinal=0, title="W", text="Clean it.", tokens=3, vector=(1.0, 0.0), **embedded
    )
    tape.add(chunk, 60, by="embedder@1", cause=submitted, about="d1")
    indexed = DocumentIndexed(document_id="d1", content_hash="0", chunk_ids=("c1",), **embedded)
    tape.add(indexed, 60, by="embedder@1", cause=submitted, about="d1")
    found = trace(tape, "d1")
    assert found.history.kind == "document"
    assert found.outcome is None
    (decision,) = found.decisions
    assert [entry.type for entry in decision.outputs] == ["ChunkEmbedded", "DocumentIndexed"]
    assert decision.waited == timedelta(milliseconds=40)
    assert "vector" not in json.dumps(trace_as_dict(found))
    assert "no answer yet" not in trace_page(found)


def test_an_unknown_id_is_said_so() -> None:
    with pytest.raises(UnknownTaskError, match="the log holds no task 'nope'"):
        trace(whole_task(), "nope")


def test_the_page_holds_everything_and_escapes_it() -> None:
    tape = whole_task()
    hostile = "<script>alert(1)</script>"
    tape.add(TaskCancelRequested(task_id="t1", requested_by=hostile, reason=hostile), 500)
    page = trace_page(trace(tape))
    for part in (
        "Be brief.",
        "How to clean it?",
        "With a dry cloth [1].",
        "Clean it with a dry cloth.",
        "0.83",
        "0.61",
        "0.87",
        "Bananas are not in the evidence.",
        "clean a widget",
        "decomposer@2",
        "not grounded",
    ):
        assert part in page, part
    assert hostile not in page
    assert "&lt;script&gt;" in page


def test_the_terminal_shows_it_in_a_hundred_columns(capsys: pytest.CaptureFixture[str]) -> None:
    found = trace(whole_task())
    out = Output(as_json=False)
    out.console.width = 100
    print_trace(found, out)
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 100
    for part in ("task t1", "completed", "retriever", "waited 20 ms", "Care", "0.83", "overseer", "200+20"):
        assert part in shown, part
    assert "Be brief." not in shown
    print_trace(found, out, full=True)
    whole = capsys.readouterr().out
    for part in ("Be brief.", "How to clean it?", "With a dry cloth [1].", "Clean it with a dry cloth."):
        assert part in whole, part


def test_recorded_text_does_not_command_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    tape = Tape()
    tape.add(TaskSubmitted(task_id="t1", objective="\x1b[2J\x1b]0;owned\x07 [red]x[/red]"), 0)
    out = Output(as_json=False)
    for full in (False, True):
        print_trace(trace(tape), out, full=full)
        shown = capsys.readouterr().out
        assert "\x1b" not in shown
        assert "[red]x[/red]" in shown


def test_json_names_entries_by_their_place() -> None:
    as_json = trace_as_dict(trace(whole_task()))
    assert json.loads(json.dumps(as_json)) == as_json
    places = {entry["place"] for entry in as_json["entries"]}
    assert all(place in places for each in as_json["decisions"] for place in (each["on"], *each["calls"]))
    assert as_json["outcome"] == "TaskCompleted"
    assert as_json["decisions"][2]["waited_s"] == 0.02


def test_a_clock_that_is_ahead_gives_no_negative_times() -> None:
    tape = Tape()
    step = tape.add(assigned(), 1000)
    effect = called(LlmCalled, tape, step, "r@1", 0, float("nan"), provider="p", model="m")
    tape.records[-1] = replace(effect, timestamp_ms=effect.timestamp_ms + 2000)
    (decision,) = trace(tape).decisions
    assert decision.waited == timedelta()
    assert decision.called == timedelta()


@pytest.mark.parametrize("path", HISTORIES, ids=lambda path: path.stem)
def test_every_record_of_a_real_history_is_told_once(path: Path) -> None:
    pinned = load(path)
    found = trace_of(read_history(TapeLog(pinned.records), pinned.id, CODEC))
    told: list[Entry] = []
    for line in flat(story(found)):
        match line.what:
            case Entry() as entry:
                told.append(entry)
            case Letter(entry=entry, resolved=resolved):
                told += [entry, *resolved]
    assert sorted(entry.place for entry in told) == sorted(entry.place for entry in found.history.entries)
    assert all(decision.ended is not None for decision in found.decisions) or found.outcome is None
    assert sum((hop.total for hop in found.path), timedelta()) <= found.wall
    assert trace_page(found)
    json.dumps(trace_as_dict(found))


def test_records_of_a_task_are_looked_for_from_shortly_before_it() -> None:
    tape = Tape()
    tape.add(TaskCancelRequested(task_id="t1", requested_by="me"), -60_000)
    tape.add(assigned(7), -24 * 3_600_000, by="coordinator@2")
    begun(tape)
    assert [entry.type for entry in trace(tape).history.entries] == [
        "TaskCancelRequested",
        "TaskSubmitted",
        "PlanProposed",
    ]


def test_what_was_erased_says_so() -> None:
    tape = whole_task()
    history = read_history(tape.log(), "t1", CODEC)
    blank = [
        Entry(entry.record, replace(entry.envelope, erased=True)) if entry.envelope is not None else entry
        for entry in history.entries
    ]
    found = trace_of(replace(history, entries=tuple(blank)))
    assert trace_page(found).count(">erased<") == len(blank)
    assert all(entry["erased"] for entry in trace_as_dict(found)["entries"])


def test_a_history_of_any_depth_can_be_told(capsys: pytest.CaptureFixture[str]) -> None:
    tape = Tape()
    cause = tape.add(assigned(0), 0)
    for number in range(1, 700):
        made = [tape.add(assigned(number), number, by=f"{who}@1", cause=cause) for who in "ab"]
        cause = made[number % 2]
    found = trace(tape)
    assert len([line for line in iterated(story(found)) if isinstance(line.what, Entry)]) == len(tape.records)
    assert trace_page(found)
    print_trace(found, Output(as_json=False))
    assert "step 699" in capsys.readouterr().out


def iterated(lines: tuple[Line, ...]) -> list[Line]:
    found, waiting = [], list(lines)
    while waiting:
        line = waiting.pop()
        found.append(line)
        waiting += line.below
    return found
