import asyncio
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient, NewTopic

from magnatronic.broker import EmbeddedBroker
from magnatronic.broker.process import free_ports
from schemas.codec import Codec
from schemas.events import StepCancelRequested
from schemas.metadata import Metadata
from streams.control import CONTROL_TOPIC, CancelledSteps, ControlReader

CODEC = Codec()


class Control:
    """Topic ``control`` of one broker, and what a reader of it was told."""

    def __init__(self, servers: str) -> None:
        self.kafka: dict[str, Any] = {"bootstrap.servers": servers}
        self.told: list[tuple[str, str]] = []
        self._producer = Producer({**self.kafka, "enable.idempotence": True, "log_level": 0})

    def create(self) -> None:
        admin = AdminClient(self.kafka)  # bound: a client that is collected takes its unanswered requests with it
        admin.create_topics([NewTopic(CONTROL_TOPIC, 1, 1)])[CONTROL_TOPIC].result(30)

    def order(self, step_id: str, reason: str = "") -> None:
        event = StepCancelRequested(target=step_id, task_id="t", reason=reason)
        metadata = Metadata(id=str(uuid4()), source="/clients/test", subject=step_id, time=datetime.now(UTC))
        value, headers = CODEC.encode(event, metadata)
        self._producer.produce(CONTROL_TOPIC, value, step_id.encode(), headers=headers)

    def garbage(self) -> None:
        self._producer.produce(CONTROL_TOPIC, b"no event", b"x")

    def flush(self) -> None:
        assert self._producer.flush(30) == 0

    def reader(self) -> ControlReader:
        return ControlReader(self.kafka, CODEC, lambda step_id, reason: self.told.append((step_id, reason)))

    async def hears(self, step_id: str, timeout_s: float = 30) -> None:
        await until(lambda: step_id in dict(self.told), timeout_s)


async def until(done: Callable[[], bool], timeout_s: float = 30) -> None:
    async with asyncio.timeout(timeout_s):
        while not done():  # noqa: ASYNC110 - the reader tells by calling, not by an event
            await asyncio.sleep(0.02)


@pytest.fixture
def control(kafka: Any) -> Iterator[Control]:
    control = Control(kafka.bootstrap_servers)
    if CONTROL_TOPIC not in kafka.admin.list_topics(timeout=20).topics:
        control.create()
    yield control
    control.flush()


async def test_it_tells_what_was_ordered_before_and_what_comes_live(control: Control) -> None:
    first, second = f"t/{uuid4()}", f"t/{uuid4()}"
    control.order(first, "the task is over")
    control.garbage()
    control.flush()
    reader = control.reader()
    reader.start()
    await until(lambda: reader.caught_up)
    assert dict(control.told)[first] == "the task is over"
    control.order(second)
    control.flush()
    await control.hears(second, 5)
    await reader.stop()
    told = len(control.told)
    control.order(f"t/{uuid4()}")
    control.flush()
    await asyncio.sleep(0.3)
    assert len(control.told) == told


async def test_a_loop_that_is_slow_to_listen_gets_all_in_order(control: Control) -> None:
    steps = [f"t/{uuid4()}" for _ in range(3000)]
    for step in steps:
        control.order(step)
    control.flush()
    reader = control.reader()
    reader.start()
    for _ in range(5):
        await asyncio.sleep(0)
        # What stands still is what it says: a loop that does not turn.
        blocked_until = asyncio.get_running_loop().time() + 0.2
        while asyncio.get_running_loop().time() < blocked_until:
            pass
    await control.hears(steps[-1])
    await reader.stop()
    mine = set(steps)
    assert [step for step, _ in control.told if step in mine] == steps


async def test_it_waits_for_the_topic_and_outlives_the_broker(tmp_path: Path) -> None:
    (port,) = free_ports(1)  # the same one after the restart
    with EmbeddedBroker(tmp_path / "kafka", port=port, heap_mb=256) as broker:
        control = Control(broker.bootstrap_servers)
        reader = control.reader()
        reader.start()
        await asyncio.sleep(0.5)
        assert not reader.caught_up
        await asyncio.to_thread(control.create)
        control.order("t/1")
        await asyncio.to_thread(control.flush)
        await control.hears("t/1")

        await asyncio.to_thread(broker.kill)
        await asyncio.sleep(2)
        await asyncio.to_thread(broker.start)
        control.order("t/2", "too late")
        await asyncio.to_thread(control.flush)
        await control.hears("t/2")
        assert dict(control.told) == {"t/1": "", "t/2": "too late"}

        await asyncio.to_thread(broker.kill)
        async with asyncio.timeout(5):
            await reader.stop()


def test_the_latest_cancellations_are_remembered() -> None:
    steps = CancelledSteps(limit=3)
    assert [steps.add(step, f"because {step}") for step in "abab"] == [True, True, False, False]
    assert [steps.add("c", ""), steps.add("d", "")] == [True, True]
    assert list(steps) == ["b", "c", "d"]
    assert "a" not in steps
    assert steps["b"] == "because b"
