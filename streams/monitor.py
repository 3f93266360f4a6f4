"""The Monitor: a Faust app over the processors' figures, outcomes and heartbeats. Started as any Faust app is:
``faust -A streams.monitor worker``, with the settings of the environment (``MAGNATRONIC_...``). The only module that
imports Faust.

In: topics ``telemetry``, ``task.outcomes`` and ``agents.directory``, as bytes through our codec. Out: AlertRaised and
AlertCleared to ``alerts``, and verdicts to ``agents.directory``: AgentHeartbeat ``degraded`` while an alert is open for
an instance, ``gone`` when it falls silent. Its parts (:mod:`streams.monitor_judge`, :mod:`streams.monitor_outcomes`,
:mod:`streams.monitor_presences`) meet Faust's streams and tables here, which live in memory with changelogs.

Faust delivers at least once. That does no harm: the tables take a record once, however often it comes, and what
is emitted has ids that follow from the log. What is emitted is in the log before a table says that it was, so a crash
at any moment loses no alert. An unexpected error ends the process at once: the supervisor's next one begins with the
record that caused it, where going on would lose it.
"""

import logging
import os
import sys
import tempfile
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, NoReturn

import faust
from faust.serializers import codecs
from faust.transport.drivers import aiokafka as driver
from faust.types.windows import WindowRange_from_start
from pydantic import BaseModel
from yarl import URL

from schemas.codec import Codec
from schemas.errors import SchemaError, UnavailableError
from schemas.events import AgentHeartbeat, AgentRegistered, AlertRaised, Event, Health, ProcessorStats, TaskCompleted
from schemas.metadata import Envelope, Metadata, deterministic_id
from schemas.record import Record
from schemas.topics import key_of, topic_name, topic_of
from streams.alerting import Spending, Watch
from streams.directory import DIRECTORY_TOPIC, HEARTBEAT_S, MONITOR_SOURCE, Presence
from streams.errors import StreamsError
from streams.figures import STEP_MS, WINDOW_MS, Figures, Sample
from streams.monitor_acks import Acks
from streams.monitor_judge import Judge, Place
from streams.monitor_login import Login
from streams.monitor_outcomes import Outcome, Outcomes
from streams.monitor_presences import Presences
from streams.monitor_settings import MonitorSettings
from streams.monitor_tables import FaustTable
from streams.monitor_topics import prepare
from streams.rules import Thresholds

__all__ = ["app"]

NAME: Final = "monitor"

_TELEMETRY: Final = topic_of(ProcessorStats).name
_OUTCOMES: Final = topic_of(TaskCompleted).name
_FAILED: Final = 70

log = logging.getLogger(__name__)
# Faust's progress display, which is on at levels above INFO, asks the root logger for debug messages, of which aiokafka
# has several a request.
logging.getLogger("aiokafka").setLevel(logging.INFO)


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
    """What configuring gives, or what is wrong with it."""

    settings: MonitorSettings | None = None
    wrong = ""
    codec = Codec()


state = _State()


@app.on_configured.connect  # type: ignore[arg-type]
def configure(_: Any, *given: Any, **__: Any) -> None:
    """Take the settings from the environment. Faust asks for them when this module is imported, by whomever, so what is
    wrong with them is said when a worker starts.
    """
    conf = given[0]
    try:
        settings = state.settings = MonitorSettings.from_environment()
    except ValueError as error:
        state.wrong = str(error)
        return
    urls = [URL(f"kafka://{server}") for server in settings.servers]
    # The two are taken from the first when the configuration is made, which is before this.
    conf.broker = conf.broker_consumer = conf.broker_producer = urls
    conf.broker_credentials = _credentials(settings.login)
    state.codec = settings.codec
    if settings.instance:
        conf.consumer_group_instance_id = f"{conf.id}-{settings.instance}"


@app.on_after_configured.connect  # type: ignore[arg-type]
def read_committed(_: Any, **__: Any) -> None:
    """Let the consumer see committed records only."""
    app.transport = _CommittedTransport(app.conf.broker_consumer, app)


def _credentials(login: Login) -> Any:
    """Faust's credentials; None where the cluster asks for none."""
    if not login.mechanism:
        return None if login.context is None else faust.SSLCredentials(login.context)
    return faust.SASLCredentials(
        username=login.username, password=login.password, ssl_context=login.context, mechanism=login.mechanism
    )


def _give_up(why: str) -> NoReturn:
    sys.stderr.write(f"magnatronic monitor: {why}\n")
    sys.exit(2)


def _raw(name: str) -> Any:
    return app.topic(name, key_type=bytes, value_type=bytes, key_serializer="raw", value_serializer="raw")


def _window_of(place: Place) -> Any:
    """The window's key, as Faust makes it."""
    source, end_ms = place
    return source, WindowRange_from_start((end_ms - WINDOW_MS) / 1000, WINDOW_MS / 1000)


