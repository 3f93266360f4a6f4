"""The clusters under test: one node, and three KRaft nodes on this machine, whose processes can be killed and paused.

In: a folder. Out: a :class:`Cluster` with stable addresses. Each node is a JVM of its own with its own data folder. It
lives here, not in the package: three nodes on one machine show how clients and processors take a node's end, but they
protect nobody from the machine's. Users of several brokers run them on several machines.
"""

import os
import random
import signal
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, Self

from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient

from magnatronic.broker import EmbeddedBroker
from magnatronic.broker.java import find_java
from magnatronic.broker.node import KAFKA_JARS, NodeFiles, new_cluster_id, server_properties
from magnatronic.broker.process import LOCALHOST, JavaProcess

__all__ = ["Cluster", "OneNode", "ThreeNodes", "cluster_of"]

_QUIET: Final = {"log_level": 0}
_IN_SYNC_S: Final = 60.0
_PORTS: Final = range(18_000, 32_000)
"""Below what Linux gives to outgoing connections, so that none of those takes a node's port while it is down."""

_QUICK: Final = {
    # A node that died is noticed in seconds, as a cluster is set that cares; the defaults take 9 s and more.
    "broker.session.timeout.ms": "3000",
    "controller.quorum.election.timeout.ms": "500",
    "controller.quorum.fetch.timeout.ms": "1500",
    "controller.quorum.election.backoff.max.ms": "500",
    "replica.fetch.wait.max.ms": "100",
    # Three of them share two cores with all else.
    "num.recovery.threads.per.data.dir": "1",
    "log.cleaner.threads": "1",
}


def stable_ports(count: int) -> list[int]:
    """Ports that nothing listens on and that no outgoing connection will be given."""
    found: list[int] = []
    while len(found) < count:
        port = random.SystemRandom().choice(_PORTS)
        with socket.socket() as probe:
            try:
                probe.bind((LOCALHOST, port))
            except OSError:
                continue
        if port not in found:
            found.append(port)
    return found


class Cluster(ABC):
    """Kafka nodes by number, from 0. ``copies`` and ``min_isr`` are what topics get."""

    nodes: int
    copies: int
    min_isr: int
    bootstrap_servers: str

    @abstractmethod
    def start(self) -> Self:
        """Start all nodes and return when the cluster takes writes."""

    @abstractmethod
    def kill(self, node: int) -> None:
        """SIGKILL a node."""

    @abstractmethod
    def restart(self, node: int) -> None:
        """Start a node that is down."""

    @abstractmethod
    def shut(self, node: int) -> None:
        """Stop a node in good order."""

    @abstractmethod
    def stop(self) -> None:
        """End all nodes."""

    @abstractmethod
    def pid(self, node: int) -> int:
        """A node's process id."""

    def pause(self, node: int) -> None:
        """SIGSTOP a node."""
        os.kill(self.pid(node), signal.SIGSTOP)

    def resume(self, node: int) -> None:
        """SIGCONT a node."""
        os.kill(self.pid(node), signal.SIGCONT)

    def in_sync(self) -> bool:
        """Whether every partition has all its copies in sync, and a leader."""
        try:
            topics = AdminClient({"bootstrap.servers": self.bootstrap_servers, **_QUIET}).list_topics(timeout=2).topics
        except KafkaException:
            return False
        return all(
            partition.leader >= 0 and len(partition.isrs) == len(partition.replicas)
            for topic in topics.values()
            for partition in topic.partitions.values()
        )

    def wait_in_sync(self, timeout_s: float = _IN_SYNC_S) -> None:
        """Wait until every copy is in sync; then the next node may fall."""
        deadline = time.monotonic() + timeout_s
        while not self.in_sync():
            assert time.monotonic() < deadline, f"copies are still out of sync after {timeout_s:g} s"
            time.sleep(0.2)

    def __enter__(self) -> Self:
        """Starts the cluster."""
        return self.start()

    def __exit__(self, *_: object) -> None:
        """Stops it."""
        self.stop()


