"""Decides recorded steps again, and holds all that they left against what is decided now, byte for byte.

In: the records of one record key, the agents with the topics that they read, and how far each has come. Each step is
run by the same :mod:`agents.step` that ran it live, with the recorded effects in place of the outside world, under the
version that decided it; twice, the second time with a shifted clock and other random numbers (:mod:`replay.guard`).
Out: :class:`~replay.findings.Decided`. A step that was cancelled is not decided again: the log says why it has no
outputs. A fired timer must be one that a step decided now has set.
"""

import copy
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, Protocol

from agents.agent import Agent
from replay.findings import Decided, DecidedStep, Finding, FindingKind, OutputCheck, Verdict, record_hash
from replay.guard import Guard
from replay.recorded import agent_of, by_time, version_of
from replay.steps import KeySteps, Station
from schemas.codec import Codec
from schemas.metadata import Envelope
from schemas.record import Record
from schemas.topics import all_topics

__all__ = [
    "Decided",
    "DecidedStep",
    "Deciding",
    "Finding",
    "FindingKind",
    "Handled",
    "OutputCheck",
    "Station",
    "Verdict",
    "by_time",
    "record_hash",
    "redecide",
]

_KEPT_MS: Final = {name: topic.retention_ms for name, topic in all_topics().items() if topic.retention_ms > 0}


class Handled(Protocol):
    """Which offsets an agent has finished, as its group committed before the log was read."""

    def finished(self, topic: str, partition: int, offset: int) -> bool:
        """Whether the record there is done with."""


async def redecide(
    records: Sequence[tuple[Record, Envelope]],
    *,
    stations: Sequence[Station],
    codec: Codec,
    handled: Mapping[str, Handled] | None = None,
    twice: bool = True,
) -> Decided:
    """Decide again all that ``stations`` handled of ``records``.

    ``records`` are all records of one record key, with outputs of other keys that they caused and the dead letters
    (topic ``dead-letters``) of these records. ``handled`` is by agent: without an agent's entry a step that left
    nothing behind, and that nothing of its lane followed, counts as open.
    """
    decided = await Deciding(stations, codec, handled, twice=twice).decide(records)
    steps = list(decided.steps)
    for sent in decided.sent:
        step = steps[sent.step]
        steps[sent.step] = replace(step, findings=(*step.findings, sent.missing), verdict=Verdict.DIFFERS)
    return replace(decided, steps=tuple(steps))


class Deciding:
    """Decides the records of one key after another's, with what all of them need made once."""

    def __init__(
        self,
        stations: Sequence[Station],
        codec: Codec,
        handled: Mapping[str, Handled] | None = None,
        *,
        twice: bool = True,
        now_ms: int | None = None,
    ) -> None:
        self.codec = codec
        self.guard = Guard(station.agent for station in stations) if twice else None
        self._now_ms = int(time.time() * 1000) if now_ms is None else now_ms
        self._handled = handled or {}
        self._by_topic: dict[str, list[Station]] = {}
        self.agents = frozenset(station.agent.name for station in stations)
        for station in stations:
            for topic in station.topics:
                self._by_topic.setdefault(topic, []).append(station)
        self._versions: dict[tuple[str, str], Agent[Any]] = {}

    async def decide(self, records: Sequence[tuple[Record, Envelope]]) -> Decided:
        """See :func:`redecide`; outputs with other keys that are not among ``records`` are in ``sent``."""
        key = KeySteps(self, by_time(records))
        steps = key.plan(self._by_topic)
        if self.guard is None or self.guard.is_installed:
            # Whoever decides many keys has installed it for all of them.
            for step in steps:
                await key.step(step)
        else:
            with self.guard.installed():
                for step in steps:
                    await key.step(step)
        rest = key.recorded.rest()
        if not rest:
            return Decided(tuple(key.steps), key.states, tuple(key.sent))
        sources = [agent_of(envelope.metadata.source) for _, envelope in rest]
        strays = tuple(item for item, agent in zip(rest, sources, strict=True) if agent in self.agents)
        others = Counter(agent for agent in sources if agent not in self.agents)
        return Decided(tuple(key.steps), key.states, tuple(key.sent), strays, others)

    def version(self, agent: Agent[Any], source: str) -> Agent[Any]:
        """The agent that makes the decisions of ``source``, under that name: a new version is no difference."""
        if not source or source == agent.source:
            return agent
        made = self._versions.get((agent.name, source))
        if made is None:
            older = agent.at_version(version_of(source))
            made = older if older.source == source else copy.copy(older)
            made.__dict__["source"] = source
            self._versions[agent.name, source] = made
        return made

    def finished(self, agent: str, record: Record) -> bool | None:
        """Whether the agent's group says that the record is done with; None where nothing is known of the group."""
        handled = self._handled.get(agent)
        return None if handled is None else handled.finished(record.topic, record.partition, record.offset)

    def gone(self, topic: str, record: Record) -> bool:
        """Whether the topic may have deleted what came of the record."""
        kept = _KEPT_MS.get(topic)
        return kept is not None and record.timestamp_ms < self._now_ms - kept

    def hash_of(self, record: Record) -> str:
        """The record's hash: the one that it carries, if it was taken when it was read."""
        return getattr(record, "hashed", None) or record_hash(record.topic, record.key, record.value, record.headers)
