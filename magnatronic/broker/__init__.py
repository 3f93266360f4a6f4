"""Kafka for those who have none: a single-node broker as a local JVM, and topic creation on any cluster.

In: a data folder, or client settings of a cluster. Out: a running :class:`EmbeddedBroker`, and topics as
:mod:`schemas.topics` describes them.
"""

from magnatronic.broker.embedded import EmbeddedBroker
from magnatronic.broker.errors import (
    ArtifactError,
    BrokerError,
    DataFolderInUseError,
    JavaNotFoundError,
    JavaProcessError,
    TopicError,
)
from magnatronic.broker.topics import TopicSpec, create_topics, ensure_topics

__all__ = [
    "ArtifactError",
    "BrokerError",
    "DataFolderInUseError",
    "EmbeddedBroker",
    "JavaNotFoundError",
    "JavaProcessError",
    "TopicError",
    "TopicSpec",
    "create_topics",
    "ensure_topics",
]
