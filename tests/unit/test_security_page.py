"""docs/security.md gives each agent the rights on topics that it needs, and none beside."""

from itertools import product
from typing import Any

import pytest

from agents.agent import Agent
from agents.embedder import Embedder
from magnatronic.roles import AGENT_ROLES, SINK_ROLES, all_agents
from schemas.topics import all_topics
from sinks.clickhouse.writer import ClickHouseSink
from sinks.milvus.sink import MilvusSink
from streams.bindings import bind
from streams.directory import DIRECTORY_TOPIC
from streams.forgotten import PRIVACY_TOPIC
from streams.rights import rights_on_topics
from tests.support.secured import Right
from tests.support.secured_rights import rights_of

# What it is made with has nothing to do with its topics, and takes a model's files.
AGENTS: dict[str, Agent[Any]] = {agent.name: agent for agent in (*all_agents(), object.__new__(Embedder))}


def covers(right: Right, topic: str, operation: str) -> bool:
    named = topic.startswith(right.name[:-1]) if right.name.endswith("*") else topic == right.name
    return right.kind == "TOPIC" and named and right.operation == operation


@pytest.mark.parametrize("role", AGENT_ROLES)
def test_an_agent_s_row(role: str) -> None:
    granted = [right for right in rights_of(role) if right.kind == "TOPIC" and right.operation != "CREATE"]
    needed = {(topic, each.name) for topic, wanted in rights_on_topics(bind(AGENTS[role])).items() for each in wanted}
    needed.add((PRIVACY_TOPIC, "READ"))  # its process drops what it remembers
    if role == "coordinator":
        needed.add((DIRECTORY_TOPIC, "READ"))  # it routes by it
    assert [each for each in needed if not any(covers(right, *each) for right in granted)] == []
    assert [right for right in granted if not any(covers(right, *each) for each in needed)] == []
    # A prefix takes in no topic of the platform that is not needed.
    taken = {
        each for each in product(all_topics(), ("READ", "WRITE")) if any(covers(right, *each) for right in granted)
    }
    assert taken <= needed


def test_the_sinks_rows() -> None:
    assert len(SINK_ROLES) == 2
    for role, topics in (
        ("sink-clickhouse", tuple(all_topics())),
        ("sink-milvus", MilvusSink(None).topics),  # type: ignore[arg-type]
    ):
        rights = rights_of(role)
        assert rights == [*(Right("TOPIC", topic, "READ") for topic in topics), Right("GROUP", role, "READ")]
    assert ClickHouseSink(None).topics == tuple(all_topics())  # type: ignore[arg-type]
