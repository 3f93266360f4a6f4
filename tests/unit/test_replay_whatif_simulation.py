"""What-ifs of single tasks: unchanged ones find nothing, changed ones what they change, unbidden nothing is asked."""

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import orjson
import pytest

from agents.context import LlmRequest, Ports, Purpose
from replay.whatif.budget import Budget
from replay.whatif.changes import Changes
from replay.whatif.result import Departure, Status, TaskResult, from_dict
from schemas.codec import Codec
from schemas.encryption import SubjectCipher
from schemas.events import Priority, TaskCancelRequested
from schemas.record import Record
from tests.support.keys import ADA, MemoryKeys
from tests.support.recording import START_MS, Happening
from tests.support.whatif import QUESTIONS, Corpus, Embedding, Model, fleet_of, past_of, recorded, simulated

PROMPT = Changes(prompts={"answer": "Answer from the passages, in one sentence."})
ASKED = Changes(prompts=PROMPT.prompts, ask="model")


class Unasked:
    """Ports that no what-if may ask of its own."""

    name = model = version = "unasked"
    dimensions = 2

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"{name} was called")


NOT_TO_BE_ASKED = Ports(tools=Unasked(), directory=Unasked())


def check_unchanged(result: TaskResult, records: list[Record]) -> None:
    assert (result.status, result.divergences, result.would) == (Status.SAME, (), ())
    assert (result.made, result.elsewhere) == (0, 0)
    assert result.after == result.before
    assert from_dict(orjson.loads(orjson.dumps(result.as_dict()))) == result


@pytest.mark.parametrize("objective", QUESTIONS)
async def test_without_a_change_nothing_differs(objective: str, tmp_path: Path) -> None:
    records = await recorded(objective)
    result = await simulated(records, tmp_path, ports=NOT_TO_BE_ASKED)
    check_unchanged(result, records)
    assert result.before.outcome == "TaskCompleted"
    assert result.steps > 4
    assert result.reused == len([each for each in records if each.topic == "effects"])
    assert result.before.latency_ms == past_of(records).ends_ms - START_MS


HARD: Mapping[str, dict[str, Any]] = {
    "retried": {"llm": Model(failures=2)},
    "given up": {"llm": Model(failures=3)},
    "given up again and again": {"llm": Model(failures=100)},
    "sent back": {"llm": Model(change=lambda request, text: "Bananas grow on Mars [1].")},
    "expired": {"deadline": datetime.fromtimestamp(START_MS / 1000, UTC) + timedelta(milliseconds=50)},
    "in time": {"deadline": datetime.fromtimestamp(START_MS / 1000, UTC) + timedelta(seconds=50)},
    "cancelled": {"happenings": [Happening(TaskCancelRequested(task_id="t1", requested_by="me"), 70)]},
    "cancelled early": {"happenings": [Happening(TaskCancelRequested(task_id="t1", requested_by="me"), 10)]},
    "cancelled late": {"happenings": [Happening(TaskCancelRequested(task_id="t1", requested_by="me"), 5000)]},
    "urgent": {"priority": Priority.HIGH},
    "planned by its user": {
        "parameters": {"plan": '{"steps":[{"id":"1","capability":"retrieve","objective":"uvloop?"}]}'}
    },
}


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("objective", QUESTIONS[1:3])
async def test_without_a_change_nothing_differs_where_things_went_wrong(
    name: str, objective: str, tmp_path: Path
) -> None:
    options = dict(HARD[name])
    if isinstance(options.get("llm"), Model):
        options["llm"] = Model(failures=options["llm"].failures, change=options["llm"].change)
    records = await recorded(objective, **options)
    check_unchanged(await simulated(records, tmp_path, ports=NOT_TO_BE_ASKED), records)


async def test_a_changed_prompt_stops_where_it_would_be_asked(tmp_path: Path) -> None:
    records = await recorded("What is uvloop?")
    result = await simulated(records, tmp_path, changes=PROMPT, ports=NOT_TO_BE_ASKED)
    assert result.status is Status.STOPPED
    (would,) = result.would
    assert (would["would"], would["agent"]) == ("would call", "retriever")
    assert orjson.loads(would["request"])["system"] == PROMPT.prompts["answer"]
    first = result.first
    assert first is not None
    assert (first.kind, first.agent, first.event_type, first.what, first.field) == (
        Departure.ASKS, "retriever", "StepAssigned", "LlmCalled", "system",
    )  # fmt: skip
    assert first.after == PROMPT.prompts["answer"]
    assert first.before.startswith("You answer questions from numbered passages")
    assert result.before.outcome == "TaskCompleted"
    assert result.after.outcome == ""


