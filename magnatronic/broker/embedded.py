"""Apache Kafka on this machine: one KRaft node as a local JVM, with no installation.

In: a data folder. Out: :class:`EmbeddedBroker`, whose ``bootstrap_servers`` any Kafka client can use. The data folder
is formatted once and survives restarts and SIGKILL; ports are free ones of 127.0.0.1 and may change between starts.
"""

import socket
import time
from pathlib import Path
from typing import Final, Self

from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient

from magnatronic.broker.errors import JavaProcessError
from magnatronic.broker.folder import FolderLock
from magnatronic.broker.java import Java, find_java
from magnatronic.broker.node import KAFKA_JARS, NodeFiles, new_cluster_id, server_properties
from magnatronic.broker.process import LOCALHOST, JavaProcess, free_ports
from magnatronic.broker.topics import TopicSpec, create_topics

__all__ = ["EmbeddedBroker"]

_PORT_ATTEMPTS: Final = 3

_CONTROLLER_PROPERTIES: Final = """\
# Written at each start after a crash.
process.roles=controller
node.id=1
listeners=CONTROLLER://{host}:{controller_port}
listener.security.protocol.map=CONTROLLER:PLAINTEXT
controller.listener.names=CONTROLLER
controller.quorum.voters=1@{host}:{controller_port}
log.dirs={log_dir}
broker.session.timeout.ms=500
"""

_FENCED: Final = "Fencing broker 1 "
_FENCING_TIMEOUT_S: Final = 10.0

_INTERNAL_TOPICS: Final = (
    TopicSpec("__consumer_offsets", 8, {"cleanup.policy": "compact", "segment.bytes": str(100 * 1024 * 1024)}),
    TopicSpec("__transaction_state", 8, {"cleanup.policy": "compact", "segment.bytes": str(100 * 1024 * 1024)}),
)
"""Made at the first start. Made on demand by the broker instead, they cost the first consumer 3.7 s, not 0.7."""

_LASTING: Final = ("-XX:TieredStopAtLevel=4", "-XX:ReservedCodeCacheSize=128m")


