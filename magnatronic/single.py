"""One role alone in this process, on a cluster or beside a running system.

In: a role's name and the system found. Out: :class:`SingleRole`, which runs the role's agents, sink or monitor until it
is stopped. Many processes may run the same role; each holds a slot, which names it to Kafka and is the same after a
restart.
"""

import asyncio
import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any, Final

from magnatronic.broker.topics import ensure_topics
from magnatronic.discovery import FoundSystem
from magnatronic.errors import PartFailedError, WrongInputError
from magnatronic.follow import KAFKA_LOGGER
from magnatronic.forgetting import forgets
from magnatronic.monitoring import MonitorProcess
from magnatronic.observing import Observer
from magnatronic.roles import MONITOR_ROLE, SINK_ROLES, Workbench, agents_of, instance_name, ready_codec
from magnatronic.system import first_of
from magnatronic.tracing import make_tracer
from sinks.runner import SinkRunner
from streams.access import check_login
from streams.directory import AgentDirectory
from streams.forgotten import ForgottenSubjects
from streams.runner import Runner
from streams.slots import SlotLock

__all__ = ["SingleRole"]

_READY_TIMEOUT_S: Final = 60.0


class SingleRole:
    """Runs ``role``. ``slot`` names this instance among all that run its agents, and is the same after a restart; by
    default it is made of the machine's name, the role and the lowest number that no process here holds.

    Raises:
        WrongInputError: there is no such role, or it needs a store that only the system on the data folder can open.
    """

    def __init__(self, role: str, found: FoundSystem, *, slot: str | None = None) -> None:
        self._agents = agents_of(role)
        self.role = role
        self.settings = found.settings
        self._check_stores()
        self._lock: SlotLock | None = None
        if slot is None:
            self._lock = SlotLock(self.settings.data_dir, role)
            slot = instance_name(role, self._lock.slot)
        self.slot = slot
        self._kafka: dict[str, Any] = {**found.kafka, "logger": KAFKA_LOGGER}
        self._found = found
        self._workbench = Workbench(self.settings)
        self._observer = Observer(
            host=self.settings.metrics_host, port=self.settings.metrics_port_or_none, instance=slot
        )
        self._tracer = make_tracer(slot)
        self._runner: Runner | None = None
        self._sink: SinkRunner | None = None
        self._directory: AgentDirectory | None = None
        self._forgotten: ForgottenSubjects | None = None
        self._monitor: MonitorProcess | None = None
        self._work: asyncio.Task[None] | None = None
        self._failure: asyncio.Future[BaseException] | None = None

    def _check_stores(self) -> None:
        """An embedded store's files have one owner, and that is the process of ``magnatronic up``."""
        settings = self.settings
        if self.role == "sink-clickhouse" and settings.clickhouse_url is None:
            raise WrongInputError("run sink-clickhouse needs a server: set MAGNATRONIC_CLICKHOUSE_URL")
        recalls = self.role == "sink-milvus" or bool({"retriever", "researcher"} & set(self._agents))
        if recalls and settings.milvus_uri is None:
            raise WrongInputError(f"run {self.role} needs a Milvus server: set MAGNATRONIC_MILVUS_URI")

    async def start(self) -> None:
        """Start; returns when it works. When it raises, nothing is left running.

        Raises:
            AccessError: the cluster refuses the login.
            BrokerError: the topics can't be had.
            ClusterError: the cluster does not answer.
            PartFailedError: it failed or was not ready in time.
            RegistryError: the schema registry gave no ids.
        """
        loop = asyncio.get_running_loop()
        self._failure = loop.create_future()
        try:
            await self._observer.start()
            codec = await asyncio.to_thread(ready_codec, self.settings, deciding=bool(self._agents))
            if not self.settings.embedded_kafka:
                await asyncio.to_thread(check_login, self._kafka)
                await asyncio.to_thread(
                    ensure_topics,
                    self._kafka,
                    partitions=self.settings.partitions,
                    replication_factor=self.settings.replication_factor,
                )
            self._observer.watch_kafka(self._kafka)
            if self.role != MONITOR_ROLE:
                self._forgotten = forgets(self._workbench, self._kafka, codec)
                self._forgotten.start()
            if self.role in SINK_ROLES:
                sink = await asyncio.to_thread(self._workbench.sink, self.role)
                watched = self._observer.watch_sink(self.role)
                self._sink = watched.runner = SinkRunner(
                    sink,
                    codec=codec,
                    kafka=self._kafka,
                    instance=self.slot,
                    on_batch=watched.on_batch,
                    on_error=self._failed_elsewhere(loop),
                )
                self._sink.start()
                await asyncio.to_thread(self._sink.wait_caught_up, 0.0)
            elif self.role == MONITOR_ROLE:
                self._monitor = MonitorProcess(
                    self.settings,
                    self._kafka["bootstrap.servers"],
                    instance=self.slot,
                    log_path=self.settings.data_dir / "logs" / f"{self.slot}-faust.log",
                    on_failed=self._failed_elsewhere(loop),
                )
                self._monitor.start()
            else:
                ports = await asyncio.to_thread(self._workbench.ports, self._agents)
                if "coordinator" in self._agents:
                    self._directory = AgentDirectory(self._kafka, codec)
                    self._directory.start()
                    ports = dataclasses.replace(ports, directory=self._directory)
                self._runner = Runner(
                    self._workbench.bindings(self._agents),
                    codec=codec,
                    kafka=self._kafka,
                    ports=ports,
                    slot=self.slot,
                    stalled_after_s=self.settings.stalled_after_s,
                    tracer=self._tracer,
                )
                self._observer.watch_agents(self._runner)
                self._work = loop.create_task(self._runner.run())
                self._work.add_done_callback(self._ended)
                await self._wait_ready(self._runner)
            self._observer.started()
        except BaseException:
            await self.stop()
            raise

    async def _wait_ready(self, runner: Runner) -> None:
        assert self._failure is not None
        async with asyncio.timeout(_READY_TIMEOUT_S):
            while not runner.ready:
                if self._failure.done():
                    raise self._as_failure(self._failure.result())
                await asyncio.sleep(0.05)

    def _ended(self, work: "asyncio.Task[None]") -> None:
        if not work.cancelled() and (error := work.exception()) is not None:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        if self._failure is not None and not self._failure.done():
            self._failure.set_result(error)

    def _failed_elsewhere(self, loop: asyncio.AbstractEventLoop) -> Callable[[BaseException], None]:
        """:meth:`_fail`, for another thread to call."""

        def failed(error: BaseException) -> None:
            loop.call_soon_threadsafe(self._fail, error)

        return failed

    def _as_failure(self, error: BaseException) -> PartFailedError:
        failure = PartFailedError(f"{self.role} failed: {error}")
        failure.__cause__ = error
        return failure

    @property
    def metrics(self) -> str | None:
        """Where its metrics are served."""
        return self._observer.url

    async def until(self, stop: asyncio.Event) -> PartFailedError | None:
        """Wait until ``stop`` is set, or the role fails; the failure."""
        assert self._failure is not None
        await first_of(stop, self._failure)
        return self._as_failure(self._failure.result()) if self._failure.done() else None

    async def stop(self) -> None:
        """Finish and commit what is in flight, and let go of everything."""
        self._observer.stopping()
        if self._runner is not None and self._work is not None:
            self._runner.stop()
            with contextlib.suppress(Exception):  # why it failed is told by `until`
                await self._work
        if self._sink is not None:
            await asyncio.to_thread(self._sink.stop)
        if self._monitor is not None:
            await asyncio.to_thread(self._monitor.stop)
        for reader in (self._directory, self._forgotten):
            if reader is not None:
                await asyncio.to_thread(reader.stop)
        await asyncio.to_thread(self._workbench.close)
        await self._observer.stop()
        if self._tracer is not None:
            await asyncio.to_thread(self._tracer.close)
        if self._lock is not None:
            self._lock.release()
