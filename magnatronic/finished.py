"""What the agents have finished: the committed offsets of their consumer groups, and the maps that go with them.

In: Kafka client settings. Out: by the agents' names :class:`~replay.finished.Finished`, which an audit or an archive of
the log needs to tell a step that is still open from one whose outputs are missing.
"""

import logging
from collections.abc import Collection, Mapping
from typing import Any, Final

from confluent_kafka import ConsumerGroupTopicPartitions, KafkaError, KafkaException
from confluent_kafka.admin import AdminClient

from magnatronic.errors import ClusterError
from magnatronic.stations import AGENT_ROLES
from replay.finished import Finished
from replay.selection import Place
from streams.errors import OffsetMetadataError
from streams.offsets import decode_finished

__all__ = ["finished_offsets"]

_TIMEOUT_S: Final = 10.0

log = logging.getLogger(__name__)


def finished_offsets(kafka: Mapping[str, Any], agents: Collection[str] = AGENT_ROLES) -> dict[str, Finished]:
    """What each of ``agents`` has committed as finished; one whose group has committed nothing is left out.

    Raises:
        ClusterError: the cluster does not answer, or this user may not describe a group.
    """
    admin = AdminClient({"log_level": 2, **kafka})
    asked = {
        agent: admin.list_consumer_group_offsets(
            [ConsumerGroupTopicPartitions(f"magnatronic.{agent}")], request_timeout=_TIMEOUT_S
        )[f"magnatronic.{agent}"]
        for agent in sorted(agents)
    }
    found: dict[str, Finished] = {}
    for agent, future in asked.items():
        places: dict[Place, tuple[Collection[int], int]] = {}
        try:
            committed = future.result().topic_partitions
        except KafkaException as error:
            if error.args[0].code() == KafkaError.GROUP_ID_NOT_FOUND:
                continue
            raise ClusterError(
                f"the committed offsets of group magnatronic.{agent} can't be read: {error.args[0].str()}; "
                "the user needs the right DESCRIBE on it (docs/security.md)"
            ) from error
        for each in committed:
            if each.error is None and each.offset >= 0:
                places[each.topic, each.partition] = _decoded(agent, each.offset, each.metadata or "")
        if places:
            found[agent] = Finished.committed(places)
    return found


def _decoded(agent: str, offset: int, metadata: str) -> tuple[list[int], int]:
    try:
        return decode_finished(offset, metadata)
    except OffsetMetadataError as error:
        log.warning("%s: %s; only what is before it counts as finished", agent, error)
        return [], offset
