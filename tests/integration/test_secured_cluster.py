"""On a Kafka with logins and rights: every role works with the rights that docs/security.md gives it, and no others;
what is refused is named at once.
"""

import asyncio
import contextlib
import io
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Producer

from agents.context import Ports
from magnatronic.broker.topics import create_topics, platform_topics
from magnatronic.cli import main
from magnatronic.client import Client
from magnatronic.control import call
from magnatronic.roles import AGENT_ROLES, Workbench
from magnatronic.settings import Settings
from schemas.codec import Codec
from sinks.clickhouse.writer import ClickHouseSink
from sinks.milvus.sink import MilvusSink
from sinks.runner import SinkRunner
from streams.access import check_login
from streams.directory import AgentDirectory
from streams.errors import AccessError, ClusterError
from streams.holdups import Holdups
from streams.processor import Processor
from streams.readiness import Cause, Kind, Readiness
from streams.runner import Runner
from tests.integration.conftest import SCRIPT, clean_environment, write_corpus
from tests.support.processors import CODEC, Bench
from tests.support.secured import Right, SecuredKafka, User, wait_until
from tests.support.secured_rights import rights_of

FAUST = Path(sys.executable).with_name("faust")


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecuredKafka]:
    with SecuredKafka(tmp_path_factory.mktemp("secured")) as kafka:
        create_topics(kafka.config, platform_topics(2), replication_factor=1)
        yield kafka


