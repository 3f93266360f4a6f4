"""The alerts that are open: a projection of topic ``alerts``, read in a thread.

In: AlertRaised and AlertCleared, each maybe several times. Out: those raised and not cleared. An alert's id names it
for good: what was cleared once is not opened again by a repeat.
"""

from collections.abc import Mapping
from typing import Any, Final

from schemas.codec import Codec
from schemas.events import AlertCleared, AlertRaised
from schemas.metadata import Envelope
from schemas.topics import topic_of
from streams.tail import Projection

__all__ = ["ALERTS_TOPIC", "OpenAlerts"]

ALERTS_TOPIC: Final = topic_of(AlertRaised).name


class OpenAlerts(Projection):
    """The open alerts as this process knows them. ``kafka`` holds librdkafka settings."""

    def __init__(self, kafka: Mapping[str, Any], codec: Codec) -> None:
        self._raised: dict[str, AlertRaised] = {}
        self._cleared: set[str] = set()
        super().__init__(kafka, codec, ALERTS_TOPIC)

    def hear(self, envelope: Envelope, at_ms: int) -> None:
        """Take one event of the topic in; for the reading thread."""
        event = envelope.event
        if isinstance(event, AlertRaised):
            if event.alert_id not in self._cleared:
                self._raised[event.alert_id] = event
        elif isinstance(event, AlertCleared):
            self._cleared.add(event.alert_id)
            self._raised.pop(event.alert_id, None)

    def entries(self) -> tuple[AlertRaised, ...]:
        """Them, by source and rule."""
        return tuple(sorted(self._raised.copy().values(), key=lambda each: (each.source, each.rule)))
