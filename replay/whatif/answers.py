"""Who answers a call that a simulated step makes: the record, this what-if's own journal, a provider, or nobody.

In: a call with its identity. Out: an effect, or a :class:`Stop` that says what would have been done. An answer
recorded for the same request at the same place (event, scope, occurrence) is taken first; then any that the same agent
was given to it in the same task; then what this what-if was answered before; then the port that may be asked. Tools
never run.
"""

import asyncio
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Final

import orjson

from agents import effects
from agents.errors import EffectFailedError
from agents.journal import Journal
from agents.ports import LlmRequest, Ports, RecallRequest
from agents.turns import begin
from replay.whatif.budget import Budget, Estimate
from replay.whatif.calls import CallKey, CallLog, Kept
from replay.whatif.changes import Changes
from replay.whatif.deciding import Want
from replay.whatif.past import Past
from schemas.events import EVENT_TYPES, Effect, LlmCalled, TextsEmbedded, ToolCalled
from schemas.metadata import Envelope, Metadata, canonical_json, deterministic_id

__all__ = ["Answers", "Caller", "Stop", "TaskAnswers", "Would"]

_KINDS: Final = {kind.__name__: kind for kind in EVENT_TYPES.values() if issubclass(kind, Effect)}


class Would(StrEnum):
    """What would have been done, and was not."""

    CALL = "would call"
    RECALL = "would recall"
    EMBED = "would embed"
    RUN = "would run"
    QUERY = "would query"
    SPEND = "would call over budget"


@dataclass(frozen=True, slots=True)
class Stop:
    """A call that nobody is to answer: a step stops there. ``why`` is for people; ``request`` is canonical JSON."""

    would: Would
    agent: str
    event_id: str
    kind: str
    request: str
    why: str = ""


@dataclass(frozen=True, slots=True)
class Caller:
    """The step that asks: its agent, its event's metadata, the attempt it is in (from 1) and its time limit."""

    agent: str
    source: str
    cause: Metadata
    attempt: int
    timeout_s: float | None

    def key(self, task: str, want: Want) -> CallKey:
        """What the call is kept under."""
        return CallKey(task, self.agent, self.cause.id, self.attempt, *want.identity)


class Answers:
    """What all tasks of a what-if share. ``ports`` are those that may be asked, ``slots`` bounds the calls at once."""

    def __init__(
        self,
        changes: Changes,
        ports: Ports,
        calls: CallLog,
        budget: Budget,
        *,
        estimate: Estimate,
        run_id: str,
        at_once: int = 8,
    ) -> None:
        self.changes, self.ports, self.calls, self.budget = changes, ports, calls, budget
        self.estimate, self.run_id = estimate, run_id
        self.slots = asyncio.Semaphore(at_once)


