"""Concurrent handlers: whatever ends first, and wherever the process dies, replay goes the way that was gone.

Random programs of gathers, races, task groups, timeouts, shields and scopes run through the real step, against a world
that answers in an order and with failures of its own. What a program saw, in the order it saw it, is its output.
"""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agents.agent import Agent, Failure
from agents.context import Context
from agents.errors import EffectFailedError, HandlerCancelledError, NondeterminismError
from agents.journal import Journal
from agents.ports import LlmRequest, LlmResponse, Message, Ports, Purpose
from agents.step import StepResult, failure_of, run_failure, run_step
from agents.turns import begin, handlers_only
from schemas.events import Effect, PlanProposed, PlanRejected, Priority, TaskSubmitted, Waited
from schemas.metadata import Envelope, Metadata

AT_MS = 1_767_225_600_000
CAUSE = Metadata("cause-1", "/clients/test", "t1", datetime(2026, 1, 1, tzinfo=UTC), correlation_id="t1")
EVENT = Envelope(TaskSubmitted(task_id="t1", objective="x"), CAUSE)
Program = tuple[Any, ...]
Handler = Callable[[Context[Any]], Coroutine[Any, Any, None]]


@dataclass
class Seen:
    """What a program saw, in order."""

    context: Context[Any]
    trace: list[str] = field(default_factory=list)

    async def run(self, program: Program, ctx: Context[Any]) -> str:
        kind, *parts = program
        match kind:
            case "call":
                request = LlmRequest(purpose=Purpose.ANSWER, messages=(Message(role="user", content=parts[0]),))
                said = (await ctx.llm(request)).text
            case "seq":
                said = "".join([await self.run(part, ctx) for part in parts])
            case "gather":
                said = "".join(await asyncio.gather(*(self.run(part, ctx) for part in parts)))
            case "settled":
                results = await asyncio.gather(*(self.run(part, ctx) for part in parts), return_exceptions=True)
                said = "".join(
                    f"<{type(item).__name__}>" if isinstance(item, Exception) else str(item) for item in results
                )
            case "scopes":
                said = "".join(
                    await asyncio.gather(*(self.run(part, ctx.scope(str(i))) for i, part in enumerate(parts)))
                )
            case "race":
                said = await self.race([asyncio.create_task(self.run(part, ctx)) for part in parts])
            case "group":
                async with asyncio.TaskGroup() as group:
                    tasks = [group.create_task(self.run(part, ctx)) for part in parts]
                said = "".join(task.result() for task in tasks)
            case "completed":
                said = "".join(
                    [
                        await each
                        for each in asyncio.as_completed([asyncio.create_task(self.run(part, ctx)) for part in parts])
                    ]
                )
            case "timeout":
                try:
                    async with asyncio.timeout(parts[0]):
                        said = await self.run(parts[1], ctx)
                except TimeoutError:
                    said = "late"
            case "shield":
                said = await asyncio.shield(self.run(parts[0], ctx))
            case "sleep":
                await asyncio.sleep(parts[0])
                said = "slept"
            case "catch":
                try:
                    said = await self.run(parts[0], ctx)
                except (EffectFailedError, ExceptionGroup) as error:
                    said = f"({type(error).__name__})"
            case "leave":
                asyncio.create_task(self.run(parts[0], ctx))  # noqa: RUF006 - left behind on purpose
                await asyncio.sleep(0)
                said = "left"
            case _:
                raise AssertionError(kind)
        self.trace.append(f"{kind}:{said}:{ctx.new_id()[:4]}")
        return said

    @staticmethod
    async def race(tasks: list[asyncio.Task[str]]) -> str:
        done, waiting = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        failed = [type(task.exception()).__name__ for task in done if task.exception()]
        return "/".join([*sorted(failed), *sorted(task.result() for task in done if not task.exception())])


