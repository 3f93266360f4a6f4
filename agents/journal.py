"""The journal of one step's effects: performs a call once, records it, and gives the recorded answer ever after.

In: what a handler asks for, the ports that can answer, and effects recorded earlier (by an earlier attempt, or from the
log in replay). Out: the response as recorded, and new effect events in their order of completion. A call's identity is
the event, the scope path, the request's hash and its occurrence among equal requests in that scope. Recorded errors are
replayed in replay, but not reused by a later live attempt.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from datetime import UTC, datetime
from typing import Any, Final, TypeVar

import numpy as np
import orjson

from agents.context import EmbeddingModel, LanguageModel, LlmRequest, LlmResponse, Memory, Ports, RecallRequest, Vectors
from agents.errors import EffectFailedError, MissingPortError, NondeterminismError
from schemas.events import Effect, Evidence, LlmCalled, MemoryRecalled, TextsEmbedded
from schemas.metadata import Envelope, Metadata, canonical_json, deterministic_id, request_hash

__all__ = ["Identity", "Journal"]

Identity = tuple[str, str, str, int]
"""What a call is known by within its event: effect type, scope path, request hash, occurrence."""

EffectT = TypeVar("EffectT", bound=Effect)
ResultT = TypeVar("ResultT")

_NO_PORTS: Final = Ports()


def identity_of(effect: Effect) -> Identity:
    """The identity that ``effect`` was recorded under."""
    return type(effect).__name__, effect.scope, effect.request_hash, effect.occurrence


class Journal:
    """The effects of one event's handling by one agent.

    Live, give it ``ports``; calls that ``recorded`` does not answer are performed. In replay give it
    ``replaying=True``: a call that was not recorded is a NondeterminismError, and nothing is ever performed.
    ``timeout_s`` bounds an attempt: the call under way when it has passed fails, and is recorded as failed, so that
    replay fails at the same place. A handler waits for nothing but its effects, which makes this its own time limit.
    """

    __slots__ = (
        "_agent",
        "_cause",
        "_deadline",
        "_key",
        "_occurrences",
        "_ports",
        "_recorded",
        "_replaying",
        "_source",
        "_timeout_s",
        "performed",
    )

    def __init__(
        self,
        *,
        agent: str,
        source: str,
        key: str,
        cause: Metadata,
        ports: Ports = _NO_PORTS,
        recorded: Iterable[Effect] = (),
        replaying: bool = False,
        timeout_s: float | None = None,
    ) -> None:
        self._agent = agent
        self._source = source
        self._key = key
        self._cause = cause
        self._ports = ports
        self._recorded = self._index(recorded, replaying) if recorded else {}
        self._replaying = replaying
        self._timeout_s = timeout_s
        self._deadline: float | None = None
        self._occurrences: dict[tuple[str, str, str], int] = {}
        self.performed: list[Envelope] = []
        """Effects performed so far, over all attempts, in order of completion."""

    @staticmethod
    def _index(recorded: Iterable[Effect], replaying: bool) -> dict[Identity, Effect]:
        index: dict[Identity, Effect] = {}
        for effect in recorded:
            if replaying or not effect.error:
                index[identity_of(effect)] = effect
        return index

    def next_attempt(self) -> None:
        """Make ready to run the handler again: successful calls so far will answer, failed ones are performed anew."""
        for envelope in self.performed:
            effect = envelope.event
            if isinstance(effect, Effect) and not effect.error:
                self._recorded[identity_of(effect)] = effect
        self._occurrences.clear()
        self._deadline = None

    def unasked(self) -> list[str]:
        """What was recorded but has not been asked for, as ``<effect type> <request hash>`` (12 digits of it)."""
        return [
            f"{name} {hashed[:12]}"
            for name, scope, hashed, occurrence in self._recorded
            if occurrence >= self._occurrences.get((name, scope, hashed), 0)
        ]

    async def llm(self, scope: str, request: LlmRequest) -> LlmResponse:
        """Call the language model; see :meth:`agents.context.Context.llm`."""
        text = canonical_json(request)

        def port() -> LanguageModel:
            return _need(self._ports.llm, "a language model", self._agent)

        effect = await self._effect(
            LlmCalled,
            scope,
            text,
            lambda: port().complete(request),
            lambda response: {
                "provider": response.provider,
                "model": response.model,
                "response": canonical_json(response),
                "prompt_tokens": response.prompt_tokens,
                "completion_tokens": response.completion_tokens,
                "cost_usd": response.cost_usd,
            },
            lambda: {"provider": port().name, "model": request.model},
        )
        return LlmResponse.model_validate_json(effect.response)

    async def recall(self, scope: str, request: RecallRequest) -> tuple[Evidence, ...]:
        """Search memory; see :meth:`agents.context.Context.recall`."""

        def port() -> Memory:
            return _need(self._ports.memory, "a memory", self._agent)

        effect = await self._effect(
            MemoryRecalled,
            scope,
            canonical_json(request),
            lambda: port().recall(request),
            lambda hits: {"model": port().model, "hits": hits},
            lambda: {"model": port().model},
        )
        return effect.hits

    async def embed(self, scope: str, texts: tuple[str, ...]) -> Vectors:
        """Embed texts; see :meth:`agents.context.Context.embed`."""

        def port() -> EmbeddingModel:
            return _need(self._ports.embedding, "an embedding model", self._agent)

        def fields(vectors: Vectors) -> dict[str, Any]:
            rows = np.ascontiguousarray(vectors, dtype="<f4")
            return {**described(), "count": rows.shape[0], "vectors": rows.tobytes()}

        def described() -> dict[str, Any]:
            return {
                "model": port().model,
                "model_version": port().version,
                "dimensions": port().dimensions,
                "count": len(texts),
            }

        effect = await self._effect(
            TextsEmbedded, scope, canonical_json({"texts": texts}), lambda: port().embed(texts), fields, described
        )
        return np.frombuffer(effect.vectors, dtype="<f4").reshape(effect.count, effect.dimensions)

    async def _effect(
        self,
        effect_type: type[EffectT],
        scope: str,
        request: str,
        call: Callable[[], Awaitable[ResultT]],
        succeeded: Callable[[ResultT], Mapping[str, Any]],
        failed: Callable[[], Mapping[str, Any]],
    ) -> EffectT:
        """The effect of one call: the recorded one when there is one, else performed and recorded now.

        Raises:
            EffectFailedError: the call failed, now or as recorded.
            NondeterminismError: in replay, the call was not recorded.
        """
        hashed = request_hash(request)
        name = effect_type.__name__
        occurrence = self._occurrences.get((name, scope, hashed), 0)
        self._occurrences[name, scope, hashed] = occurrence + 1
        recorded = self._recorded.get((name, scope, hashed, occurrence))
        if recorded is None:
            if self._replaying:
                raise NondeterminismError(
                    f"{self._agent}, event {self._cause.id}: asks for {name} in scope {scope or '/'!r} with request "
                    f"{hashed[:12]} (occurrence {occurrence}), which was not recorded: {request[:200]}"
                )
            recorded = await self._perform(effect_type, scope, occurrence, hashed, request, call, succeeded, failed)
        if recorded.error:
            error = orjson.loads(recorded.error)
            raise EffectFailedError(error["type"], error["message"], retryable=error["retryable"])
        assert isinstance(recorded, effect_type)
        return recorded

    async def _perform(
        self,
        effect_type: type[EffectT],
        scope: str,
        occurrence: int,
        hashed: str,
        request: str,
        call: Callable[[], Awaitable[ResultT]],
        succeeded: Callable[[ResultT], Mapping[str, Any]],
        failed: Callable[[], Mapping[str, Any]],
    ) -> EffectT:
        failed()  # a missing port is a fault of the configuration, not a failed call: raise before anything is recorded
        started, clock = datetime.now(UTC), time.perf_counter()
        error = ""
        try:
            fields = succeeded(await self._within_deadline(call))
        except EffectFailedError as failure:
            error = _error_json(failure.error_type, failure.message, failure.retryable)
            fields = failed()
        except Exception as failure:  # noqa: BLE001 - whatever a port raises is recorded as the call's outcome
            error = _error_json(type(failure).__name__, str(failure), retryable=True)
            fields = failed()
        effect = effect_type(
            task_id=self._key,
            agent=self._agent,
            event_id=self._cause.id,
            scope=scope,
            occurrence=occurrence,
            sequence=len(self.performed),
            request_hash=hashed,
            request=request,
            error=error,
            started_at=started,
            latency_ms=round((time.perf_counter() - clock) * 1000, 3),
            **fields,
        )
        metadata = Metadata(
            id=deterministic_id(
                self._cause.id, self._agent, effect_type.__name__, scope, hashed, occurrence, len(self.performed)
            ),
            source=self._source,
            subject=self._key,
            time=started,
            causation_id=self._cause.id,
            correlation_id=self._cause.correlation_id,
            traceparent=self._cause.traceparent,
        )
        self.performed.append(Envelope(effect, metadata))
        return effect

    async def _within_deadline(self, call: Callable[[], Awaitable[ResultT]]) -> ResultT:
        if self._timeout_s is None:
            return await call()
        if self._deadline is None:
            self._deadline = time.monotonic() + self._timeout_s
        try:
            async with asyncio.timeout(self._deadline - time.monotonic()):
                return await call()
        except TimeoutError:
            raise EffectFailedError(
                "HandlerTimeout", f"no result within {self._timeout_s:g} s of the attempt's first call", retryable=True
            ) from None


def _error_json(error_type: str, message: str, retryable: bool) -> str:
    return canonical_json({"type": error_type, "message": message, "retryable": retryable})


PortT = TypeVar("PortT")


def _need(port: PortT | None, what: str, agent: str) -> PortT:
    if port is None:
        raise MissingPortError(f"agent {agent} needs {what}, and this process has none; configure one")
    return port
