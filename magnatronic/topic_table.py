"""The topics as they are on a cluster.

In: librdkafka settings. Out: one row a topic of :mod:`schemas.topics`, with what the cluster says of it.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

from confluent_kafka import IsolationLevel, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient, ConfigResource, OffsetSpec

from magnatronic.errors import ClusterError
from magnatronic.follow import KAFKA_LOGGER
from schemas.topics import all_topics

__all__ = ["TopicRow", "topic_rows"]

_TIMEOUT_S: Final = 10.0
_DAY_MS: Final = 24 * 3600 * 1000


@dataclass(frozen=True, slots=True)
class TopicRow:
    """A topic. ``records`` counts offsets from the first kept to the last stable one (transactions' own marks too);
    ``retention_ms`` is -1 for ever, None where the cluster doesn't say; ``partitions`` is 0 where the topic is missing.
    """

    name: str
    partitions: int
    records: int
    retention_ms: int | None
    events: tuple[str, ...]
    purpose: str

    @property
    def kept(self) -> str:
        """How long records are kept, in words."""
        if self.retention_ms is None:
            return "?"
        return "forever" if self.retention_ms < 0 else f"{self.retention_ms / _DAY_MS:g} days"

    def as_dict(self) -> dict[str, Any]:
        """The row as JSON can hold it."""
        return asdict(self)


def topic_rows(kafka: Mapping[str, Any]) -> list[TopicRow]:
    """Every topic of the platform, in the order of :data:`schemas.topics.TOPICS`.

    Raises:
        ClusterError: the cluster can't be reached.
    """
    admin = AdminClient({**kafka, "log_level": 2}, logger=KAFKA_LOGGER)
    try:
        known = admin.list_topics(timeout=_TIMEOUT_S).topics
        names = [name for name in all_topics() if name in known]
        places = [(name, partition) for name in names for partition in known[name].partitions]
        first = _offsets(admin, places, OffsetSpec.earliest())
        last = _offsets(admin, places, OffsetSpec.latest())
        retention = _retention(admin, names)
    except KafkaException as error:
        raise ClusterError(f"no answer from Kafka: {error.args[0].str()}") from error
    return [
        TopicRow(
            name=name,
            partitions=len(known[name].partitions) if name in known else 0,
            records=sum(last[place] - first[place] for place in places if place[0] == name),
            retention_ms=retention.get(name),
            events=tuple(event.__name__ for event in topic.events),
            purpose=topic.purpose,
        )
        for name, topic in all_topics().items()
    ]


def _offsets(admin: AdminClient, places: list[tuple[str, int]], spec: OffsetSpec) -> dict[tuple[str, int], int]:
    if not places:
        return {}
    asked = admin.list_offsets(
        {TopicPartition(topic, partition): spec for topic, partition in places},
        isolation_level=IsolationLevel.READ_COMMITTED,
        request_timeout=_TIMEOUT_S,
    )
    return {(place.topic, place.partition): int(future.result().offset) for place, future in asked.items()}


def _retention(admin: AdminClient, names: list[str]) -> dict[str, int]:
    if not names:
        return {}
    resources = [ConfigResource(ConfigResource.Type.TOPIC, name) for name in names]
    found = {}
    for resource, future in admin.describe_configs(resources, request_timeout=_TIMEOUT_S).items():
        try:
            found[resource.name] = int(future.result()["retention.ms"].value)
        except KafkaException:  # no right to describe it
            continue
    return found
