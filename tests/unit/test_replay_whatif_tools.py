"""Tools in what-ifs: recorded results are taken, no tool ever runs, and one can be taken away or added."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agents.context import Context, Ports, ToolInfo
from agents.errors import EffectFailedError
from agents.prompts import PROMPTS, Prompts
from agents.retriever import Retriever
from replay.whatif.changes import Changes
from replay.whatif.result import Departure, Status, TaskResult
from schemas.events import StepAssigned
from tests.support.whatif import Model, fleet_of, recorded, simulated

ASKED = Changes(prompts={"answer": "Answer in verse."}, ask="model")


@dataclass
class Outbox:
    """A tool that can't be undone."""

    sent: list[str] = field(default_factory=list)
    known: Sequence[str] = ("mail",)

    def describe(self, name: str) -> ToolInfo:
        if name not in self.known:
            raise EffectFailedError("UnknownTool", f"there is no tool {name!r}", retryable=False)
        return ToolInfo(name, side_effects=True)

    async def call(self, name: str, arguments: str, *, idempotency_key: str) -> str:
        self.sent.append(arguments)
        return "true"


class Sender(Retriever):
    """A retriever that mails what it is asked, in the tone of its prompt."""

    async def handle(self, event: StepAssigned, ctx: Context[Any]) -> None:
        await super().handle(event, ctx)
        await ctx.tool("mail", {"text": event.objective, "tone": self._prompts.answer[:20]})


def fleet(prompts: Prompts = PROMPTS) -> Any:
    return tuple(Sender(prompts) if agent.name == "retriever" else agent for agent in fleet_of(prompts))


async def what_if(tools: Outbox, folder: Path, changes: Changes, llm: Any = None) -> TaskResult:
    records = await recorded("What is uvloop?", agents=fleet(), tools=tools)
    agents = fleet(PROMPTS.with_texts(changes.prompts))
    return await simulated(records, folder, changes=changes, ports=Ports(llm=llm, tools=tools), agents=agents)


async def test_recorded_results_are_taken(tmp_path: Path) -> None:
    outbox = Outbox()
    result = await what_if(outbox, tmp_path, Changes())
    assert (result.status, result.divergences) == (Status.SAME, ())
    assert len(outbox.sent) == 1  # when it was recorded


async def test_a_changed_call_would_run_and_does_not(tmp_path: Path) -> None:
    outbox = Outbox()
    result = await what_if(outbox, tmp_path, ASKED, Model())
    assert result.status is Status.STOPPED
    assert [(would["would"], would["kind"]) for would in result.would] == [("would run", "ToolCalled")]
    assert "Answer in verse." in result.would[0]["request"]
    assert len(outbox.sent) == 1


async def test_a_tool_that_is_taken_away_is_unknown(tmp_path: Path) -> None:
    outbox = Outbox()
    result = await what_if(outbox, tmp_path, Changes(without_tools=("mail",)))
    assert (result.before.outcome, result.after.outcome) == ("TaskCompleted", "TaskFailed")
    assert "UnknownTool: there is no tool 'mail'" in result.after.answer
    first = result.first
    assert first is not None
    assert (first.kind, first.what, first.field, first.before) == (Departure.ASKS, "ToolCalled", "tool", "mail")
    assert len(outbox.sent) == 1


async def test_a_tool_that_is_added_would_run(tmp_path: Path) -> None:
    outbox = Outbox(known=())
    (tmp_path / "same").mkdir()
    assert (await what_if(outbox, tmp_path / "same", Changes())).status is Status.SAME
    result = await what_if(outbox, tmp_path, Changes(with_tools=("mail",)))
    assert (result.before.outcome, result.status) == ("TaskFailed", Status.STOPPED)
    assert [would["would"] for would in result.would] == ["would run"]
    assert outbox.sent == []
