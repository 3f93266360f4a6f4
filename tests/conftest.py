"""What all tests share: one real Kafka and one real schema registry a session, each started when first asked for."""

import itertools
import os
import shutil
import signal
import socket
import tarfile
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import httpx
import pytest
from confluent_kafka.admin import AdminClient, NewTopic

from magnatronic.broker import EmbeddedBroker
from magnatronic.broker.artifacts import Artifact, ArtifactSet
from magnatronic.broker.java import find_java
from magnatronic.broker.process import LOCALHOST, JavaProcess, free_ports
from tests.support import java_cache

if TYPE_CHECKING:
    from xdist.scheduler import LoadScopeScheduling

APICURIO = Artifact(
    "io.apicurio:apicurio-registry-app:3.3.3:all:tar.gz",
    "8bc6751c76d963734224b01d5e7f84ccb3cb61c87d3bd77c36c35f10a5cbed63",
    158_577_952,
)


SYSTEM_FILES: Final = (
    "test_archive_commands.py",
    "test_client_live.py",
    "test_system_commands.py",
    "test_trace_commands.py",
    "test_dlq_redrive.py",
    "test_observability.py",
    "test_monitor_process.py",
    "test_whatif_system.py",
)
"""Those that use the session's system: they run in one go, since a system takes half a core even when it idles."""

LONGEST: Final = (
    "test_chaos.py",
    *SYSTEM_FILES,
    "test_processor_promises.py",
    "test_rebuild_system.py",
    "test_state_rebuild.py",
    "test_archive.py",
    "test_broker.py",
    "test_fetcher.py",
    "test_processor_faults.py",
    "test_system_crash.py",
    "test_forget.py",
    "test_clickhouse_sink.py",
    "test_secured_cluster.py",
    "test_broker_crash.py",
    "test_monitor.py",
    "test_processor.py",
    "test_system_cluster.py",
    "test_watchdog_processor.py",
    "test_watchdog.py",
)
"""What takes longest runs first: begun last, one file would be waited for by all processes but its own. Of those that
start systems of their own none begins beside both the chaos suite and the session's system: that is too much at once.
"""


def pytest_configure() -> None:
    os.environ.update(java_cache.options())
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # A shell's background jobs ignore Ctrl-C, and so would what they start, the commands under test among it.
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ranks = {name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path.name, len(ranks)))
    for item in items:
        if "system" in getattr(item, "fixturenames", ()) and item.path.name not in SYSTEM_FILES:
            raise pytest.UsageError(f"{item.path.name} uses the fixture system: name it in {__name__}.SYSTEM_FILES")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> "LoadScopeScheduling | None":
    """With --dist loadfile, a file's tests stay together, and so do all files that use the session's system."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "system" if file.rpartition("/")[2] in SYSTEM_FILES else file

    return Scheduling(config, log)


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither settings nor API keys of whoever runs the tests reach them: no test pays for a call or exports traces."""
    for name in os.environ:
        if name.startswith(("MAGNATRONIC_", "OTEL_")) or name.endswith(("OPENAI_API_KEY", "ANTHROPIC_API_KEY")):
            monkeypatch.delenv(name)
    for name in ("OPENAI_BASE_URL", "GOOGLE_API_KEY", "GEMINI_API_KEY"):
        monkeypatch.delenv(name, raising=False)


class KafkaForTests:
    """A running Kafka. ``config`` are librdkafka settings that reach it; copy it before adding to it."""

    def __init__(self, bootstrap_servers: str) -> None:
        self.bootstrap_servers = bootstrap_servers
        self.config: dict[str, Any] = {"bootstrap.servers": bootstrap_servers}
        self._session = uuid.uuid4().hex[:8]
        self._numbers = itertools.count(1)
        self._admin: AdminClient | None = None

    @property
    def admin(self) -> AdminClient:
        if self._admin is None:
            self._admin = AdminClient(dict(self.config))
        return self._admin

    def unique(self, prefix: str) -> str:
        """A name that no other test of the session uses, for a topic, group or transactional id."""
        return f"{prefix}-{self._session}-{next(self._numbers)}"

    def create_topics(
        self,
        names: str | Sequence[str],
        partitions: int = 1,
        config: Mapping[str, str] | None = None,
    ) -> None:
        """Creates topics and waits until their partitions have a leader."""
        wanted = [names] if isinstance(names, str) else list(names)
        topics = [NewTopic(name, partitions, 1, config=dict(config or {})) for name in wanted]
        for created in self.admin.create_topics(topics, operation_timeout=30).values():
            created.result(30)
        # The controller has made them; the broker that clients ask may not have heard of it yet.
        deadline = time.monotonic() + 30
        while not set(wanted) <= self.admin.list_topics(timeout=20).topics.keys():
            assert time.monotonic() < deadline, f"no metadata of {wanted}"
            time.sleep(0.05)

    def topic(self, prefix: str, partitions: int = 1, config: Mapping[str, str] | None = None) -> str:
        """A new topic with a unique name."""
        name = self.unique(prefix)
        self.create_topics(name, partitions, config)
        return name


@pytest.fixture(scope="session")
def docker_engine() -> None:
    """Skips what asks for it, with the reason, where there is no Docker engine."""
    host = os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock")
    if host.startswith("unix://"):
        try:
            with socket.socket(socket.AF_UNIX) as connection:
                connection.connect(host.removeprefix("unix://"))
        except OSError as error:
            pytest.skip(f"no Docker engine at {host}: {error.strerror}")


@pytest.fixture(scope="session")
def kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KafkaForTests]:
    with EmbeddedBroker(tmp_path_factory.mktemp("kafka")) as broker:
        yield KafkaForTests(broker.bootstrap_servers)


def _unpacked(archive: Path) -> Path:
    """The archive's content, unpacked beside it once for all sessions."""
    target = archive.parent / "unpacked"
    if not target.exists():
        staging = Path(tempfile.mkdtemp(dir=archive.parent))
        with tarfile.open(archive) as tar:
            tar.extractall(staging / "content", filter="data")
        try:
            (staging / "content").rename(target)
        except OSError:
            if not target.exists():
                raise
        shutil.rmtree(staging)
    return target


@pytest.fixture(scope="session")
def apicurio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The Confluent-compatible URL of a real Apicurio Registry; it keeps what is registered until the session ends."""
    folder = _unpacked(ArtifactSet("the registry tests", (APICURIO,)).fetch() / APICURIO.filename)
    java = find_java()
    port, management_port = free_ports(2)
    url = f"http://{LOCALHOST}:{port}/apis/ccompat/v7"

    def ready() -> bool:
        try:
            return httpx.get(f"{url}/subjects", timeout=2).status_code == 200
        except httpx.HTTPError:
            return False

    command = [
        *(str(java.executable), "-Xmx256m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1"),
        *(f"-Dquarkus.http.host={LOCALHOST}", f"-Dquarkus.http.port={port}"),
        *(f"-Dquarkus.management.host={LOCALHOST}", f"-Dquarkus.management.port={management_port}"),
        *("-jar", str(folder / "quarkus-run.jar")),
    ]
    work = tmp_path_factory.mktemp("apicurio")
    with JavaProcess("Apicurio Registry", command, output_path=work / "apicurio.log", ready=ready, cwd=work):
        yield url
