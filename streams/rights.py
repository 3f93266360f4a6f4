"""Whether a processor may do what its agent does, asked before it begins.

In: a binding, and librdkafka settings. Out: nothing where it may, else :class:`~streams.errors.AccessError`, which
names every right that is missing: not the first one only, and not when the first event needs it.
"""

import logging
from collections.abc import Iterable, Mapping
from typing import Any, Final

from confluent_kafka.admin import AclOperation

from schemas.events import AgentHeartbeat, DeadLettered, LlmCalled, ProcessorStats, StepCancelRequested, TimerFired
from schemas.topics import TOPICS, topic_of
from streams.access import lacking, refusal
from streams.binding import Binding
from streams.state import changelog_topic

__all__ = ["check_rights", "rights_on_topics"]

_READ: Final = AclOperation.READ
_WRITE: Final = AclOperation.WRITE
_WISHED: Final = {
    topic_of(ProcessorStats).name: {_WRITE},
    topic_of(AgentHeartbeat).name: {_WRITE},
    topic_of(StepCancelRequested).name: {_READ},
}
"""A processor works without them, and is not seen, or hears no order."""

log = logging.getLogger(__name__)


def check_rights(name: str, kafka: Mapping[str, Any], binding: Binding) -> None:
    """See to it that the binding's agent may read and write what it has to. Blocks, for 5 s at most.

    What does not exist yet, or the cluster does not tell, is passed over: a missing right shows when it is used.

    Raises:
        AccessError: rights are missing.
    """
    wanted = _wanted(binding)
    lacks = lacking(kafka, rights_on_topics(binding))
    if short := [said for topic, said in lacks.items() if topic in wanted]:
        raise refusal(name, kafka, short)
    if lacks:
        log.warning(
            "%s lacks %s: its figures are not seen, or it hears no order to cancel a step",
            name,
            ", ".join(lacks.values()),
        )


def rights_on_topics(binding: Binding) -> dict[str, set[AclOperation]]:
    """What the binding's agent needs to do with which topic."""
    found = {topic: set(operations) for topic, operations in _WISHED.items()}
    for topic, operations in _wanted(binding).items():
        found.setdefault(topic, set()).update(operations)
    return found


def _wanted(binding: Binding) -> dict[str, set[AclOperation]]:
    wanted: dict[str, set[AclOperation]] = {}

    def want(topics: Iterable[str], *operations: AclOperation) -> None:
        for topic in topics:
            wanted.setdefault(topic, set()).update(operations)

    agent = binding.agent
    # A timer fires by an event in the partition that it was set from.
    want(binding.topics, _READ, *([_WRITE] if TimerFired in agent.consumes else []))
    want((changelog_topic(binding.group, topic) for topic in binding.topics), _READ, _WRITE)
    written = {*agent.emits, LlmCalled, DeadLettered}
    for topic in TOPICS:
        if not written.isdisjoint(topic.events):
            want(topic.names(), _WRITE)
    return wanted
