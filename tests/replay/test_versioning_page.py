"""docs/versioning.md: its examples are run, and do what it says."""

import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import pytest

from agents.agent import Agent
from agents.context import LlmRequest, LlmResponse, Ports
from agents.journal import Journal
from agents.step import run_step
from replay.decide import Decided, Station, redecide
from schemas.codec import Codec
from schemas.events import ChangeMarked, LlmCalled, Priority, TaskSubmitted
from schemas.metadata import Envelope, Metadata
from schemas.record import Record
from schemas.topics import key_of, topic_name
from tests.replay.record import SYSTEMS

PAGE: Final = Path(__file__).parents[2] / "docs" / "versioning.md"
CODEC: Final = Codec()
AT_MS: Final = 1_767_225_600_000


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    """The names that the page's examples define, one after another."""
    names: dict[str, Any] = {"__name__": "page"}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL):
        exec(compile(block, str(PAGE), "exec"), names)
    return names


class Naysayer:
    name = "naysayer"

    async def complete(self, request: LlmRequest, *, idempotency_key: str) -> LlmResponse:
        return LlmResponse(text="no", provider=self.name, model="n")


async def live(agent: Agent[Any], number: int, objective: str) -> list[Record]:
    """The records of a task that ``agent`` handled."""
    key = f"t{number}"
    cause = Metadata(f"e{number}", "/clients/test", key, datetime(2026, 1, 1, tzinfo=UTC), correlation_id=key)
    envelope = Envelope(TaskSubmitted(task_id=key, objective=objective), cause)
    journal = Journal(agent=agent.name, source=agent.source, key=key, cause=cause, ports=Ports(llm=Naysayer()))
    result = await run_step(agent, envelope, timestamp_ms=AT_MS, priority=Priority.NORMAL, state=None, journal=journal)
    records = []
    for offset, item in enumerate((envelope, *journal.performed, *result.outputs), 10 * number):
        value, headers = CODEC.encode(item.event, item.metadata)
        records.append(Record(topic_name(item.event), 0, offset, AT_MS, key_of(item.event).encode(), value, headers))
    return records


async def audit(agent: Agent[Any], records: list[Record]) -> Decided:
    history = [(record, CODEC.decode(record)) for record in records]
    return await redecide(history, stations=[Station(agent, frozenset({"tasks.normal"}))], codec=CODEC)


async def test_each_version_of_the_examples_is_audited_by_its_own_code(page: dict[str, Any]) -> None:
    first, second, polite = page["FirstDoorkeeper"](), page["Doorkeeper"](), page["PoliteDoorkeeper"]()
    for number, (agent, objective) in enumerate(
        ((first, "hello"), (second, "hello"), (first, "a b c d"), (second, "a b c d"), (polite, "a b c d"))
    ):
        records = await live(agent, number, objective)
        found = await audit(polite, records)
        assert found.findings == ()
        (step,) = found.steps
        assert (step.version, len(step.outputs)) == (agent.version, 1)
    # Without what the page says, it is seen.
    assert (await audit(first, await live(second, 6, "hello"))).findings
    assert (await audit(page["Doorkeeper"](), records)).findings


async def test_the_table_of_changed_is_what_is_recorded(page: dict[str, Any]) -> None:
    events = [CODEC.decode(record).event for record in await live(page["PoliteDoorkeeper"](), 1, "a b c d")]
    marked, called = events[1:3]
    assert isinstance(marked, ChangeMarked)
    assert (marked.change, marked.taken) == ("polite", True)
    assert isinstance(called, LlmCalled)
    assert "Please tell: Is this a question? a b c d" in called.request


def test_the_commands_of_the_page_are_there() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert "python -m tests.replay.record extractive" in text
    assert set(SYSTEMS) == {"extractive", "scripted", "racing"}
    assert "extractive, scripted or racing" in text
