"""ClickHouse is made again though the log has forgotten its beginning: an archive gives that part."""

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Producer, TopicPartition

from magnatronic.rebuild import Stretches, opened_log
from replay.archive import Archiver, Header
from replay.kafka_log import KafkaLog
from schemas.codec import Codec
from schemas.events import TaskSubmitted
from schemas.metadata import Metadata, deterministic_id
from sinks.clickhouse import ClickHouse, ClickHouseProjection, ClickHouseSink
from sinks.errors import HistoryLostError
from sinks.rebuild import Rebuild, RebuildReport
from sinks.runner import SinkRunner

CODEC = Codec()
PARTITIONS = 2


class World:
    """A topic in transactions, some of them aborted, and the ClickHouse that was fed from it."""

    def __init__(self, kafka: Any, clickhouse: ClickHouse, folder: Path) -> None:
        self.kafka = kafka
        self.clickhouse = clickhouse
        self.folder = folder
        self.topic = kafka.topic("tasks", partitions=PARTITIONS)
        self._producer = Producer({**kafka.config, "transactional.id": kafka.unique("tx"), "linger.ms": 1})
        self._producer.init_transactions(30)
        self._sent = 0

    def produce(self, count: int, *, commit: bool = True) -> None:
        self._producer.begin_transaction()
        for _ in range(count):
            self._sent += 1
            task = f"t{self._sent}"
            event = TaskSubmitted(task_id=task, objective=f"find out {self._sent}")
            metadata = Metadata(deterministic_id(task), "/clients/test", task, datetime(2026, 1, 1, tzinfo=UTC))
            encoded = CODEC.encode(event, metadata)
            partition = self._sent % PARTITIONS
            self._producer.produce(self.topic, encoded.value, task.encode(), partition, headers=list(encoded.headers))
        (self._producer.commit_transaction if commit else self._producer.abort_transaction)(30)

    def follow(self) -> None:
        sink = ClickHouseSink(self.clickhouse, [self.topic])
        runner = SinkRunner(sink, codec=CODEC, kafka=self.kafka.config, group=self.kafka.unique("sink"))
        runner.start()
        try:
            assert runner.wait_caught_up(30)
        finally:
            runner.stop()

    def archive(self) -> None:
        header = Header("main", "cluster", (self.topic,))
        with KafkaLog(self.kafka.config) as log, Archiver(self.folder, header, log, CODEC) as archiver:
            archiver.run()

    def forget(self, before: int) -> None:
        """As retention does."""
        wanted = [TopicPartition(self.topic, number, before) for number in range(PARTITIONS)]
        for future in self.kafka.admin.delete_records(wanted).values():
            future.result(20)

    def rebuild(self, archive: Path | None = None, **options: Any) -> RebuildReport:
        projection = ClickHouseProjection(self.clickhouse, [self.topic])
        try:
            with opened_log(self.kafka.config, archive) as log:
                return Rebuild(projection, Stretches(log), CODEC, **options).run()
        finally:
            projection.close()

    def rows(self) -> list[tuple[Any, ...]]:
        return self.clickhouse.read("SELECT * FROM event_log FINAL ORDER BY topic, partition, offset")


@pytest.fixture
def world(kafka: Any, tmp_path: Path) -> Iterator[World]:
    with ClickHouse(tmp_path / "clickhouse", max_rows=100_000) as clickhouse:
        yield World(kafka, clickhouse, tmp_path / "archive")


def test_an_archive_gives_what_the_log_has_forgotten(world: World) -> None:
    for _ in range(4):
        world.produce(50)
        world.produce(20, commit=False)
    world.archive()
    world.produce(50)
    world.follow()
    world.forget(60)
    good = world.rows()
    assert len(good) == 250
    with pytest.raises(HistoryLostError, match=r"begins at offset 60 .* records of it are older.*--from"):
        world.rebuild()
    assert world.rows() == good
    world.clickhouse.command("DELETE FROM event_log WHERE partition = 1 AND offset < 10")
    report = world.rebuild(world.folder, accept=True)
    assert report.switched
    assert report.compared[0].missing == 10
    assert report.carried == 0
    assert world.rows() == good
    assert world.rebuild(world.folder).equal


def test_an_archive_that_ends_too_early_is_not_enough(world: World) -> None:
    world.produce(40)
    world.archive()
    world.produce(100)
    world.follow()
    world.forget(60)
    with pytest.raises(HistoryLostError, match="begins at offset 60"):
        world.rebuild(world.folder)
    report = world.rebuild(carry=True)
    assert report.equal
    assert report.carried > 0
    assert len(world.rows()) == 140
