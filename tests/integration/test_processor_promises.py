"""What a processor promises while steps run for long, fail, wait, or take their process down."""

import asyncio
import json
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from agents.context import LlmRequest, LlmResponse, Ports
from agents.errors import EffectFailedError
from schemas.events import LlmCalled, StepCancelled, TimerFired
from streams.binding import RetryPolicy
from streams.state import changelog_topic
from tests.support.asking import Asker
from tests.support.auditing import audit_of
from tests.support.processors import CODEC, Bench, bench_on, read_committed


class Model:
    """Answers a question with itself in capitals. ``gate(question)`` is awaited before, and may raise."""

    name = "capitals"

    def __init__(self, gate: Callable[[str], Any] | None = None) -> None:
        self.calls: Counter[str] = Counter()
        self.keys: dict[str, set[str]] = {}
        self._gate = gate

    async def complete(self, request: LlmRequest, *, idempotency_key: str) -> LlmResponse:
        text = request.messages[-1].content
        self.calls[text] += 1
        self.keys.setdefault(text, set()).add(idempotency_key)
        if self._gate is not None:
            await self._gate(text)
        return LlmResponse(text=text.upper(), provider=self.name, model="m")


async def never() -> None:
    await asyncio.Event().wait()


@pytest.fixture
def bench(kafka: Any) -> Iterator[Bench]:
    """An agent that asks. Whatever happens to its processors, what they left is what deciding it again gives."""
    bench = bench_on(kafka, Asker(kafka.unique("asker")))
    yield bench
    report = audit_of(bench)
    assert report.findings == [], [str(finding) for finding in report.findings]


def effects(bench: Bench) -> list[LlmCalled]:
    return [made.event for _, made in bench.committed("effects") if isinstance(made.event, LlmCalled)]


def left_in_changelog(bench: Bench) -> dict[str, bytes]:
    changelog = changelog_topic(bench.binding.group, bench.topic)
    latest = {record.key: record.value for record in read_committed(bench.kafka.config, changelog)}
    return {(key or b"").decode(): value for key, value in latest.items() if value is not None}


# Effects.


@pytest.mark.parametrize("objective", ["in turn", "together"])
async def test_an_effect_is_committed_while_its_step_runs_and_not_made_again(bench: Bench, objective: str) -> None:
    async def gate(text: str) -> None:
        if text == "c":
            await never()

    stuck = Model(gate)
    bench.send("t", objective, ask="a,b,c")
    async with bench.running(ports=Ports(llm=stuck), drain_timeout_s=0.1) as processor:
        await bench.until(lambda: stuck.calls["c"] == 1 and processor.stats.journalled == 2)
    assert sorted(effect.request[-30:] for effect in effects(bench)) != []
    assert len(effects(bench)) == 2
    assert bench.results() == {}
    assert sum(key.startswith("effect/") for key in left_in_changelog(bench)) == 2

    free = Model()
    await bench.process(1, ports=Ports(llm=free))
    assert free.calls == {"c": 1}
    assert free.keys["c"] == stuck.keys["c"], "a call that may repeat has the same idempotency key"
    assert bench.results() == {"t": ["0 A B C"]}
    made = effects(bench)
    assert [effect.sequence for effect in made] == [0, 1, 2]
    assert {key.partition("/")[0] for key in left_in_changelog(bench)} == {"state"}


async def test_a_step_that_is_done_before_the_next_commit_journals_nothing(bench: Bench) -> None:
    for number in range(50):
        bench.send(f"t{number}", ask="a")
    processor = await bench.process(50, ports=Ports(llm=Model()), commit_interval_s=0.2)
    assert len(effects(bench)) == 50
    assert processor.stats.journalled < 50