async def test_a_changed_prompt_that_is_answered_alike_ends_alike(tmp_path: Path) -> None:
    llm = Model(name="extractive")
    result = await simulated(await recorded("What is uvloop?"), tmp_path, changes=ASKED, ports=Ports(llm=llm))
    assert result.status is Status.DIVERGED
    assert {each.what for each in result.divergences} == {"LlmCalled", "StepCompleted"}
    assert not result.ended_otherwise
    assert (result.made, len(llm.requests), result.reused) == (1, 1, 3)
    assert (result.after.calls, result.spent_usd) == (2, 0.001)
    assert result.decided is not None
    assert (result.decided.field, result.decided.before, result.decided.after) == (
        "model", "extractive/extractive-1", "extractive/m1",
    )  # fmt: skip


async def test_another_answer_goes_through_the_whole_fleet(tmp_path: Path) -> None:
    def lie(request: LlmRequest, text: str) -> str:
        return "Bananas grow on Mars [1]." if request.purpose is Purpose.ANSWER else text

    llm = Model(change=lie)
    ports = Ports(llm=llm, memory=Corpus(), embedding=Embedding())
    records = await recorded("What is uvloop?")
    result = await simulated(records, tmp_path, changes=ASKED, ports=ports)
    assert (result.before.outcome, result.after.outcome) == ("TaskCompleted", "TaskFailed")
    assert "Bananas grow on Mars" in result.after.answer
    assert result.ended_otherwise
    assert result.made == 4  # two answers; after the first the reviewer's finding is looked up, with more passages
    # Without a memory to ask, it stops at what it would look up.
    (tmp_path / "b").mkdir()
    stopped = await simulated(records, tmp_path / "b", changes=ASKED, ports=Ports(llm=Model(change=lie)))
    assert stopped.status is Status.STOPPED
    assert [would["would"] for would in stopped.would] == ["would recall"]


async def test_time_is_as_recorded_until_a_step_takes_longer(tmp_path: Path) -> None:
    records = await recorded("What is httpx and does it support HTTP/2?")
    same = await simulated(records, tmp_path, changes=ASKED, ports=Ports(llm=Model()))
    assert same.after.latency_ms is not None
    assert same.before.latency_ms is not None
    # Recorded calls took 40 ms each: plan, directory, recall, two answers side by side, synthesis. This model is quick.
    assert same.before.latency_ms == 200
    assert 160 <= same.after.latency_ms < 200


async def test_a_slower_answer_misses_the_deadline(tmp_path: Path) -> None:
    deadline = datetime.fromtimestamp(START_MS / 1000, UTC) + timedelta(milliseconds=200)
    records = await recorded("What is uvloop?", deadline=deadline)
    slow = Model()

    async def complete(request: LlmRequest, *, idempotency_key: str) -> Any:
        import asyncio

        await asyncio.sleep(0.25)
        return await Model().complete(request, idempotency_key=idempotency_key)

    slow.complete = complete  # type: ignore[method-assign]
    result = await simulated(records, tmp_path, changes=ASKED, ports=Ports(llm=slow))
    assert (result.before.outcome, result.after.outcome) == ("TaskCompleted", "TaskExpired")
    assert result.after.latency_ms == 200


async def test_a_failed_call_is_tried_again_as_live_and_then_given_up(tmp_path: Path) -> None:
    records = await recorded("What is uvloop?")
    llm = Model(failures=2)
    result = await simulated(records, tmp_path, changes=ASKED, ports=Ports(llm=llm))
    assert (result.after.outcome, result.made, len(llm.requests)) == ("TaskCompleted", 3, 3)
    assert len(set(llm.keys)) == 1  # the vendor is told that they are one call
    assert result.after.latency_ms is not None
    assert result.after.latency_ms > 400  # waits of 150 and 300 ms
    (tmp_path / "b").mkdir()
    given_up = await simulated(records, tmp_path / "b", changes=ASKED, ports=Ports(llm=Model(failures=10**6)))
    assert given_up.after.outcome == "TaskFailed"
    assert "Http429: slow down" in given_up.after.answer
    assert Departure.FAILS in {each.kind for each in given_up.divergences}


async def test_what_was_paid_for_is_not_paid_for_again(tmp_path: Path) -> None:
    records = await recorded("What is httpx and does it support HTTP/2?")
    first = await simulated(records, tmp_path, changes=ASKED, ports=Ports(llm=Model(failures=1)))
    again = await simulated(records, tmp_path, changes=ASKED, ports=Ports(llm=Unasked()))
    assert again == first
    assert first.made == 3


