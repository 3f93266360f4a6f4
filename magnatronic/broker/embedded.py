"""Apache Kafka on this machine: one KRaft node as a local JVM, with no installation.

In: a data folder. Out: :class:`EmbeddedBroker`, whose ``bootstrap_servers`` any Kafka client can use. The data folder
is formatted once and survives restarts and SIGKILL; ports are free ones of 127.0.0.1 and may change between starts.
"""

import fcntl
import os
import socket
import subprocess
import time
import uuid
from base64 import urlsafe_b64encode
from pathlib import Path
from typing import Final, Self

import psutil
from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient

from magnatronic.broker.artifacts import ArtifactSet
from magnatronic.broker.errors import DataFolderInUseError, JavaProcessError
from magnatronic.broker.java import Java, find_java
from magnatronic.broker.process import LOCALHOST, JavaProcess, free_ports, last_lines
from magnatronic.broker.topics import TopicSpec, create_topics

__all__ = ["KAFKA_JARS", "EmbeddedBroker"]

KAFKA_JARS: Final = ArtifactSet.load(Path(__file__).with_name("jars.json"))
"""The broker's class path, pinned."""

_PORT_ATTEMPTS: Final = 3
_FORGOTTEN_AFTER_MINUTES: Final = 2_147_483_647
"""offsets.retention.minutes at its maximum: an idle group must not lose its place."""

_SERVER_PROPERTIES: Final = """\
# Written at each start.
process.roles=broker,controller
node.id=1
listeners=CLIENT://{host}:{port},CONTROLLER://{host}:{controller_port}
advertised.listeners=CLIENT://{host}:{port}
listener.security.protocol.map=CLIENT:PLAINTEXT,CONTROLLER:PLAINTEXT
inter.broker.listener.name=CLIENT
controller.listener.names=CONTROLLER
controller.quorum.voters=1@{host}:{controller_port}
log.dirs={log_dir}

auto.create.topics.enable=false
default.replication.factor=1
min.insync.replicas=1
num.partitions=1
log.message.timestamp.type=LogAppendTime
log.retention.ms=-1
message.max.bytes=8454144
replica.fetch.max.bytes=8454144

offsets.topic.replication.factor=1
offsets.topic.num.partitions=8
offsets.retention.minutes={offsets_retention}
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
transaction.state.log.num.partitions=8
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
share.coordinator.state.topic.num.partitions=1
group.initial.rebalance.delay.ms=0

# After a crash the controller lets the node in again when its old session is over; by default that takes 9 s.
broker.session.timeout.ms=4000
broker.heartbeat.interval.ms=500

num.network.threads=2
num.io.threads=4
num.recovery.threads.per.data.dir=2
background.threads=2
log.cleaner.dedupe.buffer.size=16777216
log.cleaner.io.buffer.size=262144
"""

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

_LOGGING: Final = """\
status = warn
appender.file.type = RollingFile
appender.file.name = file
appender.file.fileName = {log_path}
appender.file.filePattern = {log_path}.%i
appender.file.layout.type = PatternLayout
appender.file.layout.pattern = %d{{yyyy-MM-dd HH:mm:ss.SSS}} %-5p %c{{1}} - %m%n%ex{{20}}
appender.file.policies.type = Policies
appender.file.policies.size.type = SizeBasedTriggeringPolicy
appender.file.policies.size.size = 10MB
appender.file.strategy.type = DefaultRolloverStrategy
appender.file.strategy.max = 2
rootLogger.level = warn
rootLogger.appenderRef.file.ref = file
logger.groups.name = org.apache.kafka.coordinator.group
logger.groups.level = info
logger.raft.name = kafka.server.KafkaRaftServer
logger.raft.level = info
logger.broker.name = kafka.server.BrokerServer
logger.broker.level = info
logger.fencing.name = org.apache.kafka.controller.ReplicationControlManager
logger.fencing.level = info
"""


