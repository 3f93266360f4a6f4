"""The Monitor: a Faust app over the processors' figures, outcomes and heartbeats. Started as any Faust app is:
``faust -A streams.monitor worker``, with the settings of the environment (``MAGNATRONIC_...``). The only module that
imports Faust.

In: topics ``telemetry``, ``task.outcomes`` and ``agents.directory``, as bytes through our codec. Out: AlertRaised and
AlertCleared to ``alerts``, and verdicts to ``agents.directory``: AgentHeartbeat ``degraded`` while an alert is open for
an instance, ``gone`` when it falls silent. What to decide is in :mod:`streams.alerting` and :mod:`streams.directory`;
here it meets Faust's hopping windows and tables, which live in memory with changelogs.

Faust delivers at least once. That does no harm: the tables take a record once, however often it comes, and what
is emitted has ids that follow from the log. What is emitted is in the log before a table says that it was, so a crash
at any moment loses no alert. An unexpected error ends the process at once: the supervisor's next one begins with the
record that caused it, where going on would lose it.
"""

import logging
import os
import ssl
import sys
import tempfile
from collections import deque
from collections.abc import AsyncIterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, NoReturn

import faust
from faust.serializers import codecs
from faust.transport.drivers import aiokafka as driver
from faust.types.windows import WindowRange_from_start
from pydantic import BaseModel, ConfigDict, ValidationError
from yarl import URL

from schemas.codec import Codec
from schemas.errors import RegistryError, SchemaError
from schemas.events import AgentHeartbeat, AgentRegistered, Event, Health, ProcessorStats, TaskCompleted
from schemas.metadata import Envelope, Metadata, deterministic_id
from schemas.record import Record
from schemas.registry import RegistryIds
from schemas.topics import key_of, topic_name, topic_of
from streams.alerting import (
    EVERYBODY,
    OUTCOMES,
    STEP_MS,
    WINDOW_MS,
    Alert,
    Figures,
    Sample,
    Spending,
    Thresholds,
    Watch,
    conflict_of,
    forget,
    judge_spending,
    judge_window,
)
from streams.directory import (
    DIRECTORY_TOPIC,
    FORGOTTEN_AFTER_MS,
    HEARTBEAT_S,
    MONITOR_SOURCE,
    Presence,
    health_at,
    presence_after,
)
from streams.errors import StreamsError
from streams.monitor_topics import prepare
from streams.settings import AlertSettings, ClusterSettings, variable

__all__ = ["app"]

NAME: Final = "monitor"
INSTANCE_VARIABLE: Final = "MAGNATRONIC_MONITOR_INSTANCE"
"""Names this worker to Kafka; the same name after a restart takes over at once. Faust's own membership without it."""

_TELEMETRY: Final = topic_of(ProcessorStats).name
_OUTCOMES: Final = topic_of(TaskCompleted).name
_REMEMBERED_OUTCOMES: Final = 50_000
"""Outcomes a partition that are held against later ones, some 300 bytes each."""
_FAILED: Final = 70

log = logging.getLogger(__name__)


class _ModelCodec(codecs.Codec):
    """A table's values: pydantic models as JSON."""

    def __init__(self, model: type[BaseModel], children: Any = None) -> None:
        super().__init__(children, model=model)
        self._model = model

    def _dumps(self, obj: BaseModel) -> bytes:
        return obj.model_dump_json().encode()

    def _loads(self, s: bytes) -> BaseModel:
        return self._model.model_validate_json(s)


class _CommittedThread(driver.AIOKafkaConsumerThread):
    """Reads committed records only. Faust does so only where it writes transactions itself, and an outcome of an
    aborted transaction is none.
    """

    def _create_worker_consumer(self, transport: Any) -> Any:
        consumer = super()._create_worker_consumer(transport)
        consumer._isolation_level = "read_committed"
        return consumer


class _CommittedConsumer(driver.Consumer):
    def _new_consumer_thread(self) -> _CommittedThread:
        return _CommittedThread(self, loop=self.loop, beacon=self.beacon)