class Role:
    """A process of a role, with the settings of ``user`` in its environment."""

    def __init__(self, folder: Path, user: User, *command: str, **settings: str) -> None:
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=folder,
            env=clean_environment(MAGNATRONIC_DATA_DIR=str(folder), **user.environment, **settings),
        )

    def ready(self) -> dict[str, Any]:
        """What it says when it is ready."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.end()
        told: dict[str, Any] = json.loads(line)
        return told

    def end(self, *, stop: bool = False) -> tuple[int, str]:
        """Wait for its end; exit code and standard error."""
        if stop:
            self.process.terminate()
        _, errors = self.process.communicate(timeout=60)
        return self.process.returncode, errors

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def role(tmp_path: Path) -> Iterator[Callable[..., Role]]:
    made: list[Role] = []

    def start(user: User, *command: str, **settings: str) -> Role:
        made.append(Role(tmp_path, user, *command, **settings))
        return made[-1]

    yield start
    for process in made:
        process.close()


def command(monkeypatch: pytest.MonkeyPatch, user: User, *arguments: str) -> str:
    """What a command says on standard output, run to its end in the environment of ``user``."""
    with monkeypatch.context() as patched:
        for name, value in user.environment.items():
            patched.setenv(name, value)
        out, errors = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors), pytest.raises(SystemExit) as ended:
            main(arguments)
    assert ended.value.code == 0, errors.getvalue()
    return out.getvalue()


class Agents:
    """Every agent but one and both sinks, each with a login of its own, on an event loop in a thread."""

    def __init__(self, secured: SecuredKafka, folder: Path, *, without: str) -> None:
        self._secured = secured
        self._workbench = Workbench(Settings.load(data_dir=folder))
        self._without = without
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="agents")
        self._closing = ExitStack()
        self.runners: list[Runner] = []
        self.sinks: list[SinkRunner] = []

    def __enter__(self) -> "Agents":
        self._closing.callback(self._workbench.close)
        self._thread.start()
        self._closing.callback(self._loop.close)
        self._closing.callback(self._thread.join)
        self._closing.callback(self._loop.call_soon_threadsafe, self._loop.stop)
        codec = Codec()
        for sink in (ClickHouseSink(self._workbench.clickhouse()), MilvusSink(self._workbench.milvus())):
            user = self._secured.user(rights_of(f"sink-{sink.name}"))
            # No static member, whose partitions would wait for it when this test is over.
            runner = SinkRunner(sink, codec=codec, kafka=user.config)
            runner.start()
            self._closing.callback(runner.stop)
            self.sinks.append(runner)
        for name in AGENT_ROLES:
            if name != self._without:
                self._run(name, codec)
        deadline = time.monotonic() + 40
        while not all(runner.ready for runner in self.runners):
            assert time.monotonic() < deadline, [runner.readiness for runner in self.runners]
            time.sleep(0.05)
        return self

    def _run(self, name: str, codec: Codec) -> None:
        kafka = self._secured.user(rights_of(name)).config
        ports: Ports = self._workbench.ports([name])
        if name == "coordinator":
            directory = self._closing.enter_context(AgentDirectory(kafka, codec))
            ports = replace(ports, directory=directory)
        runner = Runner(self._workbench.bindings([name]), codec=codec, kafka=kafka, ports=ports, slot="here")
        running = asyncio.run_coroutine_threadsafe(runner.run(), self._loop)
        self._closing.callback(lambda: (self._loop.call_soon_threadsafe(runner.stop), running.result(30)))
        self.runners.append(runner)

    def __exit__(self, *_: object) -> None:
        self._closing.close()


def test_every_role_works_with_its_least_rights(
    secured: SecuredKafka, role: Callable[..., Role], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One role as its users run it, by the environment alone; the others in here, which is quicker.
    coordinator = role(
        secured.user(rights_of("coordinator")), str(SCRIPT), "run", "coordinator", "--json", "--slot", "there"
    )
    monitor = role(
        secured.user(rights_of("monitor"), mechanism="PLAIN"),
        *(str(FAUST), "-A", "streams.monitor", "-l", "warn", "worker", "--without-web"),
        MAGNATRONIC_MONITOR_INSTANCE="there",
    )
    asking = secured.user(rights_of("ask", "ingest", "dlq list"))
    with Agents(secured, tmp_path / "agents", without="coordinator") as agents:
        assert coordinator.ready()["slot"] == "there"
        ingested = json.loads(command(monkeypatch, asking, "ingest", "--json", str(write_corpus(tmp_path / "corpus"))))
        assert ingested["indexed"] == ingested["submitted"] == 4
        for sink in agents.sinks:
            assert sink.wait_caught_up(30)
        with Client(asking.config) as client:
            outcome = client.ask("What is a widget?", timeout=40)
        assert outcome.ok, outcome.reason
        assert outcome.citations
        submitted = json.loads(command(monkeypatch, asking, "submit", "--json", "What is a gizmo?"))
        watched = command(monkeypatch, asking, "watch", "--json", "--task", submitted["task_id"], "--timeout", "30")
        assert json.loads(watched.splitlines()[-1])["type"] == "TaskCompleted"
        assert json.loads(command(monkeypatch, asking, "dlq", "list", "--json")) == []
        assert agents.sinks[0].wait_caught_up(30)
        with AgentDirectory(secured.config, Codec()) as directory:
            deadline = time.monotonic() + 40
            while "monitor" not in {each.agent for each in directory.entries()}:
                assert time.monotonic() < deadline, monitor.end(stop=True)
                assert monitor.process.poll() is None, monitor.end()
                time.sleep(0.1)
    assert coordinator.end(stop=True)[0] == 0


def test_the_whole_system_in_one_process_with_the_rights_of_all_roles(
    secured: SecuredKafka, role: Callable[..., Role], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    everything = secured.user(rights_of(*AGENT_ROLES, "sink-clickhouse", "sink-milvus", "ask", "ingest"))
    up = role(everything, str(SCRIPT), "up", "--json", MAGNATRONIC_MONITOR="false")
    assert up.ready()["embedded"] is False
    corpus = write_corpus(tmp_path / "corpus")
    command(monkeypatch, everything, "ingest", "--data-dir", str(tmp_path), str(corpus))
    assert call(tmp_path, "catch_up")
    asked = command(monkeypatch, everything, "ask", "--json", "--data-dir", str(tmp_path), "What is a widget?")
    assert json.loads(asked)["ok"]
    wait_until(lambda: call(tmp_path, "status")["ready"])
    status = json.loads(command(monkeypatch, everything, "status", "--json", "--data-dir", str(tmp_path)))
    assert status["ready"]
    assert up.end(stop=True)[0] == 0


def needed_by(bench: Bench) -> dict[str, Right]:
    """All that the bench's agent needs; what an error says when it is missing, and the right."""
    name, changelogs = bench.agent.name, f"{bench.binding.group}.*"
    prefix = changelogs.removesuffix("*")
    return {
        f"READ on topic {bench.topic}": Right("TOPIC", bench.topic, "READ"),
        f"CREATE on topic {prefix}{bench.topic}.changelog": Right("TOPIC", changelogs, "CREATE"),
        f"READ on topic {prefix}{bench.topic}.changelog": Right("TOPIC", changelogs, "READ"),
        f"WRITE on topic {prefix}{bench.topic}.changelog": Right("TOPIC", changelogs, "WRITE"),
        "WRITE on topic work.results.normal": Right("TOPIC", "work.results.*", "WRITE"),
        "WRITE on topic tasks.lifecycle.normal": Right("TOPIC", "tasks.lifecycle.*", "WRITE"),
        "WRITE on topic alerts": Right("TOPIC", "alerts", "WRITE"),
        "WRITE on topic effects": Right("TOPIC", "effects", "WRITE"),
        "WRITE on topic dead-letters": Right("TOPIC", "dead-letters", "WRITE"),
        f"WRITE on transactional id magnatronic.{name}-0": Right("TRANSACTIONAL_ID", f"magnatronic.{name}-*", "WRITE"),
        f"READ on group {bench.binding.group}": Right("GROUP", bench.binding.group, "READ"),
    }


