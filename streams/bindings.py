"""Which agent reads which topics, and how it is run: one screen.

In: an agent. Out: its :class:`Binding`, what a deployment runs. An agent's lane (``Agent.lane``) orders its events;
what it emits goes to the topic of the event's type, at the priority of the topic that its cause came from.
"""

from typing import Any, Final

from agents.agent import Agent
from agents.coordinator import Coordinator
from agents.decomposer import Decomposer
from agents.embedder import Embedder
from agents.overseer import Overseer
from agents.researcher import Researcher
from agents.retriever import Retriever
from schemas.topics import TOPICS
from streams.binding import Binding

__all__ = ["Binding", "bind"]

_NAMES: Final = {topic.name: topic.names() for topic in TOPICS}


def bind(agent: Agent[Any]) -> Binding:
    """``agent`` on its topics.

    Raises:
        LookupError: nothing says what topics it reads; add it here.
    """
    match agent:
        case Decomposer():
            return Binding(agent, _NAMES["tasks"], timeout_s=120.0)
        case Coordinator():
            return Binding(agent, _NAMES["tasks.lifecycle"], timeout_s=120.0)
        case Retriever():
            return Binding(agent, _work("retrieve"))
        case Researcher():
            return Binding(agent, _work("research"), timeout_s=180.0)
        case Overseer():
            return Binding(agent, _NAMES["work.results"])
        case Embedder():
            # Enough documents side by side to fill the model's batches, few enough that each is soon done and their
            # vectors take little memory. A document of 10,000 chunks takes minutes on a CPU.
            return Binding(agent, _NAMES["documents"], concurrency=8, max_in_flight=64, timeout_s=900.0)
    raise LookupError(f"no binding says what topics {agent.name} reads; add it in streams.bindings.bind")


def _work(capability: str) -> tuple[str, ...]:
    return tuple(name for name in _NAMES["work"] if name.startswith(f"work.{capability}."))
