"""One simulated step, from its event to what it decides: the calls that it waits for are answered, and it goes on.

In: a step, the effects that the record has of it, and who answers the rest. Out: :class:`Stepped`: a decision, or the
calls at which it stops. A failed new call is tried again as the agent's binding says. The handler is run anew after
each answer, which shows it what it saw before and then the answer: it can't tell that from having waited.
"""

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from agents.agent import Failure
from replay.whatif.answers import Caller, Stop, TaskAnswers, adopted
from replay.whatif.calls import Kept
from replay.whatif.deciding import Ask, Decision, Identity, Want
from replay.whatif.fleet import Fleet, Retrying, Running
from schemas.events import Effect

__all__ = ["Stepped", "carry_out"]

_NEW: Final = 1_000_000
"""Where the order of completion goes on after recorded calls; no step has made so many."""
_JITTER: Final = 0.75
"""The mean of the factor by which live waits are spread."""


@dataclass
class Stepped:
    """How a step went. ``decision`` is None where it stops, at ``stops``, or is ``open``: it wants calls, and was not
    to make any. ``wants`` and ``unasked`` tell how it left the record: what it wanted first, what it did not ask for
    then. ``failure`` is with what it gave up. ``elapsed_ms`` is what its calls, attempts and waits took.
    """

    decision: Decision | None = None
    stops: tuple[Stop, ...] = ()
    open: bool = False
    wants: tuple[Want, ...] = ()
    unasked: tuple[Identity, ...] = ()
    failure: Failure | None = None
    elsewhere: list[Effect] = field(default_factory=list)
    made: list[Effect] = field(default_factory=list)
    elapsed_ms: float = 0.0
    attempts: int = 1


