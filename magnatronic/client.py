"""The Python client: submit tasks, ask and wait, watch.

In: a running system's bootstrap servers (or its data folder, see :meth:`Client.connect`). Out: task ids,
:class:`Outcome` values, and live events. It talks to Kafka alone, as any other producer and consumer may. Everything is
synchronous and safe to call from several threads; from asyncio use ``await asyncio.to_thread(client.ask, ...)``.

    with Client.connect() as client:
        outcome = client.ask("How do I turn off retries in httpx?")
        print(outcome.answer, *outcome.citations, sep="\\n")
"""

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self
from uuid import uuid4

from confluent_kafka import KafkaException, Producer

from magnatronic.errors import ClusterError, UnknownTaskError, WaitTimeoutError, WrongInputError
from magnatronic.follow import KAFKA_LOGGER, Follower, Observed, observe, read_stored
from magnatronic.tracing import Publishing
from schemas.codec import MAX_BYTES, Codec
from schemas.encryption import SubjectCipher, union
from schemas.errors import EventTooLargeError
from schemas.events import (
    Citation,
    Event,
    Priority,
    TaskCancelled,
    TaskCancelRequested,
    TaskCompleted,
    TaskExpired,
    TaskFailed,
    TaskSubmitted,
)
from schemas.metadata import Metadata, deterministic_id
from schemas.topics import TOPICS, key_of, topic_name

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

__all__ = ["TASK_TOPICS", "Client", "DataSubjects", "Outcome"]

TASK_TOPICS: Final = tuple(name for topic in TOPICS if topic.key == "task_id" for name in topic.names())
"""Every topic that holds events of tasks."""

DataSubjects = str | Sequence[str] | None
"""The names of the people that something is about."""