class Player(Agent[Any]):
    """Runs a program, or a handler given as a function."""

    name, version = "player", "1"
    consumes = (TaskSubmitted,)
    emits = (PlanProposed, PlanRejected)

    def __init__(self, program: Program | Handler) -> None:
        self.program = program

    async def handle(self, event: TaskSubmitted, ctx: Context[Any]) -> None:
        if callable(self.program):
            await self.program(ctx)
            return
        seen = Seen(ctx)
        said = await seen.run(self.program, ctx)
        say(ctx, said, *seen.trace)

    async def on_failure(self, event: TaskSubmitted, failure: Failure, ctx: Context[Any]) -> None:
        reason = f"{failure.error_type}: {failure.message}"
        ctx.emit(PlanRejected(task_id="t1", objective="x", reason=reason))


def say(ctx: Context[Any], *said: str) -> None:
    ctx.emit(PlanProposed(task_id="t1", objective="x", steps=(), rationale=" ".join(said)))


class World:
    """A language model that lets one call at a time end, by an order of its own, once all wait that can.

    An answer depends on the call's idempotency key alone; which end first depends on key and seed. ``fails`` in 16
    calls fail, by key, seed and how often the key was called.
    """

    name = "world"

    def __init__(self, seed: int, fails: int = 0) -> None:
        self.seed = seed
        self.fails = fails
        self.calls: list[str] = []
        self._waiting: dict[str, asyncio.Future[None]] = {}
        self._going: asyncio.Task[None] | None = None

    def _draw(self, *parts: Any) -> bytes:
        return sha256(repr((self.seed, *parts)).encode()).digest()

    async def complete(self, request: LlmRequest, *, idempotency_key: str) -> LlmResponse:
        self.calls.append(idempotency_key)
        ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[idempotency_key] = ended
        if self._going is None:
            self._going = asyncio.create_task(self._go())
        try:
            await ended
        finally:
            self._waiting.pop(idempotency_key, None)
        if self._draw("fails", idempotency_key, self.calls.count(idempotency_key))[0] % 16 < self.fails:
            raise EffectFailedError("Unlucky", f"call of {request.messages[0].content}", retryable=True)
        text = f"{request.messages[0].content}{sha256(idempotency_key.encode()).hexdigest()[:2]}"
        return LlmResponse(text=text, provider="world", model="m")

    async def _go(self) -> None:
        while self._waiting:
            for _ in range(4):
                await asyncio.sleep(0)
            ready = sorted(key for key, ended in self._waiting.items() if not ended.done())
            if ready:
                self._waiting[min(ready, key=lambda key: self._draw("order", key))].set_result(None)
        self._going = None


def journal(world: World | None = None, recorded: Sequence[Effect] = (), **options: Any) -> Journal:
    return Journal(
        agent="player",
        source="/agents/player@1",
        key="t1",
        cause=CAUSE,
        ports=Ports(llm=world),
        recorded=recorded,
        replaying=world is None,
        **options,
    )


async def play(program: Program | Handler, into: Journal, attempts: int = 1) -> StepResult:
    """The step as a processor runs it: some attempts, then ``on_failure``."""
    where: dict[str, Any] = {"timestamp_ms": AT_MS, "priority": Priority.NORMAL, "state": None, "journal": into}
    agent = Player(program)
    while True:
        try:
            return await run_step(agent, EVENT, **where)
        except NondeterminismError:
            raise
        except Exception as error:  # noqa: BLE001 - as in the processor
            failure = failure_of(error)
        attempts -= 1
        if attempts == 0 or not failure.retryable:
            return await run_failure(agent, EVENT, failure, **where)
        into.next_attempt()


def effects(of: Journal) -> list[Effect]:
    return [envelope.event for envelope in of.performed if isinstance(envelope.event, Effect)]


async def assert_replays(program: Program | Handler, recorded: Sequence[Effect], result: StepResult) -> None:
    again = journal(recorded=recorded)
    assert await play(program, again) == result
    assert again.performed == []
    assert again.unasked() == []


