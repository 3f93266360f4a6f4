"""The typed step on quixstreams, exactly once, with a synchronous handler (it has no async ones).

In: a :class:`~bench.workers.task.WorkerTask`. Out: one TaskCompleted for each TaskSubmitted. It gets every advantage
that a setting can give: commits every 250 ms (its default, 5 s, would be a coarser guarantee) and
``retry.backoff.ms=1``, without which each of its transactions takes 100 ms longer, and linger and compression as ours.
"""

from datetime import UTC, datetime
from typing import Any

from quixstreams import Application

from bench.samples import completion, completion_metadata
from bench.workers.task import WorkerTask, end_with_parent
from schemas.codec import Codec
from schemas.events import TaskSubmitted
from schemas.record import Record

__all__ = ["COMMIT_INTERVAL_S", "build"]

COMMIT_INTERVAL_S = 0.25


def build(task: WorkerTask) -> Application:
    """The quixstreams application, with its dataframe registered."""
    codec = Codec()
    app = Application(
        broker_address=task.bootstrap_servers,
        consumer_group=task.group,
        auto_offset_reset="earliest",
        commit_interval=COMMIT_INTERVAL_S,
        processing_guarantee="exactly-once",
        producer_extra_config={"retry.backoff.ms": 1, "linger.ms": 5, "compression.type": "lz4"},
        consumer_extra_config={"isolation.level": "read_committed"},
        auto_create_topics=False,
        use_changelog_topics=False,
        state_dir=task.folder,
        loglevel="WARNING",
    )
    source = app.topic(task.source, value_deserializer="bytes", key_deserializer="bytes")
    target = app.topic(task.target, value_serializer="bytes", key_serializer="bytes")
    headers: list[tuple[str, bytes]] = []

    def step(value: Any, key: Any, timestamp: int, given: Any) -> bytes:
        nonlocal headers
        envelope = codec.decode(Record(task.source, 0, 0, timestamp, key, value, given))
        assert isinstance(envelope.event, TaskSubmitted)
        now = datetime.fromtimestamp(timestamp / 1000, UTC)
        encoded = codec.encode(completion(envelope.event), completion_metadata(envelope.metadata, now, "quixstreams"))
        headers = encoded.headers
        return encoded.value

    frame = app.dataframe(source)
    frame = frame.apply(step, metadata=True)
    # One event passes through the whole frame before the next, so what `step` left is this event's.
    frame = frame.set_headers(lambda *_: headers)
    frame.to_topic(target)
    return app


if __name__ == "__main__":
    worker_task = WorkerTask.from_arguments()
    end_with_parent()
    build(worker_task).run()
