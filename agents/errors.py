"""The errors of agents.

AgentError
├── EffectFailedError      a recorded call to the outside world failed; the same failure is seen again in replay
├── HandlerCancelledError  a handler cancelled a part of itself and let that end it
├── InvalidPlanError       a plan can't be carried out; the message says why
├── MissingPortError       a handler asked for something that this process is not configured with
├── NondeterminismError    a re-decided step differs from the recorded one
├── PredecessorError       an agent names another agent's class as its predecessor
├── PromptError            a prompt is unknown, or lacks what it has to hold
├── ProviderError          a language model provider is unknown, or its key is missing
└── UndeclaredOutputError  a handler emitted a type that its agent does not list
"""

__all__ = [
    "AgentError",
    "EffectFailedError",
    "HandlerCancelledError",
    "InvalidPlanError",
    "MissingPortError",
    "NondeterminismError",
    "PredecessorError",
    "PromptError",
    "ProviderError",
    "UndeclaredOutputError",
]


class AgentError(Exception):
    """The base of all errors that agents raise."""


class EffectFailedError(AgentError):
    """A call to the outside world failed.

    ``error_type`` is the cause's class name; ``retryable`` says whether another attempt may succeed. Both, and the
    message, are recorded, so that replay raises the same.
    """

    def __init__(self, error_type: str, message: str, *, retryable: bool) -> None:
        super().__init__(f"{error_type}: {message}")
        self.error_type = error_type
        self.message = message
        self.retryable = retryable


class HandlerCancelledError(AgentError):
    """A handler ended by a cancellation that came from itself, not from the processor."""


class MissingPortError(AgentError):
    """The handler asked for a part that this process has not been given."""


class NondeterminismError(AgentError):
    """A re-decided step does not match what was recorded."""


class PromptError(AgentError):
    """There is no prompt of that name, or its text lacks a place that is filled in."""


class UndeclaredOutputError(AgentError):
    """A handler emitted an event type that its agent's ``emits`` does not list."""


class InvalidPlanError(AgentError):
    """A plan has a cycle, an unknown capability, too many steps, or is no plan at all."""


class PredecessorError(AgentError):
    """An agent's ``predecessors`` hold a class that is another agent's."""


class ProviderError(AgentError):
    """A language model provider can't be made: its name is unknown, or its key is missing."""
