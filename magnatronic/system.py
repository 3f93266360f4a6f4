"""The whole system in one process: broker, topics, agents, sinks, control socket.

In: settings. Out: :class:`System`, which starts its parts in order, runs until it is stopped or a part fails, and stops
them in the reverse order. Agents run on the event loop, sinks in threads, the broker is a JVM beside this process.
Nothing but the log and the stores' own offsets says how far anything has come, so that SIGKILL at any moment is no more
than a pause.
"""

import asyncio
import contextlib
import dataclasses
import fcntl
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Self

from pydantic import ValidationError

from agents.context import Memory, Ports, RecallRequest
from magnatronic.broker import EmbeddedBroker
from magnatronic.broker.topics import ensure_topics
from magnatronic.control import ControlServer, socket_path
from magnatronic.errors import AlreadyRunningError, ControlError, PartFailedError, WrongInputError
from magnatronic.follow import KAFKA_LOGGER
from magnatronic.forgetting import erasures, forgets
from magnatronic.monitoring import MonitorProcess
from magnatronic.observing import Observer
from magnatronic.queries import answer_query
from magnatronic.rebuilding import Rebuilds
from magnatronic.roles import AGENT_ROLES, SINK_ROLES, Workbench, instance_name, ready_codec
from magnatronic.settings import Settings
from magnatronic.tracing import make_tracer
from schemas.codec import Codec
from schemas.events import Evidence, Value
from sinks.errors import SinkError
from sinks.runner import SinkRunner
from streams.access import check_login
from streams.directory import AgentDirectory
from streams.forgotten import ForgottenSubjects
from streams.open_alerts import OpenAlerts
from streams.runner import Runner

__all__ = ["FolderLock", "RunningSystem", "System", "SystemInfo", "first_of", "new_event_loop"]

_LOGGER: Final = logging.getLogger(__name__)
_SLOT: Final = instance_name("up", 0)
_CATCH_UP_S: Final = 30.0
_READY_TIMEOUT_S: Final = 60.0


@dataclasses.dataclass(frozen=True, slots=True)
class SystemInfo:
    """Where the parts of a running system are. ``embedded`` tells whether the broker is its own."""

    bootstrap_servers: str
    embedded: bool
    data_dir: Path
    socket: Path
    logs: Path
    provider: str
    clickhouse: str
    milvus: str
    embedding_model: str
    metrics: str | None
    broker_pid: int | None

    def as_dict(self) -> dict[str, Any]:
        """The places as JSON can hold them."""
        return {
            "bootstrap_servers": self.bootstrap_servers,
            "embedded": self.embedded,
            "data_dir": str(self.data_dir),
            "socket": str(self.socket),
            "logs": str(self.logs),
            "provider": self.provider,
            "clickhouse": self.clickhouse,
            "milvus": self.milvus,
            "embedding_model": self.embedding_model,
            "metrics": self.metrics,
            "pid": os.getpid(),
            "broker_pid": self.broker_pid,
        }