TaskOutcome = TaskCompleted | TaskFailed | TaskExpired | TaskCancelled
_OUTCOMES: Final = (TaskCompleted, TaskFailed, TaskExpired, TaskCancelled)
_DELIVERY_TIMEOUT_S: Final = 30.0
_CONNECT_TIMEOUT_S: Final = 5.0
_CAUSES_S: Final = 2.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a task ended. ``events`` are all of the task's that were seen on the way, in order of arrival."""

    task_id: str
    event: TaskOutcome
    events: tuple[Observed, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether the task was completed."""
        return isinstance(self.event, TaskCompleted)

    @property
    def answer(self) -> str:
        """The answer, with markers such as ``[1]``; empty unless the task was completed."""
        return self.event.answer if isinstance(self.event, TaskCompleted) else ""

    @property
    def citations(self) -> tuple[Citation, ...]:
        """Where the answer's markers point."""
        return self.event.citations if isinstance(self.event, TaskCompleted) else ()

    @property
    def reason(self) -> str:
        """Why the task was not completed; empty if it was."""
        match self.event:
            case TaskFailed(reason=reason):
                return reason
            case TaskExpired(deadline=deadline):
                return f"its deadline passed at {deadline:%Y-%m-%d %H:%M:%S} UTC"
            case TaskCancelled(requested_by=who, reason=reason):
                return f"cancelled by {who or 'its submitter'}{': ' + reason if reason else ''}"
            case _:
                return ""


class Client:
    """A producer and, once something is awaited, one consumer.

    ``kafka`` is bootstrap servers, or a mapping of librdkafka settings (bootstrap.servers and security). ``name`` is
    the CloudEvents source of what it sends: ``/clients/<name>``. ``codec`` is the default one unless given. What it
    sends continues the caller's OpenTelemetry trace, or begins one; spans go to ``tracer_provider``, by default the
    application's. Use it as a context manager, or close it.
    """

    def __init__(
        self,
        kafka: str | Mapping[str, Any],
        *,
        name: str = "python",
        codec: Codec | None = None,
        tracer_provider: "TracerProvider | None" = None,
    ) -> None:
        self.kafka: dict[str, Any] = {"bootstrap.servers": kafka} if isinstance(kafka, str) else dict(kafka)
        self.codec = Codec() if codec is None else codec
        self.source = f"/clients/{name}"
        self._name = name
        self._tracer_provider = tracer_provider
        self._lock = threading.Lock()
        self._following: Follower | None = None
        self._producer = Producer(
            {
                **self.kafka,
                "enable.idempotence": True,
                "partitioner": "murmur2_random",  # what Java clients do, and all of this system's producers
                "linger.ms": 1,
                "compression.type": "lz4",
                "message.max.bytes": MAX_BYTES + 65_536,
                "delivery.timeout.ms": int(_DELIVERY_TIMEOUT_S * 1000),
                "log_level": 2,
            },
            logger=KAFKA_LOGGER,
        )
        try:
            # Asked first, an idempotent producer is ready in 50 ms; else its first record waits a second for its id.
            self._producer.list_topics(timeout=_CONNECT_TIMEOUT_S)
        except KafkaException as error:
            servers = self.kafka.get("bootstrap.servers")
            raise ClusterError(f"no Kafka answers at {servers}: {error.args[0].str()}") from None

    @classmethod
    def connect(
        cls,
        data_dir: str | Path | None = None,
        *,
        name: str = "python",
        tracer_provider: "TracerProvider | None" = None,
    ) -> Self:
        """A client of the system that the settings name: a cluster, or what runs on the data folder.

        Raises:
            NotRunningError: nothing runs there.
            AccessError: the cluster refuses the login.
        """
        from magnatronic.discovery import find_system

        found = find_system(data_dir)
        return cls(found.kafka, name=name, codec=found.codec(), tracer_provider=tracer_provider)

    def submit(
        self,
        objective: str,
        *,
        priority: Priority | str = Priority.NORMAL,
        deadline: datetime | None = None,
        task_id: str | None = None,
        parameters: Mapping[str, str] | None = None,
        data_subject: DataSubjects = None,
    ) -> str:
        """Submit a task; its id. Returns when the log has it.

        A ``task_id`` that was submitted before makes no second task. ``deadline`` is an aware datetime.
        ``data_subject`` names whom the task is about, in the application's own terms, such as ``"customer-42"``: what
        is personal in all that follows from it is sealed under the subject's key, until the subject is forgotten. No
        event holds the name. Keep personal data out of ``task_id``.

        Raises:
            ValueError: the objective is empty, the priority unknown, the deadline naive (pydantic's ValidationError).
            ClusterError: the cluster did not take it.
        """
        task = self.task(objective, priority, deadline, task_id, parameters)
        return self.submit_all([task], data_subject=data_subject)[0]

    def task(
        self,
        objective: str,
        priority: Priority | str = Priority.NORMAL,
        deadline: datetime | None = None,
        task_id: str | None = None,
        parameters: Mapping[str, str] | None = None,
    ) -> TaskSubmitted:
        """The event that :meth:`submit` sends."""
        return TaskSubmitted(
            task_id=str(uuid4()) if task_id is None else task_id,
            objective=objective,
            priority=Priority(priority),
            submitted_by=self._name,
            deadline=deadline,
            parameters=dict(parameters or {}),
        )

    def submit_all(self, tasks: Iterable[TaskSubmitted], *, data_subject: DataSubjects = None) -> list[str]:
        """Submit many tasks at once, all about ``data_subject``; their ids, when the log has them all.

        Raises:
            ClusterError: the cluster did not take one; others may be in the log.
        """
        sent = list(tasks)
        self.publish(sent, data_subject=data_subject)
        return [task.task_id for task in sent]

    def cancel(self, task_id: str, *, priority: Priority | str = Priority.NORMAL, reason: str = "") -> None:
        """Ask for the task to be stopped. ``priority`` is the one that it was submitted with."""
        request = TaskCancelRequested(task_id=task_id, requested_by=self._name, reason=reason)
        self.publish([request], priority=Priority(priority))

    def publish(
        self,
        events: Iterable[Event],
        *,
        priority: Priority = Priority.NORMAL,
        on_sent: Callable[[Event, Metadata], None] | None = None,
        data_subject: DataSubjects = None,
    ) -> list[Metadata]:
        """Send events of any type to their topics; what they were sent with, when the log has them all.

        ``priority`` is that of the task they belong to (a TaskSubmitted brings its own). ``on_sent`` is called for
        each event before it is sent. ``data_subject`` names whom they are about, as in :meth:`submit`.

        Raises:
            ClusterError: the cluster did not take one; others may be in the log.
            WrongInputError: one is over the size that its topic takes, or there is no key store for data subjects.
            KeyStoreError: the key store did not answer, or refused.
        """
        subjects = self.key_ids(data_subject)
        with Publishing(self._tracer_provider) as publishing:
            return self._publish(events, priority, on_sent, publishing, subjects)

    def key_ids(self, data_subject: DataSubjects) -> tuple[str, ...]:
        """By which ids events name the data subjects; keys are made for those that have none.

        Raises:
            WrongInputError: there is no key store, or a name is empty or too long.
            KeyStoreError: the key store did not answer, or refused.
        """
        names = [data_subject] if isinstance(data_subject, str) else list(data_subject or ())
        if not names:
            return ()
        keys = self.codec.cipher.keys if isinstance(self.codec.cipher, SubjectCipher) else None
        if keys is None or not hasattr(keys, "key_for"):
            raise WrongInputError("what is about a data subject needs a key store; set MAGNATRONIC_KEY_STORE")
        return union(keys.key_for(name) for name in names)

    def _publish(
        self,
        events: Iterable[Event],
        priority: Priority,
        on_sent: Callable[[Event, Metadata], None] | None,
        publishing: Publishing,
        subjects: tuple[str, ...],
    ) -> list[Metadata]:
        failures: list[str] = []

        def delivered(error: Any, _: Any) -> None:
            if error is not None:
                failures.append(error.str())

        sent = []
        for event in events:
            topic = topic_name(event, event.priority if isinstance(event, TaskSubmitted) else priority)
            metadata = self._metadata(event, topic, publishing, subjects)
            try:
                encoded = self.codec.encode(event, metadata)
            except EventTooLargeError as error:
                raise WrongInputError(str(error)) from error
            if on_sent is not None:
                on_sent(event, metadata)
            self._produce(topic, metadata.subject, encoded.value, encoded.headers, delivered)
            sent.append(metadata)
        left = self._producer.flush(_DELIVERY_TIMEOUT_S + 5)
        if failures or left:
            why = failures[0] if failures else "no acknowledgement"
            servers = self.kafka.get("bootstrap.servers")
            raise ClusterError(f"Kafka at {servers} did not take {len(failures) or left} of {len(sent)} events: {why}")
        return sent

    def _produce(self, topic: str, key: str, value: bytes, headers: Any, delivered: Callable[..., None]) -> None:
        while True:
            try:
                self._producer.produce(topic, value, key.encode(), headers=headers, on_delivery=delivered)
                self._producer.poll(0)
                return
            except BufferError:  # more than librdkafka queues: let some go out
                self._producer.poll(0.05)
            except KafkaException as error:
                raise ClusterError(f"Kafka refuses an event for {topic}: {error.args[0].str()}") from error

    def _metadata(self, event: Event, topic: str, publishing: Publishing, subjects: tuple[str, ...]) -> Metadata:
        key = key_of(event)
        # A task is submitted once, however often its submission is sent; anything else is a new fact each time.
        event_id = deterministic_id("TaskSubmitted", key) if isinstance(event, TaskSubmitted) else str(uuid4())
        return Metadata(
            id=event_id,
            source=self.source,
            subject=key,
            time=datetime.now(UTC),
            correlation_id=key,
            traceparent=publishing.traceparent(topic, event_id=event_id, correlation_id=key, key=key),
            data_subjects=subjects,
        )

    def ask(
        self,
        question: str,
        *,
        timeout: float = 120.0,
        priority: Priority | str = Priority.NORMAL,
        deadline: datetime | None = None,
        task_id: str | None = None,
        parameters: Mapping[str, str] | None = None,
        data_subject: DataSubjects = None,
        on_event: Callable[[Observed], None] | None = None,
        settle: float = 0.0,
    ) -> Outcome:
        """Submit a task, as :meth:`submit` does, and wait for its outcome. ``on_event`` is called with each of the
        task's events on the way, none before its cause.

        All events that led to the outcome are in it; for those on other branches, it waits ``settle`` seconds more.

        Raises:
            WaitTimeoutError: no outcome within ``timeout`` seconds; the task goes on.
            ClusterError: the cluster failed.
            ValueError: as in :meth:`submit`.
        """
        task = self.task(question, priority, deadline, task_id, parameters)
        waited_until = time.monotonic() + timeout
        with self.follower().subscribe(topics=TASK_TOPICS, keys=[task.task_id.encode()]) as subscription:
            self.submit_all([task], data_subject=data_subject)
            order = _CausalOrder(on_event)
            outcome: TaskOutcome | None = None
            while (left := waited_until - time.monotonic()) > 0:
                observed = subscription.next(left)
                if observed is not None:
                    order.add(observed)
                    if outcome is None and isinstance(observed.event, _OUTCOMES):
                        # What led to it is in the log by now, but another partition's may still be on its way here.
                        outcome = observed.event
                        waited_until = time.monotonic() + max(settle, 0.0 if not order.held else _CAUSES_S)
                if outcome is not None and not order.held and not settle:
                    break
            if outcome is not None:
                order.release()
                return Outcome(task.task_id, outcome, tuple(order.events))
        raise WaitTimeoutError(f"task {task.task_id} has no outcome after {timeout:g} s; it goes on (see `watch`)")

    def ask_all(
        self, questions: Sequence[str], *, timeout: float = 120.0, data_subject: DataSubjects = None, **options: Any
    ) -> list[Outcome]:
        """As :meth:`ask` for many questions side by side; the outcomes in the questions' order, without events.

        ``options`` are those of :meth:`task`, but for the task_id.
        """
        tasks = [self.task(question, **options) for question in questions]
        outcomes: dict[str, TaskOutcome] = {}
        waited_until = time.monotonic() + timeout
        keys = [task.task_id.encode() for task in tasks]
        with self.follower().subscribe(topics=["task.outcomes"], keys=keys) as subscription:
            self.submit_all(tasks, data_subject=data_subject)
            while len(outcomes) < len(tasks):
                left = waited_until - time.monotonic()
                observed = subscription.next(left) if left > 0 else None
                if observed is None:
                    open_ = len(tasks) - len(outcomes)
                    raise WaitTimeoutError(f"{open_} of {len(tasks)} tasks have no outcome after {timeout:g} s")
                if isinstance(observed.event, _OUTCOMES):
                    outcomes[observed.key] = observed.event
        return [Outcome(task.task_id, outcomes[task.task_id]) for task in tasks]

    def watch(
        self, task_id: str | None = None, *, topics: Sequence[str] | None = None, timeout: float | None = None
    ) -> Iterator[Observed]:
        """Live events. Of one task: from its submission to its outcome; else everything in ``topics`` from now on.

        Without a task it never ends by itself. ``timeout`` bounds the wait for the next event, in seconds.

        Raises:
            UnknownTaskError: the log holds nothing of the task.
            WaitTimeoutError: nothing came in time.
            ClusterError: the cluster failed, or a topic is missing.
        """
        if task_id is not None:
            yield from self._watch_task(task_id, topics, timeout)
            return
        if topics is None or set(topics) <= set(TASK_TOPICS):
            follower, own = self.follower(), False
        else:
            follower, own = Follower(self.kafka, topics, self.codec).start(), True
        try:
            with follower.subscribe(topics=topics) as subscription:
                while True:
                    observed = subscription.next(threading.TIMEOUT_MAX if timeout is None else timeout)
                    if observed is None:
                        raise WaitTimeoutError(f"nothing came for {timeout:g} s")
                    yield observed
        finally:
            if own:
                follower.close()

    def _watch_task(self, task_id: str, topics: Sequence[str] | None, timeout: float | None) -> Iterator[Observed]:
        key = task_id.encode()
        shown = set(TASK_TOPICS if topics is None else topics)
        records = read_stored(self.kafka, TASK_TOPICS, accept=lambda message: message.key() == key, then=True)
        stored: list[Observed] | None = []
        ended = False
        last = time.monotonic()
        for record in records:
            if record is None and stored is not None:
                if not stored:
                    raise UnknownTaskError(
                        f'the log holds no task {task_id!r}; `magnatronic query "select * from tasks"` lists them'
                    )
                # Within a topic the log keeps the order; between topics only time tells.
                yield from (observed for observed in sorted(stored, key=_when) if observed.topic in shown)
                ended = any(isinstance(observed.event, _OUTCOMES) for observed in stored)
                stored, last = None, time.monotonic()
            elif record is not None:
                observed = observe(record, self.codec)
                last = time.monotonic()
                if stored is not None:
                    stored.append(observed)
                    continue
                ended = ended or isinstance(observed.event, _OUTCOMES)
                if observed.topic in shown:
                    yield observed
            if ended and stored is None:
                return
            if timeout is not None and time.monotonic() - last > timeout:
                raise WaitTimeoutError(f"task {task_id}: nothing came for {timeout:g} s")

    def outcome(self, task_id: str, *, timeout: float = 120.0) -> Outcome:
        """The outcome of a task that was submitted before, waiting for it if need be.

        Raises:
            UnknownTaskError: the log holds nothing of the task.
            WaitTimeoutError: no outcome within ``timeout`` seconds of the last event.
        """
        events = tuple(self.watch(task_id, timeout=timeout))
        event = next(observed.event for observed in reversed(events) if isinstance(observed.event, _OUTCOMES))
        return Outcome(task_id, event, events)

    def follower(self) -> Follower:
        """The consumer behind :meth:`ask`; started at the first call."""
        with self._lock:
            if self._following is None:
                self._following = Follower(self.kafka, TASK_TOPICS, self.codec).start()
            return self._following

    def close(self) -> None:
        """Let go of the cluster. What was sent is already there."""
        with self._lock:
            following, self._following = self._following, None
        if following is not None:
            following.close()
        self._producer.flush(1)

    def __enter__(self) -> Self:
        """The client itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes it."""
        self.close()


class _CausalOrder:
    """Puts a task's events, which come from many partitions, into an order where each follows its cause."""

    def __init__(self, on_event: Callable[[Observed], None] | None) -> None:
        self.events: list[Observed] = []
        self.held: list[Observed] = []
        self._on_event = on_event
        self._known: set[str] = set()

    def add(self, observed: Observed) -> None:
        """Take an event; pass it on with all that waited for it, or hold it until its cause is there."""
        self.held.append(observed)
        moved = True
        while moved:
            moved = False
            for each in list(self.held):
                metadata = each.metadata
                if metadata is None or not metadata.causation_id or metadata.causation_id in self._known:
                    self.held.remove(each)
                    self._pass_on(each)
                    moved = True

    def release(self) -> None:
        """Pass on what is held; its causes did not come."""
        for each in sorted(self.held, key=_when):
            self._pass_on(each)
        self.held.clear()

    def _pass_on(self, observed: Observed) -> None:
        if observed.metadata is not None:
            self._known.add(observed.metadata.id)
        self.events.append(observed)
        if self._on_event is not None:
            self._on_event(observed)


def _when(observed: Observed) -> tuple[datetime, int]:
    return observed.time, observed.offset
