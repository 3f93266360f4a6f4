"""What a process says of itself over HTTP: ``/metrics`` for Prometheus, ``/live`` and ``/ready`` for orchestrators.

In: the process's runner of agents, its sinks, its Kafka. Out: an HTTP endpoint in a thread of its own, so that it
answers when the event loop does not, and says what holds it up. ``/ready`` is 503 with the causes as JSON while one
part is not ready; ``/live`` is 503 only when the event loop has stood still for a minute.
"""

import asyncio
import json
import logging
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Final
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer
from wsgiref.types import StartResponse, WSGIEnvironment

from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient
from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector, make_wsgi_app
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from magnatronic.errors import PartFailedError
from sinks.runner import SinkRunner
from streams.histogram import Histogram
from streams.metrics import Families, MetricName, ProcessorCollector
from streams.readiness import Cause, Kind, Progress
from streams.runner import Runner
from streams.stats import Stats

__all__ = ["Observer", "WatchedSink"]

_BEAT_S: Final = 0.25
_BLOCKED_S: Final = 3.0
_DEAD_S: Final = 60.0
_STORE_S: Final = 5.0
_PROBE_S: Final = 5.0
_PROBE_TIMEOUT_S: Final = 5.0
_UNREACHABLE_S: Final = 12.0
"""Two failed probes: one may hit a broker that is just being replaced."""
_CLIENT_TIMEOUT_S: Final = 10.0
_OWN: Final = {"magnatronic", "streams", "agents", "schemas", "sinks", "replay"}

_LOGGER: Final = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Figures:
    """One processor, as :class:`~streams.metrics.ProcessorCollector` reads it."""

    agent: str
    instance: str
    stats: Stats
    handlers: int
    progress: tuple[Progress, ...]
    causes: tuple[Cause, ...]


class WatchedSink:
    """A sink's runner and the durations of its batches; give ``on_batch`` to the runner, then set ``runner``."""

    def __init__(self, role: str) -> None:
        self.role = role
        self.runner: SinkRunner | None = None
        self.batches = Histogram()

    def on_batch(self, records: int, seconds: float) -> None:
        """Count a written batch; on the runner's thread."""
        self.batches.add((seconds,))

    def causes(self) -> Iterator[Cause]:
        """Why it is not ready."""
        runner = self.runner
        if runner is None:
            yield Cause(Kind.STARTING, self.role, f"{self.role} has not started")
        elif runner.error is not None:
            yield Cause(Kind.FAILED, self.role, f"{self.role} has stopped: {runner.error}")
        elif (trouble := runner.trouble) is not None and (for_s := time.monotonic() - trouble[0]) >= _STORE_S:
            said = f"{self.role} can't write for {for_s:.0f} s: {trouble[1]}"
            yield Cause(Kind.STORE, self.role, said, for_s)
        elif runner.partitions is None:
            yield Cause(Kind.NOT_JOINED, self.role, f"{self.role} has no partitions of its group {runner.group}")


