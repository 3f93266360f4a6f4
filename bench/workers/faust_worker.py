"""The typed step on faust-streaming: ``@app.agent``, then ``topic.send``, at least once.

In: a :class:`~bench.workers.task.WorkerTask`. Out: one TaskCompleted for each TaskSubmitted. Faust moves raw bytes and
the codec is ours, as on the other systems; the event loop is uvloop, as on ours.
"""

import sys
from datetime import UTC, datetime
from typing import Any

import mode.loop

mode.loop.use("uvloop")

import faust  # noqa: E402

from bench.samples import completion, completion_metadata  # noqa: E402
from bench.workers.task import WorkerTask, end_with_parent  # noqa: E402
from schemas.codec import Codec  # noqa: E402
from schemas.events import TaskCompleted, TaskSubmitted  # noqa: E402
from schemas.record import Record  # noqa: E402

__all__ = ["build"]


def build(task: WorkerTask) -> faust.App:
    """The Faust application."""
    codec = Codec()
    app = faust.App(
        task.group,
        broker=f"kafka://{task.bootstrap_servers}",
        store="memory://",
        datadir=task.folder,
        topic_partitions=task.partitions,
        topic_disable_leader=True,
        topic_allow_declare=False,
        web_enabled=False,
        consumer_auto_offset_reset="earliest",
    )
    source, target = _raw_topic(app, task.source), _raw_topic(app, task.target)

    @app.agent(source)
    async def step(stream: Any) -> None:
        async for event in stream.events():
            message = event.message
            envelope = codec.decode(
                Record(
                    message.topic,
                    message.partition,
                    message.offset,
                    int(message.timestamp * 1000),
                    message.key,
                    message.value,
                    message.headers or (),
                )
            )
            output = await decide(envelope.event)
            encoded = codec.encode(
                output, completion_metadata(envelope.metadata, datetime.fromtimestamp(message.timestamp, UTC), "faust")
            )
            await target.send(key=message.key, value=encoded.value, headers=encoded.headers)

    return app


def _raw_topic(app: faust.App, name: str) -> Any:
    return app.topic(name, key_type=bytes, value_type=bytes, key_serializer="raw", value_serializer="raw")


async def decide(event: object) -> TaskCompleted:
    """The trivial handler, async as an agent's is."""
    assert isinstance(event, TaskSubmitted)
    return completion(event)


if __name__ == "__main__":
    worker_task = WorkerTask.from_arguments()
    end_with_parent()
    sys.argv = [sys.argv[0], "worker", "--without-web", "--loglevel", "warn"]
    build(worker_task).main()