class System:
    """Everything in one process. Start it, wait for :attr:`failure` or what you like, stop it.

    ``on_progress`` is told in a few words what is being started. ``lasting`` is the broker's.
    """

    def __init__(
        self, settings: Settings, *, lasting: bool = False, on_progress: Callable[[str], None] = lambda _: None
    ) -> None:
        self.settings = settings
        self._lasting = lasting
        self._tell = on_progress
        self._lock = FolderLock(settings.data_dir)
        self._broker: EmbeddedBroker | None = None
        self._workbench = Workbench(settings)
        self._observer = Observer(host=settings.metrics_host, port=settings.metrics_port_or_none, instance=_SLOT)
        self._tracer = make_tracer(_SLOT)
        self._control: ControlServer | None = None
        self._agents: Runner | None = None
        self._sinks: dict[str, SinkRunner] = {}
        self._rebuilds: Rebuilds | None = None
        self._directory: AgentDirectory | None = None
        self._forgotten: ForgottenSubjects | None = None
        self._alerts: OpenAlerts | None = None
        self._monitor: MonitorProcess | None = None
        self._background: list[asyncio.Task[None]] = []
        self._started_at = time.monotonic()
        self.failure: asyncio.Future[PartFailedError] | None = None
        self.kafka: dict[str, Any] = {}

    async def start(self) -> SystemInfo:
        """Start all parts; where they are. When it raises, nothing is left running.

        Raises:
            AlreadyRunningError: another process runs on the data folder.
            AccessError: the cluster refuses the login, or a right is missing.
            BrokerError: the broker or its topics can't be had.
            SinkError: a store can't be opened.
            PartFailedError: a part ended while it started.
        """
        self._lock.acquire()
        try:
            return await self._start()
        except BaseException:
            await self.stop()
            raise

    async def _start(self) -> SystemInfo:
        loop = asyncio.get_running_loop()
        self.failure = loop.create_future()
        await self._observer.start()
        self._tell("Kafka, the stores and the embedding model")
        # The JVM takes two seconds to come up; models and stores open meanwhile.
        kafka, codec, _ = await asyncio.gather(
            asyncio.to_thread(self._start_kafka),
            asyncio.to_thread(ready_codec, self.settings),
            asyncio.to_thread(self._open_stores),
        )
        self.kafka = kafka
        self._observer.watch_kafka(kafka)
        self._tell("agents and sinks")
        for role in SINK_ROLES:
            self._start_sink(role, codec, loop)
        self._directory, self._alerts = AgentDirectory(kafka, codec), OpenAlerts(kafka, codec)
        self._forgotten = forgets(self._workbench, kafka, codec)
        self._directory.start()
        self._forgotten.start()
        self._alerts.start()
        self._agents = Runner(
            self._workbench.bindings(AGENT_ROLES),
            codec=codec,
            kafka=kafka,
            ports=self._ports(),
            slot=_SLOT,
            stalled_after_s=self.settings.stalled_after_s,
            tracer=self._tracer,
        )
        self._observer.watch_agents(self._agents)
        self._watch("agents", self._agents.run())
        if self._broker is not None:
            self._watch("the broker", self._watch_broker(self._broker))
        await self._wait_ready()
        self._start_monitor(kafka["bootstrap.servers"])
        self._observer.started()
        self._rebuilds = Rebuilds(
            self._workbench, self._sinks, lambda: self.kafka, codec, agents=self._agents, slot=_SLOT
        )
        self._control = ControlServer(
            socket_path(self.settings.data_dir),
            {
                **self._rebuilds.operations(),
                **{"status": self._status, "query": self._query, "catch_up": self._catch_up, "recall": self._recall},
                "forgotten": self._forgot,
            },
        )
        await self._control.start()
        return self.info()

    def _ports(self) -> Ports:
        """The agents' ports. Recall waits for the index at first: after a crash it is behind the log for a moment, and
        a search would find too little.
        """
        ports = self._workbench.ports(AGENT_ROLES)
        assert ports.memory is not None
        memory = CaughtUpMemory(ports.memory)
        self._watch("the index", self._open_when_caught_up(memory))
        return dataclasses.replace(ports, memory=memory, directory=self._directory)

    async def _open_when_caught_up(self, memory: "CaughtUpMemory") -> None:
        while not memory.caught_up.is_set():
            try:
                if await asyncio.to_thread(self._sinks["sink-milvus"].wait_caught_up, _CATCH_UP_S):
                    memory.caught_up.set()
            except SinkError as error:
                if not error.retryable:
                    raise
            else:
                _LOGGER.info("recall %s", "begins" if memory.caught_up.is_set() else "waits: the index is behind")

    def _start_monitor(self, servers: str) -> None:
        """It comes last, and nothing waits for it: without it all results are the same."""
        if self.settings.monitor:
            self._monitor = MonitorProcess(
                self.settings,
                servers,
                instance=_SLOT,
                log_path=self.settings.data_dir / "logs" / "monitor.log",
                on_failed=lambda _: None,  # it is in the log
            )
            self._monitor.start()

    def _start_kafka(self) -> dict[str, Any]:
        settings = self.settings
        servers = None
        if settings.embedded_kafka:
            self._broker = EmbeddedBroker(
                settings.data_dir / "kafka",
                heap_mb=settings.kafka_heap_mb,
                lasting=self._lasting,
                java_home=settings.java_home,
            )
            servers = self._broker.start().bootstrap_servers
        # librdkafka's own words go where all logs go, not to standard error.
        kafka = {**settings.kafka_client_config(servers), "logger": KAFKA_LOGGER}
        if not settings.embedded_kafka:
            check_login(kafka)
        ensure_topics(kafka, partitions=settings.partitions, replication_factor=settings.replication_factor)
        return kafka

    def _open_stores(self) -> None:
        self._workbench.llm()
        self._workbench.embedding()
        self._workbench.clickhouse()
        self._workbench.memory()

    def _start_sink(self, role: str, codec: Codec, loop: asyncio.AbstractEventLoop) -> None:
        def failed(error: BaseException) -> None:
            loop.call_soon_threadsafe(self._fail, role, error)

        watched = self._observer.watch_sink(role)
        runner = SinkRunner(
            self._workbench.sink(role),
            codec=codec,
            kafka=self.kafka,
            instance=_SLOT,
            on_batch=watched.on_batch,
            on_error=failed,
        )
        self._sinks[role] = watched.runner = runner
        runner.start()

    def _watch(self, name: str, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work, name=name)

        def ended(task: asyncio.Task[None]) -> None:
            if not task.cancelled() and (error := task.exception()) is not None:
                self._fail(name, error)

        task.add_done_callback(ended)
        self._background.append(task)

    def _fail(self, name: str, error: BaseException) -> None:
        _LOGGER.error("%s failed", name, exc_info=error)
        if self.failure is not None and not self.failure.done():
            said = str(error) if isinstance(error, PartFailedError) else f"{name} failed: {error}"
            failure = PartFailedError(said)
            failure.__cause__ = error
            self.failure.set_result(failure)

    async def _watch_broker(self, broker: EmbeddedBroker) -> None:
        while broker.running:  # noqa: ASYNC110 - it is a process, which sets no event
            await asyncio.sleep(0.5)
        raise PartFailedError(f"the Kafka process ended; its log is {broker.log_path}")

    async def _wait_ready(self) -> None:
        """Wait until every agent works and every sink has its partitions."""
        assert self.failure is not None
        assert self._agents is not None
        deadline = time.monotonic() + _READY_TIMEOUT_S
        while not self._agents.ready:
            if self.failure.done():
                raise self.failure.result()
            if time.monotonic() > deadline:
                raise PartFailedError(
                    f"the agents are not ready after {_READY_TIMEOUT_S:g} s; see {self.settings.data_dir / 'logs'}"
                )
            await asyncio.sleep(0.02)

    def info(self) -> SystemInfo:
        """Where the parts are."""
        settings = self.settings
        model = self._workbench.embedding()
        return SystemInfo(
            bootstrap_servers=self.kafka["bootstrap.servers"],
            embedded=self._broker is not None,
            data_dir=settings.data_dir,
            socket=socket_path(settings.data_dir),
            logs=settings.data_dir / "logs",
            provider=settings.llm_provider + (f" ({settings.llm_model})" if settings.llm_model else ""),
            clickhouse="a server" if settings.clickhouse_url else str(settings.data_dir / "clickhouse"),
            milvus=settings.milvus_uri or str(settings.data_dir / "milvus.db"),
            embedding_model=f"{model.model} ({model.version})",
            metrics=self._observer.url,
            broker_pid=None if self._broker is None else self._broker.pid,
        )

    async def _status(self, _: Mapping[str, Any]) -> dict[str, Any]:
        causes = self._observer.causes()
        return {
            **self.info().as_dict(),
            "uptime_s": round(time.monotonic() - self._started_at, 1),
            "ready": not causes,
            "causes": [cause.as_dict() for cause in causes],
            "agents": [] if self._agents is None else sorted(self._agents.processors),
            "sinks": {role: {"records": runner.records_written} for role, runner in self._sinks.items()},
            "jobs": [] if self._rebuilds is None else [job.as_dict() for job in self._rebuilds.jobs.running()],
            "monitor_pid": None if self._monitor is None else self._monitor.pid,
            "directory": [] if self._directory is None else _as_json(self._directory.entries()),
            "alerts": [] if self._alerts is None else _as_json(self._alerts.entries()),
        }

    async def _query(self, request: Mapping[str, Any]) -> dict[str, Any]:
        sql = str(request.get("sql", ""))
        caught_up = True
        if request.get("wait", True):
            caught_up = await asyncio.to_thread(self._sinks["sink-clickhouse"].wait_caught_up, _CATCH_UP_S)
        answer = await asyncio.to_thread(answer_query, self._workbench.clickhouse(), sql)
        return {**answer, "caught_up": caught_up}

    async def _recall(self, request: Mapping[str, Any]) -> list[dict[str, Any]]:
        """What memory holds now, for those who ask what it would have made of something."""
        try:
            asked = RecallRequest.model_validate(request.get("request"))
        except ValidationError as error:
            raise WrongInputError(f"a recall's request has query, limit and document_ids: {error}") from None
        return [found.model_dump(mode="json") for found in await self._workbench.memory().recall(asked)]

    async def _forgot(self, request: Mapping[str, Any]) -> list[dict[str, Any]]:
        """What the stores have done for forgotten subjects, when they have done it or the time is up."""
        timeout_s, key_ids = float(request["timeout_s"]), list(map(str, request["key_ids"]))
        await asyncio.to_thread(self.wait_caught_up, timeout_s)
        said = await asyncio.to_thread(erasures, self._workbench, key_ids, timeout_s)
        return [dataclasses.asdict(each) for each in said]

    async def _catch_up(self, request: Mapping[str, Any]) -> bool:
        return await asyncio.to_thread(self.wait_caught_up, float(request.get("timeout", _CATCH_UP_S)))

    def wait_caught_up(self, timeout: float = _CATCH_UP_S) -> bool:
        """Wait until the stores have all that is in the log now; whether they came so far in ``timeout`` seconds."""
        deadline = time.monotonic() + timeout
        return all(runner.wait_caught_up(deadline - time.monotonic()) for runner in self._sinks.values())

    async def stop(self) -> None:
        """Stop all parts, the last started first. What agents have not finished is done after the next start."""
        self._observer.stopping()
        if self._control is not None:
            await self._control.stop()
        if self._rebuilds is not None:
            await self._rebuilds.jobs.stop()
        monitor_gone = None if self._monitor is None else asyncio.ensure_future(asyncio.to_thread(self._monitor.stop))
        if self._agents is not None:
            self._agents.stop()
        work = [task for task in self._background if task.get_name() == "agents"]
        if work:
            await asyncio.wait(work, timeout=30)
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        stopped = await asyncio.gather(
            *(asyncio.to_thread(runner.stop) for runner in self._sinks.values()), return_exceptions=True
        )
        for error in stopped:
            if error is not None:
                _LOGGER.error("a sink did not stop cleanly: %s", error)
        for reader in (self._directory, self._alerts, self._forgotten):
            if reader is not None:
                await asyncio.to_thread(reader.stop)
        await asyncio.to_thread(self._workbench.close)
        await self._observer.stop()
        if self._tracer is not None:
            await asyncio.to_thread(self._tracer.close)
        if monitor_gone is not None:
            await monitor_gone
        if self._broker is not None:
            await asyncio.to_thread(self._broker.stop)
        self._lock.release()


