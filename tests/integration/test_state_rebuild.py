"""An agent's state is decided again from the log: equal where all is well, mended where not, made anew where lost."""

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Producer, TopicPartition

from agents.agent import Agent, Failure
from agents.answering import step_failed
from agents.context import Context, LlmRequest, LlmResponse, Message, Ports, Purpose
from agents.errors import EffectFailedError
from magnatronic.rebuild import Options
from magnatronic.state_rebuild import StateRebuild
from replay.selection import Selection
from replay.steps import Station
from replay.stretch import Scope
from schemas.events import Event, StepAssigned, StepCompleted, StepFailed, TimerFired
from schemas.record import Record
from schemas.topics import all_topics
from sinks.errors import HistoryLostError
from streams import custody
from streams.binding import Binding, RetryPolicy
from streams.changelog import state_key, timer_key
from streams.errors import ClusterError, GroupBusyError, StateError
from streams.runner import Runner
from streams.state import changelog_topic
from tests.support.processors import CODEC, Bench, read_committed, until
from tests.support.steps import Total, completed

FAR = timedelta(days=30)


class Keeper(Agent[Total]):
    """Adds up each task's numbers; ``alarm`` sets a timer, ``calm`` cancels it, ``ask`` asks a model, ``soon`` sets a
    timer that is due at once.
    """

    version = "1"
    consumes = (StepAssigned, TimerFired)
    emits = (StepCompleted, StepFailed)
    state_type = Total

    def __init__(self, name: str) -> None:
        self.name = name  # type: ignore[misc]

    def lane(self, event: Event) -> str:
        assert isinstance(event, StepAssigned)
        return event.task_id

    async def handle(self, event: Event, ctx: Context[Total]) -> None:
        before = ctx.state or Total()
        if isinstance(event, TimerFired):
            ctx.state = Total(sum=before.sum + 1000, count=before.count)
            return
        assert isinstance(event, StepAssigned)
        number = int(event.parameters["number"])
        match event.objective:
            case "alarm":
                ctx.timer("alarm", ctx.now + FAR)
            case "calm":
                ctx.cancel_timer("alarm")
            case "soon":
                ctx.timer("soon", ctx.now)
            case "ask":
                for question in ("one", event.parameters.get("question", "two")):
                    message = Message(role="user", content=question)
                    await ctx.llm(LlmRequest(purpose=Purpose.ANSWER, messages=(message,)))
        ctx.state = Total(sum=before.sum + number, count=before.count + 1)
        ctx.emit(completed(event, str(ctx.state.sum)))

    async def on_failure(self, event: Event, failure: Failure, ctx: Context[Total]) -> None:
        assert isinstance(event, StepAssigned)
        ctx.emit(step_failed(event, failure))


class Model:
    """Answers at once, never answers, or has too many requests, by question; counts how often it was asked each."""

    name = "model"

    def __init__(self) -> None:
        self.calls: dict[str, int] = {}
        self.open = False

    async def complete(self, request: LlmRequest, *, idempotency_key: str) -> LlmResponse:
        question = request.messages[0].content
        self.calls[question] = self.calls.get(question, 0) + 1
        if question == "stuck" and not self.open:
            await asyncio.Event().wait()
        if question == "busy" and not self.open:
            raise EffectFailedError("RateLimited", "slow down", retryable=True)
        return LlmResponse(text="yes", provider="test", model="test", prompt_tokens=2, completion_tokens=1)


class World(Bench):
    """A bench whose agent's state can be rebuilt."""

    def __init__(self, kafka: Any, folder: Path) -> None:
        super().__init__(kafka, Keeper(kafka.unique("keeper")))
        retry = RetryPolicy(attempts=50, backoff_s=3.0, max_backoff_s=3.0)
        self.binding = Binding(self.agent, (self.topic,), retry=retry, park_after_s=0.1)
        self.model = Model()
        self.folder = folder
        self.changelog = changelog_topic(self.binding.group, self.topic)
        known = kafka.admin.list_topics(timeout=20).topics
        limits = all_topics()
        for topic in Scope(Selection(), (Station(self.agent, frozenset()),)).topics():
            if topic not in known:
                kafka.create_topics(topic, 2, {"max.message.bytes": str(limits[topic].max_message_bytes)})

    def processor(self, **settings: Any) -> Any:
        return super().processor(**{"ports": Ports(llm=self.model), **settings})

    async def rebuild(self, **options: Any) -> dict[str, Any]:
        """By whoever holds the processor's slot, or with ``slot=None`` by somebody else."""
        given = {name: options.pop(name) for name in ("slot", "rest") if name in options}
        rebuild = StateRebuild(
            self.binding,
            Options(**options),
            kafka=self.kafka.config,
            codec=CODEC,
            lock_folder=self.folder,
            **{"slot": 0, **given},
        )
        return await asyncio.to_thread(rebuild.run)

    def write(self, *records: tuple[bytes, bytes | None], partition: int) -> None:
        """Put records into the changelog, past everybody."""
        producer = Producer(self.kafka.config)
        for key, value in records:
            producer.produce(self.changelog, value, key, partition)
        assert producer.flush(20) == 0

    def lose_the_changelog(self) -> None:
        admin = self.kafka.admin
        admin.delete_topics([self.changelog])[self.changelog].result(20)
        deadline = time.monotonic() + 20
        while self.changelog in admin.list_topics(timeout=20).topics:
            assert time.monotonic() < deadline
            time.sleep(0.1)

    def inputs(self) -> list[tuple[Record, bytes | None]]:
        return [(record, record.key) for record in read_committed(self.kafka.config, self.topic)]

    async def process_one_more(self) -> None:
        """An event of its own shows that the processor works; what was sent before is done by then."""
        self.send("one more", number=1)
        async with self.running():
            await until(lambda: "one more" in self.results())

    def sums(self) -> dict[str, int]:
        """The highest answer to each task."""
        return {task: max(map(int, answers)) for task, answers in self.results().items()}


