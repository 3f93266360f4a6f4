"""The effect journal: what is performed once, what is reused, what is in doubt, and what replay refuses."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest

from agents import effects as outside
from agents.errors import EffectFailedError, MissingPortError, NondeterminismError
from agents.journal import Journal
from agents.ports import (
    InDoubt,
    LlmRequest,
    LlmResponse,
    Message,
    Ports,
    Purpose,
    ToolInfo,
    Vectors,
)
from agents.turns import begin
from schemas.events import DirectoryEntry, Effect, Health, LlmCalled, Queried, TextsEmbedded, ToolCalled, ToolStarted
from schemas.metadata import Envelope, Metadata

CAUSE = Metadata("cause-1", "/clients/test", "t1", datetime(2026, 1, 1, tzinfo=UTC), correlation_id="t1")


class ScriptedModel:
    """Answers with its call count; fails as often as told, or waits."""

    name = "scripted"

    def __init__(self, *, fail_first: int = 0, delay_s: float = 0.0) -> None:
        self.calls = 0
        self.fail_first = fail_first
        self.delay_s = delay_s
        self.keys: list[str] = []

    async def complete(self, request: LlmRequest, *, idempotency_key: str) -> LlmResponse:
        self.calls += 1
        self.keys.append(idempotency_key)
        call = self.calls
        await asyncio.sleep(self.delay_s)
        if call <= self.fail_first:
            raise EffectFailedError("RateLimitError", "slow down", retryable=True)
        text = f"{request.messages[-1].content} #{call}"
        return LlmResponse(text=text, provider="scripted", model="m", prompt_tokens=3, cost_usd=0.5)


class CountingEmbedding:
    """Embeds a text as its length."""

    model, version, dimensions = "lengths", "1", 2

    async def embed(self, texts: Sequence[str]) -> Vectors:
        return np.array([[len(text), 1] for text in texts], dtype=np.float32)


def ask(question: str) -> LlmRequest:
    return LlmRequest(purpose=Purpose.ANSWER, messages=(Message(role="user", content=question),))


class Shelf:
    """Tools: ``read`` has no side effects, the others have, and are in doubt as their names say."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str, str]] = []
        self.failures: list[Exception] = []
        self.delay_s = 0.0

    def describe(self, name: str) -> ToolInfo:
        if name == "read":
            return ToolInfo(name, side_effects=False)
        try:
            return ToolInfo(name, side_effects=True, in_doubt=InDoubt(name))
        except ValueError:
            raise EffectFailedError("UnknownTool", f"there is no tool {name}", retryable=False) from None

    async def call(self, name: str, arguments: str, *, idempotency_key: str) -> str:
        self.calls.append((name, arguments, idempotency_key))
        await asyncio.sleep(self.delay_s)
        if self.failures:
            raise self.failures.pop(0)
        return f'{{"call":{len(self.calls)}}}'


def journal(ports: Ports | None = None, recorded: Sequence[Effect] = (), **options: Any) -> Journal:
    return Journal(
        agent="tester",
        source="/agents/tester@1",
        key="t1",
        cause=CAUSE,
        ports=ports or Ports(),
        recorded=recorded,
        **options,
    )


async def run(into: Journal, *asks: Callable[[], Awaitable[Any]]) -> list[Any]:
    """What a handler gets that makes ``asks`` one after another."""
    answers: list[Any] = []

    async def handler() -> None:
        for one in asks:
            answers.append(await one())  # noqa: PERF401 - one after another

    if (turns := begin(into, handler())) is not None:
        await turns.finish()
    return answers


def llm(into: Journal, question: str, scope: str = "") -> Callable[[], Awaitable[LlmResponse]]:
    return lambda: outside.llm(into, scope, ask(question))


def tool(into: Journal, name: str) -> Callable[[], Awaitable[Any]]:
    return lambda: outside.tool(into, "", name, {"b": 1, "a": [2]})


def effects(performed: Sequence[Envelope]) -> list[Effect]:
    return [envelope.event for envelope in performed if isinstance(envelope.event, Effect)]


async def test_a_call_is_recorded_with_request_response_tokens_and_cost() -> None:
    live = journal(Ports(llm=ScriptedModel()))
    (response,) = await run(live, llm(live, "why"))
    (effect,) = effects(live.performed)
    assert isinstance(effect, LlmCalled)
    assert response.text == "why #1"
    assert LlmResponse.model_validate_json(effect.response) == response
    assert LlmRequest.model_validate_json(effect.request) == ask("why")
    assert (effect.prompt_tokens, effect.cost_usd, effect.error, effect.attempt) == (3, 0.5, "", 1)
    assert live.performed[0].metadata.causation_id == "cause-1"


