"""An agent's earlier versions: which class re-decides what, how it is made, and what state it reads."""

from datetime import UTC, datetime
from typing import Any, ClassVar

import pytest
from pydantic import BaseModel

from agents.agent import Agent
from agents.context import Context
from agents.errors import PredecessorError
from agents.step import LaneState, state_for
from schemas.events import PlanRejected, TaskSubmitted

NOW = datetime(2026, 1, 1, tzinfo=UTC)


class OldCount(BaseModel, frozen=True):
    seen: int


class Count(BaseModel, frozen=True):
    seen: int
    of: str = "tasks"


class First(Agent[Any]):
    name, version = "counter", "1"
    consumes, emits = (TaskSubmitted,), (PlanRejected,)
    state_type: ClassVar[type[BaseModel] | None] = OldCount

    async def handle(self, event: TaskSubmitted, ctx: Context[Any]) -> None:
        ctx.state = OldCount(seen=1)


class Third(First):
    version = "3"
    state_type: ClassVar[type[BaseModel] | None] = Count
    predecessors: ClassVar = {"1": First, "2": First}

    async def handle(self, event: TaskSubmitted, ctx: Context[Any]) -> None:
        ctx.state = Count(seen=1)


def test_an_agent_stands_for_its_own_version_and_for_those_it_does_not_name() -> None:
    agent = Third()
    assert agent.at_version("3") is agent
    assert agent.at_version("2.1") is agent
    assert First().at_version("3").version == "1"


def test_a_predecessor_decides_for_the_versions_that_name_it_and_is_made_once() -> None:
    agent = Third()
    first = agent.at_version("1")
    assert type(first) is First
    assert agent.at_version("1") is first
    assert agent.at_version("2") is first, "two versions of one class"
    assert Third().at_version("1") is not first


def test_predecessors_of_another_agent_are_refused() -> None:
    class Other(First):
        name = "other"

    class Confused(Third):
        predecessors: ClassVar = {"1": Other}

    with pytest.raises(PredecessorError, match=r"Confused\.predecessors names Other.*agent 'other', not 'counter'"):
        Confused().at_version("1")


def test_a_predecessor_with_arguments_takes_them_from_its_successor() -> None:
    class Sized(First):
        def __init__(self, size: int) -> None:
            self.size = size

        @classmethod
        def preceding(cls, successor: Agent[Any]) -> "Sized":
            assert isinstance(successor, Larger)
            return cls(successor.size - 1)

    class Larger(Sized):
        version = "2"
        predecessors: ClassVar = {"1": Sized}

    older = Larger(8).at_version("1")
    assert isinstance(older, Sized)
    assert (type(older), older.size) == (Sized, 7)


def test_each_version_reads_the_state_that_another_left() -> None:
    old, new = LaneState(OldCount(seen=2), NOW, NOW), LaneState(Count(seen=2, of="days"), NOW)
    assert state_for(Third(), old) == LaneState(Count(seen=2, of="tasks"), NOW, NOW)
    assert state_for(First(), new) == LaneState(OldCount(seen=2), NOW)
    assert state_for(First(), old) is old
    assert state_for(First(), None) is None