def processor_of(bench: Bench, user: User) -> Processor:
    return Processor(bench.binding, codec=CODEC, kafka=user.config, session_timeout_ms=6000)


async def refused(processor: Processor) -> str:
    """Why it ended."""
    with pytest.raises(AccessError) as ended:
        await asyncio.wait_for(processor.run(), 15)
    return str(ended.value)


async def process(bench: Bench, user: User, count: int) -> None:
    processor = processor_of(bench, user)
    running = asyncio.create_task(processor.run())
    await bench.until(lambda: running.done() or processor.stats.events_in >= count)
    processor.stop()
    await running
    assert processor.stats.events_in == count


async def test_a_missing_right_is_named_before_an_event_is_taken_and_nothing_is_lost(secured: SecuredKafka) -> None:
    bench = Bench(secured)
    needed = needed_by(bench)
    user = secured.user(needed.values())
    for number in range(6):
        bench.send(f"t{number % 2}", number=1)
    bench.flush()
    for said, right in needed.items():
        user.revoke(right)
        why = await refused(processor_of(bench, user))
        assert f"{user.principal} lacks " in why
        assert said in why
        assert "docs/security.md" in why
        user.grant([right])
    await process(bench, user, 6)
    assert bench.results() == {"t0": ["1", "2", "3"], "t1": ["1", "2", "3"]}


@pytest.mark.parametrize("visible", [True, False], ids=["which it may still describe", "which it can't even see"])
async def test_a_right_that_is_taken_away_ends_the_processor_by_name(secured: SecuredKafka, visible: bool) -> None:
    bench = Bench(secured)
    needed = needed_by(bench)
    user = secured.user([*needed.values(), *([Right("TOPIC", "work.results.*", "DESCRIBE")] if visible else [])])
    bench.send("t")
    bench.flush()
    processor = processor_of(bench, user)
    running = asyncio.create_task(processor.run())
    await bench.until(lambda: running.done() or processor.stats.events_in == 1)
    said = "WRITE on topic work.results.normal"
    user.revoke(needed[said])
    bench.send("t")
    bench.flush()
    with pytest.raises(AccessError, match=f"{user.principal} lacks {said}"):
        await asyncio.wait_for(running, 30)
    user.grant([needed[said]])
    await process(bench, user, 1)
    assert bench.results() == {"t": ["1", "2"]}


