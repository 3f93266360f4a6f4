"""Reads topic ``control``: orders that every process hears, such as the one to stop a step.

In: each :class:`~schemas.events.StepCancelRequested` that the topic holds (it keeps them for days), then live ones.
Out: a call on the event loop for each. There is no group and no offset: what a process has forgotten it reads again
when it starts, so that a step cancelled while nobody ran is not run by who comes next.
"""

import asyncio
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final
from uuid import uuid4

from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, KafkaException, Message, TopicPartition

from schemas.codec import Codec
from schemas.errors import RegistryError, SchemaError
from schemas.events import StepCancelRequested
from schemas.record import Record
from schemas.topics import topic_of
from streams.kafka import PASSING, reader_settings

__all__ = ["CONTROL_TOPIC", "CancelledSteps", "ControlReader"]

CONTROL_TOPIC: Final = topic_of(StepCancelRequested).name

_BATCH: Final = 500
_POLL_S: Final = 0.1
_RETRY_S: Final = 1.0
_METADATA_S: Final = 2.0
_REMEMBERED: Final = 100_000
"""Step ids of some 100 bytes: 20 MB at most, and more steps than are cancelled in the days that the topic keeps."""
log = logging.getLogger(__name__)


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
        self._kafka = kafka
        self._codec = codec
        self._on_cancel = on_cancel
        self._stop = threading.Event()
        self._caught_up = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    @property
    def caught_up(self) -> bool:
        """Whether all that the topic held at the start was told."""
        return self._caught_up.is_set()

    def start(self) -> None:
        """Begin; to be called on the event loop that the calls are made on."""
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name="control reader", daemon=True)
        self._thread.start()

    async def stop(self) -> None:
        """Stop; no call is made after it returns."""
        self._stop.set()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self._read()
            except KafkaException as error:
                # Read again from the beginning: orders are few, and hearing one twice does no harm.
                log.info("%s can't be read, and is tried again: %s", CONTROL_TOPIC, error.args[0].str())
            except Exception:
                log.exception("%s can't be read, and is tried again", CONTROL_TOPIC)
            self._stop.wait(_RETRY_S)

    def _read(self) -> None:
        """Read until stopped.

        Raises:
            KafkaException: it does not get over it by itself; a new consumer may.
        """
        consumer = Consumer(reader_settings(self._kafka, f"control-{uuid4()}"))
        try:
            waiting = self._assign(consumer)
            while not self._stop.is_set():
                first = consumer.poll(_POLL_S)
                messages = [] if first is None else [first, *consumer.consume(_BATCH - 1, 0)]
                orders = []
                for message in messages:
                    error = message.error()
                    if error is None:
                        orders += self._orders(message)
                    elif error.code() == KafkaError._PARTITION_EOF:
                        waiting.discard(message.partition())
                    elif not error.retriable() and error.code() not in PASSING:
                        raise KafkaException(error)
                if orders and not self._tell(orders):
                    return
                if not waiting:
                    self._caught_up.set()
        finally:
            consumer.close()

    def _assign(self, consumer: Consumer) -> set[int]:
        topic = consumer.list_topics(CONTROL_TOPIC, timeout=_METADATA_S).topics[CONTROL_TOPIC]
        if topic.error is not None:
            raise KafkaException(topic.error)
        consumer.assign([TopicPartition(CONTROL_TOPIC, number, OFFSET_BEGINNING) for number in topic.partitions])
        return set(topic.partitions)

    def _orders(self, message: Message) -> list[tuple[str, str]]:
        try:
            event = self._codec.decode(Record.from_message(message)).event
        except RegistryError as error:
            # The bytes may be fine; they are read again when the registry answers.
            raise KafkaException(KafkaError(KafkaError._FAIL, str(error))) from error
        except SchemaError as error:
            log.warning("%s@%s is no order: %s", CONTROL_TOPIC, message.offset(), error)
            return []
        return [(event.target, event.reason)] if isinstance(event, StepCancelRequested) else []

    def _tell(self, orders: Sequence[tuple[str, str]]) -> bool:
        """Make the calls, and wait for them: what the loop has not taken yet is not piled up. False when it is over."""
        told = threading.Event()
        assert self._loop is not None

        def tell() -> None:
            try:
                for step_id, reason in orders:
                    if self._stop.is_set():
                        return
                    self._on_cancel(step_id, reason)
            finally:
                told.set()

        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(tell)
            while not told.wait(_POLL_S):
                if self._stop.is_set():
                    return False
            return True
        return False
