"""The agents under test, and the outside world that one of them calls.

In: StepAssigned events whose ``parameters`` say what to do, and the timers that they set. Out: answers that follow from
the input alone, so that a checker can tell each one in advance, and a file that names every real call with its time and
idempotency key. The outside world fails some calls, now and then for so long that the event is parked.
"""

import asyncio
import hashlib
import os
import random
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from agents.agent import Agent, Failure
from agents.answering import step_failed
from agents.context import Context, LlmRequest, LlmResponse, Message, Purpose
from agents.errors import EffectFailedError
from schemas.events import StepAssigned, StepCompleted, StepFailed, TimerFired
from tests.support.steps import Total, completed

__all__ = [
    "BUSY",
    "CALLER",
    "OVERLOADED",
    "SUMMER",
    "TIMER",
    "CallLog",
    "Caller",
    "Summer",
    "answer_of",
    "call_answer",
    "due_text",
]

SUMMER: Final = "chaos-summer"
CALLER: Final = "chaos-caller"
TIMER: Final = "timer"
"""The capability of the answers that timers lead to."""
BUSY: Final = "Busy"
"""A call failed, and is worth another try at once."""
OVERLOADED: Final = "Overloaded"
"""A call failed, and is worth another try after a while."""
_SLOW_CALL_S: Final = 0.3
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_FAILS: Final = {BUSY: 0.03, OVERLOADED: 0.02}


def set_timer(event: StepAssigned, ctx: Context[Total]) -> None:
    """Set the timer that ``event`` asks for, if it does: named after its step, so many milliseconds ahead."""
    if TIMER in event.parameters:
        ctx.timer(event.step_id, ctx.now + timedelta(milliseconds=int(event.parameters[TIMER])))


def due_text(due: datetime) -> str:
    """A timer's due time as its answer has it: microseconds since the epoch."""
    return str((due - _EPOCH) // timedelta(microseconds=1))


def rung(event: TimerFired) -> StepCompleted:
    """What a timer leads to: one answer under the step that set it."""
    return StepCompleted(
        task_id=event.task_id,
        step_id=event.timer,
        attempt=1,
        capability=TIMER,
        objective="chaos",
        answer=due_text(event.due),
    )


class Summer(Agent[Total]):
    """Sums each task's numbers; a few events wait, so that others overtake and the offsets done are no prefix."""

    name, version = SUMMER, "1"
    consumes = (StepAssigned, TimerFired)
    emits = (StepCompleted,)
    state_type = Total

    async def handle(self, event: StepAssigned | TimerFired, ctx: Context[Total]) -> None:
        if isinstance(event, TimerFired):
            ctx.emit(rung(event))
            return
        if random.random() < 0.02:
            await asyncio.sleep(random.random() * 0.2)
        before = ctx.state or Total()
        ctx.state = Total(sum=before.sum + int(event.parameters["number"]), count=before.count + 1)
        ctx.emit(completed(event, str(ctx.state.sum)))
        set_timer(event, ctx)


def call_answer(question: str) -> str:
    """What the outside world answers to ``question``, always."""
    return hashlib.blake2b(question.encode(), digest_size=6).hexdigest()


def answer_of(event: StepAssigned, count: int) -> str:
    """What :class:`Caller` answers to the ``count``-th event of its lane that does not fail."""
    calls = int(event.parameters["calls"])
    return f"{count}:" + ",".join(call_answer(f"{event.step_id}#{number}") for number in range(calls))


class Caller(Agent[Total]):
    """Makes an event's ``calls`` calls, side by side or (``order`` = ``serial``) one after the other, then counts.

    An event with ``fail`` gives up after its calls: it must end in dead-letters, leave a StepFailed, no state and no
    timer.
    """

    name, version = CALLER, "1"
    consumes = (StepAssigned, TimerFired)
    emits = (StepCompleted, StepFailed)
    state_type = Total

    async def handle(self, event: StepAssigned | TimerFired, ctx: Context[Total]) -> None:
        if isinstance(event, TimerFired):
            ctx.emit(rung(event))
            return

        async def call(number: int) -> str:
            question = Message(role="user", content=f"{event.step_id}#{number}")
            return (await ctx.scope(str(number)).llm(LlmRequest(purpose=Purpose.ANSWER, messages=(question,)))).text

        numbers = range(int(event.parameters["calls"]))
        if event.parameters.get("order") == "serial":
            answers = [await call(number) for number in numbers]
        else:
            answers = await asyncio.gather(*map(call, numbers))
        set_timer(event, ctx)
        if "fail" in event.parameters:
            raise ValueError("told to fail")
        before = ctx.state or Total()
        ctx.state = Total(count=before.count + 1)
        ctx.emit(completed(event, f"{ctx.state.count}:" + ",".join(answers)))

    async def on_failure(self, event: StepAssigned | TimerFired, failure: Failure, ctx: Context[Total]) -> None:
        assert isinstance(event, StepAssigned), f"{event} failed: {failure}"
        ctx.emit(step_failed(event, failure))


class CallLog:
    """A language model that answers or fails after up to 300 ms, and whose every call is on disk before it is made.

    A line a call: nanoseconds since the epoch, process id, question, idempotency key. The file is appended to with one
    write a line, so lines of processes that were killed are whole.
    """

    name = "chaos"

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    async def complete(self, request: LlmRequest, *, idempotency_key: str = "") -> LlmResponse:
        question = request.messages[-1].content
        os.write(self._file, f"{time.time_ns()}\t{os.getpid()}\t{question}\t{idempotency_key}\n".encode())
        await asyncio.sleep(random.random() * _SLOW_CALL_S)
        drawn = random.random()
        for error_type, share in _FAILS.items():
            drawn -= share
            if drawn < 0:
                raise EffectFailedError(error_type, "the world does so now and then", retryable=True)
        return LlmResponse(text=call_answer(question), provider=self.name, model=self.name, completion_tokens=1)