async def test_a_group_that_is_taken_away_ends_the_processor_by_name(secured: SecuredKafka) -> None:
    bench = Bench(secured)
    needed = needed_by(bench)
    user = secured.user(needed.values())
    processor = processor_of(bench, user)
    running = asyncio.create_task(processor.run())
    await bench.until(lambda: running.done() or processor.joined)
    said = f"READ on group {bench.binding.group}"
    user.revoke(needed[said])
    with pytest.raises(AccessError, match=said):
        await asyncio.wait_for(running, 30)


async def test_a_login_that_is_refused_for_a_while_kills_no_running_processor(secured: SecuredKafka) -> None:
    bench = Bench(secured)
    user = secured.user(needed_by(bench).values())
    bench.send("t")
    bench.flush()
    processor = processor_of(bench, user)
    running = asyncio.create_task(processor.run())
    await bench.until(lambda: running.done() or processor.stats.events_in == 1)
    name = user.config["sasl.username"]
    secured.shut_out(name)
    await asyncio.sleep(4)  # the producer's connections are closed for idleness, and can't be had again
    bench.send("t")
    bench.flush()
    await asyncio.sleep(2)
    assert not running.done()
    assert processor.stats.events_in == 1
    secured.let_in(name)
    await bench.until(lambda: running.done() or processor.stats.events_in == 2)
    processor.stop()
    await running
    assert bench.results() == {"t": ["1", "2"]}


def test_a_refused_login_is_told_at_once_with_what_to_do(secured: SecuredKafka) -> None:
    good = secured.user().config
    by_tls = secured.user(listener="tls").config
    wrong: list[tuple[dict[str, Any], str]] = [
        ({**good, "sasl.password": "no"}, "MAGNATRONIC_KAFKA_SASL_PASSWORD"),
        ({**good, "sasl.mechanism": "PLAIN"}, "MAGNATRONIC_KAFKA_SASL_PASSWORD"),
        ({**good, "sasl.mechanism": "SCRAM-SHA-512"}, "supported mechanisms: PLAIN,SCRAM-SHA-256.*_SASL_MECHANISM"),
        (
            {**good, "bootstrap.servers": secured.at("plain")},
            "asks for no login: set MAGNATRONIC_KAFKA_SEC",
        ),
        ({**good, "security.protocol": "SASL_SSL"}, "speaks no TLS: set MAGNATRONIC_KAFKA_SECURITY_PROTOCOL"),
        ({**by_tls, "bootstrap.servers": secured.at("plain")}, "speaks no TLS"),
        ({"bootstrap.servers": secured.at("sasl")}, "Does that port ask for TLS or a login.* PLAINTEXT now"),
        ({**good, "bootstrap.servers": secured.at("tls")}, "Does that port ask for TLS.* SASL_PLAINTEXT now"),
        ({**by_tls, "ssl.ca.location": str(secured.folder / "other.crt")}, "set MAGNATRONIC_KAFKA_SSL_CA_LOCATION"),
        (
            {**by_tls, "security.protocol": "SSL", "bootstrap.servers": secured.at("mutual")},
            "MAGNATRONIC_KAFKA_SSL_CERTIFICATE_LOCATION",
        ),
    ]
    (secured.folder / "other.crt").write_text((secured.folder / "server.crt").read_text())

    def attempt(config: dict[str, Any]) -> tuple[str, float]:
        started = time.monotonic()
        with pytest.raises(AccessError) as ended:
            check_login(config, timeout_s=4)
        return str(ended.value), time.monotonic() - started

    with ThreadPoolExecutor(len(wrong)) as threads:
        told = list(threads.map(attempt, (config for config, _ in wrong)))
    for (config, expected), (said, took_s) in zip(wrong, told, strict=True):
        assert re.search(expected, said), said
        assert config["bootstrap.servers"] in said
        assert took_s < 8
    check_login(good)
    check_login(by_tls)
    with pytest.raises(ClusterError, match=r"no Kafka answers at 127.0.0.1:1: .*refused"):
        check_login({**good, "bootstrap.servers": "127.0.0.1:1"}, timeout_s=1)