class _CommittedTransport(driver.Transport):
    Consumer = _CommittedConsumer


app = faust.App(
    f"magnatronic-{NAME}",
    store="memory://",
    datadir=Path(tempfile.gettempdir()) / f"magnatronic-{NAME}-{os.getuid()}",  # made, but nothing is put there
    web_enabled=False,
    topic_disable_leader=True,
    topic_allow_declare=False,  # streams.monitor_topics creates them
    consumer_auto_offset_reset="earliest",
    # How long a dead worker's partitions wait for it.
    broker_session_timeout=10.0,
    broker_heartbeat_interval=2.5,
    broker_commit_interval=1.0,
    # A stop waits for no record that is not done: it comes again.
    stream_wait_empty=False,
    # The default waits for other workers to join, which are few.
    stream_recovery_delay=0.0,
)
# The command line turns it on by default, on a port that the next worker would find taken.
app.boot_strategy.enable_web = False


class _State:
    """What configuring gives, and what is derived from tables."""

    def __init__(self) -> None:
        self.cluster: ClusterSettings | None = None
        self.wrong = ""
        self.codec = Codec()
        self.thresholds = Thresholds()
        self.instance = os.environ.get(INSTANCE_VARIABLE, "")
        self.recent: dict[int, deque[str]] = {}


state = _State()


@app.on_configured.connect  # type: ignore[arg-type]
def configure(_: Any, *given: Any, **__: Any) -> None:
    """Take the settings from the environment. Faust asks for them when this module is imported, by whomever, so what is
    wrong with them is said when a worker starts.
    """
    conf = given[0]
    try:
        cluster, alerts = ClusterSettings(), AlertSettings()
        credentials = _credentials(cluster)
    except ValidationError as error:
        said = "; ".join(each["msg"] for each in error.errors(include_input=False, include_url=False))
        state.wrong = f"a setting is wrong: {said}"
        return
    except (ValueError, OSError) as error:
        state.wrong = str(error)
        return
    if cluster.kafka_bootstrap_servers is None:
        state.wrong = f"which Kafka? Set {variable('kafka_bootstrap_servers')}, to what `magnatronic status` says"
        return
    urls = [URL(f"kafka://{server.strip()}") for server in cluster.kafka_bootstrap_servers.split(",")]
    # The two are taken from the first when the configuration is made, which is before this.
    conf.broker = conf.broker_consumer = conf.broker_producer = urls
    if credentials is not None:
        conf.broker_credentials = credentials
    if state.instance:
        conf.consumer_group_instance_id = f"{conf.id}-{state.instance}"
    state.cluster, state.thresholds = cluster, alerts.thresholds
    url = cluster.schema_registry_url
    state.codec = Codec() if url is None else Codec(RegistryIds(url))


@app.on_after_configured.connect  # type: ignore[arg-type]
def read_committed(_: Any, **__: Any) -> None:
    """Let the consumer see committed records only."""
    app.transport = _CommittedTransport(app.conf.broker_consumer, app)


def _credentials(cluster: ClusterSettings) -> Any:
    """Faust's credentials for the cluster; None where it asks for none."""
    protocol = cluster.kafka_security_protocol or "PLAINTEXT"
    context = None
    if protocol.endswith("SSL"):
        context = ssl.create_default_context(cafile=cluster.kafka_ssl_ca_location)
        if cluster.kafka_ssl_certificate_location is not None:
            password = cluster.kafka_ssl_key_password
            context.load_cert_chain(
                cluster.kafka_ssl_certificate_location,
                cluster.kafka_ssl_key_location,
                None if password is None else password.get_secret_value(),
            )
    if not protocol.startswith("SASL"):
        return None if context is None else faust.SSLCredentials(context)
    mechanism = cluster.kafka_sasl_mechanism or "PLAIN"
    secret = cluster.kafka_sasl_password
    if secret is None or mechanism in ("GSSAPI", "OAUTHBEARER"):
        raise ValueError(f"it can't log in by {mechanism}; it takes PLAIN, SCRAM-SHA-256 and SCRAM-SHA-512")
    return faust.SASLCredentials(
        username=cluster.kafka_sasl_username,
        password=secret.get_secret_value(),
        ssl_context=context,
        mechanism=mechanism,
    )


