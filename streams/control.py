"""Reads topic ``control``: orders that every process hears, such as the one to stop a step.

In: each :class:`~schemas.events.StepCancelRequested` that the topic holds (it keeps them for days), then live ones.
Out: a call on the event loop for each. There is no group and no offset: what a process has forgotten it reads again
when it starts, so that a step cancelled while nobody ran is not run by who comes next.
"""

import asyncio
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final

from schemas.codec import Codec
from schemas.events import StepCancelRequested
from schemas.topics import topic_of
from streams.tail import Heard, Tail

__all__ = ["CONTROL_TOPIC", "CancelledSteps", "ControlReader"]

CONTROL_TOPIC: Final = topic_of(StepCancelRequested).name

_POLL_S: Final = 0.1
_REMEMBERED: Final = 100_000
"""Step ids of some 100 bytes: 20 MB at most, and more steps than are cancelled in the days that the topic keeps."""


class CancelledSteps(Mapping[str, str]):
    """The latest steps that were cancelled, and why: step_id to reason. Holds ``limit`` of them, oldest forgotten."""

    def __init__(self, limit: int = _REMEMBERED) -> None:
        self._limit = limit
        self._reasons: OrderedDict[str, str] = OrderedDict()

    def add(self, step_id: str, reason: str) -> bool:
        """Remember one; whether it is new."""
        new = step_id not in self._reasons
        self._reasons[step_id] = reason
        self._reasons.move_to_end(step_id)
        if len(self._reasons) > self._limit:
            self._reasons.popitem(last=False)
        return new

    def __getitem__(self, step_id: str) -> str:
        return self._reasons[step_id]

    def __iter__(self) -> Iterator[str]:
        return iter(self._reasons)

    def __len__(self) -> int:
        return len(self._reasons)


class ControlReader:
    """Reads all of ``control`` in a thread and calls ``on_cancel(step_id, reason)`` on the event loop.

    ``kafka`` holds librdkafka settings (bootstrap.servers and security). A call may come twice for the same order. It
    waits for a topic that is not there, and for brokers that are away, for as long as it takes.
    """

    def __init__(self, kafka: Mapping[str, Any], codec: Codec, on_cancel: Callable[[str, str], None]) -> None:
        self._tail = Tail(kafka, codec, CONTROL_TOPIC, self._hear)
        self._on_cancel = on_cancel
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def caught_up(self) -> bool:
        """Whether all that the topic held at the start was told."""
        return self._tail.caught_up

    def start(self) -> None:
        """Begin; to be called on the event loop that the calls are made on."""
        self._loop = asyncio.get_running_loop()
        self._tail.start()

    async def stop(self) -> None:
        """Stop; no call is made after it returns."""
        await asyncio.to_thread(self._tail.stop)

    def _hear(self, heard: Sequence[Heard]) -> None:
        """Have the orders told, and wait for it: what the loop has not taken yet is not piled up."""
        orders = [each.envelope.event for each in heard if isinstance(each.envelope.event, StepCancelRequested)]
        told = threading.Event()
        assert self._loop is not None

        def tell() -> None:
            try:
                for order in orders:
                    if self._tail.stopping:
                        return
                    self._on_cancel(order.target, order.reason)
            finally:
                told.set()

        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(tell)
            while not told.wait(_POLL_S) and not self._tail.stopping:
                pass