class EmbeddedBroker:
    """One Kafka node whose life is that of this object, and at most that of this process.

    ``data_dir`` is created and formatted if need be; ``port`` None takes a free one. ``heap_mb`` caps the Java heap in
    MiB. ``lasting`` says that it runs for long: its code is compiled for speed, which costs CPU for a minute and
    saves a sixth of it from then on. Use it as a context manager, or call :meth:`start` and :meth:`stop`.

    Errors of :meth:`start`: :class:`~magnatronic.broker.errors.DataFolderInUseError`,
    :class:`~magnatronic.broker.errors.JavaNotFoundError`, :class:`~magnatronic.broker.errors.ArtifactError`,
    :class:`~magnatronic.broker.errors.JavaProcessError`, :class:`~magnatronic.broker.errors.TopicError`.
    """

    def __init__(
        self,
        data_dir: Path,
        *,
        port: int | None = None,
        heap_mb: int = 512,
        lasting: bool = False,
        java_home: Path | None = None,
        start_timeout_s: float = 120.0,
    ) -> None:
        self.data_dir = data_dir.absolute()
        self._files = NodeFiles(self.data_dir)
        self.log_path = self._files.log_path
        self._port = port
        self._options = [f"-Xmx{heap_mb}m", *(_LASTING if lasting else ())]
        self._java_home = java_home
        self._start_timeout_s = start_timeout_s
        self._lock = FolderLock(self.data_dir / "lock")
        self._process: JavaProcess | None = None
        self._bootstrap_servers = ""

    @property
    def bootstrap_servers(self) -> str:
        """``127.0.0.1:<port>`` of the running broker."""
        self._running_process()
        return self._bootstrap_servers

    @property
    def pid(self) -> int:
        """The JVM's process id."""
        return self._running_process().pid

    @property
    def running(self) -> bool:
        """Whether the JVM lives."""
        return self._process is not None and self._process.running

    def start(self) -> Self:
        """Starts the broker and returns when it answers clients. The first start ever fetches the jars (44 MB)."""
        if self._process is not None and not self._process.running:
            self.stop()  # It crashed since; a lock that is still held here would refuse its own owner.
        java = find_java(self._java_home)
        classpath = KAFKA_JARS.fetch() / "*"
        self.data_dir.mkdir(parents=True, exist_ok=True)
        self._lock.acquire()
        try:
            self._start(java, classpath)
            create_topics({"bootstrap.servers": self._bootstrap_servers}, _INTERNAL_TOPICS, replication_factor=1)
        except BaseException:
            self.stop()
            raise
        return self

    def _start(self, java: Java, classpath: Path) -> None:
        for attempt in range(1, _PORT_ATTEMPTS + 1):
            properties = self._write_settings()
            self._files.format_once(
                java, classpath, properties, cluster_id=new_cluster_id(), keep_open=[self._lock.descriptor]
            )
            if self._files.crashed():
                self._fence(java, classpath)
            process = JavaProcess(
                "Kafka",
                self._files.command(java, classpath, *self._options, "kafka.Kafka", str(properties)),
                output_path=self.data_dir / "kafka.out",
                ready=self._answers,
                log_paths=[self.log_path],
                cwd=self.data_dir,
                start_timeout_s=self._start_timeout_s,
                keep_open=[self._lock.descriptor],
            )
            try:
                self._process = process.start()
                return
            except JavaProcessError as error:
                # Between the choice of a free port and its use another process may have taken it.
                if "Address already in use" not in str(error) or attempt == _PORT_ATTEMPTS or self._port is not None:
                    raise

    def _fence(self, java: Java, classpath: Path) -> None:
        """Let a controller that runs alone fence the crashed broker, before that broker comes back.

        Started at once, the broker would lead its partitions again by the metadata from before the crash, until the
        controller fences its old session. At that moment they have no leader, and the transaction coordinator (4.3.1)
        drops the markers of transactions that were being committed as the crash came: it takes partitions without
        a leader for deleted ones. Such a transaction hangs for ever, and what follows it is never read
        (docs/decisions/0006). A broker that was fenced before it starts leads nothing until it is let in again.
        """
        (controller_port,) = free_ports(1)
        properties = self._files.write(
            "controller.properties",
            _CONTROLLER_PROPERTIES.format(host=LOCALHOST, controller_port=controller_port, log_dir=self._files.log_dir),
        )
        since = self.log_path.stat().st_size if self.log_path.exists() else 0
        deadline = time.monotonic() + _FENCING_TIMEOUT_S

        def fenced() -> bool:
            # A broker that had been fenced when it crashed is not fenced again; then the time is waited out.
            return _FENCED in _read_from(self.log_path, since) or time.monotonic() > deadline

        JavaProcess(
            "Kafka's controller",
            self._files.command(java, classpath, *self._options, "kafka.Kafka", str(properties)),
            output_path=self.data_dir / "controller.out",
            ready=fenced,
            log_paths=[self.log_path],
            cwd=self.data_dir,
            start_timeout_s=self._start_timeout_s,
            keep_open=[self._lock.descriptor],
        ).start().stop()

    def stop(self) -> None:
        """Stops the broker, cleanly if it can (its open segments are flushed), and frees the data folder."""
        process, self._process = self._process, None
        if process is not None:
            process.stop()
        self._lock.release()

    def kill(self) -> None:
        """SIGKILLs the broker, as a crash would, and frees the data folder; :meth:`start` recovers it."""
        self._running_process().kill()
        self.stop()

    def __enter__(self) -> Self:
        """Starts the broker."""
        return self.start()

    def __exit__(self, *_: object) -> None:
        """Stops the broker."""
        self.stop()

    def _running_process(self) -> JavaProcess:
        if self._process is None:
            raise JavaProcessError("the embedded Kafka is not running; call start() first")
        return self._process

    def _write_settings(self) -> Path:
        port, controller_port = free_ports(2)
        self._bootstrap_servers = f"{LOCALHOST}:{self._port or port}"
        return self._files.write(
            "server.properties",
            server_properties(
                node_id=1,
                port=self._port or port,
                controller_port=controller_port,
                voters=f"1@{LOCALHOST}:{controller_port}",
                log_dir=self._files.log_dir,
            ),
        )

    def _answers(self) -> bool:
        host, port = self._bootstrap_servers.split(":")
        try:
            socket.create_connection((host, int(port)), timeout=0.2).close()
        except OSError:
            return False
        try:
            client = AdminClient({"bootstrap.servers": self._bootstrap_servers, "log_level": 0})
            # Whoever else took the port may answer too, even another Kafka: the cluster id tells.
            return bool(client.list_topics(timeout=2).cluster_id == self._files.cluster_id())
        except KafkaException:
            return False


def _read_from(path: Path, offset: int) -> str:
    try:
        with path.open("rb") as file:
            file.seek(offset)
            return file.read().decode(errors="replace")
    except FileNotFoundError:
        return ""
