"""What binds an agent to its input topics, and how it is run there.

In: an agent, topic names, limits and policies. Out: :class:`Binding`, which a processor takes.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from agents.agent import Agent

__all__ = ["Binding", "RetryPolicy"]


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often a failed effect that is worth it is tried in all, and how long it waits in between.

    ``backoff_s`` is the first wait, doubled each time up to ``max_backoff_s``.
    """

    attempts: int = 3
    backoff_s: float = 0.2
    max_backoff_s: float = 30.0

    def wait_s(self, attempt: int) -> float:
        """The wait after the failed ``attempt`` (from 1): exponential, with jitter on its upper half, so that what
        failed together does not come back together.
        """
        return min(self.max_backoff_s, self.backoff_s * 2.0 ** (attempt - 1)) * random.uniform(0.5, 1.0)


@dataclass(frozen=True, slots=True)
class Binding:
    """An agent bound to its input topics.

    ``concurrency`` is how many of its handlers may wait at once in one process; ``max_in_flight`` bounds the events
    that are fetched and not yet committed (each costs a few KiB), and the parked ones too. ``retry`` says how failed
    effects are retried, ``retry_by_error`` how those of one error type (``EffectFailedError.error_type``) are. An event
    that waits ``park_after_s`` or longer for its next attempt is parked in the changelog, with what waits behind it in
    its lane. ``timeout_s`` bounds an attempt, None for no bound. An event that was counted ``max_crashes`` times as
    running when its process ended is dead-lettered; with fewer than three so would be what ran beside the culprit.

    Raises:
        ValueError: a limit is out of its range.
    """

    agent: Agent[Any]
    topics: tuple[str, ...]
    concurrency: int = 256
    max_in_flight: int = 4096
    retry: RetryPolicy = RetryPolicy()
    retry_by_error: Mapping[str, RetryPolicy] = field(default_factory=dict)
    park_after_s: float = 1.0
    timeout_s: float | None = 60.0
    max_crashes: int = 3

    def __post_init__(self) -> None:
        for name, least in (("concurrency", 1), ("max_in_flight", 1), ("max_crashes", 3)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} of the binding of {self.agent.name} must be {least} or more")

    @property
    def group(self) -> str:
        """The consumer group: ``magnatronic.<agent's name>``."""
        return f"magnatronic.{self.agent.name}"

    def retry_of(self, error_type: str) -> RetryPolicy:
        """The policy for a retryable failure of this type."""
        return self.retry_by_error.get(error_type, self.retry)
