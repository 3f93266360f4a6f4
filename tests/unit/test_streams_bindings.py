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
from streams.binding import Binding, RetryPolicy
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


@pytest.mark.parametrize("limit", ["concurrency", "max_in_flight", "max_crashes"])
def test_a_limit_out_of_range_is_refused(limit: str) -> None:
    with pytest.raises(ValueError, match=f"{limit} .* must be"):
        Binding(Retriever(), ("work.retrieve.normal",), **{limit: 0})  # type: ignore[arg-type]


def test_waits_double_up_to_their_limit_and_vary() -> None:
    policy = RetryPolicy(attempts=9, backoff_s=1.0, max_backoff_s=5.0)
    for attempt, longest in ((1, 1.0), (2, 2.0), (3, 4.0), (4, 5.0), (9, 5.0)):
        waits = [policy.wait_s(attempt) for _ in range(200)]
        assert all(longest / 2 <= wait <= longest for wait in waits)
        assert len(set(waits)) > 100
