"""The vendors' adapters: the real SDKs against a local server that speaks each vendor's wire format."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from agents.context import LanguageModel, LlmRequest, Message, Passage, Purpose
from agents.errors import EffectFailedError, ProviderError
from agents.planning import PLAN_SCHEMA
from agents.providers import PROVIDERS, create_provider
from agents.providers.prices import cost_usd, is_priced

VENDORS = ("openai", "anthropic", "google")
MODELS = {"openai": "gpt-4.1-mini", "anthropic": "claude-haiku-4-5", "google": "gemini-2.5-flash"}


def body(vendor: str, text: str | None = "uvloop is fast [1].") -> dict[str, Any]:
    """A successful response of 1,000 tokens in and 200 out."""
    if vendor == "openai":
        return {
            "id": "c1",
            "object": "chat.completion",
            "created": 1,
            "model": "gpt-4.1-mini-2025-04-14",
            "choices": [
                {
                    "index": 0,
                    "finish_reason": "stop",
                    "message": {"role": "assistant", "content": text, "refusal": None},
                }
            ],
            "usage": {"prompt_tokens": 1000, "completion_tokens": 200, "total_tokens": 1200},
        }
    if vendor == "anthropic":
        return {
            "id": "m1",
            "type": "message",
            "role": "assistant",
            "model": "claude-haiku-4-5-20251001",
            "content": [{"type": "text", "text": text}] if text else [],
            "stop_reason": "end_turn",
            "stop_sequence": None,
            "usage": {"input_tokens": 900, "cache_read_input_tokens": 100, "output_tokens": 200},
        }
    parts = [{"text": text}] if text else []
    return {
        "candidates": [{"index": 0, "finishReason": "STOP", "content": {"role": "model", "parts": parts}}],
        "usageMetadata": {"promptTokenCount": 1000, "candidatesTokenCount": 150, "thoughtsTokenCount": 50},
        "modelVersion": "gemini-2.5-flash",
    }


def error_body(vendor: str, status: int) -> dict[str, Any]:
    if vendor == "google":
        return {"error": {"code": status, "message": "told so", "status": "FAILED"}}
    return {"type": "error", "error": {"type": "some_error", "message": "told so"}}


@dataclass
class Server:
    """Answers every request with ``status`` and ``payload`` (raw bytes as they are), after ``delay_s``."""

    status: int = 200
    payload: Any = None
    delay_s: float = 0.0
    drop: bool = False
    url: str = ""
    requests: list[tuple[str, dict[str, str], dict[str, Any]]] = field(default_factory=list)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:] if line)}
            sent = await reader.readexactly(int(headers.get("content-length", "0")))
            self.requests.append((head[0].split()[1], headers, json.loads(sent)))
            if not self.drop:
                await asyncio.sleep(self.delay_s)
                raw = self.payload if isinstance(self.payload, bytes) else json.dumps(self.payload).encode()
                writer.write(
                    f"HTTP/1.1 {self.status} Whatever\r\ncontent-type: application/json\r\n"
                    f"content-length: {len(raw)}\r\nconnection: close\r\n\r\n".encode()
                    + raw
                )
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    state = Server()
    listening = await asyncio.start_server(state.serve, "127.0.0.1", 0)
    state.url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    yield state
    listening.close()


Make = Callable[..., LanguageModel]


@pytest.fixture
async def make(server: Server) -> AsyncIterator[Make]:
    made: list[Any] = []

    def create(vendor: str, **options: Any) -> LanguageModel:
        values: dict[str, Any] = {"api_key": "k-1", "model": MODELS[vendor], "base_url": server.url}
        model = create_provider(vendor, **{**values, **options})
        made.append(model)
        return model

    yield create
    for model in made:
        await model.aclose()


REQUEST = LlmRequest(
    purpose=Purpose.ANSWER,
    system="Answer from the passages.",
    messages=(Message(role="user", content="What is uvloop?"),),
    passages=(Passage(marker=1, chunk_id="c", title="uvloop", text="uvloop is an event loop."),),
    max_tokens=300,
)
PLAN = LlmRequest(
    purpose=Purpose.PLAN,
    messages=(
        Message(role="user", content="Q"),
        Message(role="assistant", content="bad"),
        Message(role="user", content="mend it"),
    ),
    response_schema=PLAN_SCHEMA,
)


@pytest.mark.parametrize("vendor", VENDORS)
async def test_a_call_gives_text_tokens_and_cost(vendor: str, server: Server, make: Make) -> None:
    server.payload = body(vendor)
    response = await make(vendor).complete(REQUEST, idempotency_key="key-1")
    assert response.text == "uvloop is fast [1]."
    assert response.provider == vendor
    assert (response.prompt_tokens, response.completion_tokens) == (1000, 200)
    assert response.cost_usd == pytest.approx(cost_usd(MODELS[vendor], 1000, 200))
    assert response.cost_usd > 0
    assert response.finish_reason in ("stop", "end_turn")
    (path, headers, sent) = server.requests[0]
    text = json.dumps(sent)
    assert "k-1" in json.dumps(headers)
    assert "[1] uvloop\\nuvloop is an event loop.\\n\\nWhat is uvloop?" in text
    assert "Answer from the passages." in text
    assert "300" in text
    assert MODELS[vendor] in (path + text)


@pytest.mark.parametrize("vendor", VENDORS)
async def test_a_schema_asks_for_structured_output_and_turns_keep_their_order(
    vendor: str, server: Server, make: Make
) -> None:
    server.payload = body(vendor, '{"steps": [], "rationale": ""}')
    await make(vendor).complete(PLAN, idempotency_key="key-1")
    sent = server.requests[0][2]
    schema = json.loads(PLAN_SCHEMA)
    if vendor == "openai":
        assert sent["response_format"]["json_schema"]["schema"] == schema
        assert sent["response_format"]["json_schema"]["strict"] is True
        turns = [(turn["role"], turn["content"]) for turn in sent["messages"]]
    elif vendor == "anthropic":
        assert sent["output_config"]["format"] == {"type": "json_schema", "schema": schema}
        turns = [(turn["role"], turn["content"]) for turn in sent["messages"]]
    else:
        assert sent["generationConfig"]["responseJsonSchema"] == schema
        assert sent["generationConfig"]["responseMimeType"] == "application/json"
        turns = [(turn["role"].replace("model", "assistant"), turn["parts"][0]["text"]) for turn in sent["contents"]]
    assert turns == [("user", "Q"), ("assistant", "bad"), ("user", "mend it")]


@pytest.mark.parametrize("vendor", VENDORS)
@pytest.mark.parametrize(
    ("status", "retryable"),
    [(400, False), (401, False), (404, False), (408, True), (429, True), (500, True), (503, True)],
)
async def test_error_statuses_are_typed_and_asked_once(
    vendor: str, status: int, retryable: bool, server: Server, make: Make
) -> None:
    server.status, server.payload = status, error_body(vendor, status)
    with pytest.raises(EffectFailedError) as caught:
        await make(vendor).complete(REQUEST, idempotency_key="key-1")
    assert (caught.value.error_type, caught.value.retryable) == (f"Http{status}", retryable)
    assert "told so" in caught.value.message
    assert len(server.requests) == 1


@pytest.mark.parametrize("vendor", VENDORS)
@pytest.mark.parametrize("payload", [b"{ not json", b"[]", b"{}", b'"a string"', b"<html>proxy</html>"])
async def test_malformed_responses_are_typed(vendor: str, payload: bytes, server: Server, make: Make) -> None:
    server.payload = payload
    with pytest.raises(EffectFailedError) as caught:
        await make(vendor).complete(REQUEST, idempotency_key="key-1")
    assert (caught.value.error_type, caught.value.retryable) == ("MalformedResponse", True)


@pytest.mark.parametrize("vendor", VENDORS)
async def test_an_empty_answer_is_a_failure(vendor: str, server: Server, make: Make) -> None:
    server.payload = body(vendor, None)
    with pytest.raises(EffectFailedError) as caught:
        await make(vendor).complete(REQUEST, idempotency_key="key-1")
    assert (caught.value.error_type, caught.value.retryable) == ("EmptyResponse", False)


@pytest.mark.parametrize("vendor", VENDORS)
async def test_a_slow_server_times_out(vendor: str, server: Server, make: Make) -> None:
    server.payload, server.delay_s = body(vendor), 5.0
    model = make(vendor, timeout_s=0.4)
    with pytest.raises(EffectFailedError) as caught:
        await model.complete(REQUEST, idempotency_key="key-1")
    assert (caught.value.error_type, caught.value.retryable) == ("Timeout", True)


@pytest.mark.parametrize("vendor", VENDORS)
async def test_a_lost_connection_can_be_tried_again(vendor: str, server: Server, make: Make) -> None:
    server.drop = True
    with pytest.raises(EffectFailedError) as caught:
        await make(vendor, timeout_s=5.0).complete(REQUEST, idempotency_key="key-1")
    assert caught.value.retryable
    refused = make(vendor, base_url="http://127.0.0.1:9", timeout_s=5.0)
    with pytest.raises(EffectFailedError) as caught:
        await refused.complete(REQUEST, idempotency_key="key-1")
    assert (caught.value.error_type, caught.value.retryable) == ("ConnectionFailed", True)


async def test_reasoning_models_are_given_room_and_no_temperature(server: Server, make: Make) -> None:
    server.payload = body("openai")
    await make("openai", model="gpt-5.4-mini").complete(REQUEST, idempotency_key="key-1")
    await make("openai", model="gpt-4.1-mini").complete(REQUEST, idempotency_key="key-1")
    thinks, plain = (sent for _, _, sent in server.requests)
    assert "temperature" not in thinks
    assert thinks["max_completion_tokens"] > 300
    assert (plain["temperature"], plain["max_tokens"]) == (0.0, 300)


async def test_a_blocked_prompt_is_final(server: Server, make: Make) -> None:
    server.payload = {"promptFeedback": {"blockReason": "SAFETY"}}
    with pytest.raises(EffectFailedError) as caught:
        await make("google").complete(REQUEST, idempotency_key="key-1")
    assert (caught.value.error_type, caught.value.retryable) == ("PromptBlocked", False)


@pytest.mark.parametrize(("vendor", "sent"), [("openai", "key-1"), ("anthropic", "key-1"), ("google", None)])
async def test_a_repeat_can_be_told_by_its_key(server: Server, make: Make, vendor: str, sent: str | None) -> None:
    server.payload = body(vendor)
    for _ in range(2):
        await make(vendor).complete(REQUEST, idempotency_key="key-1")
    assert [headers.get("idempotency-key") for _, headers, _ in server.requests] == [sent, sent]


async def test_notes_of_a_synthesis_keep_their_own_markers(server: Server, make: Make) -> None:
    server.payload = body("openai")
    note = Passage(marker=1, chunk_id="t/2", title="What is b?", text="b is slow [2].")
    await make("openai").complete(
        LlmRequest(purpose=Purpose.SYNTHESISE, messages=(Message(role="user", content="a or b?"),), passages=(note,)),
        idempotency_key="key-1",
    )
    assert server.requests[0][2]["messages"][-1]["content"] == "Note on: What is b?\nb is slow [2].\n\na or b?"


def test_unknown_providers_and_missing_keys_are_refused() -> None:
    with pytest.raises(ProviderError, match=r"no language model provider 'bard'; choose one of: extractive"):
        create_provider("bard")
    for vendor in VENDORS:
        with pytest.raises(ProviderError, match=f"'{vendor}' needs an API key"):
            create_provider(vendor)
    assert create_provider("openai", base_url="http://127.0.0.1:9").name == "openai"
    assert create_provider().name == "extractive"
    assert {create_provider(name, api_key="k").name for name in PROVIDERS} == set(PROVIDERS)


def test_prices() -> None:
    assert cost_usd("gpt-4.1-mini", 1_000_000, 1_000_000) == 2.0
    assert cost_usd("claude-haiku-4-5-20251001", 1_000_000, 0) == 1.0
    assert is_priced("gpt-4.1-mini-2025-04-14")
    assert not is_priced("my-own-model")
    assert cost_usd("my-own-model", 1_000_000, 1) == 0.0