def _as_json(values: Sequence[Value]) -> list[dict[str, Any]]:
    return [value.model_dump(mode="json") for value in values]


class CaughtUpMemory:
    """A memory whose recalls wait until :attr:`caught_up` is set."""

    def __init__(self, memory: Memory) -> None:
        self.model = memory.model
        self.caught_up = asyncio.Event()
        self._memory = memory

    async def recall(self, request: RecallRequest) -> tuple[Evidence, ...]:
        """As the memory recalls, once it is caught up."""
        await self.caught_up.wait()
        return await self._memory.recall(request)


class FolderLock:
    """One system a data folder: an flock that the kernel frees however this process ends."""

    def __init__(self, data_dir: Path) -> None:
        self._data_dir = data_dir
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Take it.

        Raises:
            AlreadyRunningError: another process has it; the message says which.
            ControlError: the folder can't be written.
        """
        path = self._data_dir / "magnatronic.lock"
        try:
            self._data_dir.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ControlError(f"the data folder {self._data_dir} can't be used: {error.strerror}") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(descriptor, 32, 0).decode(errors="replace").strip()
            os.close(descriptor)
            raise AlreadyRunningError(
                f"a Magnatronic runs on {self._data_dir} already (process {owner or 'unknown'}); "
                "use it, stop it, or give another --data-dir"
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        self._descriptor = descriptor

    def check(self) -> None:
        """Raise what :meth:`acquire` would, and leave it free."""
        self.acquire()
        self.release()

    def release(self) -> None:
        """Free it, if held."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)


