"""The agents' test bench: scripted ports, and a harness that runs agents by the same step that processors run.

Every step that the harness runs is replayed at once from the effects it recorded, without ports: a step that is not a
function of its event, state and effects fails the test that ran it.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest

from agents.agent import Agent, Failure
from agents.context import LlmRequest, LlmResponse, Ports, RecallRequest, Vectors
from agents.errors import EffectFailedError
from agents.journal import Journal
from agents.step import LaneState, StepResult, failure_of, run_failure, run_step
from schemas.events import DirectoryEntry, Effect, Event, Evidence, Priority, StepAssigned
from schemas.metadata import Envelope, Metadata
from schemas.topics import key_of

AT_MS = 1_767_225_600_000


@dataclass
class ScriptedLlm:
    """Answers with the next of ``answers``; an exception among them is raised."""

    answers: list[str | Exception] = field(default_factory=list)
    requests: list[LlmRequest] = field(default_factory=list)
    name: str = "scripted"

    async def complete(self, request: LlmRequest, *, idempotency_key: str) -> LlmResponse:
        self.requests.append(request)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return LlmResponse(text=answer, provider=self.name, model="m1")


@dataclass
class ScriptedMemory:
    """Recalls ``hits`` for any query, or what ``by_query`` says."""

    hits: Sequence[Evidence] = ()
    by_query: Callable[[str], Sequence[Evidence]] | None = None
    requests: list[RecallRequest] = field(default_factory=list)
    model: str = "scripted"

    async def recall(self, request: RecallRequest) -> tuple[Evidence, ...]:
        self.requests.append(request)
        hits = self.by_query(request.query) if self.by_query else self.hits
        return tuple(hits[: request.limit])


@dataclass
class ScriptedEmbedding:
    """Gives every pair of texts (claim, window) the cosine ``cosine``."""

    cosine: float = 0.0
    calls: list[tuple[str, ...]] = field(default_factory=list)
    model: str = "scripted"
    version: str = "1"
    dimensions: int = 2

    async def embed(self, texts: Sequence[str]) -> Vectors:
        self.calls.append(tuple(texts))
        other = (self.cosine, (1 - self.cosine**2) ** 0.5)
        return np.array([(1.0, 0.0) if index % 2 == 0 else other for index in range(len(texts))], dtype=np.float32)


@dataclass
class ScriptedDirectory:
    """Knows ``entries``; by default nobody has announced itself."""

    entries: tuple[DirectoryEntry, ...] = ()
    asked: list[str] = field(default_factory=list)

    async def lookup(self, capability: str) -> tuple[DirectoryEntry, ...]:
        self.asked.append(capability)
        return tuple(each for each in self.entries if not capability or capability in each.capabilities)


def metadata_of(event: Event, cause: str = "cause-1") -> Metadata:
    key = key_of(event)
    return Metadata(cause, "/clients/test", key, datetime(2026, 1, 1, tzinfo=UTC), correlation_id=key)


class Harness:
    """Runs steps of agents with the ports in ``llm``, ``memory``, ``embedding`` and ``directory``, and replays each."""

    def __init__(self) -> None:
        self.llm: Any = ScriptedLlm()
        self.memory: Any = ScriptedMemory()
        self.embedding: Any = ScriptedEmbedding()
        self.directory: Any = ScriptedDirectory()
        self.failure: Failure | None = None

    async def step(
        self,
        agent: Agent[Any],
        event: Event,
        state: LaneState | None = None,
        *,
        metadata: Metadata | None = None,
        at_ms: int = AT_MS,
    ) -> StepResult:
        """The result of ``agent`` handling ``event``, or of its ``on_failure`` when it raised (see ``failure``)."""
        envelope = Envelope(event, metadata or metadata_of(event))
        ports = Ports(llm=self.llm, memory=self.memory, embedding=self.embedding, directory=self.directory)
        live = self._journal(agent, envelope, ports=ports)
        result = await self._run(agent, envelope, state, live, at_ms)
        effects = [item.event for item in live.performed if isinstance(item.event, Effect)]
        replayed = self._journal(agent, envelope, recorded=effects, replaying=True)
        assert await self._run(agent, envelope, state, replayed, at_ms) == result
        return result

    async def fail(
        self, agent: Agent[Any], event: Event, failure: Failure, state: LaneState | None = None
    ) -> StepResult:
        """The result of ``agent.on_failure``."""
        envelope = Envelope(event, metadata_of(event))
        journal = self._journal(agent, envelope)
        return await run_failure(
            agent, envelope, failure, timestamp_ms=AT_MS, priority=Priority.NORMAL, state=state, journal=journal
        )

    async def drain(self, agents: Sequence[Agent[Any]], event: Event, *, limit: int = 200) -> list[Event]:
        """All events that follow from ``event`` when ``agents`` handle each other's outputs, ``event`` first."""
        queue = deque([Envelope(event, metadata_of(event))])
        states: dict[tuple[str, str], LaneState | None] = {}
        seen: list[Event] = []
        while queue:
            envelope = queue.popleft()
            seen.append(envelope.event)
            assert len(seen) < limit, "the agents keep each other busy for ever"
            for agent in agents:
                if not isinstance(envelope.event, agent.consumes):
                    continue
                if isinstance(envelope.event, StepAssigned) and envelope.event.capability not in agent.capabilities:
                    continue
                lane = agent.name, agent.lane(envelope.event)
                result = await self.step(agent, envelope.event, states.get(lane), metadata=envelope.metadata)
                states[lane] = result.state
                queue.extend(result.outputs)
        return seen

    async def _run(
        self, agent: Agent[Any], envelope: Envelope, state: LaneState | None, journal: Journal, at_ms: int
    ) -> StepResult:
        self.failure = None
        options: dict[str, Any] = {"timestamp_ms": at_ms, "priority": Priority.NORMAL, "state": state}
        try:
            return await run_step(agent, envelope, journal=journal, **options)
        except EffectFailedError as error:
            self.failure = failure_of(error)
            return await run_failure(agent, envelope, self.failure, journal=journal, **options)

    @staticmethod
    def _journal(agent: Agent[Any], envelope: Envelope, **options: Any) -> Journal:
        key = key_of(envelope.event)
        return Journal(agent=agent.name, source=agent.source, key=key, cause=envelope.metadata, **options)


@pytest.fixture(scope="session")
def make_harness() -> Callable[[], Harness]:
    """For tests that need a fresh one in each of many examples."""
    return Harness


@pytest.fixture
def harness() -> Harness:
    return Harness()