def programs(leaves: st.SearchStrategy[Program], *kinds: str) -> st.SearchStrategy[Program]:
    def combined(parts: st.SearchStrategy[Program]) -> st.SearchStrategy[Program]:
        several = st.lists(parts, min_size=1, max_size=4)
        made = [several.map(lambda items, kind=kind: (kind, *items)) for kind in kinds]  # type: ignore[misc]
        one = [parts.map(lambda part, kind=kind: (kind, part)) for kind in ("catch", "shield", "leave")]  # type: ignore[misc]
        return st.one_of(*made, *one)

    return st.recursive(leaves, combined, max_leaves=10)


KINDS = ("seq", "gather", "settled", "scopes", "race", "group", "completed")
CALLS: st.SearchStrategy[Program] = st.sampled_from("abc").map(lambda name: ("call", name))
SLEEPS: st.SearchStrategy[Program] = st.sampled_from((0.0, 0.0002, 0.001)).map(lambda delay: ("sleep", delay))
UNTIMED = programs(CALLS, *KINDS)
TIMED = st.recursive(
    programs(st.one_of(CALLS, SLEEPS), *KINDS),
    lambda parts: st.one_of(
        st.tuples(st.just("timeout"), st.sampled_from((0.0, 0.0002, 0.001)), parts),
        st.lists(parts, min_size=1, max_size=3).map(lambda items: ("gather", *items)),
    ),
    max_leaves=4,
)
SEEDS = st.integers(0, 2**16)


@settings(max_examples=150, deadline=None)
@given(TIMED, SEEDS, st.sampled_from((0, 0, 3)))
def test_whatever_ends_first_replay_ends_alike(program: Program, seed: int, fails: int) -> None:
    async def check() -> None:
        live = journal(World(seed, fails))
        result = await play(program, live, attempts=3)
        assert [effect.sequence for effect in effects(live)] == list(range(len(live.performed)))
        await assert_replays(program, effects(live), result)

    asyncio.run(check())


@settings(max_examples=80, deadline=None)
@given(UNTIMED, SEEDS)
def test_after_a_crash_anywhere_all_ends_as_without_it(program: Program, seed: int) -> None:
    async def check() -> None:
        whole = journal(World(seed))
        result = await play(program, whole)
        made = effects(whole)
        for journalled in range(len(made) + 1):
            world, before = World(seed), made[:journalled]
            second = journal(world, before)
            assert await play(program, second) == result
            answered = {effect_key(effect) for effect in before if not effect.error}
            assert answered.isdisjoint(world.calls)
            assert len(set(world.calls)) == len(world.calls)
            ids = [envelope.metadata.id for envelope in (*whole.performed[:journalled], *second.performed)]
            assert len(set(ids)) == len(ids)
            await assert_replays(program, [*before, *effects(second)], result)

    asyncio.run(check())


@settings(max_examples=80, deadline=None)
@given(TIMED, SEEDS, st.lists(st.integers(0, 12), min_size=1, max_size=3))
def test_after_crashes_failures_and_timeouts_replay_goes_the_last_way(
    program: Program, seed: int, lives: list[int]
) -> None:
    async def check() -> None:
        recorded: list[Effect] = []
        for life, journalled in enumerate(lives):
            world = World(seed + life, fails=3)
            answered = {effect_key(effect) for effect in recorded if not effect.error}
            into = journal(world, recorded)
            await play(program, into, attempts=2)
            assert answered.isdisjoint(world.calls)
            recorded = [*recorded, *effects(into)[:journalled]]
        last = journal(World(seed, fails=2), recorded)
        result = await play(program, last, attempts=2)
        await assert_replays(program, [*recorded, *effects(last)], result)

    asyncio.run(check())


def effect_key(effect: Effect) -> str:
    """The idempotency key that the call went out with."""
    from schemas.metadata import deterministic_id

    kind = type(effect).__name__
    return deterministic_id("cause-1", "player", kind, effect.scope, effect.request_hash, effect.occurrence)


