"""Creates topics on any cluster, embedded or not, and says where an existing one differs from what is wanted.

In: client settings and :class:`TopicSpec` values (those of :mod:`schemas.topics` by default). Out: the topics, visible
to clients. Existing topics are never changed: more partitions would move keys, and another's settings may be meant.
"""

import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import AdminClient, ConfigResource, NewTopic

from magnatronic.broker.errors import TopicError
from schemas.topics import all_topics

__all__ = ["TopicSpec", "create_topics", "ensure_topics", "platform_topics"]

_log = logging.getLogger(__name__)

_TIMEOUT_S: Final = 30.0
_REFUSED: Final = frozenset({KafkaError.TOPIC_AUTHORIZATION_FAILED, KafkaError.CLUSTER_AUTHORIZATION_FAILED})


@dataclass(frozen=True, slots=True)
class TopicSpec:
    """A topic to create: its partitions, and topic-level settings such as ``cleanup.policy``, as text."""

    name: str
    partitions: int
    config: Mapping[str, str] = field(default_factory=dict)


def platform_topics(partitions: int) -> list[TopicSpec]:
    """All topics of :mod:`schemas.topics`; ``partitions`` is for those that fix no number."""
    return [
        TopicSpec(
            name,
            topic.partitions or partitions,
            {
                "cleanup.policy": "delete",
                "retention.ms": str(topic.retention_ms),
                "max.message.bytes": str(topic.max_message_bytes),
                "message.timestamp.type": "LogAppendTime",
            },
        )
        for name, topic in all_topics().items()
    ]


def ensure_topics(client_config: Mapping[str, Any], *, partitions: int, replication_factor: int) -> list[str]:
    """Creates the platform's topics where they are missing; the names that are new.

    ``replication_factor`` -1 is the cluster's default. See :func:`create_topics` for the rest.

    Raises:
        TopicError: the cluster can't be reached or refuses.
    """
    return create_topics(client_config, platform_topics(partitions), replication_factor=replication_factor)


def create_topics(
    client_config: Mapping[str, Any], specs: Iterable[TopicSpec], *, replication_factor: int
) -> list[str]:
    """Creates the topics of ``specs`` that are missing and waits until clients see them; the names that are new.

    A topic that exists with fewer partitions or other settings than wanted stays as it is, and a warning says so. What
    this user may neither see nor create is somebody else's, or was created by an operator: whoever needs it says so.

    Raises:
        TopicError: the cluster can't be reached, refuses a topic (the message names it), or doesn't show it in time.
    """
    wanted = {spec.name: spec for spec in specs}
    admin = AdminClient({**client_config, "log_level": 2})
    existing = _partition_counts(admin)
    missing = [spec for name, spec in wanted.items() if name not in existing]
    created, refused = _create(admin, missing, replication_factor)
    seen = {name: spec for name, spec in wanted.items() if name not in refused}
    _wait_visible(admin, seen)
    kept = [spec for spec in seen.values() if spec.name not in created]
    _warn_of_differences(admin, kept, _partition_counts(admin) if kept else {})
    return sorted(created)


def _partition_counts(admin: AdminClient) -> dict[str, int]:
    """The partitions of each topic; topics with a partition that has no leader yet are left out."""
    try:
        topics = admin.list_topics(timeout=_TIMEOUT_S).topics
    except KafkaException as error:
        raise TopicError(f"no answer from Kafka within {_TIMEOUT_S:g} s: {error.args[0].str()}") from error
    return {
        name: len(topic.partitions)
        for name, topic in topics.items()
        if topic.error is None and all(partition.leader >= 0 for partition in topic.partitions.values())
    }


def _create(admin: AdminClient, specs: list[TopicSpec], replication_factor: int) -> tuple[set[str], set[str]]:
    """The names of those that are new, and of those that this user may not create."""
    if not specs:
        return set(), set()
    requests = [NewTopic(spec.name, spec.partitions, replication_factor, config=dict(spec.config)) for spec in specs]
    created, refused = set(), set()
    for name, future in admin.create_topics(requests, operation_timeout=_TIMEOUT_S).items():
        try:
            future.result(_TIMEOUT_S + 5)
            created.add(name)
        except KafkaException as error:
            if error.args[0].code() in _REFUSED:
                refused.add(name)
            # Another process starts at the same time: its topic is as good as ours.
            elif error.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:
                raise TopicError(f"Kafka refused topic {name}: {error.args[0].str()}") from error
    if refused:
        _log.info("%d topics are missing or not to be seen, and may not be created: %s", len(refused), sorted(refused))
    return created, refused


def _wait_visible(admin: AdminClient, wanted: Mapping[str, TopicSpec]) -> None:
    deadline = time.monotonic() + _TIMEOUT_S
    while unseen := wanted.keys() - _partition_counts(admin).keys():
        if time.monotonic() > deadline:
            raise TopicError(f"{len(unseen)} topics have no leader after {_TIMEOUT_S:g} s, among them {min(unseen)}")
        time.sleep(0.05)


def _warn_of_differences(admin: AdminClient, specs: list[TopicSpec], partitions: Mapping[str, int]) -> None:
    if not specs:
        return
    asked = {spec.name: ConfigResource(ConfigResource.Type.TOPIC, spec.name) for spec in specs}
    answers = {resource.name: future for resource, future in admin.describe_configs(list(asked.values())).items()}
    unchecked = []
    for spec in specs:
        if partitions.get(spec.name, 0) < spec.partitions:
            _log.warning(
                "topic %s has %d partitions, %d are wanted; it stays as it is, because new partitions would move keys",
                *(spec.name, partitions.get(spec.name, 0), spec.partitions),
            )
        try:
            present = answers[spec.name].result(_TIMEOUT_S)
        except KafkaException as error:
            # Without the right to describe, the topic can still be used.
            unchecked.append(f"{spec.name} ({error.args[0].name()})")
            continue
        for name, value in spec.config.items():
            if name in present and present[name].value != value:
                _log.warning("topic %s has %s=%s, wanted is %s", spec.name, name, present[name].value, value)
    if unchecked:
        _log.info("settings of these topics can't be checked: %s", ", ".join(unchecked))
