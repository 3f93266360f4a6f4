"""Hears of data subjects who were forgotten: what a process still remembers of them goes.

In: SubjectForgotten of topic ``privacy``, read in a thread. Out: a call with each key id, those told before the start
too: they cost nothing, as there is nothing to drop.
"""

from collections.abc import Callable, Mapping
from typing import Any, Final

from schemas.codec import Codec
from schemas.events import SubjectForgotten
from schemas.metadata import Envelope
from schemas.topics import topic_of
from streams.tail import Projection

__all__ = ["PRIVACY_TOPIC", "ForgottenSubjects"]

PRIVACY_TOPIC: Final = topic_of(SubjectForgotten).name


class ForgottenSubjects(Projection):
    """Calls ``drop`` with the key id of each. ``kafka`` holds librdkafka settings."""

    def __init__(self, kafka: Mapping[str, Any], codec: Codec, drop: Callable[[str], None]) -> None:
        self._drop = drop
        super().__init__(kafka, codec, PRIVACY_TOPIC)

    def hear(self, envelope: Envelope, at_ms: int) -> None:
        """Take one event of the topic in; for the reading thread."""
        if isinstance(envelope.event, SubjectForgotten):
            self._drop(envelope.event.key_id)
