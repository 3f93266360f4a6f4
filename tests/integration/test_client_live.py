"""The Python client against a running system and a real Kafka."""

import asyncio
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from pydantic import ValidationError

from magnatronic.broker.topics import ensure_topics
from magnatronic.client import Client
from magnatronic.errors import ClusterError, NotRunningError, UnknownTaskError, WaitTimeoutError, WrongInputError
from magnatronic.follow import read_stored
from magnatronic.ingest import ingest
from schemas.events import DocumentSubmitted, Priority, TaskCompleted, TaskExpired, TaskFailed
from schemas.record import Record

if TYPE_CHECKING:
    from tests.conftest import KafkaForTests
    from tests.integration.conftest import SystemForTests


@pytest.fixture(scope="module")
def client(system: "SystemForTests") -> Iterator[Client]:
    with Client.connect(system.data_dir) as client:
        client.follower()
        yield client


@pytest.fixture(scope="module")
def silent(kafka: "KafkaForTests") -> Iterator[Client]:
    """A client of a cluster with all topics, where no agent answers."""
    ensure_topics(kafka.config, partitions=2, replication_factor=1)
    with Client(kafka.bootstrap_servers, name="tester") as client:
        yield client


def stored(client: Client, topic: str, key: str) -> list[Record]:
    """The records with ``key`` that lie in the topic."""
    records = read_stored(client.kafka, [topic], accept=lambda message: message.key() == key.encode())
    return [record for record in records if record is not None]


def test_ask_gives_the_outcome_with_all_events(client: Client) -> None:
    outcome = client.ask("What is a widget?", timeout=60)
    assert outcome.ok
    assert outcome.answer.startswith("A widget is a small device that turns heat into light")
    assert [citation.title for citation in outcome.citations] == ["Widgets"]
    assert (outcome.events[0].type, outcome.events[-1].type) == ("TaskSubmitted", "TaskCompleted")
    assert {observed.key for observed in outcome.events} == {outcome.task_id}


def test_threads_share_one_client(client: Client) -> None:
    wanted = {"widget": "heat into light", "gadget": "steps of a dog", "sprocket": "teeth", "gizmo": "rains"}
    with ThreadPoolExecutor(16) as threads:
        asked = [(thing, threads.submit(client.ask, f"What is a {thing}?", timeout=60)) for thing in [*wanted] * 8]
        for thing, outcome in asked:
            assert wanted[thing] in outcome.result().answer


async def test_it_serves_asyncio_through_threads(client: Client) -> None:
    first, second = await asyncio.gather(
        asyncio.to_thread(client.ask, "What is a gadget?", timeout=60),
        asyncio.to_thread(client.ask, "What is a gizmo?", timeout=60),
    )
    assert "dog" in first.answer
    assert "rains" in second.answer


def test_many_questions_at_once(client: Client) -> None:
    outcomes = client.ask_all(["What is a widget?", "What is a gadget?"] * 50, timeout=60, priority=Priority.HIGH)
    assert len(outcomes) == 100
    assert all("light" in outcome.answer for outcome in outcomes[::2])
    assert all("dog" in outcome.answer for outcome in outcomes[1::2])


def test_the_outcome_of_an_earlier_task_can_be_had(client: Client) -> None:
    asked = client.ask("What is a sprocket?", timeout=60)
    again = client.outcome(asked.task_id, timeout=30)
    assert again.event == asked.event
    assert {observed.metadata for observed in again.events} >= {observed.metadata for observed in asked.events}


def test_watching_a_task_shows_it_from_its_submission_to_its_end(client: Client) -> None:
    task_id = client.submit("Compare widgets and gizmos.")
    kinds = [observed.type for observed in client.watch(task_id, timeout=30)]
    assert (kinds[0], kinds[-1]) == ("TaskSubmitted", "TaskCompleted")
    only = [observed.topic for observed in client.watch(task_id, topics=["task.outcomes"], timeout=30)]
    assert only == ["task.outcomes"]


def test_a_deadline_in_the_past_expires(client: Client) -> None:
    outcome = client.ask("What is a widget?", deadline=datetime(2020, 1, 1, tzinfo=UTC), timeout=60)
    assert isinstance(outcome.event, TaskExpired)
    assert not outcome.ok
    assert outcome.reason == "its deadline passed at 2020-01-01 00:00:00 UTC"


def test_a_plan_that_cannot_be_carried_out_fails_the_task_with_the_reason(client: Client) -> None:
    outcome = client.ask("Anything", parameters={"plan": '{"steps": []}'}, timeout=60)
    assert isinstance(outcome.event, TaskFailed)
    assert outcome.reason