def _give_up(why: str) -> NoReturn:
    sys.stderr.write(f"magnatronic monitor: {why}\n")
    sys.exit(2)


def _raw(name: str) -> Any:
    return app.topic(name, key_type=bytes, value_type=bytes, key_serializer="raw", value_serializer="raw")


class Outcome(BaseModel):
    """How a task ended: the event's id and type, and where it lay."""

    model_config = ConfigDict(frozen=True)

    id: str
    type: str
    partition: int
    offset: int


def _table(name: str, model: type[BaseModel], **options: Any) -> Any:
    table: Any = app.Table(name, **options)
    table.value_serializer = _ModelCodec(model)
    # It was made with the serializer that a table begins with.
    table.changelog_topic = table._new_changelog_topic()
    return table


telemetry, outcomes, directory = _raw(_TELEMETRY), _raw(_OUTCOMES), _raw(DIRECTORY_TOPIC)
windows = _table("windows", Figures, default=Figures, partitions=1).hopping(WINDOW_MS / 1000, STEP_MS / 1000)
"""Figures by ``<agent>/<instance>``. They have no expiry: Faust's follows the wall clock, ours the log."""
watches = _table("watches", Watch, partitions=1)
spending = _table("spending", Spending, partitions=1)
presences = _table("presences", Presence, partitions=1)
ended = _table("ended", Outcome)

_SOURCES: Final = {
    windows.table: _TELEMETRY,
    watches: _TELEMETRY,
    spending: _TELEMETRY,
    presences: DIRECTORY_TOPIC,
    ended: _OUTCOMES,
}


@app.on_worker_init.connect  # type: ignore[arg-type]
def begin(_: Any, **__: Any) -> None:
    """Prepare topics, before anything is read."""
    servers = "" if state.cluster is None else state.cluster.kafka_bootstrap_servers
    if state.cluster is None or not servers:
        _give_up(state.wrong)
    try:
        prepare(
            state.cluster.librdkafka_config(servers),
            app.conf.id,
            changelogs={f"{app.conf.id}-{table.name}-changelog": source for table, source in _SOURCES.items()},
            recent=(_TELEMETRY, DIRECTORY_TOPIC),
            replication_factor=state.cluster.replication_factor,
        )
    except StreamsError as error:
        _give_up(str(error))


def _decode(message: Any) -> Envelope | None:
    record = Record(
        message.topic,
        message.partition,
        message.offset,
        round(message.timestamp * 1000),
        message.key,
        message.value,
        message.headers or (),
    )
    try:
        return state.codec.decode(record)
    except RegistryError:
        raise
    except SchemaError as error:
        log.warning("%s[%d]@%d is passed over: %s", record.topic, record.partition, record.offset, error)
        return None


async def _events(stream: Any) -> AsyncIterable[tuple[Any, Envelope]]:
    async for event in stream.events():
        envelope = _decode(event.message)
        if envelope is not None:
            yield event.message, envelope


async def _send(event: Event, event_id: str, at: datetime, source: str = MONITOR_SOURCE) -> None:
    """Send, and wait until it is in the log."""
    key = key_of(event)
    value, headers = state.codec.encode(event, Metadata(id=event_id, source=source, subject=key, time=at))
    await (await app.send(topic_name(event), key=key.encode(), value=value, headers=headers, value_serializer="raw"))


async def _raise(alerts: list[Alert]) -> None:
    for alert in alerts:
        await _send(alert.event, alert.id, alert.at)
        log.info("%s %s: %s", type(alert.event).__name__, alert.event.rule, alert.event.source)


async def _put(table: Any, key: str, value: BaseModel, partition: int = 0) -> None:
    """Set a key, and wait until its changelog has it."""
    table.data[key] = value
    await table.send_changelog(partition, key, value)


