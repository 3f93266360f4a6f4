"""The errors of replay.

ReplayError
├── LogReadError            the log could not be read
│   └── LogTruncatedError   it no longer holds what was asked for
├── UnknownTaskError        no record carries the task's id
└── OpenTaskError           the task has no outcome yet, so its history is not complete
"""

__all__ = ["LogReadError", "LogTruncatedError", "OpenTaskError", "ReplayError", "UnknownTaskError"]


class ReplayError(Exception):
    """The base of all errors of replay."""


class LogReadError(ReplayError):
    """The log could not be read: the cluster can't be reached, or a topic is missing."""


class LogTruncatedError(LogReadError):
    """The log's beginning has moved past what was asked for: the topic's retention has deleted it."""


class UnknownTaskError(ReplayError):
    """No record in the log carries the task's id."""


class OpenTaskError(ReplayError):
    """The task has no outcome yet."""