def _place_of(key: Any) -> Place:
    source, (start_s, _) = key
    return source, round(start_s * 1000) + WINDOW_MS


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
    if state.settings is None:
        _give_up(state.wrong)
    try:
        prepare(
            state.settings.kafka,
            app.conf.id,
            changelogs={f"{app.conf.id}-{table.name}-changelog": source for table, source in _SOURCES.items()},
            recent=(_TELEMETRY, DIRECTORY_TOPIC),
            written=(topic_of(AlertRaised).name, DIRECTORY_TOPIC),
            replication_factor=state.settings.replication_factor,
        )
    except StreamsError as error:
        _give_up(str(error))


def _decode(message: Any) -> Envelope | None:
    record = Record(
        message.topic,
        message.partition,
        message.offset,
        _ms(message),
        message.key,
        message.value,
        message.headers or (),
    )
    try:
        return state.codec.decode(record)
    except UnavailableError:
        raise
    except SchemaError as error:
        log.warning("%s[%d]@%d is passed over: %s", record.topic, record.partition, record.offset, error)
        return None


async def _send(event: Event, event_id: str, at: datetime, source: str = MONITOR_SOURCE) -> None:
    """Send, and wait until it is in the log."""
    key = key_of(event)
    value, headers = state.codec.encode(event, Metadata(id=event_id, source=source, subject=key, time=at))
    await (await app.send(topic_name(event), key=key.encode(), value=value, headers=headers, value_serializer="raw"))


# Making a table has had the settings read.
judging = Judge(
    FaustTable(windows.table, _window_of, _place_of),
    FaustTable(watches),
    FaustTable(spending),
    _send,
    Thresholds() if state.settings is None else state.settings.thresholds,
)
comparing = Outcomes(FaustTable(ended), _send)
attending = Presences(FaustTable(presences), _send)


def _die(failure: BaseException) -> None:
    """End the process, see the module's first lines; what fails as it stops comes again."""
    if app.should_stop:
        return
    log.error("the monitor can't go on", exc_info=failure)
    logging.shutdown()
    os._exit(_FAILED)


_ACKS: Final = {name: Acks(_die) for name in (_TELEMETRY, _OUTCOMES, DIRECTORY_TOPIC)}


async def _follow(stream: Any, take: Callable[[Envelope, Any], Awaitable[Awaitable[Any] | None]]) -> None:
    """Have each event taken that can be read: ``take`` gets it and Faust's message."""
    stream.enable_acks = False
    try:
        async for event in stream.events():
            message = event.message
            envelope = _decode(message)
            done = None if envelope is None else await take(envelope, message)
            _ACKS[message.topic].add(message.partition, event, done)
    except Exception as failure:
        _die(failure)
        raise


def _ms(message: Any) -> int:
    """When the broker appended it."""
    at_s: float = message.timestamp
    return round(at_s * 1000)


@app.agent(telemetry, concurrency=1)
async def judge(stream: Any) -> None:
    """Take figures into their windows, and judge the windows that are complete."""

    async def take(envelope: Envelope, message: Any) -> Awaitable[Any] | None:
        if not isinstance(envelope.event, ProcessorStats):
            return None
        told_us = round(envelope.metadata.time.timestamp() * 1_000_000)
        return await judging.take(Sample(envelope.event, _ms(message), message.offset, told_us))

    await _follow(stream, take)


@app.agent(outcomes, concurrency=1)
async def compare(stream: Any) -> None:
    """Hold each outcome against an earlier one of the same task."""

    async def take(envelope: Envelope, message: Any) -> Awaitable[Any] | None:
        return await comparing.take(envelope, message.partition, message.offset, _ms(message))

    await _follow(stream, take)


@app.agent(directory, concurrency=1)
async def attend(stream: Any) -> None:
    """Keep the directory, and say who has fallen silent. Others' heartbeats tell the time."""

    async def take(envelope: Envelope, message: Any) -> Awaitable[Any] | None:
        return await attending.take(envelope, _ms(message))

    await _follow(stream, take)


@app.on_partitions_assigned.connect  # type: ignore[arg-type]
async def reassigned(_: Any, *__: Any, **___: Any) -> None:
    """Tables were read again; what is derived from them is too."""
    judging.forget_derived()
    comparing.forget_derived()
    for each in _ACKS.values():
        each.forget()


@app.timer(HEARTBEAT_S)  # type: ignore[untyped-decorator]
async def announce() -> None:
    """Say that the Monitor lives: where all others are gone, its own heartbeats tell the time."""
    now = datetime.now(UTC)
    name = (state.settings and state.settings.instance) or str(os.getpid())
    source = f"/processors/{app.conf.id}-{name}"
    for event in (
        AgentRegistered(name=NAME, instance=name, version="1"),
        AgentHeartbeat(name=NAME, instance=name, health=Health.READY),
    ):
        await _send(event, deterministic_id(source, type(event).__name__, now.isoformat()), now, source)