@pytest.fixture
def world(kafka: Any, tmp_path: Path) -> World:
    return World(kafka, tmp_path)


def rows(report: dict[str, Any]) -> list[tuple[int, int]]:
    return [(each["stored_rows"], each["rebuilt_rows"]) for each in report["compared"]]


async def work(world: World, *, tasks: int = 12) -> None:
    """Some tasks with state, four with a timer that runs, one whose timer was cancelled, one whose timer has fired."""
    for number in range(tasks):
        world.send(f"t{number}", number=number)
        world.send(f"t{number}", "alarm" if number < 5 else "add", number=1)
    world.send("t4", "calm", number=1)
    world.send("fired", "soon", number=1)
    async with world.running() as processor:
        await until(lambda: processor.stats.events_in >= 2 * tasks + 3)


async def test_what_is_decided_again_equals_what_lies_there(world: World) -> None:
    await work(world)
    report = await world.rebuild()
    assert report["equal"], report
    assert report["switched"]
    assert rows(report) == [(13, 13), (4, 4)]
    assert report["compared"][0]["stored_hash"] == report["compared"][0]["rebuilt_hash"]
    assert report["written"] == 0
    assert report["lost"] == []
    assert report["undecided"] == []
    assert report["differing_steps"] == 0
    # Not the holder of the slot: it waits until the one that stopped has been forgotten.
    assert (await world.rebuild(slot=None))["equal"]
    await world.process_one_more()


async def test_damage_is_named_and_mended(world: World) -> None:
    await work(world)
    partition = next(record.partition for record, _ in world.inputs() if record.key == b"t0")
    stranger = next(record.partition for record, _ in world.inputs() if record.key == b"t1")
    world.write((state_key("t0"), b'{"v":1,"now":1,"expires":null,"value":{"sum":99,"count":1}}'), partition=partition)
    world.write((timer_key("t0", "alarm"), None), (state_key("invented"), b"{}"), partition=partition)
    world.write((state_key("t1"), None), partition=stranger)
    report = await world.rebuild()
    assert not report["equal"]
    assert not report["switched"]
    states, timers = report["compared"]
    assert (states["missing"], states["surplus"], states["changed"]) == (1, 1, 1)
    assert (timers["missing"], timers["surplus"], timers["changed"]) == (1, 0, 0)
    said = [example["said"] for example in states["examples"]]
    assert any('"sum":99' in each and '"sum":1,' in each for each in said), said
    assert (await world.rebuild())["compared"] == report["compared"], "nothing was changed"
    report = await world.rebuild(accept=True)
    assert report["switched"]
    assert report["written"] == 4
    report = await world.rebuild()
    assert report["equal"]
    assert rows(report) == [(13, 13), (4, 4)]
    world.send("t0", number=5)
    await world.process_one_more()
    assert world.sums()["t0"] == 0 + 1 + 5


async def test_a_lost_changelog_is_made_again_with_work_in_flight(world: World) -> None:
    """One event runs with an effect journalled, one is parked, another waits behind it; more come meanwhile."""
    await work(world)
    world.send("stuck", "ask", number=1, question="stuck")
    world.send("busy", "ask", number=1, question="busy")
    async with world.running() as processor:
        await until(lambda: world.model.calls.get("stuck", 0) == 1 and processor.stats.journalled >= 1)
        await until(lambda: processor.stats.parked >= 1)
        world.send("busy", number=7)
        world.flush()
        await until(lambda: processor.stats.parked >= 2)
    before = dict(world.model.calls)
    world.lose_the_changelog()
    world.send("t1", number=50)
    world.flush()
    with pytest.raises(StateError, match="magnatronic rebuild state"):
        await world.processor().run()
    report = await world.rebuild()
    assert report["switched"]
    assert sum(each["states"] for each in report["lost"]) == 13
    assert sum(each["timers"] for each in report["lost"]) == 4
    assert sum(each["parked"] for each in report["lost"]) == 2
    assert sum(each["effects"] for each in report["lost"]) >= 2
    world.model.open = True
    world.send("t2", number=60)
    async with world.running():
        await until(lambda: len(world.results().get("busy", ())) == 2 and "stuck" in world.results())
        await until(lambda: world.sums()["t1"] == 52 and world.sums()["t2"] == 63)
    assert world.sums()["busy"] == 8
    assert world.results()["busy"] == ["1", "8"], "in the order of the lane"
    assert world.model.calls["one"] == before["one"], "a committed effect is not repeated"
    assert world.letters() == []
    report = await world.rebuild()
    assert report["equal"], report