class OneNode(Cluster):
    """The embedded broker, as ``magnatronic up`` runs it."""

    nodes = copies = min_isr = 1

    def __init__(self, folder: Path) -> None:
        (port,) = stable_ports(1)
        self._broker = EmbeddedBroker(folder / "kafka", port=port)
        self.bootstrap_servers = f"{LOCALHOST}:{port}"

    def start(self) -> Self:
        self._broker.start()
        return self

    def kill(self, node: int) -> None:
        self._broker.kill()

    def restart(self, node: int) -> None:
        self._broker.start()

    def shut(self, node: int) -> None:
        self._broker.stop()

    def stop(self) -> None:
        if self._broker.running:
            self.resume(0)
        self._broker.stop()

    def pid(self, node: int) -> int:
        return self._broker.pid


class ThreeNodes(Cluster):
    """Three nodes, each broker and controller; every record has three copies and is taken when two have it."""

    nodes, copies, min_isr = 3, 3, 2

    def __init__(self, folder: Path, *, heap_mb: int = 320) -> None:
        self._folder = folder
        self._heap_mb = heap_mb
        self._ports = stable_ports(2 * self.nodes)
        self._processes: dict[int, JavaProcess] = {}
        self.bootstrap_servers = ",".join(f"{LOCALHOST}:{port}" for port in self._ports[: self.nodes])

    def start(self) -> Self:
        cluster_id = new_cluster_id()
        java, jars = find_java(), KAFKA_JARS.fetch() / "*"
        controllers = self._ports[self.nodes :]
        voters = ",".join(f"{node + 1}@{LOCALHOST}:{port}" for node, port in enumerate(controllers))

        def prepare(node: int) -> JavaProcess:
            data_dir = self._folder / f"kafka-{node}"
            data_dir.mkdir(parents=True)
            files = NodeFiles(data_dir)
            properties = files.write(
                "server.properties",
                server_properties(
                    node_id=node + 1,
                    port=self._ports[node],
                    controller_port=controllers[node],
                    voters=voters,
                    log_dir=files.log_dir,
                    copies=self.copies,
                    min_isr=self.min_isr,
                    more=_QUICK,
                ),
            )
            files.format_once(java, jars, properties, cluster_id=cluster_id)
            return JavaProcess(
                f"Kafka node {node}",
                files.command(java, jars, f"-Xmx{self._heap_mb}m", "kafka.Kafka", str(properties)),
                output_path=data_dir / "kafka.out",
                ready=lambda: self._answers(node),
                log_paths=[files.log_path],
                cwd=data_dir,
                start_timeout_s=120.0,
            )

        with ThreadPoolExecutor(self.nodes) as threads:
            self._processes = dict(enumerate(threads.map(prepare, range(self.nodes))))
            try:
                # A node alone has no quorum and is never ready, so all start at once.
                list(threads.map(lambda process: process.start(), self._processes.values()))
            except BaseException:
                self.stop()
                raise
        return self

    def _answers(self, node: int) -> bool:
        """Whether the node itself takes requests and knows its leader; the others may be down."""
        servers = f"{LOCALHOST}:{self._ports[node]}"
        try:
            brokers = AdminClient({"bootstrap.servers": servers, **_QUIET}).list_topics(timeout=1).brokers
        except KafkaException:
            return False
        return node + 1 in brokers

    def kill(self, node: int) -> None:
        self._processes[node].kill()

    def restart(self, node: int) -> None:
        self._processes[node].start()

    def shut(self, node: int) -> None:
        self._processes[node].stop()

    def stop(self) -> None:
        for node, process in self._processes.items():
            if process.running:
                self.resume(node)

        def end(process: JavaProcess) -> None:
            # What the data folders hold is of no use to anybody.
            if process.running:
                process.kill()

        with ThreadPoolExecutor(self.nodes) as threads:
            list(threads.map(end, self._processes.values()))

    def pid(self, node: int) -> int:
        return self._processes[node].pid

    def processes(self) -> Sequence[int]:
        """The process ids of the running nodes."""
        return [process.pid for process in self._processes.values() if process.running]


def cluster_of(brokers: int, folder: Path) -> Cluster:
    """A cluster of 1 or 3 brokers in ``folder``."""
    if brokers not in (1, 3):
        raise ValueError(f"clusters have 1 or 3 brokers, not {brokers}")
    return OneNode(folder) if brokers == 1 else ThreeNodes(folder)