async def test_a_killed_process_makes_no_committed_call_again(bench: Bench, tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    bench.send("t", "in turn", ask="a,b,stuck")
    bench.flush()
    with worker(bench, calls, "stuck") as process:
        await bench.until(lambda: len(effects(bench)) == 2)
        process.kill()
    model = Model()
    await bench.process(1, ports=Ports(llm=model))
    assert model.calls == {"stuck": 1}
    assert bench.results() == {"t": ["0 A B STUCK"]}
    assert sorted(calls.read_text().split()) == ["a", "b", "stuck"]


# Retries.


async def test_a_long_wait_is_parked_and_survives_a_restart(bench: Bench) -> None:
    refusals = 0

    async def refuse(text: str) -> None:
        nonlocal refusals
        refusals += 1
        raise EffectFailedError("RateLimited", "slow down", retryable=True)

    policy = RetryPolicy(attempts=3, backoff_s=12.0)
    binding = replace(bench.binding, park_after_s=0.5, retry_by_error={"RateLimited": policy})
    bench.send("t", ask="a")
    for _ in range(3):
        bench.send("t")
    bench.send("other")
    bench.flush()
    async with bench.running(binding=binding, ports=Ports(llm=Model(refuse))) as processor:
        await bench.until(lambda: sum(place.offset for place in bench.offsets()) == 5)
        assert processor.stats.parked == 0 or processor.stats.parked == 4
        bench.send("t")
        bench.flush()
        await bench.until(lambda: sum(place.offset for place in bench.offsets()) == 6)
        assert bench.results() == {"other": ["0"]}
    assert refusals == 1
    assert sum(key.startswith("parked/") for key in left_in_changelog(bench)) == 5
    bench.send("t")

    second = Model()
    started = time.monotonic()
    await bench.process(6, binding=binding, ports=Ports(llm=second))
    assert time.monotonic() - started > 0.5, "it did not wait for the rest of its time"
    assert bench.results() == {"other": ["0"], "t": ["0 A", "1", "2", "3", "4", "5"]}
    assert {key.partition("/")[0] for key in left_in_changelog(bench)} == {"state"}
    assert [bool(effect.error) for effect in effects(bench)] == [True, False]


async def test_attempts_are_counted_through_a_restart(bench: Bench) -> None:
    async def refuse(text: str) -> None:
        raise EffectFailedError("RateLimited", "slow down", retryable=True)

    binding = replace(bench.binding, park_after_s=0.1, retry=RetryPolicy(attempts=2, backoff_s=1.0))
    bench.send("t", ask="a")
    first = Model(refuse)
    async with bench.running(binding=binding, ports=Ports(llm=first)):
        await bench.until(lambda: sum(place.offset for place in bench.offsets()) == 1)
    second = Model(refuse)
    await bench.process(1, binding=binding, ports=Ports(llm=second))
    assert (first.calls["a"], second.calls["a"]) == (1, 1)
    (letter,) = bench.letters()
    assert (letter.attempts, letter.error_type) == (2, "RateLimited")
    assert [effect.sequence for effect in effects(bench)] == [0, 1]


async def test_a_wait_holds_up_its_own_lane_only(bench: Bench) -> None:
    failing = True

    async def gate(text: str) -> None:
        if failing:
            raise EffectFailedError("RateLimited", "slow down", retryable=True)

    binding = replace(
        bench.binding, concurrency=2, park_after_s=60, retry=RetryPolicy(attempts=50, backoff_s=0.3, max_backoff_s=0.3)
    )
    for number in range(5):
        bench.send(f"slow{number}", ask="a")
    for number in range(200):
        bench.send(f"t{number}")
    async with bench.running(binding=binding, ports=Ports(llm=Model(gate))) as processor:
        await bench.until(lambda: processor.stats.events_in == 200)
        failing = False
        await bench.until(lambda: processor.stats.events_in == 205)
    assert processor.stats.retries >= 5
    assert sum(map(len, bench.results().values())) == 205


# Cancellation.


async def test_a_cancelled_step_is_ended_where_it_is(bench: Bench) -> None:
    async def gate(text: str) -> None:
        if text == "never":
            await never()
        if text == "later":
            raise EffectFailedError("RateLimited", "slow down", retryable=True)

    model = Model(gate)
    cancelled: dict[str, str] = {}
    binding = replace(bench.binding, park_after_s=0.1, retry=RetryPolicy(attempts=5, backoff_s=600, max_backoff_s=600))
    bench.send("t", ask="a,never", lane="step")  # runs
    bench.send("t", ask="later", lane="step")  # waits for another attempt, parked
    running, waiting, unseen = "t/1", "t/2", "t/3"
    async with bench.running(binding=binding, ports=Ports(llm=model), cancelled=cancelled) as processor:
        await bench.until(lambda: model.calls["never"] == 1 and processor.stats.journalled >= 2)
        for step_id in (running, waiting, unseen):
            cancelled[step_id] = "no longer needed"
            processor.cancel_step(step_id, "no longer needed")
        bench.send("t", ask="a", lane="step")  # arrives after its cancellation
        bench.send("t", ask="a", lane="step")
        bench.flush()
        await bench.until(lambda: processor.stats.events_in == 4)
    assert processor.stats.cancelled == 3
    assert model.calls["a"] == 2
    assert bench.results() == {"t": ["0 A"]}
    facts = [made.event for _, made in bench.committed("effects") if isinstance(made.event, StepCancelled)]
    assert sorted(fact.step_id for fact in facts) == [running, waiting, unseen]
    assert {fact.reason for fact in facts} == {"no longer needed"}
    assert len(effects(bench)) == 3, "what was paid for is recorded"
    assert {key.partition("/")[0] for key in left_in_changelog(bench)} == {"state"}
    assert bench.letters() == []


# Timers.


async def test_timers_fire_once_also_after_a_restart(bench: Bench) -> None:
    bench.send("now", timer="soon", after="0.3")
    bench.send("moved", timer="x", after="0.3")
    bench.send("moved", timer="x", after="1.0")
    bench.send("stopped", timer="y", after="0.5")
    bench.send("stopped", stop="y")
    bench.send("later", timer="late", after="3")
    async with bench.running() as processor:
        await bench.until(lambda: processor.stats.events_in == 8)
    assert sum(key.startswith("timer/") for key in left_in_changelog(bench)) == 1
    await bench.process(1)
    results = bench.results()
    assert [len(results[task]) for task in ("now", "moved", "stopped", "later")] == [2, 3, 2, 2]
    assert results["later"][-1].startswith("late due")
    fired = [made for record in read_committed(bench.kafka.config, bench.topic) if (made := as_timer(record))]
    assert sorted(made.task_id for made in fired) == ["later", "moved", "now"]
    assert {key.partition("/")[0] for key in left_in_changelog(bench)} == {"state"}


def as_timer(record: Any) -> TimerFired | None:
    event = CODEC.decode(record).event
    return event if isinstance(event, TimerFired) else None


async def test_a_timer_whose_time_passed_while_nobody_ran_fires_at_the_start(bench: Bench) -> None:
    sent = time.monotonic()
    bench.send("t", timer="past", after="6")
    await bench.process(1)
    await asyncio.sleep(sent + 6.5 - time.monotonic())
    started = datetime.now(UTC)
    await bench.process(1)
    (record,) = [record for record in read_committed(bench.kafka.config, bench.topic) if as_timer(record)]
    assert datetime.fromtimestamp(record.timestamp_ms / 1000, UTC) >= started - timedelta(milliseconds=5)


# Events that take their process down.


class worker:  # noqa: N801 - used as a function
    """A process with a processor for the bench's agent, whose model writes its calls down and ends the process."""

    def __init__(self, bench: Bench, calls: Path, deadly: str) -> None:
        arguments = {
            "servers": bench.kafka.bootstrap_servers,
            "topic": bench.topic,
            "name": bench.agent.name,
            "calls": str(calls),
            "deadly": deadly,
        }
        script = Path(__file__).parent.parent / "support" / "asking_worker.py"
        self.process = subprocess.Popen([sys.executable, str(script), json.dumps(arguments)])

    def __enter__(self) -> subprocess.Popen[bytes]:
        return self.process

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait(20)


async def test_an_event_that_takes_its_process_down_ends_as_a_dead_letter(bench: Bench, tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    for number in range(40):
        bench.send(f"t{number}", ask="deadly" if number == 17 else "fine")
    bench.flush()
    deaths = 0
    while deaths < 10:
        with worker(bench, calls, "deadly") as process:
            await bench.until(lambda: process.poll() is not None or bool(bench.letters()))
            if process.poll() is None:
                await bench.until(lambda: sum(place.offset for place in bench.offsets()) == 40)
                process.send_signal(signal.SIGTERM)
                assert process.wait(20) == 0
                break
            assert process.returncode == -signal.SIGKILL
            deaths += 1
    assert deaths == 4, "once uncounted, then three times"
    (letter,) = bench.letters()
    assert (letter.error_type, letter.key, letter.attempts) == ("ProcessCrashed", b"t17", 3)
    results = bench.results()
    assert sorted(results) == sorted(f"t{number}" for number in range(40) if number != 17)
    assert all(answers == ["0 FINE"] for answers in results.values())
    assert {key.partition("/")[0] for key in left_in_changelog(bench)} == {"state"}


# Redriven records.


async def test_a_redriven_record_is_for_one_agent_only(bench: Bench) -> None:
    bench.send("a")
    bench.flush()
    (record,) = [each for each in read_committed(bench.kafka.config, bench.topic) if each.key == b"a"]
    assert record.value is not None
    for name in (b"somebody-else", bench.agent.name.encode()):
        bench.send_raw(b"a", record.value, [*record.headers, ("redrive", name)])
    processor = await bench.process(2)
    assert processor.stats.skipped == 1
    assert bench.results() == {"a": ["0", "1"]}
