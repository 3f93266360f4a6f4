"""The errors of streams.

StreamsError
├── ProcessorError          a processor has stopped; ``retryable`` says whether a new one may fare better
│   ├── FencedError         another instance holds this one's slot; nothing uncommitted of this one counts
│   ├── MissingTopicError   a topic that it reads or writes does not exist
│   ├── AccessError         Kafka does not let this user in, or does not let it do what is needed
│   ├── ClusterError        Kafka could not be reached, or refused, for longer than the clients' own retries
│   ├── StateError          the changelog and the committed offsets don't fit together
│   └── OffsetMetadataError the finished-offset map in a commit can't be read
├── TransactionAbortedError a transaction came to nothing; the same results may be committed by the next one
├── RecordRejectedError     the broker will never take one of the records; names it by its place in the transaction
├── RestoreCancelledError   a restore was told to end; its partitions are somebody else's by now
└── NoFreeSlotError         every slot of the group is held by another process
"""

__all__ = [
    "AccessError",
    "ClusterError",
    "FencedError",
    "GroupBusyError",
    "MissingTopicError",
    "NoFreeSlotError",
    "OffsetMetadataError",
    "ProcessorError",
    "RecordRejectedError",
    "RestoreCancelledError",
    "StateError",
    "StreamsError",
    "TransactionAbortedError",
]


class StreamsError(Exception):
    """The base of all errors that streams raise."""


class ProcessorError(StreamsError):
    """A processor has stopped. What it had not committed will be done again by the partition's next owner."""

    retryable = False


class FencedError(ProcessorError):
    """Another instance with the same slot has taken over. Two processes must never share a slot."""


class MissingTopicError(ProcessorError):
    """A topic does not exist; create the topics before processors start."""


class AccessError(ProcessorError):
    """Kafka refuses the login, or a right is missing. The message names the user, the right and what to do."""


class ClusterError(ProcessorError):
    """Kafka (or the schema registry) could not be reached or refused for too long; a new start may succeed."""

    retryable = True


class StateError(ProcessorError):
    """The changelog and the committed offsets contradict each other; starting anyway would decide wrongly."""


class TransactionAbortedError(StreamsError):
    """The transaction was aborted, and nothing of it is visible to read_committed consumers."""


class RecordRejectedError(StreamsError):
    """The broker refuses a record for good. ``index`` is its place among the transaction's messages."""

    def __init__(self, index: int, message: str) -> None:
        super().__init__(message)
        self.index = index


class GroupBusyError(StreamsError):
    """Somebody works in the group. The message names the members, and says what to stop."""


class RestoreCancelledError(StreamsError):
    """A restore ended because it was told to; nothing is wrong."""


class OffsetMetadataError(ProcessorError):
    """A commit's metadata is no finished-offset map of a known version."""


class NoFreeSlotError(StreamsError):
    """All slots that may be tried are held by living processes."""
