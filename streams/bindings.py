"""Which agent reads which topics, and how it is run: one screen.

In: the agents. Out: a :class:`Binding` each, what a deployment runs. An agent's lane (``Agent.lane``) orders its
events; what it emits goes to the topic of the event's type, at the priority of the topic that its cause came from.
"""

from dataclasses import dataclass
from typing import Any, Final

from agents.agent import Agent
from agents.coordinator import Coordinator
from agents.decomposer import Decomposer
from agents.embedder import Embedder
from agents.overseer import Overseer
from agents.researcher import Researcher
from agents.retriever import Retriever
from schemas.topics import TOPICS

__all__ = ["Binding", "bindings"]

_NAMES: Final = {topic.name: topic.names() for topic in TOPICS}


@dataclass(frozen=True, slots=True)
class Binding:
    """An agent bound to its input topics.

    ``concurrency`` is how many of its handlers may wait at once in one process; ``max_in_flight`` bounds the events
    that are fetched and not yet committed (each costs a few KiB). A failed effect that is worth it is tried again up to
    ``max_attempts`` times in all, after ``backoff_s``, doubled each time up to ``max_backoff_s``, with jitter.
    ``timeout_s`` bounds an attempt, None for no bound.
    """

    agent: Agent[Any]
    topics: tuple[str, ...]
    concurrency: int = 256
    max_in_flight: int = 8192
    max_attempts: int = 3
    backoff_s: float = 0.2
    max_backoff_s: float = 30.0
    timeout_s: float | None = 60.0

    @property
    def group(self) -> str:
        """The consumer group: ``magnatronic.<agent's name>``."""
        return f"magnatronic.{self.agent.name}"

    @property
    def stateful(self) -> bool:
        """Whether the agent keeps state, and so has changelogs."""
        return self.agent.state_type is not None


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