async def test_replay_gives_what_was_recorded_and_performs_nothing() -> None:
    live = journal(Ports(llm=ScriptedModel()))
    answers = await run(live, llm(live, "a"), llm(live, "a"))
    again = journal(recorded=effects(live.performed), replaying=True)
    assert await run(again, llm(again, "a"), llm(again, "a")) == answers
    assert [answer.text for answer in answers] == ["a #1", "a #2"]
    assert again.performed == []
    assert again.unasked() == []


async def test_replay_refuses_a_call_that_was_not_recorded_and_names_it() -> None:
    live = journal(Ports(llm=ScriptedModel()))
    await run(live, llm(live, "a"))
    again = journal(recorded=effects(live.performed), replaying=True)
    with pytest.raises(NondeterminismError, match=r"tester, event cause-1: asks for LlmCalled .*not recorded.*another"):
        await run(again, llm(again, "another"))
    assert len(again.unasked()) == 1


async def test_a_handler_that_catches_everything_does_not_hide_that_a_call_was_not_recorded() -> None:
    again = journal(replaying=True)

    async def handler() -> None:
        try:
            await outside.llm(again, "", ask("x"))
        except BaseException:  # noqa: BLE001 - the point
            return

    turns = begin(again, handler())
    assert turns is not None
    with pytest.raises(NondeterminismError):
        await turns.finish()


async def test_a_later_attempt_reuses_answers_but_not_errors() -> None:
    model = ScriptedModel(fail_first=1)
    live = journal(Ports(llm=model, embedding=CountingEmbedding()))
    embed = lambda: outside.embed(live, "", ("abc",))  # noqa: E731
    with pytest.raises(EffectFailedError, match="RateLimitError: slow down") as failure:
        await run(live, embed, llm(live, "x"))
    assert failure.value.retryable
    live.next_attempt()
    _, answer = await run(live, embed, llm(live, "x"))
    assert answer.text == "x #2"
    kinds = [(type(effect), bool(effect.error), effect.sequence, effect.attempt) for effect in effects(live.performed)]
    assert kinds == [(TextsEmbedded, False, 0, 1), (LlmCalled, True, 1, 1), (LlmCalled, False, 2, 2)]
    assert len({envelope.metadata.id for envelope in live.performed}) == 3
    assert model.keys[0] == model.keys[1]


async def test_after_a_crash_answers_are_reused_errors_are_not_and_the_sequence_goes_on() -> None:
    model = ScriptedModel(fail_first=1)
    first = journal(Ports(llm=model))
    with pytest.raises(EffectFailedError):
        await run(first, llm(first, "x"))
    first.next_attempt()
    await run(first, llm(first, "x"), llm(first, "y"))
    made = effects(first.performed)

    told: list[int] = []
    second: Journal = journal(Ports(llm=model), made[:2], on_performed=lambda: told.append(len(second.performed)))
    x, y, z = await run(second, llm(second, "x"), llm(second, "y"), llm(second, "z"))
    assert [answer.text for answer in (x, y, z)] == ["x #2", "y #4", "z #5"]
    assert [(effect.sequence, effect.attempt) for effect in effects(second.performed)] == [(2, 3), (3, 3)]
    assert told == [1, 2]
    assert model.keys[2] == model.keys[3], "a call whose result was lost goes out under the same key"
    assert len(set(model.keys)) == 3


async def test_what_the_journal_was_given_unordered_counts_in_order() -> None:
    first = journal(Ports(llm=ScriptedModel(fail_first=1)))
    with pytest.raises(EffectFailedError):
        await run(first, llm(first, "x"))
    first.next_attempt()
    await run(first, llm(first, "x"))
    again = journal(recorded=[*reversed(effects(first.performed))], replaying=True)
    (answer,) = await run(again, llm(again, "x"))
    assert answer.text == "x #2"


