"""The errors of the composition root.

::

    MagnatronicError
    ├── WrongInputError           what was asked for can't be; nothing was done (the command line ends with 2)
    │   ├── NotRunningError       no system runs on this data folder
    │   ├── AlreadyRunningError   one does already
    │   ├── UnknownTaskError      the log holds nothing of the task
    │   └── QueryRefusedError     the SQL is wrong, or would write
    ├── ClusterError              Kafka can't be reached, or refused
    ├── FencedOperatorError       another operator began to resolve dead letters
    ├── ControlError              the running system failed at what it was asked
    ├── WaitTimeoutError          it did not happen in time; it may still
    └── PartFailedError           a part of the running system ended; carries its name
"""

__all__ = [
    "AlreadyRunningError",
    "ClusterError",
    "ControlError",
    "FencedOperatorError",
    "MagnatronicError",
    "NotRunningError",
    "PartFailedError",
    "QueryRefusedError",
    "UnknownTaskError",
    "WaitTimeoutError",
    "WrongInputError",
]


class MagnatronicError(Exception):
    """The base of all errors of this package (the broker has its own tree)."""


class WrongInputError(MagnatronicError):
    """What was asked for can't be done as asked; nothing was done."""


class NotRunningError(WrongInputError):
    """No system runs on this data folder."""


class AlreadyRunningError(WrongInputError):
    """A system runs on this data folder already."""


class UnknownTaskError(WrongInputError):
    """The log holds nothing of this task."""


class QueryRefusedError(WrongInputError):
    """ClickHouse refused the query: bad SQL, an unknown table, a write."""


class ClusterError(MagnatronicError):
    """The Kafka cluster can't be reached, lacks a topic, or refused a record."""


class FencedOperatorError(MagnatronicError):
    """Another operator began to resolve dead letters on this cluster; what was not committed here was not done."""


class ControlError(MagnatronicError):
    """The running system failed at what it was asked over its socket."""


class WaitTimeoutError(MagnatronicError):
    """What was waited for did not happen in time."""


class PartFailedError(MagnatronicError):
    """A part of the running system ended by itself."""
