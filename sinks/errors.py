"""The errors of sinks.

SinkError
├── StoreError          the store refused or failed a read or write; ``retryable`` says whether it may work later
├── StoreBusyError      another process owns the embedded store's files
├── LogError            the log can't be read: the cluster is out of reach, a topic is missing, or access is denied
├── HistoryLostError    the log no longer holds records that the store has not seen, or that a rebuild needs
├── ReplacedError       a rebuild has put another store into use; go on where that stands
├── RebuildStoppedError a rebuild was told to stop; the next one goes on
└── QueryError          a user's query failed; the message is the store's own first line
    ├── WriteRefusedError   it would change something, or names a second statement
    ├── QueryTimeoutError   it ran past its time limit
    └── UnknownQueryError   no named query has this name
"""

__all__ = [
    "HistoryLostError",
    "LogError",
    "QueryError",
    "QueryTimeoutError",
    "RebuildStoppedError",
    "ReplacedError",
    "SinkError",
    "StoreBusyError",
    "StoreError",
    "UnknownQueryError",
    "WriteRefusedError",
]


class SinkError(Exception):
    """The base of all errors that sinks raise. ``retryable``: the same call may succeed later."""

    def __init__(self, message: str, *, retryable: bool = False) -> None:
        super().__init__(message)
        self.retryable = retryable


class StoreError(SinkError):
    """The store refused or failed a read or write."""


class StoreBusyError(SinkError):
    """Another process has the embedded store open."""


class LogError(SinkError):
    """The log can't be read."""


class HistoryLostError(SinkError):
    """Retention removed records before the store saw them, or the topic was made anew."""


class ReplacedError(SinkError):
    """A rebuild has put another store into use. Nothing is lost: its offsets say where to go on."""


class RebuildStoppedError(SinkError):
    """A rebuild was told to stop before it was through. Nothing that readers see has changed."""


class QueryError(SinkError):
    """A query failed: bad SQL, an unknown table, too many rows."""


class WriteRefusedError(QueryError):
    """The query is not one plain read."""


class QueryTimeoutError(QueryError):
    """The query ran past its time limit."""


class UnknownQueryError(QueryError):
    """There is no named query of this name."""