def test_commands_and_the_monitor_end_by_a_refused_login(
    secured: SecuredKafka, role: Callable[..., Role], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    wrong = secured.user()
    wrong.config["sasl.password"] = "no"
    worker = ("-A", "streams.monitor", "worker", "--without-web")
    monitor = role(wrong, str(FAUST), *worker)
    unable = role(secured.user(), str(FAUST), *worker, MAGNATRONIC_KAFKA_CONFIG='{"ssl.sigalgs.list": "x"}')
    run = role(wrong, str(SCRIPT), "run", "coordinator", "--slot", "x")
    for ended, code in ((monitor.end(), 2), (run.end(), 1)):
        assert ended[0] == code, ended
        assert "check MAGNATRONIC_KAFKA_SASL_USERNAME and MAGNATRONIC_KAFKA_SASL_PASSWORD" in ended[1]
    code, said = unable.end()
    assert code == 2
    assert "does not know ssl.sigalgs.list" in said


async def test_tls_with_a_login_and_with_a_certificate(secured: SecuredKafka, role: Callable[..., Role]) -> None:
    monitor = role(
        secured.user(rights_of("monitor"), listener="mutual"),
        *(str(FAUST), "-A", "streams.monitor", "-l", "warn", "worker", "--without-web"),
        MAGNATRONIC_MONITOR_INSTANCE="by-tls",
    )
    for listener in ("tls", "mutual"):
        bench = Bench(secured)
        bench.send("t")
        bench.flush()
        await process(bench, secured.user(needed_by(bench).values(), listener=listener), 1)
        assert bench.results() == {"t": ["1"]}
    with AgentDirectory(secured.config, CODEC) as directory:

        def works() -> bool:
            assert monitor.process.poll() is None, monitor.end()
            return "by-tls" in {each.instance for each in directory.entries()}

        await asyncio.to_thread(wait_until, works, 40.0)


async def test_a_transaction_that_somebody_left_open_is_named(secured: SecuredKafka) -> None:
    bench = Bench(secured)
    for number in range(20):
        bench.send(f"t{number}")
    processor = bench.processor()
    readiness = Readiness(processor, holdups=Holdups(secured.config, suspected_after_s=0.3, held_up_after_s=1.0))
    running = asyncio.create_task(processor.run())
    bench.flush()
    await bench.until(lambda: running.done() or processor.stats.events_in == 20)

    def held() -> list[Cause]:
        return [cause for cause in readiness.check() if cause.kind is Kind.HELD_UP]

    hung = Producer({**secured.config, "transactional.id": secured.unique("hung"), "transaction.timeout.ms": 60_000})
    await asyncio.to_thread(hung.init_transactions, 20)
    hung.begin_transaction()
    hung.produce(bench.topic, b"", b"x", partition=1, headers=[("ce_source", b"/clients/hung")])
    assert hung.flush(20) == 0
    for number in range(20):
        bench.send(f"t{number}")
    bench.flush()
    await bench.until(lambda: running.done() or bool(held()), 20)
    (cause,) = held()
    assert (cause.topic, cause.partition) == (bench.topic, 1)
    assert re.search(
        rf"can't read on in {bench.topic}\[1\].* a transaction of /clients/hung is open at .* UTC", cause.message
    )
    await asyncio.to_thread(hung.abort_transaction, 20)
    await bench.until(lambda: running.done() or processor.stats.events_in == 40)
    assert not held()
    processor.stop()
    await running
    assert {task: answers[-1] for task, answers in bench.results().items()} == {
        f"t{number}": "2" for number in range(20)
    }