class Observer:
    """Serves one process's figures on ``host``:``port`` (0: a free one; None: nowhere). ``instance`` is its label."""

    def __init__(self, *, host: str, port: int | None, instance: str) -> None:
        self._host = host
        self._port = port
        self._instance = instance
        self._runner: Runner | None = None
        self._sinks: list[WatchedSink] = []
        self._kafka: KafkaProbe | None = None
        self._between: Cause | None = Cause(Kind.STARTING, "process", "the process starts")
        self._loop_thread = 0
        self._beat_at = time.monotonic()
        self._delay_s = 0.0
        self._beating: asyncio.Task[None] | None = None
        self._server: _Server | None = None
        self._serving: threading.Thread | None = None
        self._registry = CollectorRegistry()
        for standard in (ProcessCollector, PlatformCollector, GCCollector):
            standard(registry=self._registry)
        self._registry.register(ProcessorCollector(self._processors))
        self._registry.register(_OwnCollector(self._own_figures))
        self._metrics = make_wsgi_app(self._registry)

    @property
    def url(self) -> str | None:
        """Where it is served, such as ``http://127.0.0.1:9102``; None when it is not."""
        if self._server is None:
            return None
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"http://{host}:{self._server.server_port}"

    async def start(self) -> None:
        """Begin to serve, and to watch the event loop that this runs on.

        Raises:
            PartFailedError: the address can't be had.
        """
        self._loop_thread = threading.get_ident()
        self._beating = asyncio.create_task(self._beat())
        if self._port is None:
            return
        try:
            self._server = _Server(self._host, self._port, self._answer)
        except OSError as error:
            raise PartFailedError(
                f"metrics can't be served on {self._host}:{self._port}: {error.strerror or error}; set "
                "MAGNATRONIC_METRICS_PORT to another port, to 0 for a free one, or to off"
            ) from error
        self._serving = threading.Thread(
            target=self._server.serve_forever, args=(0.2,), name="metrics-http", daemon=True
        )
        self._serving.start()

    def watch_agents(self, runner: Runner) -> None:
        """Serve the figures of ``runner``'s processors."""
        self._runner = runner

    def watch_sink(self, role: str) -> WatchedSink:
        """Serve the figures of a sink."""
        sink = WatchedSink(role)
        self._sinks.append(sink)
        return sink

    def watch_kafka(self, kafka: Mapping[str, Any]) -> None:
        """Ask the cluster every few seconds whether it is there."""
        self._kafka = KafkaProbe(kafka)
        self._kafka.start()

    def started(self) -> None:
        """All parts are there; from now on they are asked."""
        self._between = None

    def stopping(self) -> None:
        """The process ends; it is not ready from now on, so that nothing is sent to it."""
        self._between = Cause(Kind.STOPPING, "process", "the process stops")

    async def stop(self) -> None:
        """Serve nothing more."""
        if self._beating is not None:
            self._beating.cancel()
            await asyncio.gather(self._beating, return_exceptions=True)
        if self._kafka is not None:
            await asyncio.to_thread(self._kafka.stop)
        server, self._server = self._server, None
        if server is not None and self._serving is not None:
            await asyncio.to_thread(server.shutdown)
            server.server_close()
            await asyncio.to_thread(self._serving.join)

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(_BEAT_S)
            now = time.monotonic()
            self._delay_s = max(0.0, now - self._beat_at - _BEAT_S)
            self._beat_at = now

    # What other threads ask.

    def causes(self) -> list[Cause]:
        """Why the process is not ready; empty while it is."""
        if self._between is not None:
            return [self._between]
        found = list(self._blocked())
        if self._kafka is not None:
            found += self._kafka.causes()
        runner = self._runner
        if runner is not None:
            for readiness in list(runner.readiness.values()):
                found += readiness.causes
        for sink in self._sinks:
            found += sink.causes()
        return found

    def _blocked(self) -> Iterator[Cause]:
        for_s = self._stands_still_s()
        if for_s >= _BLOCKED_S:
            said = f"the event loop has stood still for {for_s:.0f} s{_where(self._loop_thread)}"
            yield Cause(Kind.BLOCKED, "process", said, for_s)

    def _stands_still_s(self) -> float:
        return max(0.0, time.monotonic() - self._beat_at - _BEAT_S)

    def _processors(self) -> Iterator[_Figures]:
        runner = self._runner
        if runner is None:
            return
        for agent, processor in list(runner.processors.items()):
            readiness = runner.readiness.get(agent)
            if readiness is None:
                continue
            yield _Figures(
                agent,
                self._instance,
                processor.stats,
                len(processor.workers),
                readiness.progress,
                readiness.causes,
            )

    def _own_figures(self) -> Families:
        families, name = Families(), MetricName
        for sink in self._sinks:
            at, runner = (sink.role.removeprefix("sink-"), self._instance), sink.runner
            if runner is None:
                continue
            families.add(name.SINK_RECORDS, at, runner.records_written)
            families.add(name.SINK_LAG, at, runner.backlog)
            families.add(name.SINK_PARTITIONS, at, runner.partitions or 0)
            families.add(name.SINK_READY, at, float(not list(sink.causes())))
            families.add_histogram(name.SINK_BATCH, at, sink.batches)
        families.add(name.READY_PROCESS, (), float(not self.causes()))
        families.add(name.LOOP_DELAY, (), max(self._delay_s, self._stands_still_s()))
        return families

    # HTTP.

    def _answer(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        if environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            return _json(start_response, "405 Method Not Allowed", {"error": "only GET"})
        match environ["PATH_INFO"]:
            case "/metrics":
                body: Iterable[bytes] = self._metrics(environ, start_response)
                return body
            case "/ready":
                causes = self.causes()
                status = "503 Service Unavailable" if causes else "200 OK"
                said = {"ready": not causes, "causes": [cause.as_dict() for cause in causes]}
                return _json(start_response, status, said)
            case "/live":
                for_s = self._stands_still_s()
                live = for_s < _DEAD_S
                said = {"live": live, "event_loop_stands_still_s": round(for_s, 1)}
                return _json(start_response, "200 OK" if live else "503 Service Unavailable", said)
        return _json(start_response, "404 Not Found", {"error": "there are /metrics, /live and /ready"})


class KafkaProbe:
    """Asks the cluster for its nodes every few seconds, in a thread of its own."""

    def __init__(self, kafka: Mapping[str, Any]) -> None:
        self._config = dict(kafka)
        self._stopping = threading.Event()
        self._answered_at = time.monotonic()
        self._error = ""
        self._thread = threading.Thread(target=self._run, name="kafka-probe", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End; blocks while a question is open."""
        self._stopping.set()
        self._thread.join(_PROBE_TIMEOUT_S + 1)

    def causes(self) -> Iterator[Cause]:
        """Whether it has not answered for too long."""
        for_s = time.monotonic() - self._answered_at
        if self._error and for_s >= _UNREACHABLE_S:
            servers = self._config.get("bootstrap.servers", "")
            said = f"Kafka at {servers} has not answered for {for_s:.0f} s: {self._error}"
            yield Cause(Kind.UNREACHABLE, "kafka", said, for_s)

    def _run(self) -> None:
        admin = AdminClient(self._config)
        while not self._stopping.wait(_PROBE_S):
            try:
                admin.describe_cluster(request_timeout=_PROBE_TIMEOUT_S).result(_PROBE_TIMEOUT_S + 1)
            except KafkaException as error:
                self._error = str(error.args[0].str())
            except TimeoutError:
                self._error = "timed out"
            else:
                self._answered_at, self._error = time.monotonic(), ""


class _OwnCollector(Collector):
    def __init__(self, figures: Callable[[], Families]) -> None:
        self._figures = figures

    def collect(self) -> Iterator[Metric]:
        return iter(self._figures())


class _Server(socketserver.ThreadingMixIn, WSGIServer):
    daemon_threads = True

    def __init__(self, host: str, port: int, app: Callable[..., Iterable[bytes]]) -> None:
        self.address_family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
        super().__init__((host, port), _Handler)
        self.set_app(app)

    def server_bind(self) -> None:
        # Not the parent's: it asks the name service for the host's name, which may take seconds.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])
        self.setup_environ()

    def handle_error(self, request: Any, client_address: Any) -> None:
        _LOGGER.debug("a request from %s failed", client_address, exc_info=True)


class _Handler(WSGIRequestHandler):
    timeout = _CLIENT_TIMEOUT_S

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: these requests come every few seconds for ever."""


def _json(start_response: StartResponse, status: str, value: Mapping[str, Any]) -> list[bytes]:
    body = json.dumps(value, indent=2).encode() + b"\n"
    start_response(status, [("Content-Type", "application/json"), ("Content-Length", str(len(body)))])
    return [body]


def _where(thread: int) -> str:
    """What the thread does: the innermost function that is ours, and what that has called."""
    frame: FrameType | None = sys._current_frames().get(thread)
    if frame is None:
        return ""
    innermost = _place(frame)
    while frame is not None:
        with suppress(KeyError):
            if frame.f_globals["__name__"].partition(".")[0] in _OWN:
                own = _place(frame)
                return f", in {own}" if own == innermost else f", in {own}, which called {innermost}"
        frame = frame.f_back
    return f", in {innermost}"


def _place(frame: FrameType) -> str:
    code = frame.f_code
    return f"{code.co_qualname} ({Path(code.co_filename).name}:{frame.f_lineno})"
