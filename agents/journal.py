"""The journal of one step's effects: performs a call once, records it, and gives the recorded answer ever after.

In: what a handler asks for, the ports that can answer, and effects recorded earlier (by an earlier attempt, by a
process that died, or from the log in replay). Out: the response as recorded, and new effect events in their order of
completion. A call's identity is the event, the scope path, the request's hash and its occurrence among equal requests
in that scope. Recorded failures and passed delays are replayed in replay, but not reused by a later live attempt.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple, TypeVar
from zlib import crc32

import orjson

from agents.errors import EffectFailedError, NondeterminismError
from agents.handler_loop import Delay, of_thread
from agents.ports import Ports
from agents.turns import Turns
from agents.world import Call
from schemas.encryption import union
from schemas.events import ChangeMarked, Effect, MemoryRecalled, ToolCalled, ToolStarted, Waited
from schemas.metadata import Envelope, Metadata, canonical_json, deterministic_id, request_hash

__all__ = ["DOUBTFUL", "Identity", "Journal", "Request", "identity_of"]

Identity = tuple[str, str, str, int]
"""What a call is known by within its event: effect type, scope path, request hash, occurrence."""

DOUBTFUL: Final = frozenset({"HandlerTimeout", "CallCancelled", "ToolInDoubt", "ToolNeedsApproval"})
"""Failures that leave it open whether the call did its work."""

_CANCELLED: Final = "CallCancelled"
_NO_PORTS: Final = Ports()
_NOTHING: Final[dict[Identity, Effect]] = {}

EffectT = TypeVar("EffectT", bound=Effect)
ResultT = TypeVar("ResultT")


def identity_of(effect: Effect) -> Identity:
    """The identity that ``effect`` was recorded under."""
    return type(effect).__name__, effect.scope, effect.request_hash, effect.occurrence


class _Place(NamedTuple):
    """The identity of an effect that no call made, with its request."""

    scope: str
    text: str
    hashed: str
    occurrence: int


class Request(Call):
    """One call of a handler: what it asks, and then what came of it.

    ``call`` performs it; ``succeeded`` makes the effect's own fields from the response, ``failed`` those of a call
    without one.
    """

    __slots__ = (
        "call",
        "effect_type",
        "error",
        "failed",
        "fields",
        "hashed",
        "latency_ms",
        "occurrence",
        "recorded",
        "scope",
        "started_at",
        "succeeded",
        "text",
    )

    def __init__(
        self,
        effect_type: type[Effect],
        scope: str,
        text: str,
        call: Callable[["Request"], Awaitable[Any]],
        succeeded: Callable[[Any], Mapping[str, Any]],
        failed: Callable[[], Mapping[str, Any]],
    ) -> None:
        super().__init__()
        self.effect_type, self.scope, self.text = effect_type, scope, text
        self.call, self.succeeded, self.failed = call, succeeded, failed
        self.recorded: Effect | None = None
        self.started_at: datetime | None = None
        self.fields: Mapping[str, Any] = {}
        self.error = ""
        self.latency_ms = 0.0
        self.hashed = request_hash(text)
        self.occurrence = 0


class Journal:
    """The effects of one event's handling by one agent.

    Live, give it ``ports``; calls that ``recorded`` does not answer are performed, and ``sequence`` goes on after the
    highest recorded one. In replay give it ``replaying=True``: a call that was not recorded is a NondeterminismError,
    and nothing is ever performed.

    ``timeout_s`` bounds an attempt: calls under way when it has passed fail, and are recorded as failed, so that replay
    fails at the same place. A handler waits for nothing but its effects, which makes this its own time limit.
    ``on_performed`` is called after each effect that is added to ``performed``; ``durable`` returns when all of
    ``performed`` is committed; ``permitted`` is awaited before each call, and returns when the event is this process's
    to handle for sure.
    """

    # Most events have no effects, so what only effects need is set when there are some; and a subclass that has one of
    # the functions as a method has it for all of its events.
    ports: Ports = _NO_PORTS
    replaying = False
    erased = False
    """Whether an effect that was recorded can't be read any more, since a data subject was forgotten."""
    _timeout_s: float | None = None
    _on_performed: Callable[[], None] | None = None
    _durable: Callable[[], Awaitable[None]] | None = None
    _permitted: Callable[[], Awaitable[None]] | None = None
    _deadline: float | None = None
    _occurrences: dict[tuple[str, str, str], int] | None = None
    _recorded: dict[Identity, Effect] = _NOTHING
    _doubts: set[tuple[str, str, int]] | None = None
    _attempt = 1
    _next = 0
    _stale = False
    _subjects: tuple[str, ...] | None = None

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
        on_performed: Callable[[], None] | None = None,
        durable: Callable[[], Awaitable[None]] | None = None,
        permitted: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self._agent = agent
        self._source = source
        self._key = key
        self._cause = cause
        self.ports = ports
        self.replaying = replaying
        self._timeout_s = timeout_s
        if on_performed is not None:
            self._on_performed = on_performed
        if durable is not None:
            self._durable = durable
        if permitted is not None:
            self._permitted = permitted
        self.performed: list[Envelope] = []
        """Effects performed in this life of the event, over all its attempts, in order of completion."""
        if recorded:
            self._load(sorted(recorded, key=lambda effect: effect.sequence))

    @property
    def agent(self) -> str:
        """The agent's name."""
        return self._agent

    @property
    def data_subjects(self) -> tuple[str, ...]:
        """The key ids of the people that the step is about: those of its event, of its lane's state, and of all that
        was recalled for the event, whichever attempt did it: so replay, which knows no other attempts, has the same.
        """
        return self._cause.data_subjects if self._subjects is None else self._subjects

    def concern(self, subjects: Iterable[str]) -> None:
        """The step is about these people too."""
        known = self.data_subjects
        if not set(subjects).issubset(known):
            self._subjects = union(known, subjects)

    def _recalled(self, effect: Effect) -> None:
        if isinstance(effect, MemoryRecalled):
            for hit in effect.hits:
                if hit.data_subjects:
                    self.concern(hit.data_subjects)

    def _load(self, recorded: list[Effect]) -> None:
        """Take up what earlier lives recorded, in order."""
        if not recorded:
            return
        last = max(effect.attempt for effect in recorded)
        self._next = recorded[-1].sequence + 1
        self._attempt = last if self.replaying else last + 1
        self._recorded = {}
        for effect in recorded:
            self._recalled(effect)
            if not self.replaying:
                self._learn(effect)
            elif not isinstance(effect, Waited) or (effect.attempt == last and effect.request != _mark(last)):
                # The last one of an identity decided. An earlier attempt's delays did not: they were set anew.
                self._recorded[identity_of(effect)] = effect

    def _learn(self, effect: Effect) -> None:
        """What a later live attempt needs to know of ``effect``: its answer, or that it may have done its work."""
        if isinstance(effect, Waited):
            self._stale = True
        elif isinstance(effect, ToolStarted) or (isinstance(effect, ToolCalled) and effect.error):
            self._doubts = self._doubts or set()
            place = effect.scope, effect.request_hash, effect.occurrence
            if isinstance(effect, ToolStarted) or orjson.loads(effect.error)["type"] in DOUBTFUL:
                self._doubts.add(place)
            else:
                self._doubts.discard(place)
        elif not effect.error:
            self._recorded[identity_of(effect)] = effect

    def next_attempt(self) -> None:
        """Make ready to run the handler again: successful calls so far will answer, failed ones are performed anew."""
        if self._recorded is _NOTHING:
            self._recorded = {}
        for envelope in self.performed:
            effect = envelope.event
            if isinstance(effect, Effect) and effect.attempt == self._attempt:
                self._learn(effect)
        self._attempt += 1
        self._occurrences = None
        self._deadline = None

    def unasked(self) -> list[str]:
        """What the attempt that decided recorded, but has not been asked for: ``<effect type> <request hash>`` (12
        digits of it). Earlier attempts may have gone another way. That code no longer asks whether a change applies is
        no difference: what it decides tells.
        """
        return [
            f"{identity[0]} {identity[2][:12]}"
            for identity, effect in self._recorded.items()
            if effect.attempt == self._attempt
            and not isinstance(effect, ToolStarted | ChangeMarked)
            and not self._asked(*identity)
        ]

    def _asked(self, name: str, scope: str, hashed: str, occurrence: int) -> bool:
        return self._occurrences is not None and occurrence < self._occurrences.get((name, scope, hashed), 0)

    # What handlers ask, through agents.effects.

    async def ask(self, request: Request, effect_type: type[EffectT]) -> EffectT:
        """The effect of one call: the recorded one when there is one, else performed and recorded now.

        Raises:
            EffectFailedError: the call failed, now or as recorded.
            MissingPortError: it is to be performed, and this process lacks the part for it.
        """
        turns = of_thread.loop.owner
        if not isinstance(turns, Turns):
            raise RuntimeError(f"{self._agent} asks for {effect_type.__name__} while no handler of it runs")
        request.occurrence = self._occurrence(effect_type.__name__, request.scope, request.hashed)
        request.recorded = recorded = self._recorded.get(
            (effect_type.__name__, request.scope, request.hashed, request.occurrence)
        )
        if recorded is None:
            if self.replaying:
                await turns.give_up(
                    NondeterminismError(
                        f"{self._agent}, event {self._cause.id}: asks for {effect_type.__name__} in scope "
                        f"{request.scope or '/'!r} with request {request.hashed[:12]} (occurrence "
                        f"{request.occurrence}), which was not recorded: {request.text[:200]}"
                    )
                )
            # A missing port is a fault of the configuration, not a failed call: raise before anything is recorded.
            request.failed()
        elif not recorded.error or orjson.loads(recorded.error)["type"] != _CANCELLED:
            request.sequence = recorded.sequence
        effect = await turns.ask(request)
        if effect.error:
            error = orjson.loads(effect.error)
            raise EffectFailedError(error["type"], error["message"], retryable=error["retryable"])
        assert isinstance(effect, effect_type)
        return effect

    def changed(self, change: str) -> bool:
        """Whether ``change`` applies to this event: as the first one to ask was told, over all attempts and crashes."""
        text = canonical_json({"change": change})
        place = _Place("", text, request_hash(text), 0)
        identity = ChangeMarked.__name__, place.scope, place.hashed, place.occurrence
        marked = self._recorded.get(identity)
        if marked is None:
            if self.replaying:
                return False
            taken = not self._begun_otherwise()
            marked = self._record(ChangeMarked, place, datetime.now(UTC), latency_ms=0.0, change=change, taken=taken)
            if self._recorded is _NOTHING:
                self._recorded = {}
            self._recorded[identity] = marked
        assert isinstance(marked, ChangeMarked)
        return marked.taken

    def _begun_otherwise(self) -> bool:
        """Whether an earlier attempt has got further than this one: it made calls that this one has not asked for yet.
        Past this point it was then older code's, and what it paid for, or did outside, is to be taken up again.
        """
        made = [identity for identity, effect in self._recorded.items() if not isinstance(effect, ChangeMarked)]
        made += [(ToolCalled.__name__, *place) for place in self._doubts or ()]
        return not all(self._asked(*identity) for identity in made)

    def _occurrence(self, name: str, scope: str, hashed: str) -> int:
        if self._occurrences is None:
            self._occurrences = {}
        occurrence = self._occurrences.get((name, scope, hashed), 0)
        self._occurrences[name, scope, hashed] = occurrence + 1
        return occurrence

    def key_of(self, request: Request) -> str:
        """The call's idempotency key: the same after a crash and for each attempt."""
        name = request.effect_type.__name__
        return deterministic_id(self._cause.id, self._agent, name, request.scope, request.hashed, request.occurrence)

    def in_doubt(self, request: Request) -> bool:
        """Whether an earlier attempt started this tool call and nobody knows what came of it."""
        return self._doubts is not None and (request.scope, request.hashed, request.occurrence) in self._doubts

    async def started(self, request: Request, **fields: Any) -> None:
        """Record that ``request`` is about to be performed, and wait until that is committed."""
        self._record(ToolStarted, request, datetime.now(UTC), latency_ms=0.0, **fields)
        if self._durable is not None:
            await self._durable()

    async def within_deadline(self, call: Awaitable[ResultT]) -> ResultT:
        """The result of ``call``, if it comes within the attempt's time.

        Raises:
            EffectFailedError: it does not.
        """
        if self._timeout_s is None:
            return await call
        if self._deadline is None:
            self._deadline = time.monotonic() + self._timeout_s
        try:
            async with asyncio.timeout(self._deadline - time.monotonic()) as limit:
                return await call
        except TimeoutError:
            if not limit.expired():
                raise
            raise EffectFailedError(
                "HandlerTimeout", f"no result within {self._timeout_s:g} s of the attempt's first call", retryable=True
            ) from None

    # What turns ask: agents.world.World.

    @property
    def seed(self) -> int:
        """A number that goes with the event: its id's checksum, with room for the numbers of its tasks."""
        return crc32(self._cause.id.encode()) << 16

    async def perform(self, request: Request) -> None:
        """Make the call; what comes of it, failures too, is kept in ``request``."""
        if self._permitted is not None:
            await self._permitted()
        request.started_at, clock = datetime.now(UTC), time.perf_counter()
        try:
            request.fields = request.succeeded(await request.call(request))
        except EffectFailedError as failure:
            request.error = _error_json(failure.error_type, failure.message, failure.retryable)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            request.error = _error_json("CancelledError", "the port cancelled the call itself", retryable=True)
        except Exception as failure:  # noqa: BLE001 - whatever a port raises is recorded as the call's outcome
            request.error = _error_json(type(failure).__name__, str(failure), retryable=True)
        if request.error:
            request.fields = request.failed()
        request.latency_ms = round((time.perf_counter() - clock) * 1000, 3)

    def settle(self, request: Request) -> Effect:
        """The answer that the handler is given: the recorded one, or what came of the call, recorded now."""
        if request.recorded is not None:
            return request.recorded
        assert request.started_at is not None
        return self._record(
            request.effect_type,
            request,
            request.started_at,
            error=request.error,
            latency_ms=request.latency_ms,
            **request.fields,
        )

    def abandon(self, request: Request) -> None:
        """Record that the handler cancelled the call before there was an answer; unless that is recorded."""
        if self.replaying or request.recorded is not None:
            return
        started = request.started_at or datetime.now(UTC)
        self._record(
            request.effect_type,
            request,
            started,
            error=_error_json(_CANCELLED, "the handler did not wait for it any longer", retryable=True),
            latency_ms=round(max((datetime.now(UTC) - started).total_seconds(), 0.0) * 1000, 3),
            **request.failed(),
        )

    def delay_set(self, delay: Delay) -> None:
        """Give ``delay`` its identity, and its sequence if it is recorded to have passed."""
        text = canonical_json({"seconds": delay.seconds})
        hashed = request_hash(text)
        delay.identity = hashed, self._occurrence(Waited.__name__, "", hashed)
        recorded = self._recorded.get((Waited.__name__, "", *delay.identity)) if self.replaying else None
        delay.sequence = None if recorded is None else recorded.sequence

    def delay_passed(self, delay: Delay) -> None:
        """Record that the delay passed while calls were under way: their order decides."""
        hashed, occurrence = delay.identity
        place = _Place("", canonical_json({"seconds": delay.seconds}), hashed, occurrence)
        self._record(Waited, place, datetime.now(UTC), latency_ms=delay.seconds * 1000, seconds=delay.seconds)

    def ended(self) -> None:
        """The handler ran to its end. An attempt that decided, but otherwise than an earlier one whose delays passed,
        leaves a mark if it leaves nothing else: replay must know which of the two it follows.
        """
        if self._stale and not self.replaying and not self._has_recorded():
            text = _mark(self._attempt)
            place = _Place("", text, request_hash(text), 0)
            self._record(Waited, place, datetime.now(UTC), latency_ms=0.0, seconds=0.0)

    def _has_recorded(self) -> bool:
        last = self.performed[-1].event if self.performed else None
        return isinstance(last, Effect) and last.attempt == self._attempt

    def _record(
        self, effect_type: type[EffectT], request: "Request | _Place", started: datetime, **fields: Any
    ) -> EffectT:
        sequence = self._next
        self._next += 1
        effect = effect_type(
            task_id=self._key,
            agent=self._agent,
            event_id=self._cause.id,
            scope=request.scope,
            occurrence=request.occurrence,
            sequence=sequence,
            attempt=self._attempt,
            request_hash=request.hashed,
            request=request.text,
            started_at=started,
            **fields,
        )
        self._recalled(effect)
        subjects = self.data_subjects
        metadata = Metadata(
            id=deterministic_id(
                self._cause.id,
                self._agent,
                effect_type.__name__,
                request.scope,
                # An id is not sealed: it must not tell whether a text that somebody guesses was in the request.
                "" if subjects else request.hashed,
                request.occurrence,
                sequence,
            ),
            source=self._source,
            subject=self._key,
            time=started,
            causation_id=self._cause.id,
            correlation_id=self._cause.correlation_id,
            traceparent=self._cause.traceparent,
            data_subjects=subjects,
        )
        self.performed.append(Envelope(effect, metadata))
        if self._on_performed is not None:
            self._on_performed()
        return effect


def _error_json(error_type: str, message: str, retryable: bool) -> str:
    return canonical_json({"type": error_type, "message": message, "retryable": retryable})


def _mark(attempt: int) -> str:
    return canonical_json({"attempt": attempt})
