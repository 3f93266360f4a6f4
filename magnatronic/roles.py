"""The roles that a process can have, put together from the settings.

In: :class:`~magnatronic.settings.Settings` and Kafka client settings. Out: bindings of agents, the ports they decide
through, and sinks. ``up`` runs all roles in one process, ``run`` one of them on a cluster.
"""

import contextlib
import socket
from collections.abc import Sequence
from typing import Any, Final

from agents.agent import Agent
from agents.context import LanguageModel, Ports
from agents.embedder import Embedder
from agents.memory.chunking import Chunker
from agents.memory.embedding import BatchingEmbedder
from agents.memory.model_files import TokenCounter
from agents.providers import create_provider
from magnatronic.discovery import make_codec
from magnatronic.errors import WrongInputError
from magnatronic.settings import Settings
from magnatronic.stations import AGENT_ROLES, all_agents, make_encoder, stations
from schemas.codec import Codec
from schemas.topics import TOPICS
from sinks.clickhouse.client import ClickHouse
from sinks.clickhouse.writer import ClickHouseSink
from sinks.milvus.memory import MilvusMemory
from sinks.milvus.sink import MilvusSink
from sinks.milvus.store import MilvusStore
from sinks.sink import Sink
from streams.bindings import Binding, bind

__all__ = [
    "AGENT_ROLES",
    "MONITOR_ROLE",
    "ROLES",
    "SINK_ROLES",
    "Workbench",
    "agents_of",
    "all_agents",
    "instance_name",
    "ready_codec",
    "stations",
]

SINK_ROLES: Final = ("sink-clickhouse", "sink-milvus")

MONITOR_ROLE: Final = "monitor"

ROLES: Final = (*AGENT_ROLES, "agents", *SINK_ROLES, MONITOR_ROLE)
"""What ``magnatronic run`` takes; ``agents`` is all agents in one process."""

_NEEDS_MEMORY: Final = frozenset({"retriever", "researcher"})
_NEEDS_EMBEDDING: Final = frozenset({"retriever", "researcher", "overseer", "embedder"})


def instance_name(role: str, number: int) -> str:
    """What a process is called in its consumer groups, and its transactional producers with it.

    No two living processes may share it, on whatever machines they run, and a restarted one should have its old one:
    the machine's name, the role and the slot that the process holds there make it both.
    """
    return f"{socket.gethostname()}-{role}-{number}"


def ready_codec(settings: Settings, *, deciding: bool = True) -> Codec:
    """The codec of a process that decides, or only reads, with the ids of all event types at hand.

    Raises:
        RegistryError: the schema registry gave no ids.
    """
    codec = make_codec(settings, deciding=deciding)
    codec.prepare(*(event for topic in TOPICS for event in topic.events))
    return codec


def agents_of(role: str) -> tuple[str, ...]:
    """The names of the agents that ``role`` runs; none for a sink and the monitor.

    Raises:
        WrongInputError: there is no such role.
    """
    if role not in ROLES:
        raise WrongInputError(f"there is no role {role!r}; choose one of: {', '.join(ROLES)}")
    if role == "agents":
        return AGENT_ROLES
    return (role,) if role in AGENT_ROLES else ()


class Workbench:
    """What the roles of one process share, each part made when it is first asked for.

    ``data_dir`` holds the embedded stores' files. Close it when all that it made has stopped.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._closing = contextlib.ExitStack()
        self._embedding: BatchingEmbedder | None = None
        self._llm: LanguageModel | None = None
        self._clickhouse: ClickHouse | None = None
        self._milvus: MilvusStore | None = None
        self._memory: MilvusMemory | None = None

    def bindings(self, names: Sequence[str]) -> list[Binding]:
        """The agents called ``names``, bound to their topics."""
        made: dict[str, Agent[Any]] = {agent.name: agent for agent in all_agents()}
        if "embedder" in names:
            model = self.embedding()
            made["embedder"] = Embedder(model.model, model.version, Chunker(TokenCounter()))
        return [bind(made[name]) for name in names]

    def ports(self, names: Sequence[str]) -> Ports:
        """What the agents called ``names`` need of the outside world."""
        needed = frozenset(names)
        return Ports(
            llm=self.llm(),
            memory=self.memory() if needed & _NEEDS_MEMORY else None,
            embedding=self.embedding() if needed & _NEEDS_EMBEDDING else None,
        )

    def sink(self, role: str) -> Sink:
        """The sink that ``role`` runs."""
        return ClickHouseSink(self.clickhouse()) if role == "sink-clickhouse" else MilvusSink(self.milvus())

    def embedding(self) -> BatchingEmbedder:
        """The embedding model that the settings name."""
        if self._embedding is None:
            self._embedding = BatchingEmbedder(make_encoder(self.settings.embedding_model))
            self._closing.callback(self._embedding.close)
        return self._embedding

    def forget_texts(self) -> None:
        """Forget the texts that the embedding model was given lately."""
        if self._embedding is not None:
            self._embedding.forget_texts()

    def llm(self) -> LanguageModel:
        """The language model that the settings name."""
        if self._llm is None:
            settings = self.settings
            key = settings.llm_api_key
            self._llm = create_provider(
                settings.llm_provider,
                api_key="" if key is None else key.get_secret_value(),
                model=settings.llm_model or "",
                base_url=(settings.openai_base_url or "") if settings.llm_provider == "openai" else "",
            )
        return self._llm

    def clickhouse(self) -> ClickHouse:
        """The ClickHouse that the settings name, by default the embedded one in the data folder."""
        if self._clickhouse is None:
            self._clickhouse = ClickHouse(self.settings.clickhouse_url or self.settings.data_dir / "clickhouse")
            self._closing.callback(self._clickhouse.close)
        return self._clickhouse

    def milvus(self) -> MilvusStore:
        """The Milvus that the settings name, by default the embedded one in the data folder; its users open it."""
        if self._milvus is None:
            settings = self.settings
            token = settings.milvus_token
            self._milvus = MilvusStore(
                settings.milvus_uri or settings.data_dir / "milvus.db",
                token="" if token is None else token.get_secret_value(),
            )
        return self._milvus

    def memory(self) -> MilvusMemory:
        """Recall from :meth:`milvus`, opened."""
        if self._memory is None:
            self._memory = MilvusMemory(self.milvus(), self.embedding())
            self._memory.open()
            self._closing.callback(self._memory.close)
        return self._memory

    def close(self) -> None:
        """Let go of stores and models, the last made first."""
        self._closing.close()
