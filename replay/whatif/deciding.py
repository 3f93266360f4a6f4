"""Decides single steps for a what-if, in whatever process: an event, a state and the effects that are known go in.

Out: what the agent decides, or the calls that it waits for and that nobody has answered. The simulation finds the
answers, and the step is decided anew with them: nothing is ever performed here. It keeps to what ``agents`` and
``schemas`` have had for long, since :mod:`replay.whatif.worker` runs it on those of other revisions.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

from agents.agent import Agent, Failure
from agents.errors import NondeterminismError
from agents.handler_loop import of_thread
from agents.journal import Journal, Request
from agents.step import StepResult, failure_of, run_failure, run_step
from schemas.codec import Codec
from schemas.events import Effect, LlmCalled, Priority, ToolStarted, Waited
from schemas.metadata import Envelope, canonical_json
from schemas.record import Record
from schemas.topics import key_of

__all__ = ["Ask", "Decision", "Encoded", "Identity", "Want", "decide"]

Identity = tuple[str, str, str, int]
Encoded = tuple[bytes, list[tuple[str, bytes]]]
"""Value and headers, as the codec wrote them."""

_NO_CALLS = (ToolStarted, Waited)
_MARKED = "ChangeMarked"


@dataclass(frozen=True, slots=True)
class Want:
    """A call that nobody has answered yet: its identity, and the request's canonical JSON."""

    kind: str
    scope: str
    hashed: str
    occurrence: int
    text: str

    @property
    def identity(self) -> Identity:
        """What the call is known by within its event."""
        return self.kind, self.scope, self.hashed, self.occurrence


@dataclass(frozen=True, slots=True)
class Ask:
    """A step to be decided.

    ``record`` holds the event of ``envelope``. ``state`` is the lane's, as the last decision left it. ``effects`` are
    the answers that are known. ``version`` is whose decisions are asked for, empty for the code as it is. ``rewrite``
    are fields of language model requests with other values. ``changed`` says whether changes that handlers ask about
    (``ctx.changed``) apply where nothing is recorded. With ``failure`` the handler is known to give up with it, and
    ``on_failure`` decides; ``crashed`` means that it came upon the handler from outside, so that it is not run at all.
    """

    agent: str
    record: Record
    envelope: Envelope
    priority: Priority
    state: Any
    effects: tuple[Effect, ...] = ()
    version: str = ""
    rewrite: Mapping[str, Any] = field(default_factory=dict)
    changed: bool = False
    failure: Failure | None = None
    crashed: bool = False


@dataclass(frozen=True, slots=True)
class Decision:
    """What came of a step: a result with its outputs encoded, calls that are wanted first, or a failure.

    ``unasked`` are effects that were given and not asked for. ``busy_ms`` is how long the calls took, side by side as
    the handler made them, up to where it decided or waits.
    """

    result: StepResult | None = None
    encoded: tuple[Encoded, ...] = ()
    wants: tuple[Want, ...] = ()
    failure: Failure | None = None
    unasked: tuple[Identity, ...] = ()
    busy_ms: float = 0.0


class _Journal(Journal):
    """Answers from what is known, and notes what is not."""

    def __init__(self, ask: Ask, **options: Any) -> None:
        super().__init__(**options)
        self._rewrite = ask.rewrite
        self._apply_changes = ask.changed
        self._starts: dict[Request, float] = {}
        self.wants: dict[Request, Want] = {}
        self.clock = 0.0
        """Milliseconds that the calls answered so far took, side by side."""

    async def ask(self, request: Request, effect_type: Any) -> Any:
        kind = effect_type.__name__
        if self._rewrite and effect_type is LlmCalled:
            request.text = canonical_json({**json.loads(request.text), **self._rewrite})
            request.hashed = sha256(request.text.encode()).hexdigest()
        self._starts[request] = self.clock
        occurrence = (self._occurrences or {}).get((kind, request.scope, request.hashed), 0)
        if (kind, request.scope, request.hashed, occurrence) in self._recorded:
            return await super().ask(request, effect_type)
        request.occurrence = self._occurrence(kind, request.scope, request.hashed)
        self.wants[request] = Want(kind, request.scope, request.hashed, occurrence, request.text)
        turns: Any = of_thread.loop.owner
        return await turns.ask(request)  # never answered in this run

    def settle(self, request: Request) -> Effect:
        effect = super().settle(request)
        self.clock = max(self.clock, self._starts.get(request, 0.0) + effect.latency_ms)
        return effect

    def abandon(self, request: Request) -> None:
        super().abandon(request)
        self.wants.pop(request, None)

    def changed(self, change: str) -> bool:
        if not self._apply_changes:
            return super().changed(change)
        text = canonical_json({"change": change})
        marked: Any = self._recorded.get((_MARKED, "", sha256(text.encode()).hexdigest(), 0))
        return True if marked is None else bool(marked.taken)

    def unused(self) -> tuple[Identity, ...]:
        asked = self._occurrences or {}
        return tuple(
            identity
            for identity, effect in self._recorded.items()
            if effect.attempt == self._attempt
            and not isinstance(effect, _NO_CALLS)
            and identity[0] != _MARKED
            and identity[3] >= asked.get(identity[:3], 0)
        )


async def decide(agent: Agent[Any], ask: Ask, codec: Codec) -> Decision:
    """What ``agent`` makes of the step, or waits for."""
    envelope = ask.envelope
    journal = _Journal(
        ask,
        agent=agent.name,
        source=agent.source,
        key=envelope.metadata.subject or key_of(envelope.event),
        cause=envelope.metadata,
        recorded=ask.effects,
        replaying=True,
    )
    where: dict[str, Any] = {
        "timestamp_ms": ask.record.timestamp_ms,
        "priority": ask.priority,
        "state": ask.state,
        "journal": journal,
    }
    try:
        if not ask.crashed:
            try:
                return _decided(await run_step(agent, envelope, **where), journal, codec)
            except NondeterminismError:
                raise
            except Exception as error:  # noqa: BLE001 - whatever a handler raises is its event's failure
                if ask.failure is None:
                    return Decision(failure=failure_of(error), unasked=journal.unused(), busy_ms=journal.clock)
        assert ask.failure is not None
        try:
            return _decided(await run_failure(agent, envelope, ask.failure, **where), journal, codec)
        except NondeterminismError:
            raise
        except Exception:  # noqa: BLE001 - as live: an agent that can't say what failed says nothing
            nothing = StepResult((), ask.state, state_changed=False)
            return Decision(nothing, unasked=journal.unused(), busy_ms=journal.clock)
    except NondeterminismError as error:
        if journal.wants:
            wants = tuple(journal.wants.values())
            return Decision(wants=wants, unasked=journal.unused(), busy_ms=journal.clock)
        return Decision(failure=Failure(type(error).__name__, str(error), retryable=False), busy_ms=journal.clock)


def _decided(result: StepResult, journal: _Journal, codec: Codec) -> Decision:
    encoded = []
    for output in result.outputs:
        value, headers = codec.encode(output.event, output.metadata)
        encoded.append((value, headers))
    return Decision(result, tuple(encoded), unasked=journal.unused(), busy_ms=journal.clock)
