from typing import Any

import pytest

from agents.agent import Agent
from agents.coordinator import Coordinator
from agents.decomposer import Decomposer
from agents.embedder import Embedder
from agents.overseer import Overseer
from agents.researcher import Researcher
from agents.retriever import Retriever
from schemas.topics import CAPABILITIES, all_topics
from streams.bindings import bind

AGENTS: list[Agent[Any]] = [
    Decomposer(),
    Coordinator(),
    Retriever(),
    Researcher(),
    Overseer(),
    object.__new__(Embedder),
]
BINDINGS = [bind(agent) for agent in AGENTS]


def test_every_agent_reads_the_topics_of_all_that_it_consumes() -> None:
    topics = all_topics()
    for binding in BINDINGS:
        carried = {event for name in binding.topics for event in topics[name].events}
        assert set(binding.agent.consumes) <= carried, binding.agent.name


def test_every_capability_has_a_worker_at_every_priority() -> None:
    read = {name for binding in BINDINGS for name in binding.topics}
    for capability in CAPABILITIES:
        for priority in ("high", "normal", "low"):
            assert f"work.{capability}.{priority}" in read


def test_groups_are_distinct() -> None:
    assert len({binding.group for binding in BINDINGS}) == len(BINDINGS)


def test_an_agent_without_topics_is_refused() -> None:
    stranger = type("Stranger", (Agent,), {"name": "stranger", "handle": Retriever.handle})()
    with pytest.raises(LookupError, match="what topics stranger reads"):
        bind(stranger)
