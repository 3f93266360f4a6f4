"""The effect journal: what is performed once, what is reused, and what replay refuses."""

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime

import numpy as np
import pytest

from agents.context import LlmRequest, LlmResponse, Message, Ports, Purpose, Vectors
from agents.errors import EffectFailedError, MissingPortError, NondeterminismError
from agents.journal import Journal
from schemas.events import Effect, LlmCalled, TextsEmbedded
from schemas.metadata import Envelope, Metadata

CAUSE = Metadata("cause-1", "/clients/test", "t1", datetime(2026, 1, 1, tzinfo=UTC), correlation_id="t1")


class ScriptedModel:
    """Answers with its call count; fails as often as told, or waits."""

    name = "scripted"

    def __init__(self, *, fail_first: int = 0, delay_s: float = 0.0) -> None:
        self.calls = 0
        self.fail_first = fail_first
        self.delay_s = delay_s

    async def complete(self, request: LlmRequest) -> LlmResponse:
        self.calls += 1
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


def journal(
    ports: Ports | None = None,
    recorded: Sequence[Effect] = (),
    *,
    replaying: bool = False,
    timeout_s: float | None = None,
) -> Journal:
    return Journal(
        agent="tester",
        source="/agents/tester@1",
        key="t1",
        cause=CAUSE,
        ports=ports or Ports(),
        recorded=recorded,
        replaying=replaying,
        timeout_s=timeout_s,
    )


def effects(performed: Sequence[Envelope]) -> list[Effect]:
    return [envelope.event for envelope in performed if isinstance(envelope.event, Effect)]


async def test_a_call_is_recorded_with_request_response_tokens_and_cost() -> None:
    live = journal(Ports(llm=ScriptedModel()))
    response = await live.llm("", ask("why"))
    (effect,) = effects(live.performed)
    assert isinstance(effect, LlmCalled)
    assert response.text == "why #1"
    assert LlmResponse.model_validate_json(effect.response) == response
    assert LlmRequest.model_validate_json(effect.request) == ask("why")
    assert (effect.prompt_tokens, effect.cost_usd, effect.error) == (3, 0.5, "")
    assert live.performed[0].metadata.causation_id == "cause-1"


async def test_replay_gives_what_was_recorded_and_performs_nothing() -> None:
    live = journal(Ports(llm=ScriptedModel()))
    answers = [(await live.llm("", ask("a"))).text, (await live.llm("", ask("a"))).text]
    again = journal(recorded=effects(live.performed), replaying=True)
    assert [(await again.llm("", ask("a"))).text, (await again.llm("", ask("a"))).text] == answers == ["a #1", "a #2"]
    assert again.performed == []
    assert again.unasked() == []


async def test_replay_refuses_a_call_that_was_not_recorded_and_names_it() -> None:
    live = journal(Ports(llm=ScriptedModel()))
    await live.llm("", ask("a"))
    again = journal(recorded=effects(live.performed), replaying=True)
    with pytest.raises(NondeterminismError, match=r"tester, event cause-1: asks for LlmCalled .*not recorded.*another"):
        await again.llm("", ask("another"))
    assert len(again.unasked()) == 1


async def test_concurrent_equal_requests_keep_their_identity_by_scope() -> None:
    model = ScriptedModel()
    live = journal(Ports(llm=model))
    first, second = await asyncio.gather(live.llm("/left", ask("q")), live.llm("/right", ask("q")))
    again = journal(recorded=effects(live.performed), replaying=True)
    swapped = await asyncio.gather(again.llm("/right", ask("q")), again.llm("/left", ask("q")))
    assert [response.text for response in swapped] == [second.text, first.text]
    assert first.text != second.text


async def test_a_later_attempt_reuses_answers_but_not_errors() -> None:
    model = ScriptedModel(fail_first=1)
    live = journal(Ports(llm=model, embedding=CountingEmbedding()))
    await live.embed("", ("abc",))
    with pytest.raises(EffectFailedError, match="RateLimitError: slow down") as failure:
        await live.llm("", ask("x"))
    assert failure.value.retryable
    live.next_attempt()
    await live.embed("", ("abc",))
    assert (await live.llm("", ask("x"))).text == "x #2"
    kinds = [(type(effect), bool(effect.error), effect.sequence) for effect in effects(live.performed)]
    assert kinds == [(TextsEmbedded, False, 0), (LlmCalled, True, 1), (LlmCalled, False, 2)]
    assert len({envelope.metadata.id for envelope in live.performed}) == 3


async def test_replay_raises_the_recorded_error() -> None:
    live = journal(Ports(llm=ScriptedModel(fail_first=1)))
    with pytest.raises(EffectFailedError) as before:
        await live.llm("", ask("x"))
    again = journal(recorded=effects(live.performed), replaying=True)
    with pytest.raises(EffectFailedError) as after:
        await again.llm("", ask("x"))
    assert str(after.value) == str(before.value)
    assert after.value.retryable == before.value.retryable


async def test_an_attempt_past_its_time_fails_as_recorded() -> None:
    live = journal(Ports(llm=ScriptedModel(delay_s=30)), timeout_s=0.02)
    with pytest.raises(EffectFailedError, match="HandlerTimeout"):
        await live.llm("", ask("x"))
    again = journal(recorded=effects(live.performed), replaying=True)
    with pytest.raises(EffectFailedError, match="HandlerTimeout"):
        await again.llm("", ask("x"))


async def test_vectors_come_back_bit_for_bit() -> None:
    live = journal(Ports(embedding=CountingEmbedding()))
    vectors = await live.embed("", ("one", "three"))
    again = journal(recorded=effects(live.performed), replaying=True)
    assert vectors.shape == (2, 2)
    assert np.array_equal(await again.embed("", ("one", "three")), vectors)


async def test_a_missing_port_says_so_and_records_nothing() -> None:
    bare = journal()
    with pytest.raises(MissingPortError, match="tester needs a language model"):
        await bare.llm("", ask("x"))
    assert bare.performed == []