def ask(ctx: Context[Any], name: str) -> Coroutine[Any, Any, LlmResponse]:
    return ctx.llm(LlmRequest(purpose=Purpose.ANSWER, messages=(Message(role="user", content=name),)))


class Slow:
    """A language model that never answers, and tells how many wait for it."""

    name = "slow"

    def __init__(self) -> None:
        self.waiting = 0

    async def complete(self, request: LlmRequest, *, idempotency_key: str) -> LlmResponse:
        if request.messages[0].content == "quick":
            return LlmResponse(text="quick", provider="slow", model="m")
        self.waiting += 1
        try:
            await asyncio.sleep(3600)
        finally:
            self.waiting -= 1
        raise AssertionError


async def test_a_timeout_ends_its_call_is_recorded_and_replays_without_waiting() -> None:
    async def handler(ctx: Context[Any]) -> None:
        try:
            async with asyncio.timeout(0.05):
                await ask(ctx, "slow")
        except TimeoutError:
            say(ctx, "too slow", (await ask(ctx, "quick")).text)

    slow = Slow()
    live = journal(slow)  # type: ignore[arg-type]
    result = await play(handler, live)
    await asyncio.sleep(0)
    assert slow.waiting == 0
    waited, cancelled, quick = effects(live)
    assert isinstance(waited, Waited)
    assert waited.seconds == 0.05
    assert "CallCancelled" in cancelled.error
    assert not quick.error
    started = asyncio.get_running_loop().time()
    await assert_replays(handler, effects(live), result)
    assert asyncio.get_running_loop().time() - started < 0.04


async def test_a_timeout_that_was_not_needed_leaves_nothing() -> None:
    async def handler(ctx: Context[Any]) -> None:
        async with asyncio.timeout(60):
            say(ctx, (await ask(ctx, "quick")).text)

    live = journal(Slow())  # type: ignore[arg-type]
    result = await play(handler, live)
    assert [type(effect).__name__ for effect in effects(live)] == ["LlmCalled"]
    await assert_replays(handler, effects(live), result)


async def test_waiting_alone_takes_its_time_and_is_no_effect() -> None:
    async def handler(ctx: Context[Any]) -> None:
        first, second = asyncio.get_running_loop().time(), 0.0
        await asyncio.gather(asyncio.sleep(0.03), asyncio.sleep(0.01))
        second = asyncio.get_running_loop().time()
        say(ctx, f"{second - first:g}")

    started = asyncio.get_running_loop().time()
    live = journal(World(0))
    result = await play(handler, live)
    assert asyncio.get_running_loop().time() - started >= 0.03
    assert live.performed == []
    assert isinstance(result.outputs[0].event, PlanProposed)
    assert result.outputs[0].event.rationale == "0.03"
    await assert_replays(handler, [], result)


async def test_a_timeout_is_not_reused_by_a_later_attempt() -> None:
    calls: list[str] = []

    class Once(Slow):
        async def complete(self, request: LlmRequest, *, idempotency_key: str) -> LlmResponse:
            calls.append(idempotency_key)
            if len(calls) > 1:
                return LlmResponse(text="in time", provider="slow", model="m")
            return await super().complete(request, idempotency_key=idempotency_key)

    async def handler(ctx: Context[Any]) -> None:
        try:
            async with asyncio.timeout(0.02):
                say(ctx, (await ask(ctx, "x")).text)
        except TimeoutError:
            raise EffectFailedError("Late", "too late", retryable=True) from None

    live = journal(Once())  # type: ignore[arg-type]
    result = await play(handler, live, attempts=2)
    assert isinstance(result.outputs[0].event, PlanProposed)
    assert calls[0] == calls[1]
    await assert_replays(handler, effects(live), result)