class RunningSystem:
    """A system on an event loop in a thread of its own, for programs that are no asyncio ones, such as the demo.

    ``with RunningSystem(settings) as system: ...``; :attr:`info` says where it is.
    """

    def __init__(self, settings: Settings, *, on_progress: Callable[[str], None] = lambda _: None) -> None:
        self._system = System(settings, on_progress=on_progress)
        self._thread = threading.Thread(target=self._run, name="system", daemon=True)
        self._up = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._error: BaseException | None = None
        self._info: SystemInfo | None = None

    @property
    def info(self) -> SystemInfo:
        """Where its parts are."""
        assert self._info is not None
        return self._info

    @property
    def kafka(self) -> dict[str, Any]:
        """Client settings for its Kafka."""
        return self._system.kafka

    def check(self) -> None:
        """Raise what made a part fail, if one did."""
        failure = self._system.failure
        if failure is not None and failure.done():
            raise failure.result()

    def __enter__(self) -> Self:
        """Starts it; raises what :meth:`System.start` does."""
        self._thread.start()
        self._up.wait()
        if self._error is not None:
            self._thread.join()
            raise self._error
        return self

    def __exit__(self, *_: object) -> None:
        """Stops it."""
        if self._loop is not None and self._stop is not None:
            with contextlib.suppress(RuntimeError):  # it has ended by itself
                self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            try:
                runner.run(self._main())
            except BaseException as error:  # noqa: BLE001 - handed to the thread that waits in __enter__
                self._error = error
            finally:
                self._up.set()

    async def _main(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        self._info = await self._system.start()
        self._up.set()
        try:
            await self._stop.wait()
        finally:
            await self._system.stop()


async def first_of(stop: asyncio.Event, failure: "asyncio.Future[Any]") -> None:
    """Wait until ``stop`` is set or ``failure`` is there."""
    stopping = asyncio.ensure_future(stop.wait())
    waiting: list[asyncio.Future[Any]] = [stopping, failure]
    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()


def new_event_loop() -> asyncio.AbstractEventLoop:
    """The event loop that agents run on."""
    import uvloop

    return uvloop.new_event_loop()
