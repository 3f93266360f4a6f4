"""Runs several processors in one event loop, restarts those that may recover, and tells their figures each second.

In: bindings, and what every processor needs. Out: nothing until :meth:`Runner.stop`, or the error that no restart
helps against. Figures go to ``telemetry`` through one plain idempotent producer for all processors: they are about the
process, not decided from events, and must flow when transactions are stuck.
"""

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final

from confluent_kafka import KafkaException, Producer

from agents.context import Ports
from schemas.codec import Codec
from schemas.metadata import Metadata, deterministic_id
from schemas.topics import key_of, topic_name
from streams.binding import Binding
from streams.errors import FencedError, ProcessorError
from streams.garbage import collecting_seldom
from streams.kafka import producer_settings
from streams.processor import Processor

__all__ = ["Runner"]

_FIRST_BACKOFF_S: Final = 0.5
_LAST_BACKOFF_S: Final = 30.0
_STEADY_S: Final = 60.0
_TELEMETRY_S: Final = 1.0
_FLUSH_S: Final = 2.0

log = logging.getLogger(__name__)


class Runner:
    """Runs a processor for each binding.

    A processor that stops with a retryable error (Kafka or the registry away) is started again with backoff. So is one
    that was fenced: the machine slept, or a transaction timed out while the broker was away. Fenced again within a
    minute it has a rival with the same slot. That, and any other error, stops them all, gracefully, and is raised by
    :meth:`run`.
    """

    def __init__(
        self,
        bindings: Sequence[Binding],
        *,
        codec: Codec,
        kafka: Mapping[str, Any],
        ports: Ports | None = None,
        slot: int | str = 0,
        commit_interval_s: float = 0.0,
        drain_timeout_s: float = 10.0,
        telemetry: bool = True,
    ) -> None:
        self._bindings = tuple(bindings)
        self._codec = codec
        self._kafka = dict(kafka)
        self._ports = ports
        self._slot = slot
        self._commit_interval_s = commit_interval_s
        self._drain_timeout_s = drain_timeout_s
        self._telemetry = telemetry
        self._stop = asyncio.Event()
        self.processors: dict[str, Processor] = {}
        """The running processor of each agent, by the agent's name."""

    @property
    def ready(self) -> bool:
        """Whether every processor works. One of many instances may own no partition, and is ready all the same."""
        return len(self.processors) == len(self._bindings) and all(each.joined for each in self.processors.values())

    def stop(self) -> None:
        """Stop all processors gracefully; :meth:`run` returns then."""
        self._stop.set()
        for processor in self.processors.values():
            processor.stop()

    async def run(self) -> None:
        """Run until :meth:`stop`.

        Raises:
            ProcessorError: one processor can't go on; the others were stopped.
        """
        with collecting_seldom():
            await self._run()

    async def _run(self) -> None:
        keepers = [asyncio.create_task(self._keep(binding)) for binding in self._bindings]
        teller = asyncio.create_task(self._tell()) if self._telemetry else None
        try:
            await asyncio.wait(keepers, return_when=asyncio.FIRST_EXCEPTION)
            self.stop()
            await asyncio.gather(*keepers)
        finally:
            self.stop()
            await asyncio.gather(*keepers, return_exceptions=True)
            if teller is not None:
                teller.cancel()
                await asyncio.gather(teller, return_exceptions=True)

    async def _keep(self, binding: Binding) -> None:
        backoff_s = _FIRST_BACKOFF_S
        fenced_at = -_STEADY_S
        while not self._stop.is_set():
            processor = self.processors[binding.agent.name] = Processor(
                binding,
                codec=self._codec,
                kafka=self._kafka,
                ports=self._ports,
                slot=self._slot,
                commit_interval_s=self._commit_interval_s,
                drain_timeout_s=self._drain_timeout_s,
            )
            started = time.monotonic()
            try:
                await processor.run()
                return
            except ProcessorError as error:
                now = time.monotonic()
                if not error.retryable:
                    if not isinstance(error, FencedError) or now - fenced_at < _STEADY_S:
                        raise
                    fenced_at = now
                if now - started > _STEADY_S:
                    backoff_s = _FIRST_BACKOFF_S
                log.warning("%s stopped and starts again in %.1f s: %s", processor.name, backoff_s, error)
            try:
                async with asyncio.timeout(backoff_s):
                    await self._stop.wait()
            except TimeoutError:
                backoff_s = min(_LAST_BACKOFF_S, backoff_s * 2)

    async def _tell(self) -> None:
        producer = Producer(producer_settings(self._kafka, f"magnatronic-telemetry-{self._slot}"))
        try:
            while True:
                await asyncio.sleep(_TELEMETRY_S)
                for processor in self.processors.values():
                    self._tell_one(producer, processor)
                producer.poll(0)
        finally:
            await asyncio.to_thread(producer.flush, _FLUSH_S)

    def _tell_one(self, producer: Producer, processor: Processor) -> None:
        agent = processor.binding.agent.name
        stats = processor.stats.interval(agent=agent, instance=str(self._slot), interval_s=_TELEMETRY_S)
        now, key = datetime.now(UTC), key_of(stats)
        metadata = Metadata(
            id=deterministic_id(processor.name, "stats", now.isoformat()),
            source=f"/processors/{processor.name}",
            subject=key,
            time=now,
        )
        value, headers = self._codec.encode(stats, metadata)
        try:
            producer.produce(topic_name(stats), value, key.encode(), headers=headers)
        except (BufferError, KafkaException) as error:
            # Figures are worth less than the work; the next second has new ones.
            log.debug("%s: no telemetry: %s", processor.name, error)
