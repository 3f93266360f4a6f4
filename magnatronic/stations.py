"""Which agents there are and what they read: what decides recorded events again, without the parts that ran them.

In: the settings, for the embedding model's name. Out: agents, and :class:`~replay.decide.Station` values. Stores, sinks
and providers are not imported here, which saves commands that only read history two seconds.
"""

from typing import Any, Final

from agents.agent import Agent
from agents.coordinator import Coordinator
from agents.decomposer import Decomposer
from agents.embedder import Embedder
from agents.memory.chunking import Chunker
from agents.memory.embedding import TextEncoder
from agents.memory.model_files import MODEL, MODEL_SHA256, TokenCounter
from agents.overseer import Overseer
from agents.prompts import PROMPTS, Prompts
from agents.researcher import Researcher
from agents.retriever import Retriever
from magnatronic.settings import Settings
from replay.decide import Station
from streams.bindings import bind

__all__ = ["AGENT_ROLES", "all_agents", "make_encoder", "stations"]

AGENT_ROLES: Final = ("decomposer", "coordinator", "retriever", "researcher", "overseer", "embedder")
"""Each agent is a role of its own."""

_SMALL_MODEL: Final = "all-MiniLM-L6-v2"


def all_agents(prompts: Prompts = PROMPTS) -> tuple[Agent[Any], ...]:
    """Every agent that decides on tasks; what a task's replay runs."""
    return (Decomposer(prompts), Coordinator(prompts), Retriever(prompts), Researcher(prompts), Overseer())


def stations(settings: Settings | None = None) -> tuple[Station, ...]:
    """The agents with the topics that they read: what decides recorded events again. With ``settings`` the Embedder
    too, which decides by the embedding model's name and version.

    Raises:
        ModelFileError: the embedding model's files are missing.
    """
    agents = all_agents()
    if settings is not None:
        agents = (*agents, _embedder(settings.embedding_model))
    return tuple(Station(agent, frozenset(bind(agent).topics)) for agent in agents)


def _embedder(model: str) -> Embedder:
    if model == _SMALL_MODEL:
        # Known without loading it: decided again, its vectors are those that were recorded.
        return Embedder(MODEL, MODEL_SHA256[:12], Chunker(TokenCounter()))
    encoder = make_encoder(model)
    try:
        return Embedder(encoder.model, encoder.version, Chunker(TokenCounter()))
    finally:
        encoder.close()


def make_encoder(model: str) -> TextEncoder:
    """all-MiniLM-L6-v2 runs on ONNX without further ado; any other model needs the ``gpu`` extra."""
    from agents.memory.embedding_onnx import OnnxMiniLm

    if model == _SMALL_MODEL:
        return OnnxMiniLm()
    from agents.memory.embedding_torch import TorchEncoder

    return TorchEncoder(model)
