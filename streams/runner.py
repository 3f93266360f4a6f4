"""Runs several processors in one event loop, restarts those that may recover, and tells how they fare.

In: bindings, and what every processor needs. Out: nothing until :meth:`Runner.stop`, or the error that no restart
helps against. Once a second each processor is looked at (:mod:`streams.readiness`) and told of
(:mod:`streams.telling`). Orders to stop a step (:mod:`streams.control`) are heard once for all of them.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any, Final

from agents.context import Ports
from schemas.codec import Codec
from streams.binding import Binding
from streams.control import CancelledSteps, ControlReader
from streams.errors import ClusterError, FencedError, ProcessorError
from streams.holdups import Holdups
from streams.interpreter import collecting_seldom, switching_soon
from streams.processor import Processor
from streams.readiness import Readiness
from streams.telling import INTERVAL_S, Teller

if TYPE_CHECKING:
    from streams.tracing import Tracer

__all__ = ["Runner"]

_FIRST_BACKOFF_S: Final = 0.5
_LAST_BACKOFF_S: Final = 30.0
_STEADY_S: Final = 60.0

log = logging.getLogger(__name__)


class _Rest:
    """An agent's rest: ``begun`` is set when its processor has stopped, ``over`` when it may start again."""

    def __init__(self) -> None:
        self.begun = asyncio.Event()
        self.over = asyncio.Event()


class Runner:
    """Runs a processor for each binding.

    A processor that stops with a retryable error (Kafka or the registry away) is started again with backoff. So is one
    that was fenced: the machine slept, or a transaction timed out while the broker was away. Fenced again within a
    minute it has a rival with the same slot. That, and any other error, stops them all, gracefully, and is raised by
    :meth:`run`. ``stalled_after_s`` is :class:`~streams.readiness.Readiness`'s, ``tracer`` the processors'.
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
        stalled_after_s: float | None = None,
        tracer: "Tracer | None" = None,
    ) -> None:
        self._bindings = tuple(bindings)
        self._codec = codec
        self._kafka = dict(kafka)
        self._ports = ports
        self._slot = slot
        self._commit_interval_s = commit_interval_s
        self._drain_timeout_s = drain_timeout_s
        self._telemetry = telemetry
        self._stalled_after_s = stalled_after_s
        self._tracer = tracer
        self._stop = asyncio.Event()
        self._ended = asyncio.Event()
        self._cancelled = CancelledSteps()
        self._rests: dict[str, _Rest] = {}
        self.processors: dict[str, Processor] = {}
        """The running processor of each agent, by the agent's name."""
        self.readiness: dict[str, Readiness] = {}
        """What each of them waits for, looked at once a second."""

    @property
    def ready(self) -> bool:
        """Whether every processor works. One of many instances may own no partition, and is ready all the same."""
        return len(self.processors) == len(self._bindings) and all(each.joined for each in self.processors.values())

    def stop(self) -> None:
        """Stop all processors gracefully; :meth:`run` returns then."""
        self._stop.set()
        for processor in self.processors.values():
            processor.stop()

    @asynccontextmanager
    async def resting(self, agent: str) -> AsyncIterator[None]:
        """While it is entered, the agent's processor is stopped: what it had finished is committed, and nothing begins.
        It is still the one that holds its slot. Then a new one starts, and restores what lies there.

        Raises:
            LookupError: no processor of this agent runs here, or it rests already.
            ClusterError: all are being stopped.
        """
        if agent not in self.processors or agent in self._rests:
            raise LookupError(f"{agent} does not run here, or rests already")
        rest = self._rests[agent] = _Rest()
        try:
            self.processors[agent].stop()
            await self._either(rest.begun)
            if not rest.begun.is_set():
                raise ClusterError(f"{agent} is being stopped with all others")
            log.info("%s rests", agent)
            yield
        finally:
            del self._rests[agent]
            rest.over.set()

    async def _either(self, event: asyncio.Event) -> None:
        """Wait for ``event``, or for the order to stop."""
        waiting = [asyncio.ensure_future(each.wait()) for each in (event, self._stop)]
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for each in waiting:
                each.cancel()

    async def run(self) -> None:
        """Run until :meth:`stop`.

        Raises:
            ProcessorError: one processor can't go on; the others were stopped.
        """
        with collecting_seldom(), switching_soon():
            await self._run()

    async def _run(self) -> None:
        keepers = [asyncio.create_task(self._keep(binding)) for binding in self._bindings]
        control = ControlReader(self._kafka, self._codec, self._cancel_step)
        control.start()
        looking = asyncio.create_task(self._look())
        try:
            await asyncio.wait(keepers, return_when=asyncio.FIRST_EXCEPTION)
            self.stop()
            await asyncio.gather(*keepers)
        finally:
            self.stop()
            await asyncio.gather(*keepers, return_exceptions=True)
            self._ended.set()
            await control.stop()
            await asyncio.gather(looking, return_exceptions=True)

    def _cancel_step(self, step_id: str, reason: str) -> None:
        if self._cancelled.add(step_id, reason):
            for processor in self.processors.values():
                processor.cancel_step(step_id, reason)

    async def _keep(self, binding: Binding) -> None:
        backoff_s = _FIRST_BACKOFF_S
        fenced_at = -_STEADY_S
        while not self._stop.is_set():
            if (rest := self._rests.get(binding.agent.name)) is not None:
                rest.begun.set()
                await self._either(rest.over)
                continue
            processor = self.processors[binding.agent.name] = Processor(
                binding,
                codec=self._codec,
                kafka=self._kafka,
                ports=self._ports,
                slot=self._slot,
                commit_interval_s=self._commit_interval_s,
                drain_timeout_s=self._drain_timeout_s,
                cancelled=self._cancelled,
                tracer=self._tracer,
            )
            self.readiness[binding.agent.name] = Readiness(
                processor, stalled_after_s=self._stalled_after_s, holdups=Holdups(self._kafka)
            )
            started = time.monotonic()
            try:
                await processor.run()
                if binding.agent.name not in self._rests:
                    return
                continue
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

    async def _look(self) -> None:
        """Look at each processor once a second until all have stopped, and tell what was seen."""
        teller = None
        if self._telemetry:
            teller = Teller(codec=self._codec, kafka=self._kafka, instance=str(self._slot))
        try:
            while True:
                # Once more when all have stopped: their last events are not told yet.
                over = self._ended.is_set()
                for name, processor in self.processors.items():
                    try:
                        readiness = self.readiness[name]
                        readiness.check()
                        if teller is not None:
                            teller.tell(processor, readiness)
                    except Exception:
                        # Figures are worth less than the work.
                        log.exception("%s: its figures can't be told", processor.name)
                if over:
                    return
                with suppress(TimeoutError):
                    async with asyncio.timeout(INTERVAL_S):
                        await self._ended.wait()
        finally:
            if teller is not None:
                await asyncio.to_thread(teller.close, self.processors)