async def test_after_a_crash_an_attempt_that_decides_otherwise_than_a_timeout_did_leaves_a_mark() -> None:
    class Third(Slow):
        async def complete(self, request: LlmRequest, *, idempotency_key: str) -> LlmResponse:
            await asyncio.sleep(0.04)
            return LlmResponse(text="came", provider="slow", model="m")

    async def handler(ctx: Context[Any]) -> None:
        task = asyncio.create_task(ask(ctx, "x"))
        await asyncio.wait([task], timeout=0.01)
        was_late = not task.done()
        say(ctx, str(was_late), (await task).text)

    first = journal(Third())  # type: ignore[arg-type]
    late = await play(handler, first)
    await assert_replays(handler, effects(first), late)
    second = journal(Third(), effects(first))  # type: ignore[arg-type]
    result = await play(handler, second)
    assert result != late
    await assert_replays(handler, [*effects(first), *effects(second)], result)


@pytest.mark.parametrize("calls", [1, 2])
async def test_a_port_that_cancels_itself_is_a_failed_call(calls: int) -> None:
    class Cancels:
        name = "cancels"

        async def complete(self, request: LlmRequest, *, idempotency_key: str) -> LlmResponse:
            raise asyncio.CancelledError

    async def handler(ctx: Context[Any]) -> None:
        results = await asyncio.gather(*(ask(ctx, str(number)) for number in range(calls)), return_exceptions=True)
        say(ctx, *(str(item) for item in results))

    live = journal(Cancels())  # type: ignore[arg-type]
    result = await play(handler, live)
    assert isinstance(result.outputs[0].event, PlanProposed)
    assert result.outputs[0].event.rationale.count("the port cancelled the call itself") == calls
    await assert_replays(handler, effects(live), result)


@pytest.mark.parametrize("calls", [1, 2])
@pytest.mark.parametrize("refusal", [asyncio.CancelledError, OSError])
async def test_a_call_that_is_not_permitted_ends_the_run(calls: int, refusal: type[BaseException]) -> None:
    async def permitted() -> None:
        raise refusal

    async def handler(ctx: Context[Any]) -> None:
        await asyncio.gather(*(ask(ctx, str(number)) for number in range(calls)), return_exceptions=True)
        say(ctx, "went on")

    world = World(0)
    live = journal(world, permitted=permitted)
    where: dict[str, Any] = {"timestamp_ms": AT_MS, "priority": Priority.NORMAL, "state": None, "journal": live}
    with pytest.raises(refusal):
        await run_step(Player(handler), EVENT, **where)
    assert (live.performed, world.calls) == ([], [])


async def test_what_is_left_behind_is_cancelled_when_the_handler_is_done() -> None:
    async def handler(ctx: Context[Any]) -> None:
        task = asyncio.create_task(ask(ctx, "slow"))
        await asyncio.sleep(0)
        say(ctx, str(task.done()))

    slow = Slow()
    live = journal(slow)  # type: ignore[arg-type]
    result = await play(handler, live)
    await asyncio.sleep(0)
    assert slow.waiting == 0
    assert ["CallCancelled" in effect.error for effect in effects(live)] == [True]
    await assert_replays(handler, effects(live), result)


async def test_an_attempt_out_of_time_fails_all_that_it_waits_for() -> None:
    async def handler(ctx: Context[Any]) -> None:
        results = await asyncio.gather(ask(ctx, "a"), ask(ctx.scope("s"), "b"), return_exceptions=True)
        say(ctx, *(str(item) for item in results))

    live = journal(Slow(), timeout_s=0.02)  # type: ignore[arg-type]
    result = await play(handler, live)
    assert isinstance(result.outputs[0].event, PlanProposed)
    assert result.outputs[0].event.rationale.count("HandlerTimeout") == 2
    await assert_replays(handler, effects(live), result)