class EmbeddedBroker:
    """One Kafka node whose life is that of this object, and at most that of this process.

    ``data_dir`` is created and formatted if need be; ``port`` None takes a free one. ``heap_mb`` caps the Java heap in
    MiB. Use it as a context manager, or call :meth:`start` and :meth:`stop`.

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
        java_home: Path | None = None,
        start_timeout_s: float = 120.0,
    ) -> None:
        self.data_dir = data_dir.absolute()
        self.log_path = self.data_dir / "kafka.log"
        self._port = port
        self._heap_mb = heap_mb
        self._java_home = java_home
        self._start_timeout_s = start_timeout_s
        self._lock = _FolderLock(self.data_dir / "lock")
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
            self._format_once(java, classpath, properties)
            if self._crashed():
                self._fence(java, classpath)
            process = JavaProcess(
                "Kafka",
                self._java_command(java, classpath, f"-Xmx{self._heap_mb}m", "kafka.Kafka", str(properties)),
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

    def _crashed(self) -> bool:
        """Whether the last run ended without closing its logs."""
        log = self.data_dir / "log"
        return (log / "__cluster_metadata-0").exists() and not (log / ".kafka_cleanshutdown").exists()

    def _fence(self, java: Java, classpath: Path) -> None:
        """Let a controller that runs alone fence the crashed broker, before that broker comes back.

        Started at once, the broker would lead its partitions again by the metadata from before the crash, until the
        controller fences its old session. At that moment they have no leader, and the transaction coordinator (4.3.1)
        drops the markers of transactions that were being committed as the crash came: it takes partitions without
        a leader for deleted ones. Such a transaction hangs for ever, and what follows it is never read
        (docs/decisions/0006). A broker that was fenced before it starts leads nothing until it is let in again.
        """
        (controller_port,) = free_ports(1)
        properties = self.data_dir / "controller.properties"
        properties.write_text(
            _CONTROLLER_PROPERTIES.format(
                host=LOCALHOST, controller_port=controller_port, log_dir=self.data_dir / "log"
            )
        )
        since = self.log_path.stat().st_size if self.log_path.exists() else 0
        deadline = time.monotonic() + _FENCING_TIMEOUT_S

        def fenced() -> bool:
            # A broker that had been fenced when it crashed is not fenced again; then the time is waited out.
            return _FENCED in _read_from(self.log_path, since) or time.monotonic() > deadline

        JavaProcess(
            "Kafka's controller",
            self._java_command(java, classpath, f"-Xmx{self._heap_mb}m", "kafka.Kafka", str(properties)),
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
        properties = self.data_dir / "server.properties"
        properties.write_text(
            _SERVER_PROPERTIES.format(
                host=LOCALHOST,
                port=self._port or port,
                controller_port=controller_port,
                log_dir=self.data_dir / "log",
                offsets_retention=_FORGOTTEN_AFTER_MINUTES,
            )
        )
        (self.data_dir / "log4j2.properties").write_text(_LOGGING.format(log_path=self.log_path))
        return properties

    def _format_once(self, java: Java, classpath: Path, properties: Path) -> None:
        if (self.data_dir / "log" / "meta.properties").exists():
            return
        cluster_id = urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
        # One argument: the id may begin with "-".
        arguments = ["format", f"--cluster-id={cluster_id}", "--config", str(properties), "--ignore-formatted"]
        command = self._java_command(java, classpath, "-Xmx64m", "kafka.tools.StorageTool", *arguments)
        done = subprocess.run(command, capture_output=True, text=True, pass_fds=[self._lock.descriptor], check=False)
        if done.returncode != 0:
            raise JavaProcessError(
                f"Kafka could not format {self.data_dir} (exit status {done.returncode}); it said:\n"
                f"{done.stdout}{done.stderr}{last_lines(self.log_path)}"
            )

    def _java_command(self, java: Java, classpath: Path, *rest: str) -> list[str]:
        # Newer Javas warn of what Kafka's libraries do; the warnings would bury the lines that tell of a failure.
        quiet = ["--enable-native-access=ALL-UNNAMED"] if java.version >= 22 else []
        quiet += ["--sun-misc-unsafe-memory-access=allow"] if java.version >= 23 else []
        return [
            str(java.executable),
            *quiet,
            "-XX:+UseSerialGC",
            "-XX:TieredStopAtLevel=1",
            "-XX:MaxMetaspaceSize=128m",
            "-XX:ReservedCodeCacheSize=64m",
            "-Djava.awt.headless=true",
            "-Dlog4j2.shutdownHookEnabled=false",
            f"-Dlog4j2.configurationFile={self.data_dir / 'log4j2.properties'}",
            "-cp",
            str(classpath),
            *rest,
        ]

    def _cluster_id(self) -> str:
        """The id that the data folder was formatted with."""
        lines = (self.data_dir / "log" / "meta.properties").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines if "=" in line).get("cluster.id", "")

    def _answers(self) -> bool:
        host, port = self._bootstrap_servers.split(":")
        try:
            socket.create_connection((host, int(port)), timeout=0.2).close()
        except OSError:
            return False
        try:
            client = AdminClient({"bootstrap.servers": self._bootstrap_servers, "log_level": 0})
            # Whoever else took the port may answer too, even another Kafka: the cluster id tells.
            return bool(client.list_topics(timeout=2).cluster_id == self._cluster_id())
        except KafkaException:
            return False


class _FolderLock:
    """An flock that the JVM inherits: it is free when this process *and* the JVM are gone, so data has one writer."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor: int | None = None

    @property
    def descriptor(self) -> int:
        assert self._descriptor is not None
        return self._descriptor

    def acquire(self, patience_s: float = 20.0) -> None:
        """Takes the lock; waits only where the owner is dead and its JVM still on the way out.

        Raises:
            DataFolderInUseError: a living process has it.
        """
        if self._descriptor is not None:
            raise DataFolderInUseError(f"this broker runs already on {self._path.parent}")
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        deadline = time.monotonic() + patience_s
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                owner = os.pread(descriptor, 32, 0).decode().strip()
                if _alive(owner) or time.monotonic() > deadline:
                    os.close(descriptor)
                    raise DataFolderInUseError(
                        f"the data folder {self._path.parent} is in use by process {owner or 'unknown'}; "
                        "stop that one, or set another MAGNATRONIC_DATA_DIR"
                    ) from None
                time.sleep(0.1)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        self._descriptor = descriptor

    def release(self) -> None:
        """Frees the lock, if held."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)


def _read_from(path: Path, offset: int) -> str:
    try:
        with path.open("rb") as file:
            file.seek(offset)
            return file.read().decode(errors="replace")
    except FileNotFoundError:
        return ""


def _alive(pid: str) -> bool:
    """Whether a process with this id runs; one that is dead but not yet waited for by its parent doesn't."""
    try:
        return bool(psutil.Process(int(pid)).status() != psutil.STATUS_ZOMBIE)
    except (ValueError, psutil.NoSuchProcess):
        return False
