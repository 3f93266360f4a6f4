"""What all tests share: one real Kafka a session."""

import itertools
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
from confluent_kafka.admin import AdminClient, NewTopic

from magnatronic.broker import EmbeddedBroker


class KafkaForTests:
    """A running Kafka. ``config`` are librdkafka settings that reach it; copy it before adding to it."""

    def __init__(self, bootstrap_servers: str) -> None:
        self.bootstrap_servers = bootstrap_servers
        self.config: dict[str, Any] = {"bootstrap.servers": bootstrap_servers}
        self._session = uuid.uuid4().hex[:8]
        self._numbers = itertools.count(1)
        self._admin: AdminClient | None = None

    @property
    def admin(self) -> AdminClient:
        if self._admin is None:
            self._admin = AdminClient(dict(self.config))
        return self._admin

    def unique(self, prefix: str) -> str:
        """A name that no other test of the session uses, for a topic, group or transactional id."""
        return f"{prefix}-{self._session}-{next(self._numbers)}"

    def create_topics(
        self,
        names: str | Sequence[str],
        partitions: int = 1,
        config: Mapping[str, str] | None = None,
    ) -> None:
        """Creates topics and waits until their partitions have a leader."""
        wanted = [names] if isinstance(names, str) else list(names)
        topics = [NewTopic(name, partitions, 1, config=dict(config or {})) for name in wanted]
        for created in self.admin.create_topics(topics, operation_timeout=30).values():
            created.result(30)

    def topic(self, prefix: str, partitions: int = 1, config: Mapping[str, str] | None = None) -> str:
        """A new topic with a unique name."""
        name = self.unique(prefix)
        self.create_topics(name, partitions, config)
        return name


@pytest.fixture(scope="session")
def kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KafkaForTests]:
    with EmbeddedBroker(tmp_path_factory.mktemp("kafka")) as broker:
        yield KafkaForTests(broker.bootstrap_servers)