async def test_a_handler_that_cancels_itself_fails() -> None:
    async def handler(ctx: Context[Any]) -> None:
        task = asyncio.create_task(asyncio.sleep(3600))
        task.cancel()
        await task

    with pytest.raises(HandlerCancelledError, match="catch it"):
        await run_step(
            Player(handler), EVENT, timestamp_ms=AT_MS, priority=Priority.NORMAL, state=None, journal=journal(World(0))
        )


async def test_threads_are_refused_and_the_network_is_not_there() -> None:
    async def threads(ctx: Context[Any]) -> None:
        await asyncio.to_thread(print)

    async def network(ctx: Context[Any]) -> None:
        await asyncio.open_connection("127.0.0.1", 9)

    for handler, error, said in ((threads, NondeterminismError, "threads"), (network, AttributeError, "only through")):
        with pytest.raises(error, match=said):
            await run_step(
                Player(handler),
                EVENT,
                timestamp_ms=AT_MS,
                priority=Priority.NORMAL,
                state=None,
                journal=journal(World(0)),
            )


async def test_coroutines_are_refused_where_asyncio_would_start_them_in_no_certain_order() -> None:
    async def handler(ctx: Context[Any]) -> None:
        asked = [ask(ctx, "a"), ask(ctx, "b")]
        try:
            for each in asyncio.as_completed(asked):
                await each
        finally:
            for coroutine in asked:
                coroutine.close()

    with pytest.raises(NondeterminismError, match="give it tasks"):
        await play(handler, journal(World(0)))


async def test_an_endless_handler_lets_others_run_and_can_be_cancelled() -> None:
    async def handler(ctx: Context[Any]) -> None:
        while True:  # noqa: ASYNC110 - the point
            await asyncio.sleep(0)

    running = asyncio.create_task(play(handler, journal(World(0))))
    await asyncio.sleep(0.02)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running


async def test_a_handler_that_clings_to_life_is_ended() -> None:
    caught: list[int] = []

    async def handler(ctx: Context[Any]) -> None:
        while True:
            try:
                await ask(ctx, "slow")
            except asyncio.CancelledError:
                caught.append(1)

    running = asyncio.create_task(play(handler, journal(Slow())))  # type: ignore[arg-type]
    await asyncio.sleep(0.01)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert caught


async def test_what_wakes_a_handler_from_outside_is_not_lost() -> None:
    gate = asyncio.Event()

    async def handler(ctx: Context[Any]) -> None:
        await gate.wait()
        say(ctx, "woken")

    running = [asyncio.create_task(play(handler, journal(World(seed)))) for seed in range(3)]
    await asyncio.sleep(0.01)
    gate.set()
    results = await asyncio.gather(*running)
    assert all(result.outputs for result in results)


async def test_replay_of_a_handler_that_waits_for_nothing_recorded_says_so() -> None:
    async def handler(ctx: Context[Any]) -> None:
        await asyncio.Event().wait()

    with pytest.raises(NondeterminismError, match="waits for something that is no effect"):
        await play(handler, journal())


async def test_handlers_that_are_begun_one_after_another_see_only_their_own_loop() -> None:
    real, order = asyncio.get_running_loop(), list[str]()

    async def quick(name: str) -> None:
        assert asyncio.get_running_loop() is not real
        order.append(name)

    async def waiting(name: str) -> None:
        order.append(f"{name} begins")
        await asyncio.create_task(quick(f"{name}'s task"))
        order.append(f"{name} ends")

    async def failing() -> None:
        raise KeyError("defect")

    with handlers_only():
        assert begin(journal(World(1)), quick("first")) is None
        turns = begin(journal(World(1)), waiting("second"))
        with pytest.raises(KeyError):
            begin(journal(World(1)), failing())
        assert begin(journal(World(1)), quick("third")) is None
    assert asyncio.get_running_loop() is real
    assert order == ["first", "second begins", "third"]
    assert turns is not None
    await turns.finish()
    assert order[3:] == ["second's task", "second ends"]
    assert begin(journal(World(1)), quick("fourth")) is None
    assert asyncio.get_running_loop() is real
