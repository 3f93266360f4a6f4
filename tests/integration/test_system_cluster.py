"""On a cluster and a schema registry of somebody else's: they are used, and stock clients read what lies there."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from confluent_kafka import Consumer
from confluent_kafka.admin import AdminClient
from confluent_kafka.schema_registry import SchemaRegistryClient
from confluent_kafka.schema_registry.avro import AvroDeserializer
from confluent_kafka.serialization import MessageField, SerializationContext

from magnatronic.broker import EmbeddedBroker
from magnatronic.client import Client
from schemas.codec import Codec
from schemas.registry import RegistryIds
from schemas.topics import all_topics

if TYPE_CHECKING:
    from tests.integration.conftest import UpProcess


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[str]:
    """A broker that the system does not own; its bootstrap servers."""
    with EmbeddedBroker(tmp_path / "cluster") as broker:
        yield broker.bootstrap_servers


def first_value(cluster: str, topic: str) -> bytes | None:
    """The first record's value, read by a consumer that knows nothing of Magnatronic."""
    consumer = Consumer({"bootstrap.servers": cluster, "group.id": "stock", "auto.offset.reset": "earliest"})
    consumer.subscribe([topic])
    try:
        message = consumer.poll(30)
        assert message is not None
        value: bytes | None = message.value()
        return value
    finally:
        consumer.close()


def test_the_given_cluster_and_registry_are_used(
    up_on: "Callable[..., UpProcess]", cluster: str, apicurio: str, tmp_path: Path
) -> None:
    up = up_on(
        tmp_path / "data",
        MAGNATRONIC_KAFKA_BOOTSTRAP_SERVERS=cluster,
        MAGNATRONIC_REPLICATION_FACTOR="1",
        MAGNATRONIC_PARTITIONS="2",
        MAGNATRONIC_SCHEMA_REGISTRY_URL=apicurio,
    )
    info = up.start()
    assert (info["bootstrap_servers"], info["embedded"], info["broker_pid"]) == (cluster, False, None)

    admin = AdminClient({"bootstrap.servers": cluster})
    topics = admin.list_topics(timeout=20).topics
    assert set(all_topics()) <= topics.keys()
    assert len(topics["tasks.normal"].partitions) == 2

    ids = RegistryIds(apicurio)
    with Client(cluster, codec=Codec(ids)) as client:
        outcome = client.ask("What is a widget?", timeout=60)
    ids.close()
    assert not outcome.ok  # nothing was ingested, and it says so
    assert "ingest" in outcome.reason

    with SchemaRegistryClient({"url": apicurio}) as registry:
        read: Any = AvroDeserializer(registry)(
            first_value(cluster, "task.outcomes"), SerializationContext("task.outcomes", MessageField.VALUE)
        )
    assert (read["task_id"], read["reason"]) == (outcome.task_id, outcome.reason)
