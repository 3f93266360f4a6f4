"""Which agent reads which topics, and how it is run: one screen.

In: the agents. Out: a :class:`Binding` each, what a deployment runs. An agent's lane (``Agent.lane``) orders its
events; what it emits goes to the topic of the event's type, at the priority of the topic that its cause came from.
"""

from typing import Final

from agents.coordinator import Coordinator
from agents.decomposer import Decomposer
from agents.embedder import Embedder
from agents.overseer import Overseer
from agents.researcher import Researcher
from agents.retriever import Retriever
from schemas.topics import TOPICS
from streams.binding import Binding

__all__ = ["Binding", "bindings"]

_NAMES: Final = {topic.name: topic.names() for topic in TOPICS}


def bindings(embedder: Embedder) -> tuple[Binding, ...]:
    """Every agent and its topics. The Embedder is handed in, as it is made for the process's embedding model."""
    return (
        Binding(Decomposer(), _NAMES["tasks"], timeout_s=120.0),
        Binding(Coordinator(), _NAMES["tasks.lifecycle"], timeout_s=120.0),
        Binding(Retriever(), _work("retrieve")),
        Binding(Researcher(), _work("research"), timeout_s=180.0),
        Binding(Overseer(), _NAMES["work.results"]),
        # A document is embedded whole; few at a time keep its vectors' memory small.
        Binding(embedder, _NAMES["documents"], concurrency=8, max_in_flight=64, timeout_s=300.0),
    )


def _work(capability: str) -> tuple[str, ...]:
    return tuple(name for name in _NAMES["work"] if name.startswith(f"work.{capability}."))
