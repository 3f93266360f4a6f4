"""SIGKILL in the middle of ``magnatronic up`` with tasks open, ``up`` again: every task completes, none twice."""

import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, TopicPartition

from magnatronic.client import Client
from magnatronic.control import call
from magnatronic.ingest import find_files, ingest, load_file
from schemas.events import TaskCompleted
from schemas.record import Record

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.integration.conftest import UpProcess

TASKS = 400
QUESTIONS = ("What is a widget?", "What is a gadget?", "What is a sprocket?", "Who invented widgets?")


def committed_outcomes(client: Client) -> list[tuple[str, str, int]]:
    """Task id, type and append time (ms) of every committed event on task.outcomes, read from the beginning."""
    consumer = Consumer(
        {
            **client.kafka,
            "group.id": "crash-test",
            "isolation.level": "read_committed",
            "enable.auto.commit": False,
            "enable.partition.eof": True,
            "auto.offset.reset": "earliest",
        }
    )
    try:
        partitions = consumer.list_topics("task.outcomes", timeout=10).topics["task.outcomes"].partitions
        waiting = set(partitions)
        consumer.assign([TopicPartition("task.outcomes", number, OFFSET_BEGINNING) for number in partitions])
        found = []
        while waiting:
            message = consumer.poll(10)
            assert message is not None, f"partitions {waiting} never reached their end"
            error = message.error()
            if error is not None:
                assert error.code() == KafkaError._PARTITION_EOF, error
                waiting.discard(message.partition())
                continue
            record = Record.from_message(message)
            event = client.codec.decode(record).event
            found.append((message.key().decode(), type(event).__name__, record.timestamp_ms))
        return found
    finally:
        consumer.close()


def test_sigkill_with_tasks_open_completes_each_task_once(
    up_on: "Callable[[Path], UpProcess]", tmp_path: Path, corpus: Path
) -> None:
    up = up_on(tmp_path / "data")
    up.start()
    with Client.connect(up.data_dir) as client:
        files, _ = find_files([corpus])
        assert ingest(client, map(load_file, files)).indexed == len(files)
        assert call(up.data_dir, "catch_up")
        tasks = [client.task(f"{QUESTIONS[number % len(QUESTIONS)]}") for number in range(TASKS)]
        with client.follower().subscribe(topics=["task.outcomes"]) as outcomes:
            client.submit_all(tasks)
            # In the midst of it: some are done, most are not.
            for _ in range(TASKS // 10):
                assert outcomes.next_record(30) is not None
            up.kill()

    restarted = time.time() * 1000
    up.start()
    with Client.connect(up.data_dir) as client:
        open_ = {task.task_id for task in tasks}
        deadline = time.monotonic() + 60
        while open_ and time.monotonic() < deadline:
            open_ -= {task_id for task_id, _, _ in committed_outcomes(client)}
        assert not open_
        found = committed_outcomes(client)
    # It was a crash with work left, by a system that lost nothing and did nothing twice.
    assert any(appended > restarted for _, _, appended in found)
    assert any(appended < restarted for _, _, appended in found)
    assert Counter(task_id for task_id, _, _ in found) == {task.task_id: 1 for task in tasks}
    assert {kind for _, kind, _ in found} == {TaskCompleted.__name__}
    code, errors = up.stop()
    assert code == 0, errors