class TaskAnswers:
    """The answers for one task."""

    def __init__(self, answers: Answers, past: Past) -> None:
        self._all, self._past = answers, past
        self._elsewhere: dict[tuple[str, str, str], Effect] = {}
        self._embedded: set[str] = set()
        for agent, recorded in past.effects.items():
            for effect in recorded:
                if not effect.error and answers.changes.stands(effect):
                    if isinstance(effect, TextsEmbedded):
                        self._embedded.add(effect.model)
                    self._elsewhere.setdefault((agent, type(effect).__name__, effect.request_hash), effect)

    def elsewhere(self, agent: str, want: Want) -> Effect | None:
        """What the agent was told to the same request at another place of this task."""
        return self._elsewhere.get((agent, want.kind, want.hashed))

    def kept(self, caller: Caller, want: Want) -> Kept | None:
        """What came of the call when this what-if made it before."""
        return self._all.calls.find(caller.key(self._past.task_id, want))

    def stop(self, caller: Caller, want: Want) -> Stop | None:
        """Why the call is not made; None when it may be."""
        changes, ports = self._all.changes, self._all.ports

        def told(would: Would, why: str) -> Stop:
            return self._stop(would, caller, want, why)

        match want.kind:
            case "LlmCalled":
                if ports.llm is None:
                    return told(Would.CALL, "nobody is to be asked: name who with --ask or --provider")
                if self._all.budget.exhausted:
                    return told(Would.SPEND, self._all.budget.exhausted)
            case "TextsEmbedded":
                if ports.embedding is None:
                    return told(Would.EMBED, "there is no embedding model here")
                if self._embedded and ports.embedding.model not in self._embedded:
                    models = ", ".join(sorted(self._embedded))
                    return told(Would.EMBED, f"the record's model is {models}, the one here {ports.embedding.model}")
            case "MemoryRecalled":
                if ports.memory is None:
                    return told(Would.RECALL, "memory has changed since: ask it as it is now with --recall live")
            case "ToolCalled":
                if not changes.gone(want.kind, want.text):
                    return told(Would.RUN, "tools never run in a what-if")
            case _:
                return told(Would.QUERY, "no answer to this was recorded in the task")
        return None

    @staticmethod
    def _stop(would: Would, caller: Caller, want: Want, why: str) -> Stop:
        return Stop(would, caller.agent, caller.cause.id, want.kind, want.text, why)

    async def make(self, caller: Caller, want: Want) -> Kept | Stop:
        """Make the call, and have its result on disk."""
        if self._all.changes.gone(want.kind, want.text):
            return Kept(-1, self._refused(caller, want))
        reserved = None
        if want.kind == "LlmCalled":
            reserved = self._all.estimate(LlmRequest.model_validate_json(want.text))
            if not await self._all.budget.reserve(*reserved):
                return self._stop(Would.SPEND, caller, want, self._all.budget.exhausted)
        spent = (0, 0.0)
        try:
            async with self._all.slots:
                made = await self._perform(caller, want)
            if isinstance(made.event, LlmCalled):
                spent = made.event.prompt_tokens + made.event.completion_tokens, made.event.cost_usd
        finally:
            if reserved is not None:
                self._all.budget.settle(reserved, *spent)
        return await self._all.calls.keep(caller.key(self._past.task_id, want), made)

    async def _perform(self, caller: Caller, want: Want) -> Envelope:
        """One recorded effect, made by the same code that makes it live, under an idempotency key of its own."""
        cause = caller.cause
        asked_for = deterministic_id("what-if", self._all.run_id, cause.id, caller.agent)
        journal = Journal(
            agent=caller.agent,
            source=caller.source,
            key=cause.subject,
            cause=Metadata(asked_for, cause.source, cause.subject, cause.time, data_subjects=cause.data_subjects),
            ports=self._all.ports,
            timeout_s=caller.timeout_s,
        )
        turns = begin(journal, _asking(journal, want))
        if turns is not None:
            with suppress(EffectFailedError):  # recorded as what came of the call
                await turns.finish()
        made = journal.performed[-1]
        assert isinstance(made.event, Effect)
        return Envelope(_placed(made.event, cause.id, want), made.metadata)

    def _refused(self, caller: Caller, want: Want) -> Effect:
        tool = orjson.loads(want.text)["tool"]
        error = canonical_json({"type": "UnknownTool", "message": f"there is no tool {tool!r}", "retryable": False})
        effect = ToolCalled(
            task_id=caller.cause.subject,
            agent=caller.agent,
            event_id=caller.cause.id,
            request_hash=want.hashed,
            request=want.text,
            error=error,
            started_at=datetime.fromtimestamp(0, UTC),
            latency_ms=0.0,
            tool=tool,
        )
        return _placed(effect, caller.cause.id, want)


async def _asking(journal: Journal, want: Want) -> None:
    match want.kind:
        case "LlmCalled":
            await effects.llm(journal, want.scope, LlmRequest.model_validate_json(want.text))
        case "MemoryRecalled":
            await effects.recall(journal, want.scope, RecallRequest.model_validate_json(want.text))
        case "TextsEmbedded":
            await effects.embed(journal, want.scope, tuple(orjson.loads(want.text)["texts"]))
        case _:
            raise LookupError(f"nobody performs {want.kind}")


def _placed(effect: Effect, event_id: str, want: Want) -> Effect:
    """The effect as one of this event, under the call's identity."""
    return effect.model_copy(
        update={
            "event_id": event_id,
            "scope": want.scope,
            "occurrence": want.occurrence,
            "request_hash": want.hashed,
            "request": want.text,
        }
    )


def adopted(effect: Effect, event_id: str, want: Want, *, sequence: int, attempt: int) -> Effect:
    """An answer as the step is given it: at the call's place, next in order, of the attempt that decides."""
    return _placed(effect, event_id, want).model_copy(update={"sequence": sequence, "attempt": attempt})