class _Step:
    def __init__(self, ask: Ask, caller: Caller, fleet: Fleet, answers: TaskAnswers, running: Running) -> None:
        self._ask, self._caller, self._fleet, self._answers, self._running = ask, caller, fleet, answers, running
        self._known = list(ask.effects)
        self._recorded_attempt = max((effect.attempt for effect in ask.effects), default=1)
        self._next = _NEW
        self._failed: list[Effect] = []
        """New calls that failed in this attempt."""
        self._fresh = False
        """Whether one of them was made just now, not taken from an earlier run of this what-if."""
        self._flights: dict[Identity, asyncio.Task[Kept | Stop]] = {}
        self.stepped = Stepped()

    async def run(self, *, may_ask: bool) -> Stepped:
        stepped = self.stepped
        try:
            while True:
                decision = await self._fleet.decide(replace(self._ask, effects=tuple(self._known)))
                if decision.wants:
                    if not stepped.wants:
                        stepped.wants, stepped.unasked = decision.wants, decision.unasked
                    if not may_ask and not _instead(decision):
                        stepped.open = True
                        return stepped
                    stepped.stops = await self._answer(decision.wants)
                    if stepped.stops:
                        return stepped
                elif decision.failure is None:
                    self._drop(self._flights)  # it decided without waiting for them
                    stepped.decision = decision
                    stepped.elapsed_ms += decision.busy_ms
                    if not stepped.wants:
                        stepped.unasked = decision.unasked
                    return stepped
                elif self._ask.failure is not None:
                    stepped.decision = replace(decision, failure=None)  # on_failure failed too: nothing is emitted
                    return stepped
                elif not await self._try_again(decision):
                    stepped.failure = decision.failure
                    self._ask = replace(self._ask, failure=decision.failure)
        except asyncio.CancelledError:
            self._drop(self._flights)
            raise
        finally:
            await self._land()

    async def _try_again(self, decision: Decision) -> bool:
        failure = decision.failure
        assert failure is not None
        if not self._failed or not failure.retryable:
            return False
        rule = self._running.retry_of(failure.error_type)
        if self._caller.attempt >= rule.attempts:
            return False
        wait_s = _wait_s(rule, self._caller.attempt)
        self.stepped.elapsed_ms += decision.busy_ms + wait_s * 1000
        if self._fresh:
            await asyncio.sleep(wait_s)
        gone = {id(effect) for effect in self._failed}
        self._known = [effect for effect in self._known if id(effect) not in gone]
        self._failed, self._fresh = [], False
        self._caller = replace(self._caller, attempt=self._caller.attempt + 1)
        self.stepped.attempts += 1
        return True

    async def _answer(self, wants: Sequence[Want]) -> tuple[Stop, ...]:
        """Have one more answer known, or some at once that the record has; else what stops the step.

        One at a time, in the order in which they came first: so a run that goes on where another was killed shows the
        handler the same order.
        """
        found = [(want, effect) for want in wants if (effect := self._answers.elsewhere(self._caller.agent, want))]
        if found:
            self.stepped.elsewhere += [effect for _, effect in found]
            for want, effect in found:
                self._take(want, effect)
            return ()
        kept = [(want, known) for want in wants if (known := self._answers.kept(self._caller, want)) is not None]
        kept = [(want, known) for want, known in kept if want.identity not in self._flights]
        if kept:
            want, known = min(kept, key=lambda item: item[1].number)
            self._took(want, known, fresh=False)
            return ()
        stops = tuple(stop for want in wants if (stop := self._answers.stop(self._caller, want)) is not None)
        if stops:
            return stops
        for want in wants:
            if want.identity not in self._flights:
                self._flights[want.identity] = asyncio.create_task(self._answers.make(self._caller, want))
        by_identity = {want.identity: want for want in wants}
        self._drop(self._flights.keys() - by_identity.keys())  # the handler no longer waits for them
        await asyncio.wait(self._flights.values(), return_when=asyncio.FIRST_COMPLETED)
        ended = [(identity, task.result()) for identity, task in self._flights.items() if task.done()]
        stops = tuple(answer for _, answer in ended if isinstance(answer, Stop))
        if stops:
            return stops
        identity, first = min(
            ((identity, answer) for identity, answer in ended if isinstance(answer, Kept)),
            key=lambda item: item[1].number,
        )
        del self._flights[identity]
        self._took(by_identity[identity], first, fresh=True)
        return ()

    def _took(self, want: Want, kept: Kept, *, fresh: bool) -> None:
        self.stepped.made.append(kept.effect)
        effect = self._take(want, kept.effect)
        if effect.error:
            self._failed.append(effect)
            self._fresh = self._fresh or fresh

    def _take(self, want: Want, effect: Effect) -> Effect:
        taken = adopted(effect, self._caller.cause.id, want, sequence=self._next, attempt=self._recorded_attempt)
        self._next += 1
        self._known.append(taken)
        return taken

    def _drop(self, identities: Iterable[Identity]) -> None:
        for identity in tuple(identities):
            self._flights.pop(identity).cancel()

    async def _land(self) -> None:
        """Wait for what is under way: it is paid for, so it is to be kept."""
        if self._flights:
            await asyncio.gather(*self._flights.values(), return_exceptions=True)


def _instead(decision: Decision) -> bool:
    """Whether a call is wanted in the place of one that was recorded."""
    kinds = {identity[0] for identity in decision.unasked}
    return any(want.kind in kinds for want in decision.wants)


def _wait_s(rule: Retrying, attempt: int) -> float:
    return min(rule.max_backoff_s, rule.backoff_s * 2.0 ** (attempt - 1)) * _JITTER


async def carry_out(
    ask: Ask, caller: Caller, *, fleet: Fleet, answers: TaskAnswers, running: Running, may_ask: bool = True
) -> Stepped:
    """Have the step decided. ``ask.effects`` are the recorded answers that stand; without ``may_ask`` it is left open
    where these are not enough.
    """
    return await _Step(ask, caller, fleet, answers, running).run(may_ask=may_ask)
