import asyncio
import random
import time
from collections import defaultdict
from dataclasses import replace
from typing import Any

import pytest
from confluent_kafka.admin import AlterConfigOpType, ConfigEntry, ConfigResource

from agents.context import Ports
from schemas.events import (
    LlmCalled,
    StepFailed,
    TaskSubmitted,
)
from schemas.metadata import Envelope, deterministic_id
from schemas.record import Record
from streams.errors import FencedError, MissingTopicError, StateError
from streams.state import changelog_topic
from tests.support.processors import CODEC, PARTITIONS, Bench, FlakyModel, bench_on, read_committed


@pytest.fixture
def bench(kafka: Any) -> Bench:
    return bench_on(kafka)


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
    assert sum(key.startswith(b"state/") for key in latest if key) == 10
    assert latest[b"owner/"] is None
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
    binding = replace(bench.binding, timeout_s=0.05)
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