async def test_replay_raises_the_recorded_error() -> None:
    live = journal(Ports(llm=ScriptedModel(fail_first=1)))
    with pytest.raises(EffectFailedError) as before:
        await run(live, llm(live, "x"))
    again = journal(recorded=effects(live.performed), replaying=True)
    with pytest.raises(EffectFailedError) as after:
        await run(again, llm(again, "x"))
    assert str(after.value) == str(before.value)
    assert after.value.retryable == before.value.retryable


async def test_replay_does_not_miss_what_only_an_earlier_attempt_asked() -> None:
    model = ScriptedModel(fail_first=1)
    live = journal(Ports(llm=model))

    async def handler(into: Journal) -> None:
        try:
            await outside.llm(into, "", ask("x"))
        except EffectFailedError:
            await outside.llm(into, "", ask("instead"))
            raise

    with pytest.raises(EffectFailedError):
        await run(live, lambda: handler(live))
    live.next_attempt()
    await run(live, lambda: handler(live))
    again = journal(recorded=effects(live.performed), replaying=True)
    await run(again, lambda: handler(again))
    assert again.unasked() == []


async def test_an_attempt_past_its_time_fails_as_recorded() -> None:
    live = journal(Ports(llm=ScriptedModel(delay_s=30)), timeout_s=0.02)
    with pytest.raises(EffectFailedError, match="HandlerTimeout"):
        await run(live, llm(live, "x"))
    again = journal(recorded=effects(live.performed), replaying=True)
    with pytest.raises(EffectFailedError, match="HandlerTimeout"):
        await run(again, llm(again, "x"))


async def test_vectors_come_back_bit_for_bit() -> None:
    live = journal(Ports(embedding=CountingEmbedding()))
    (vectors,) = await run(live, lambda: outside.embed(live, "", ("one", "three")))
    again = journal(recorded=effects(live.performed), replaying=True)
    assert vectors.shape == (2, 2)
    (replayed,) = await run(again, lambda: outside.embed(again, "", ("one", "three")))
    assert np.array_equal(replayed, vectors)


async def test_a_missing_port_says_so_and_records_nothing() -> None:
    bare = journal()
    with pytest.raises(MissingPortError, match="tester needs a language model"):
        await run(bare, llm(bare, "x"))
    with pytest.raises(MissingPortError, match="tester needs tools"):
        await run(bare, tool(bare, "read"))
    with pytest.raises(MissingPortError, match="tester needs an agent directory"):
        await run(bare, lambda: outside.directory(bare, "", "research"))
    assert bare.performed == []


async def test_outside_a_handler_nothing_can_be_asked() -> None:
    live = journal(Ports(llm=ScriptedModel()))
    with pytest.raises(RuntimeError, match="while no handler of it runs"):
        await outside.llm(live, "", ask("x"))


async def test_the_directory_answers_as_recorded() -> None:
    entry = DirectoryEntry(agent="r", instance="i", version="1", capabilities=("research",), health=Health.READY)

    class Book:
        async def lookup(self, capability: str) -> tuple[DirectoryEntry, ...]:
            return (entry,) if capability == "research" else ()

    live = journal(Ports(directory=Book()))

    def look(into: Journal, what: str) -> Callable[[], Awaitable[Any]]:
        return lambda: outside.directory(into, "", what)

    assert await run(live, look(live, "research"), look(live, "cook")) == [(entry,), ()]
    assert all(isinstance(effect, Queried) and effect.target == "directory" for effect in effects(live.performed))
    again = journal(recorded=effects(live.performed), replaying=True)
    assert await run(again, look(again, "research"), look(again, "cook")) == [(entry,), ()]


async def test_a_tool_without_side_effects_is_one_effect() -> None:
    shelf = Shelf()
    live = journal(Ports(tools=shelf))
    (result,) = await run(live, tool(live, "read"))
    assert result.value == {"call": 1}
    (effect,) = effects(live.performed)
    assert isinstance(effect, ToolCalled)
    assert not effect.side_effects
    assert shelf.calls[0][1] == '{"a":[2],"b":1}'


async def test_a_tool_with_side_effects_starts_only_when_that_is_committed() -> None:
    shelf, committed = Shelf(), asyncio.Event()

    async def durable() -> None:
        await committed.wait()

    live = journal(Ports(tools=shelf), durable=durable)
    running = asyncio.create_task(run(live, tool(live, "fail")))
    await asyncio.sleep(0.01)
    (started,) = effects(live.performed)
    assert isinstance(started, ToolStarted)
    assert (started.tool, shelf.calls) == ("fail", [])
    committed.set()
    await running
    made = effects(live.performed)
    assert [type(effect) for effect in made] == [ToolStarted, ToolCalled]
    assert (made[1].request_hash, made[1].occurrence) == (started.request_hash, started.occurrence)
    again = journal(recorded=made, replaying=True)
    assert (await run(again, tool(again, "fail")))[0].value == {"call": 1}
    assert again.unasked() == []


