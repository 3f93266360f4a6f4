"""One KRaft node's files and command lines, whoever composes nodes to a cluster.

In: a data folder, ports, and the quorum that the node belongs to. Out: settings on disk, a formatted log folder, and
the command that starts the node. Running it is :mod:`magnatronic.broker.process`'s part.
"""

import subprocess
import uuid
from base64 import urlsafe_b64encode
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from magnatronic.broker.artifacts import ArtifactSet
from magnatronic.broker.errors import JavaProcessError
from magnatronic.broker.java import Java
from magnatronic.broker.process import LOCALHOST, last_lines

__all__ = ["KAFKA_JARS", "NodeFiles", "new_cluster_id", "server_properties"]

KAFKA_JARS: Final = ArtifactSet.load(Path(__file__).with_name("jars.json"))
"""The broker's class path, pinned."""

_FORGOTTEN_AFTER_MINUTES: Final = 2_147_483_647
"""offsets.retention.minutes at its maximum: an idle group must not lose its place."""

_SERVER_PROPERTIES: Final = """\
# Written at each start.
process.roles=broker,controller
node.id={node_id}
listeners=CLIENT://{host}:{port},CONTROLLER://{host}:{controller_port}
advertised.listeners=CLIENT://{host}:{port}
listener.security.protocol.map=CLIENT:PLAINTEXT,CONTROLLER:PLAINTEXT
inter.broker.listener.name=CLIENT
controller.listener.names=CONTROLLER
controller.quorum.voters={voters}
log.dirs={log_dir}

auto.create.topics.enable=false
default.replication.factor={copies}
min.insync.replicas={min_isr}
num.partitions=1
log.message.timestamp.type=LogAppendTime
log.retention.ms=-1
message.max.bytes=8454144
replica.fetch.max.bytes=8454144

offsets.topic.replication.factor={copies}
offsets.topic.num.partitions=8
offsets.retention.minutes={offsets_retention}
transaction.state.log.replication.factor={copies}
transaction.state.log.min.isr={min_isr}
transaction.state.log.num.partitions=8
share.coordinator.state.topic.replication.factor={copies}
share.coordinator.state.topic.min.isr={min_isr}
share.coordinator.state.topic.num.partitions=1
group.initial.rebalance.delay.ms=0

# After a crash the controller lets the node in again when its old session is over; by default that takes 9 s.
broker.session.timeout.ms=4000
broker.heartbeat.interval.ms=500

# How often timed-out transactions are looked for. A dead producer's holds up the restore of its partitions for its
# timeout and up to this; by default that is 10 s more.
transaction.abort.timed.out.transaction.cleanup.interval.ms=500

num.network.threads=2
num.io.threads=4
num.recovery.threads.per.data.dir=2
background.threads=2
log.cleaner.dedupe.buffer.size=16777216
log.cleaner.io.buffer.size=262144
"""

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


def new_cluster_id() -> str:
    """A cluster's id as Kafka makes them: a UUID in URL-safe base64."""
    return urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")


def server_properties(
    *,
    node_id: int,
    port: int,
    controller_port: int,
    voters: str,
    log_dir: Path,
    copies: int = 1,
    min_isr: int = 1,
    more: Mapping[str, str] | None = None,
) -> str:
    """The settings of a node that is broker and controller on 127.0.0.1.

    ``voters`` are the quorum's, as ``id@host:port,...``; ``copies`` is how often records are kept, ``min_isr`` how many
    copies a record needs to be taken. ``more`` settings come last, and win.
    """
    text = _SERVER_PROPERTIES.format(
        host=LOCALHOST,
        node_id=node_id,
        port=port,
        controller_port=controller_port,
        voters=voters,
        log_dir=log_dir,
        copies=copies,
        min_isr=min_isr,
        offsets_retention=_FORGOTTEN_AFTER_MINUTES,
    )
    return text + "".join(f"{name}={value}\n" for name, value in (more or {}).items())


class NodeFiles:
    """What a node keeps in ``data_dir``: its settings, its own log file and, in ``log``, its data."""

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = data_dir
        self.log_path = data_dir / "kafka.log"
        self.log_dir = data_dir / "log"

    def write(self, name: str, properties: str) -> Path:
        """Write settings to ``name``, and those of the node's logging; the path of the former."""
        path = self.data_dir / name
        path.write_text(properties)
        (self.data_dir / "log4j2.properties").write_text(_LOGGING.format(log_path=self.log_path))
        return path

    def crashed(self) -> bool:
        """Whether the last run ended without closing its logs."""
        return (self.log_dir / "__cluster_metadata-0").exists() and not (self.log_dir / ".kafka_cleanshutdown").exists()

    def cluster_id(self) -> str:
        """The id that the data folder was formatted with."""
        lines = (self.log_dir / "meta.properties").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines if "=" in line).get("cluster.id", "")

    def format_once(
        self, java: Java, classpath: Path, properties: Path, *, cluster_id: str, keep_open: Sequence[int] = ()
    ) -> None:
        """Format the log folder for a cluster, unless it is already. ``keep_open``: descriptors that the JVM inherits.

        Raises:
            JavaProcessError: Kafka's tool failed; the message holds what it said.
        """
        if (self.log_dir / "meta.properties").exists():
            return
        # One argument: the id may begin with "-".
        arguments = ["format", f"--cluster-id={cluster_id}", "--config", str(properties), "--ignore-formatted"]
        command = self.command(java, classpath, "-Xmx64m", "kafka.tools.StorageTool", *arguments)
        done = subprocess.run(command, capture_output=True, text=True, pass_fds=keep_open, check=False)
        if done.returncode != 0:
            raise JavaProcessError(
                f"Kafka could not format {self.data_dir} (exit status {done.returncode}); it said:\n"
                f"{done.stdout}{done.stderr}{last_lines(self.log_path)}"
            )

    def command(self, java: Java, classpath: Path, *rest: str) -> list[str]:
        """The command line of a JVM with Kafka's classes; ``rest`` are further options, the class and its arguments."""
        # Newer Javas warn of what Kafka's libraries do; the warnings would bury the lines that tell of a failure.
        quiet = ["--enable-native-access=ALL-UNNAMED"] if java.version >= 22 else []
        quiet += ["--sun-misc-unsafe-memory-access=allow"] if java.version >= 23 else []
        return [
            str(java.executable),
            *quiet,
            # Two threads end a pause in half of one's time, which the slowest hundredth of a hop's time shows.
            "-XX:+UseParallelGC",
            "-XX:ParallelGCThreads=2",
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