async def test_ended_while_it_writes_nobody_starts_with_a_part(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    await work(world, tasks=30)
    world.lose_the_changelog()
    monkeypatch.setattr(custody, "_MOST_MESSAGES", 4)
    write = custody.Custody._commit
    written: list[int] = []

    def die(self: Any, place: Any, messages: Any) -> None:
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(len(messages))
        write(self, place, messages)

    with monkeypatch.context() as patched:
        patched.setattr(custody.Custody, "_commit", die)
        with pytest.raises(KeyboardInterrupt):
            await world.rebuild()
    with pytest.raises(StateError, match="magnatronic rebuild state"):
        await world.processor().run()
    report = await world.rebuild()
    assert report["switched"]
    report = await world.rebuild()
    assert report["equal"]
    assert rows(report) == [(31, 31), (4, 4)]
    world.send("t1", number=50)
    await world.process_one_more()
    assert world.sums()["t1"] == 52


async def test_a_running_agent_rests_for_it(world: World) -> None:
    for number in range(40):
        world.send(f"t{number % 10}", "alarm" if number < 4 else "add", number=1)
    world.flush()
    runner = Runner(
        [world.binding], codec=CODEC, kafka=world.kafka.config, ports=Ports(llm=world.model), slot=0, telemetry=False
    )
    loop, running = asyncio.get_running_loop(), asyncio.create_task(runner.run())
    stop = asyncio.Event()

    async def produce() -> None:
        while not stop.is_set():
            world.send(f"t{world.sent % 10}", number=1)
            await asyncio.to_thread(world.flush)
            await asyncio.sleep(0.01)

    @contextmanager
    def rest() -> Iterator[None]:
        resting = runner.resting(world.agent.name)
        asyncio.run_coroutine_threadsafe(resting.__aenter__(), loop).result(30)
        try:
            yield
        finally:
            asyncio.run_coroutine_threadsafe(resting.__aexit__(None, None, None), loop).result(30)

    producing = asyncio.create_task(produce())
    try:
        await until(lambda: runner.ready, running=running)
        for _ in range(2):
            report = await world.rebuild(rest=rest)
            assert report["equal"], report
            assert rows(report)[0] == (10, 10)
            assert report["rested_s"] < 20
        stop.set()
        await producing
        await until(lambda: sum(world.sums().values()) == world.sent, running=running)
    finally:
        stop.set()
        runner.stop()
        await running


async def test_while_processors_work_elsewhere_it_says_whom_to_stop(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(custody, "_LEAVE_S", 1.0)
    world.send("t0")
    async with world.running() as processor:
        await until(lambda: processor.stats.events_in >= 1)
        with pytest.raises(GroupBusyError, match=f"{world.agent.name}-0 on .*Stop them first"):
            await world.rebuild(slot=None)
        world.send("t0", number=2)
        world.flush()
        await until(lambda: processor.stats.events_in >= 2)


async def test_a_processor_that_starts_meanwhile_ends_it(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    await work(world)
    world.lose_the_changelog()
    commit = custody.Custody._commit
    started: list[asyncio.Task[None]] = []

    def rival(self: Any, place: Any, messages: Any) -> None:
        if not started:
            asyncio.run_coroutine_threadsafe(start(), loop).result(30)
            until_lost = time.monotonic() + 40
            while not (self._lost or self._error) and time.monotonic() < until_lost:
                time.sleep(0.05)
        commit(self, place, messages)

    loop = asyncio.get_running_loop()

    async def start() -> None:
        started.append(asyncio.create_task(world.processor(slot="rival").run()))

    monkeypatch.setattr(custody.Custody, "_commit", rival)
    with pytest.raises((GroupBusyError, ClusterError)):
        await world.rebuild()
    for each in started:
        with pytest.raises(StateError):
            await each
    monkeypatch.undo()
    assert (await world.rebuild(slot=None))["switched"]
    assert (await world.rebuild())["equal"]


async def test_what_the_log_has_lost_is_said(world: World) -> None:
    await work(world)
    partition = next(record.partition for record, _ in world.inputs())
    world.kafka.admin.delete_records([TopicPartition(world.topic, partition, 1)])
    deadline = time.monotonic() + 20
    while any(record.partition == partition and record.offset == 0 for record, _ in world.inputs()):
        assert time.monotonic() < deadline
    with pytest.raises(HistoryLostError, match=rf"{world.topic}\[{partition}\] begins at offset 1.*--from"):
        await world.rebuild()
