"""The agents of a simulation, wherever their code runs: :class:`Fleet`, and the one of this process.

In: an event, to learn whose it is; a step, to have it decided. Out: lanes and decisions. :mod:`replay.whatif.revision`
has the fleet whose code is another revision's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from agents.agent import Agent
from agents.step import concerns, lane_of
from replay.whatif.deciding import Ask, Decision, decide
from schemas.codec import Codec
from schemas.metadata import Envelope
from schemas.record import Record

__all__ = ["Fleet", "LocalFleet", "Post", "Retrying", "Taker"]


class Retrying(Protocol):
    """How a failed call is tried again; a binding's policy is one. Waits are in seconds."""

    @property
    def attempts(self) -> int:
        """How often in all."""

    @property
    def backoff_s(self) -> float:
        """The first wait, doubled each time."""

    @property
    def max_backoff_s(self) -> float:
        """The longest."""


class Running(Protocol):
    """How an agent is run live; a binding is one."""

    @property
    def timeout_s(self) -> float | None:
        """Seconds that an attempt may take."""

    def retry_of(self, error_type: str) -> Retrying:
        """The policy for a retryable failure of this type."""


@dataclass(frozen=True, slots=True)
class Post:
    """An agent, the topics that it reads, and how it is run there."""

    agent: Agent[Any]
    topics: frozenset[str]
    running: Running


Taker = tuple[str, str]
"""An agent's name, and the lane of the event in it."""


class Fleet(Protocol):
    """Agents that can be asked."""

    local: bool
    """Whether they are this process's code, which wrote the histories or still decides as their writers did."""

    def names(self) -> Sequence[str]:
        """Who they are."""

    def source(self, agent: str) -> str:
        """The CloudEvents source of what the agent emits."""

    async def takers(self, record: Record, envelope: Envelope) -> Sequence[Taker]:
        """Which of them consume the event, whatever topic it is in."""

    async def decide(self, ask: Ask) -> Decision:
        """What one of them makes of a step."""


class LocalFleet:
    """The agents of this process; a step is decided by the version that is asked for, where an agent knows it."""

    local = True

    def __init__(self, agents: Sequence[Agent[Any]], codec: Codec) -> None:
        self._agents: Mapping[str, Agent[Any]] = {agent.name: agent for agent in agents}
        self._codec = codec

    def names(self) -> Sequence[str]:
        """Who they are."""
        return tuple(self._agents)

    def source(self, agent: str) -> str:
        """The CloudEvents source of what the agent emits."""
        return self._agents[agent].source

    async def takers(self, record: Record, envelope: Envelope) -> Sequence[Taker]:
        """Which of them consume the event; one for which it has no lane does not handle it."""
        found = []
        for name, agent in self._agents.items():
            if concerns(agent, envelope.event):
                try:
                    found.append((name, lane_of(agent, envelope.event)))
                except Exception:  # noqa: BLE001 - as live: the record goes to dead-letters
                    continue
        return found

    async def decide(self, ask: Ask) -> Decision:
        """What the agent makes of the step."""
        agent = self._agents[ask.agent]
        return await decide(agent.at_version(ask.version) if ask.version else agent, ask, self._codec)
