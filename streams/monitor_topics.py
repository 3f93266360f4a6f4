"""What the Monitor needs of Kafka before its Faust app starts: changelogs, and where to begin.

In: librdkafka settings. Out: the app's changelogs, compacted and with as many partitions as their sources, and
committed offsets for a group that has none, or that has been away for so long that nobody needs alerts about what it
missed. Faust could create topics by itself, but only with a number of replicas that is given, and it would begin
either with days of figures or, after a crash before its first commit, too late.
"""

import logging
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, Final

from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition
from confluent_kafka.admin import AclOperation, AdminClient, NewTopic

from streams.access import check_login, denied, lacking, refusal
from streams.errors import ClusterError, MissingTopicError
from streams.kafka import reader_settings
from streams.state import CHANGELOG_CONFIG
from streams.tail import offsets_since

__all__ = ["prepare"]

_READ_BACK: Final = timedelta(hours=1)
"""The longest window is an hour's spending."""
_TIMEOUT_S: Final = 30.0
_READ, _WRITE = AclOperation.READ, AclOperation.WRITE

log = logging.getLogger(__name__)


def prepare(
    kafka: Mapping[str, Any],
    group: str,
    *,
    changelogs: Mapping[str, str],
    recent: tuple[str, ...],
    written: tuple[str, ...],
    replication_factor: int,
) -> None:
    """Create ``changelogs`` (name to source topic) and let ``group`` begin at most an hour back in ``recent`` topics.
    ``written`` are the topics that are written to.

    Raises:
        MissingTopicError: a source topic does not exist.
        AccessError: Kafka refuses the login, or a right is missing.
        ClusterError: Kafka does not answer, or refuses.
    """
    check_login(kafka)
    try:
        admin = AdminClient(dict(kafka))
        known = admin.list_topics(timeout=_TIMEOUT_S).topics
        missing = sorted({*changelogs.values(), *recent} - known.keys())
        _check_rights(kafka, group, changelogs, recent, written)
        if missing:
            raise MissingTopicError(
                f"{group}: the cluster has no topic {', '.join(missing)}; `magnatronic up` and `run` create them"
            )
        counts = {name: len(known[source].partitions) for name, source in changelogs.items()}
        _create(kafka, admin, {name: count for name, count in counts.items() if name not in known}, replication_factor)
        for name, count in counts.items():
            if name in known and len(known[name].partitions) != count:
                raise ClusterError(
                    f"{changelogs[name]} has {count} partitions and {name} {len(known[name].partitions)}; "
                    f"delete {name}: what it holds is made again"
                )
        _begin(kafka, group, [TopicPartition(topic, number) for topic in recent for number in known[topic].partitions])
    except KafkaException as error:
        cause: KafkaError = error.args[0]
        raise denied(group, kafka, cause, group=group) or ClusterError(f"{group}: {cause.str()}") from error


def _check_rights(
    kafka: Mapping[str, Any],
    group: str,
    changelogs: Mapping[str, str],
    recent: tuple[str, ...],
    written: tuple[str, ...],
) -> None:
    wanted = {name: {_READ, _WRITE} for name in changelogs}
    wanted |= {name: {_READ} for name in (*changelogs.values(), *recent)}
    for name in written:
        wanted[name] = {*wanted.get(name, ()), _WRITE}
    if lacks := lacking(kafka, wanted):
        raise refusal(group, kafka, lacks.values())


def _create(kafka: Mapping[str, Any], admin: AdminClient, counts: Mapping[str, int], replication_factor: int) -> None:
    new = [NewTopic(name, count, replication_factor, config=dict(CHANGELOG_CONFIG)) for name, count in counts.items()]
    for name, created in admin.create_topics(new, operation_timeout=_TIMEOUT_S).items() if new else ():
        try:
            created.result(_TIMEOUT_S)
        except KafkaException as error:
            cause: KafkaError = error.args[0]
            if cause.code() != KafkaError.TOPIC_ALREADY_EXISTS:
                raise denied("the Monitor", kafka, cause, topic=name, to="CREATE") or error from None


def _begin(kafka: Mapping[str, Any], group: str, places: list[TopicPartition]) -> None:
    consumer = Consumer({**reader_settings(kafka, group), "group.id": group})
    try:
        begins = offsets_since(consumer, places, _READ_BACK, timeout_s=_TIMEOUT_S)
        earliest = {(place.topic, place.partition): place.offset for place in begins}
        moved = [
            TopicPartition(place.topic, place.partition, earliest[place.topic, place.partition])
            for place in consumer.committed(places, timeout=_TIMEOUT_S)
            if place.offset < earliest[place.topic, place.partition]
        ]
        if moved:
            try:
                consumer.commit(offsets=moved, asynchronous=False)
            except KafkaException as error:
                if error.args[0].code() == KafkaError.GROUP_AUTHORIZATION_FAILED:
                    raise
                # The group has a living member: it reads on where it is.
                log.info("%s begins where another of its members is: %s", group, error.args[0].str())
    finally:
        consumer.close()
