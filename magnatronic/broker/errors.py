"""What can go wrong between here and a running broker.

::

    BrokerError
    ├── JavaNotFoundError      no JRE of version 17 or newer
    ├── ArtifactError          a jar can't be fetched, or isn't the pinned one
    ├── DataFolderInUseError   another broker runs on this data folder
    ├── JavaProcessError       a JVM didn't come up; carries its last lines
    └── TopicError             the cluster refused a topic
"""

__all__ = [
    "ArtifactError",
    "BrokerError",
    "DataFolderInUseError",
    "JavaNotFoundError",
    "JavaProcessError",
    "TopicError",
]


class BrokerError(Exception):
    """Base of everything that :mod:`magnatronic.broker` raises."""


class JavaNotFoundError(BrokerError):
    """No Java that can run the broker was found; the message says where it was looked for."""


class ArtifactError(BrokerError):
    """A pinned file could not be fetched, or what came has another SHA-256."""


class DataFolderInUseError(BrokerError):
    """Another process owns the data folder; the message names its pid."""


class JavaProcessError(BrokerError):
    """A JVM ended, or stayed silent, before it was ready. The message holds its last lines."""


class TopicError(BrokerError):
    """The cluster can't be reached, or refused to create a topic."""