async def start_and_crash(name: str) -> list[Effect]:
    live = journal(Ports(tools=Shelf()))
    await run(live, tool(live, name))
    return effects(live.performed)[:1]


async def test_a_tool_in_doubt_is_called_again_under_its_key_if_it_says_so() -> None:
    shelf = Shelf()
    first = journal(Ports(tools=shelf))
    await run(first, tool(first, "retry"))
    second = journal(Ports(tools=shelf), effects(first.performed)[:1])
    await run(second, tool(second, "retry"))
    assert len(shelf.calls) == 2
    assert shelf.calls[0][2] == shelf.calls[1][2]
    finished = journal(Ports(tools=shelf), effects(first.performed))
    await run(finished, tool(finished, "retry"))
    assert len(shelf.calls) == 2


@pytest.mark.parametrize(("name", "error_type"), [("fail", "ToolInDoubt"), ("ask", "ToolNeedsApproval")])
async def test_a_tool_in_doubt_fails_or_asks_and_goes_on_doing_so(name: str, error_type: str) -> None:
    shelf, recorded = Shelf(), await start_and_crash(name)
    second = journal(Ports(tools=shelf), recorded)
    for _ in range(2):
        with pytest.raises(EffectFailedError) as failure:
            await run(second, tool(second, name))
        assert (failure.value.error_type, failure.value.retryable) == (error_type, False)
        second.next_attempt()
    assert shelf.calls == []
    (told, _) = effects(second.performed)
    assert isinstance(told, ToolCalled)
    again = journal(recorded=[*recorded, *effects(second.performed)], replaying=True)
    with pytest.raises(EffectFailedError, match=error_type):
        await run(again, tool(again, name))
    third = journal(Ports(tools=shelf), [*recorded, *effects(second.performed)])
    with pytest.raises(EffectFailedError, match=error_type):
        await run(third, tool(third, name))


async def test_a_tool_that_said_that_it_failed_is_in_no_doubt() -> None:
    shelf = Shelf()
    shelf.failures = [EffectFailedError("Busy", "later", retryable=True)]
    live = journal(Ports(tools=shelf))
    with pytest.raises(EffectFailedError, match="Busy"):
        await run(live, tool(live, "fail"))
    live.next_attempt()
    assert (await run(live, tool(live, "fail")))[0].value == {"call": 2}


async def test_a_tool_that_ran_out_of_time_is_in_doubt() -> None:
    shelf = Shelf()
    shelf.delay_s = 30
    live = journal(Ports(tools=shelf), timeout_s=0.02)
    with pytest.raises(EffectFailedError, match="HandlerTimeout"):
        await run(live, tool(live, "fail"))
    live.next_attempt()
    with pytest.raises(EffectFailedError, match="ToolInDoubt"):
        await run(live, tool(live, "fail"))


async def test_an_unknown_tool_is_a_recorded_failure() -> None:
    live = journal(Ports(tools=Shelf()))
    with pytest.raises(EffectFailedError, match="there is no tool hammer"):
        await run(live, tool(live, "hammer"))
    again = journal(recorded=effects(live.performed), replaying=True)
    with pytest.raises(EffectFailedError, match="there is no tool hammer"):
        await run(again, tool(again, "hammer"))


async def test_a_cancelled_attempt_records_nothing_and_ends_its_calls() -> None:
    ended: list[str] = []

    class Slow(ScriptedModel):
        async def complete(self, request: LlmRequest, *, idempotency_key: str) -> LlmResponse:
            try:
                return await super().complete(request, idempotency_key=idempotency_key)
            finally:
                ended.append(request.messages[0].content)

    live = journal(Ports(llm=Slow(delay_s=30)))

    async def handler() -> None:
        await asyncio.gather(*(outside.llm(live, "", ask(name)) for name in "ab"))

    running = asyncio.create_task(run(live, handler))
    await asyncio.sleep(0.01)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    await asyncio.sleep(0)
    assert sorted(ended) == ["a", "b"]
    assert live.performed == []
