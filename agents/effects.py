"""What a handler can ask of the outside world, each as a recorded effect.

In: a journal, a scope and a request in our own terms. Out: the response as it was recorded. Each function says how its
call is performed, and how response and failure are written down; identity, order and reuse are the journal's part.
"""

from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
import orjson
from pydantic import TypeAdapter

from agents.errors import EffectFailedError, MissingPortError
from agents.journal import Journal, Request
from agents.ports import InDoubt, LlmRequest, LlmResponse, RecallRequest, ToolInfo, ToolResult, Vectors
from schemas.events import DirectoryEntry, Evidence, LlmCalled, MemoryRecalled, Queried, TextsEmbedded, ToolCalled
from schemas.metadata import canonical_json

__all__ = ["directory", "embed", "llm", "recall", "tool"]

_ENTRIES = TypeAdapter(tuple[DirectoryEntry, ...])

PortT = TypeVar("PortT")


async def llm(journal: Journal, scope: str, request: LlmRequest) -> LlmResponse:
    """Call the language model; see :meth:`agents.context.Context.llm`."""

    async def call(asked: Request) -> LlmResponse:
        model = _need(journal, journal.ports.llm, "a language model")
        return await journal.within_deadline(model.complete(request, idempotency_key=journal.key_of(asked)))

    def succeeded(response: LlmResponse) -> dict[str, Any]:
        return {
            "provider": response.provider,
            "model": response.model,
            "response": canonical_json(response),
            "prompt_tokens": response.prompt_tokens,
            "completion_tokens": response.completion_tokens,
            "cost_usd": response.cost_usd,
        }

    def failed() -> dict[str, Any]:
        return {"provider": _need(journal, journal.ports.llm, "a language model").name, "model": request.model}

    asked = Request(LlmCalled, scope, canonical_json(request), call, succeeded, failed)
    effect = await journal.ask(asked, LlmCalled)
    return LlmResponse.model_validate_json(effect.response)


async def recall(journal: Journal, scope: str, request: RecallRequest) -> tuple[Evidence, ...]:
    """Search memory; see :meth:`agents.context.Context.recall`."""

    async def call(_: Request) -> tuple[Evidence, ...]:
        return await journal.within_deadline(_need(journal, journal.ports.memory, "a memory").recall(request))

    def succeeded(hits: tuple[Evidence, ...]) -> dict[str, Any]:
        return {**failed(), "hits": hits}

    def failed() -> dict[str, Any]:
        return {"model": _need(journal, journal.ports.memory, "a memory").model}

    asked = Request(MemoryRecalled, scope, canonical_json(request), call, succeeded, failed)
    return (await journal.ask(asked, MemoryRecalled)).hits


async def embed(journal: Journal, scope: str, texts: tuple[str, ...]) -> Vectors:
    """Embed texts; see :meth:`agents.context.Context.embed`."""

    async def call(_: Request) -> Vectors:
        return await journal.within_deadline(_need(journal, journal.ports.embedding, "an embedding model").embed(texts))

    def succeeded(vectors: Vectors) -> dict[str, Any]:
        rows = np.ascontiguousarray(vectors, dtype="<f4")
        return {**failed(), "count": rows.shape[0], "vectors": rows.tobytes()}

    def failed() -> dict[str, Any]:
        model = _need(journal, journal.ports.embedding, "an embedding model")
        return {
            "model": model.model,
            "model_version": model.version,
            "dimensions": model.dimensions,
            "count": len(texts),
        }

    asked = Request(TextsEmbedded, scope, canonical_json({"texts": texts}), call, succeeded, failed)
    effect = await journal.ask(asked, TextsEmbedded)
    return np.frombuffer(effect.vectors, dtype="<f4").reshape(effect.count, effect.dimensions)


async def tool(journal: Journal, scope: str, name: str, arguments: Mapping[str, Any]) -> ToolResult:
    """Run a tool; see :meth:`agents.context.Context.tool`."""
    arguments_json = canonical_json(arguments)
    side_effects = False

    async def call(asked: Request) -> str:
        nonlocal side_effects
        tools = _need(journal, journal.ports.tools, "tools")
        info = tools.describe(name)
        side_effects = info.side_effects
        if info.side_effects:
            if journal.in_doubt(asked):
                _resolve(info)
            await journal.started(asked, tool=name)
        return await journal.within_deadline(tools.call(name, arguments_json, idempotency_key=journal.key_of(asked)))

    def succeeded(result: str) -> dict[str, Any]:
        return {**failed(), "result": result}

    def failed() -> dict[str, Any]:
        _need(journal, journal.ports.tools, "tools")
        return {"tool": name, "side_effects": side_effects}

    request = canonical_json({"tool": name, "arguments": orjson.loads(arguments_json)})
    effect = await journal.ask(Request(ToolCalled, scope, request, call, succeeded, failed), ToolCalled)
    return ToolResult(tool=effect.tool, result=effect.result)


def _resolve(info: ToolInfo) -> None:
    """What the tool's policy says to a call that was started and may have done its work."""
    if info.in_doubt is InDoubt.FAIL:
        raise EffectFailedError(
            "ToolInDoubt", f"{info.name} was started, and whether it did its work is not known", retryable=False
        )
    if info.in_doubt is InDoubt.ASK:
        raise EffectFailedError(
            "ToolNeedsApproval",
            f"{info.name} was started, and whether it did its work is not known; somebody has to say if it may run "
            "again",
            retryable=False,
        )


async def directory(journal: Journal, scope: str, capability: str) -> tuple[DirectoryEntry, ...]:
    """Look up agents; see :meth:`agents.context.Context.directory`."""

    async def call(_: Request) -> tuple[DirectoryEntry, ...]:
        return await journal.within_deadline(
            _need(journal, journal.ports.directory, "an agent directory").lookup(capability)
        )

    def succeeded(entries: tuple[DirectoryEntry, ...]) -> dict[str, Any]:
        return {**failed(), "result": canonical_json([entry.model_dump(mode="json") for entry in entries])}

    def failed() -> dict[str, Any]:
        _need(journal, journal.ports.directory, "an agent directory")
        return {"target": "directory"}

    asked = Request(Queried, scope, canonical_json({"capability": capability}), call, succeeded, failed)
    return _ENTRIES.validate_json((await journal.ask(asked, Queried)).result)


def _need(journal: Journal, port: PortT | None, what: str) -> PortT:
    if port is None:
        raise MissingPortError(f"agent {journal.agent} needs {what}, and this process has none; configure one")
    return port