def _or_die(work: Any) -> Any:
    """``work`` over a stream; an error in it ends the process, see the module's first lines."""

    async def working(stream: Any) -> None:
        try:
            await work(stream)
        except Exception:
            log.exception("the monitor can't go on")
            logging.shutdown()
            os._exit(_FAILED)

    working.__name__ = working.__qualname__ = work.__name__
    return working


@app.agent(telemetry, concurrency=1)
@_or_die
async def judge(stream: Any) -> None:
    """Take figures into their windows, and judge the windows that are complete.

    A record counts as done when what it changed is surely in the changelog, which is known when a window is judged.
    Faust by itself commits offsets while changes still wait in its buffer.
    """
    stream.enable_acks = False
    taken: list[Any] = []
    async for event in stream.events():
        message = event.message
        taken.append(event)
        envelope = _decode(message)
        stats = None if envelope is None else envelope.event
        if envelope is None or not isinstance(stats, ProcessorStats):
            continue
        at_ms = round(message.timestamp * 1000)
        sample = Sample(stats, at_ms, message.offset, round(envelope.metadata.time.timestamp() * 1_000_000))
        watch = watches.get(stats.agent)
        if watch is None:
            watch = Watch.beginning(at_ms)
            await _put(watches, stats.agent, watch)
        held = [windows.table[stats.source, _span(end_ms)] for end_ms in watch.unjudged(at_ms)]
        if watch.late(sample, held):
            continue
        if watch.reach(at_ms).judged_ms > watch.judged_ms:
            await _judge_due(stats.agent, watch, at_ms)
            await _forget_silent(at_ms)
            for each in taken[:-1]:
                await stream.ack(each)
            taken = [event]
        windows[stats.source] += sample


def _span(end_ms: int) -> tuple[float, float]:
    """The window that ends then, as Faust calls it."""
    return WindowRange_from_start((end_ms - WINDOW_MS) / 1000, WINDOW_MS / 1000)


async def _judge_due(agent: str, watch: Watch, at_ms: int) -> None:
    # What windows hold must be in their changelog before the watch says that later records of their time are late.
    # Messages are handed over in the order of the calls: when this one is through, the others can be waited for.
    await _put(watches, agent, watch)
    await app.producer.flush()
    held: dict[tuple[float, float], dict[str, Figures]] = {}
    for (source, span), figures in windows.table.items():
        if source.partition("/")[0] == agent:
            held.setdefault(tuple(span), {})[source.partition("/")[2]] = figures
    for end_ms in watch.due(at_ms):
        figures = held.get(_span(end_ms), {})
        before = watch.open_alerts()
        watch, alerts = judge_window(watch, agent, end_ms, figures, state.thresholds)
        await _raise(alerts)
        await _say_degraded(agent, end_ms, figures, before, watch.open_alerts())
        if end_ms % 60_000 == 0:
            spent, alerts = judge_spending(
                spending.get(EVERYBODY) or Spending(), agent, end_ms, figures.values(), state.thresholds
            )
            await _raise(alerts)
            await _put(spending, EVERYBODY, spent)
    watch = watch.reach(at_ms)
    await _put(watches, agent, watch)
    for span, sources in held.items():
        if round(span[0] * 1000) + WINDOW_MS <= watch.judged_ms:
            for instance in sources:
                del windows.table[f"{agent}/{instance}", span]


async def _say_degraded(
    agent: str, end_ms: int, figures: dict[str, Figures], before: dict[str, str], now: dict[str, str]
) -> None:
    """Say of instances with an open alert, theirs or their agent's, that they are degraded; and once that no more."""
    for instance, each in sorted(figures.items()):
        sources = {agent, f"{agent}/{instance}"}
        is_, was = bool(sources & now.keys()), bool(sources & before.keys())
        if is_ or was:
            health = Health.DEGRADED if is_ else Health.READY
            verdict = AgentHeartbeat(name=agent, instance=instance, health=health, in_flight=each.in_flight)
            event_id = deterministic_id("verdict", agent, instance, health.value, end_ms)
            await _send(verdict, event_id, datetime.fromtimestamp(end_ms / 1000, UTC))


