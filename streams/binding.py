"""What binds an agent to its input topics, and how it is run there.

In: an agent, topic names and limits. Out: :class:`Binding`, which a processor takes.
"""

from dataclasses import dataclass
from typing import Any

from agents.agent import Agent

__all__ = ["Binding"]


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
    max_in_flight: int = 4096
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
