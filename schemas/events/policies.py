"""Policies that agents decide by, and the directory of agents: topics ``policies`` and ``agents.directory``."""

from enum import StrEnum

from schemas.events.base import Event, Value

__all__ = [
    "AgentHeartbeat",
    "AgentRegistered",
    "DirectoryEntry",
    "Health",
    "PolicyPromoted",
    "PolicyProposed",
    "PolicyRolledBack",
]


class Health(StrEnum):
    """The state of an agent's instance."""

    STARTING = "starting"
    READY = "ready"
    BUSY = "busy"
    DEGRADED = "degraded"
    GONE = "gone"


class PolicyProposed(Event, family="policies"):
    """A new version of a policy is put forward. ``content`` is canonical JSON."""

    name: str
    version: int
    content: str
    rationale: str = ""


class PolicyPromoted(Event, family="policies"):
    """A proposed policy is in force. ``evidence`` names the replay that it passed. ``content`` is canonical JSON."""

    name: str
    version: int
    content: str
    evidence: str = ""


class PolicyRolledBack(Event, family="policies"):
    """The policy goes back to an earlier version."""

    name: str
    version: int
    to_version: int
    reason: str = ""


class AgentRegistered(Event, family="policies"):
    """An agent and what it can do. ``instance`` names the process."""

    name: str
    instance: str
    version: str
    capabilities: tuple[str, ...] = ()
    consumes: tuple[str, ...] = ()
    emits: tuple[str, ...] = ()


class AgentHeartbeat(Event, family="policies"):
    """An agent's instance lives. ``in_flight`` counts the events being handled."""

    name: str
    instance: str
    health: Health
    in_flight: int = 0


class DirectoryEntry(Value):
    """One agent's instance as the directory knows it, when a handler asked."""

    agent: str
    instance: str
    version: str
    capabilities: tuple[str, ...] = ()
    health: Health
    in_flight: int = 0
