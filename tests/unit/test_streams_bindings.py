from agents.embedder import Embedder
from schemas.topics import CAPABILITIES, all_topics
from streams.bindings import bindings

BINDINGS = bindings(object.__new__(Embedder))


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
