"""New calls of handlers that make several at once: side by side, raced, given up; and the same when resumed."""

import asyncio
from pathlib import Path
from typing import Any

from agents.context import Context, LlmRequest, LlmResponse, Message, Ports, Purpose
from agents.prompts import PROMPTS, Prompts
from agents.retriever import Retriever
from agents.text import not_found
from replay.whatif.changes import Changes
from replay.whatif.result import Status, TaskResult
from schemas.events import StepAssigned, StepCompleted
from schemas.record import Record
from tests.support.whatif import fleet_of, recorded, simulated

ASKED = Changes(prompts={"answer": "quick:10,slow:200"}, ask="model")


class Timed:
    """Answers each request after as many milliseconds as its system text says."""

    name = "timed"

    def __init__(self) -> None:
        self.began: list[str] = []
        self.ended: list[str] = []

    async def complete(self, request: LlmRequest, *, idempotency_key: str) -> LlmResponse:
        if request.purpose is not Purpose.ANSWER:
            return LlmResponse(text=PLAN, provider=self.name, model="m")
        name, _, milliseconds = request.system.partition(":")
        self.began.append(name)
        await asyncio.sleep(int(milliseconds) / 1000)
        self.ended.append(name)
        return LlmResponse(text=name, provider=self.name, model="m", prompt_tokens=5)


PLAN = '{"steps":[{"id":"1","capability":"retrieve","objective":"uvloop?","depends_on":[]}],"rationale":"x"}'


class Several(Retriever):
    """Asks once for each part of its prompt, all at once, and says what came in which order."""

    def __init__(self, prompts: Prompts = PROMPTS) -> None:
        super().__init__(prompts)
        parts = prompts.answer.split(",")
        self.parts = parts if ":" in parts[0] else ["first:1", "second:2"]

    async def ask(self, part: str, ctx: Context[Any]) -> str:
        message = Message(role="user", content="?")
        request = LlmRequest(purpose=Purpose.ANSWER, system=part, messages=(message,))
        return (await ctx.scope(part).llm(request)).text

    async def handle(self, event: StepAssigned, ctx: Context[Any]) -> None:
        order: list[str] = []

        async def note(part: str) -> None:
            order.append(await self.ask(part, ctx))

        await asyncio.gather(*(note(part) for part in self.parts))
        self.tell(event, ctx, ", ".join(order))

    def tell(self, event: StepAssigned, ctx: Context[Any], answer: str) -> None:
        told = event.model_dump(include={"task_id", "step_id", "attempt", "revision", "capability", "objective"})
        ctx.emit(StepCompleted(**told, answer=not_found(answer)))


class Racing(Several):
    """Takes the first answer, and gives the others up."""

    async def handle(self, event: StepAssigned, ctx: Context[Any]) -> None:
        tasks = [asyncio.create_task(self.ask(part, ctx)) for part in self.parts]
        done, late = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in late:
            task.cancel()
        self.tell(event, ctx, ", ".join(task.result() for task in done))


RECORDS: dict[type[Several], list[Record]] = {}


async def what_if(kind: type[Several], folder: Path, llm: Any, changes: Changes = ASKED) -> TaskResult:
    def fleet(prompts: Prompts = PROMPTS) -> Any:
        return tuple(kind(prompts) if agent.name == "retriever" else agent for agent in fleet_of(prompts))

    if kind not in RECORDS:
        RECORDS[kind] = await recorded("What is uvloop?", agents=fleet(), llm=Timed())
    records = RECORDS[kind]
    agents = fleet(PROMPTS.with_texts(changes.prompts))
    return await simulated(records, folder, changes=changes, ports=Ports(llm=llm), agents=agents)


def said(result: TaskResult) -> str:
    return result.after.answer.partition(": ")[2].rstrip(".")


class Nobody:
    name = "nobody"

    async def complete(self, request: LlmRequest, *, idempotency_key: str) -> LlmResponse:
        raise AssertionError("it was paid for already")


async def test_unchanged_they_go_as_recorded(tmp_path: Path) -> None:
    for number, kind in enumerate((Several, Racing)):
        (tmp_path / str(number)).mkdir()
        result = await what_if(kind, tmp_path / str(number), Nobody(), Changes())
        assert (result.status, result.divergences) == (Status.SAME, ())


async def test_calls_at_once_are_made_at_once_and_come_as_they_end(tmp_path: Path) -> None:
    llm = Timed()
    changes = Changes(prompts={"answer": "slow:150,quick:10,middle:80"}, ask="model")
    result = await what_if(Several, tmp_path, llm, changes)
    assert llm.began == ["slow", "quick", "middle"]
    assert said(result) == "quick, middle, slow"
    assert result.before.latency_ms is not None
    assert result.after.latency_ms is not None
    # Both asked for a plan and the directory for 40 ms each; then two calls after one another, and three side by side.
    assert 230 <= result.after.latency_ms < 230 + 80
    again = await what_if(Several, tmp_path, Nobody(), changes)
    assert again == result


async def test_a_race_is_won_once_and_the_loser_given_up(tmp_path: Path) -> None:
    llm = Timed()
    result = await what_if(Racing, tmp_path, llm)
    assert said(result) == "quick"
    assert (llm.began, llm.ended) == (["quick", "slow"], ["quick"])
    assert result.made == 1
    assert await what_if(Racing, tmp_path, Nobody()) == result