def test_what_is_submitted_is_what_lies_in_the_log(silent: Client) -> None:
    task_id = silent.submit("Paint it", priority="high", parameters={"colour": "blue"})
    (record,) = stored(silent, "tasks.high", task_id)
    envelope = silent.codec.decode(record)
    assert envelope.event == silent.task("Paint it", "high", None, task_id, {"colour": "blue"})
    assert (envelope.metadata.source, envelope.metadata.subject) == ("/clients/tester", task_id)
    assert envelope.metadata.correlation_id == task_id
    assert envelope.metadata.traceparent.count("-") == 3
    silent.submit("Paint it", priority="high", parameters={"colour": "blue"}, task_id=task_id)
    first, second = stored(silent, "tasks.high", task_id)
    assert silent.codec.decode(first).metadata.id == silent.codec.decode(second).metadata.id


def test_keys_lie_where_a_java_client_puts_them(silent: Client) -> None:
    # Kafka's own test vectors for murmur2 (UtilsTest.java): 21 -> -973932308, foobar -> -790332482.
    for task_id, hashed in (("21", -973932308), ("foobar", -790332482)):
        silent.submit("x", task_id=task_id)
        (record,) = stored(silent, "tasks.normal", task_id)
        assert record.partition == (hashed & 0x7FFFFFFF) % 2


def test_no_outcome_in_time_is_an_error_that_names_the_task(silent: Client) -> None:
    with pytest.raises(WaitTimeoutError, match=r"task slow has no outcome after 0\.3 s"):
        silent.ask("Anybody?", task_id="slow", timeout=0.3)
    with pytest.raises(WaitTimeoutError, match=r"task slow: nothing came for 0\.3 s"):
        silent.outcome("slow", timeout=0.3)
    with pytest.raises(UnknownTaskError, match="the log holds no task 'never'"):
        silent.outcome("never", timeout=5)


def test_an_answer_that_comes_at_once_is_not_missed(silent: Client) -> None:
    """The subscription stands before the task is submitted; whatever follows is seen."""
    for number in range(20):
        task_id = f"quick-{number}"
        with silent.follower().subscribe(topics=["task.outcomes"], keys=[task_id.encode()]) as subscription:
            silent.publish([TaskCompleted(task_id=task_id, objective="x", answer=str(number))])
            observed = subscription.next(10)
        assert observed is not None
        assert isinstance(observed.event, TaskCompleted)
        assert observed.event.answer == str(number)


def test_bytes_that_are_no_event_are_shown_as_such(silent: Client) -> None:
    from confluent_kafka import Producer

    producer = Producer(silent.kafka)
    with silent.follower().subscribe(topics=["tasks.low"]) as subscription:
        producer.produce("tasks.low", b"nonsense", b"k")
        producer.flush(10)
        observed = subscription.next(10)
    assert observed is not None
    assert (observed.event, observed.type, observed.key) == (None, "?", "k")
    assert "magic byte" in observed.error


def test_an_event_over_the_size_cap_is_refused_before_it_is_sent(silent: Client) -> None:
    huge = DocumentSubmitted(document_id="d", title="t", text="x" * 9_000_000)
    with pytest.raises(WrongInputError, match="over the cap"):
        silent.publish([huge])
    larger_than_the_topic = DocumentSubmitted(document_id="d", title="t", text="x" * 2_000_000)
    with pytest.raises(WrongInputError, match="over the cap of 1048576"):
        silent.publish([larger_than_the_topic])


def test_a_naive_deadline_and_an_empty_objective_are_refused(silent: Client) -> None:
    with pytest.raises(ValidationError):
        silent.submit("x", deadline=datetime(2030, 1, 1))
    with pytest.raises(ValidationError):
        silent.submit("")
    with pytest.raises(ValueError, match="urgent"):
        silent.submit("x", priority="urgent")


def test_documents_that_nobody_indexes_are_not_waited_for_for_ever(silent: Client) -> None:
    document = DocumentSubmitted(document_id="d", title="t", text="text")
    assert ingest(silent, [document], wait=False).submitted == 1
    with pytest.raises(WaitTimeoutError, match="1 of 1 documents are not indexed"):
        ingest(silent, [document], stall_timeout=0.5)


def test_no_cluster_and_no_system_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=r"no Kafka answers at 127\.0\.0\.1:1"):
        Client("127.0.0.1:1")
    with pytest.raises(NotRunningError, match="start it with: magnatronic up"):
        Client.connect(tmp_path)


def test_a_client_is_ready_in_a_moment(client: Client) -> None:
    best = 99.0
    for _ in range(3):
        began = time.monotonic()
        with Client(client.kafka):
            best = min(best, time.monotonic() - began)
    assert best < 0.3