async def _forget_silent(at_ms: int) -> None:
    for agent, watch in list(watches.items()):
        cleared = forget(watch, at_ms)
        if cleared is None:
            continue
        await _raise(cleared)
        del watches[agent]
        for source, span in [key for key in windows.table if key[0].partition("/")[0] == agent]:
            del windows.table[source, span]


@app.agent(outcomes, concurrency=1)
@_or_die
async def compare(stream: Any) -> None:
    """Hold each outcome against an earlier one of the same task."""
    async for message, envelope in _events(stream):
        event = envelope.event
        if not isinstance(event, OUTCOMES):
            continue
        known = ended.get(event.task_id)
        if known is None:
            await _remember(
                event.task_id,
                Outcome(
                    id=envelope.metadata.id,
                    type=type(event).__name__,
                    partition=message.partition,
                    offset=message.offset,
                ),
            )
            continue
        alert = conflict_of(
            event.task_id,
            (known.id, known.type),
            (envelope.metadata.id, type(event).__name__),
            datetime.fromtimestamp(message.timestamp, UTC),
        )
        if alert is not None:
            await _raise([alert])


async def _remember(task_id: str, outcome: Outcome) -> None:
    recent = state.recent.get(outcome.partition)
    if recent is None:
        mine = ((each.offset, key) for key, each in ended.items() if each.partition == outcome.partition)
        recent = state.recent[outcome.partition] = deque(key for _, key in sorted(mine))
    recent.append(task_id)
    await _put(ended, task_id, outcome, outcome.partition)
    while len(recent) > _REMEMBERED_OUTCOMES:
        del ended[recent.popleft()]


@app.on_partitions_assigned.connect  # type: ignore[arg-type]
async def reassigned(_: Any, *__: Any, **___: Any) -> None:
    """Tables were read again; what is derived from them is too."""
    state.recent = {}


@app.agent(directory, concurrency=1)
@_or_die
async def attend(stream: Any) -> None:
    """Keep the directory, and say who has fallen silent. Others' heartbeats tell the time."""
    async for message, envelope in _events(stream):
        event, at_ms = envelope.event, round(message.timestamp * 1000)
        if not isinstance(event, AgentRegistered | AgentHeartbeat):
            continue
        place = f"{event.name}/{event.instance}"
        known = presences.get(place)
        after = presence_after(known, event, source=envelope.metadata.source, at_ms=at_ms)
        if after is not None and after is not known:
            await _put(presences, place, after)
        for other, each in list(presences.items()):
            if at_ms - each.seen_ms > FORGOTTEN_AFTER_MS:
                del presences[other]
            elif Health.GONE not in (each.health, each.verdict) and health_at(each, at_ms) is Health.GONE:
                verdict = AgentHeartbeat(name=each.agent, instance=each.instance, health=Health.GONE)
                event_id = deterministic_id("verdict", each.agent, each.instance, Health.GONE.value, each.seen_ms)
                await _send(verdict, event_id, datetime.fromtimestamp(at_ms / 1000, UTC))
                said = {"verdict": Health.GONE, "verdict_ms": at_ms}
                await _put(presences, other, each.model_copy(update=said))


@app.timer(HEARTBEAT_S)  # type: ignore[untyped-decorator]
async def announce() -> None:
    """Say that the Monitor lives: where all others are gone, its own heartbeats tell the time."""
    now = datetime.now(UTC)
    name = state.instance or str(os.getpid())
    source = f"/processors/{app.conf.id}-{name}"
    for event in (
        AgentRegistered(name=NAME, instance=name, version="1"),
        AgentHeartbeat(name=NAME, instance=name, health=Health.READY),
    ):
        await _send(event, deterministic_id(source, type(event).__name__, now.isoformat()), now, source)