async def test_another_temperature_changes_every_request_to_a_model(tmp_path: Path) -> None:
    records = await recorded("What is uvloop?")
    changes = Changes(temperature=0.7, ask="model")
    llm = Model()
    result = await simulated(records, tmp_path, changes=changes, ports=Ports(llm=llm))
    assert [request.temperature for request in llm.requests] == [0.7, 0.7]
    assert {(each.field, each.before, each.after) for each in result.divergences if each.kind is Departure.ASKS} == {
        ("temperature", "0.0", "0.7")
    }


async def test_another_provider_answers_everything_anew(tmp_path: Path) -> None:
    records = await recorded("What is uvloop?")
    llm = Model()
    result = await simulated(records, tmp_path, changes=Changes(provider="model", ask="model"), ports=Ports(llm=llm))
    assert len(llm.requests) == result.made == 2
    first = result.first
    assert first is not None
    assert (first.agent, first.field, first.before, first.after) == (
        "decomposer", "provider", "extractive/extractive-1", "model",
    )  # fmt: skip
    (tmp_path / "b").mkdir()
    same = await simulated(
        records, tmp_path / "b", changes=Changes(provider="extractive", ask="extractive"), ports=Ports(llm=llm)
    )
    assert (same.status, same.made) == (Status.SAME, 0)


async def test_a_budget_ends_it_before_the_call_that_could_exceed_it(tmp_path: Path) -> None:
    records = await recorded("What is httpx and does it support HTTP/2?")
    llm = Model()
    result = await simulated(records, tmp_path, changes=ASKED, ports=Ports(llm=llm), budget=Budget(max_usd=0.0015))
    assert (result.status, len(llm.requests)) == (Status.BUDGET, 1)
    assert "over $0.0015" in result.would[0]["why"]
    tokens = await simulated(records, tmp_path, changes=ASKED, ports=Ports(llm=llm), budget=Budget(max_tokens=5))
    assert (tokens.status, len(llm.requests)) == (Status.BUDGET, 1)
    done = await simulated(records, tmp_path, changes=ASKED, ports=Ports(llm=llm), budget=Budget(max_usd=1.0))
    assert (done.status, len(llm.requests)) == (Status.DIVERGED, 2)


async def test_a_task_whose_record_breaks_off_is_taken_as_far(tmp_path: Path) -> None:
    records = await recorded("What is httpx and does it support HTTP/2?")
    ends = [at for at in range(2, len(records)) if records[at].timestamp_ms > records[at - 1].timestamp_ms]
    assert len(ends) > 3  # a transaction's records are all there, or none
    for length in ends:
        (tmp_path / str(length)).mkdir()
        result = await simulated(records[:length], tmp_path / str(length), ports=NOT_TO_BE_ASKED)
        assert result.divergences == (), length
        assert result.status in (Status.STOPPED, Status.UNFINISHED), length


async def test_an_order_to_stop_reaches_a_step_that_now_takes_longer(tmp_path: Path) -> None:
    asked = Happening(TaskCancelRequested(task_id="t1", requested_by="me"), 125)
    records = await recorded("Compare fastavro with avro", happenings=[asked])
    assert past_of(records).outcome is not None
    result = await simulated(records, tmp_path, changes=ASKED, ports=Ports(llm=Model(), memory=Corpus()))
    assert (result.before.outcome, result.after.outcome) == ("TaskCancelled", "TaskCancelled")


async def test_the_fleet_of_the_test_is_the_one_that_is_simulated() -> None:
    assert [agent.name for agent in fleet_of()] == ["decomposer", "coordinator", "retriever", "researcher", "overseer"]


async def test_personal_data_stays_sealed_and_is_compared_all_the_same(tmp_path: Path) -> None:
    keys = MemoryKeys()
    codec = Codec(cipher=SubjectCipher(keys))
    records = await recorded("What is uvloop?", codec=codec, data_subjects=(ADA,))
    assert not any(b"drop-in replacement" in (record.value or b"") for record in records)
    (tmp_path / "same").mkdir()
    check_unchanged(await simulated(records, tmp_path / "same", ports=NOT_TO_BE_ASKED, codec=codec), records)
    llm = Model(change=lambda request, text: text.replace("fast, ", ""))
    result = await simulated(records, tmp_path, changes=ASKED, ports=Ports(llm=llm, embedding=Embedding()), codec=codec)
    fields = [(each.what, each.field) for each in result.divergences if each.kind is Departure.DECIDES]
    assert ("StepCompleted", "answer") in fields
    assert ("TaskCompleted", "answer") in fields
    assert b"drop-in" not in (tmp_path / "calls.jsonl").read_bytes()
    assert await simulated(records, tmp_path, changes=ASKED, ports=Ports(llm=Unasked()), codec=codec) == result
    keys.forget(ADA)
    assert past_of(records, codec=Codec(cipher=SubjectCipher(keys))).erased
