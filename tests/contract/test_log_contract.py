"""What holds for every log that history is read from, whether it is Kafka or an archive of it."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from confluent_kafka import Consumer, Producer, TopicPartition

from replay.archive import ArchiveLog, Archiver, Header, Limits
from replay.errors import LogReadError, LogTruncatedError
from replay.kafka_log import KafkaLog
from replay.log import Batch, Log
from replay.selection import Place, Selection
from schemas.codec import Codec
from schemas.events import Event, StepFailed, TaskCancelRequested
from schemas.metadata import Metadata
from schemas.record import Record

if TYPE_CHECKING:
    from tests.conftest import KafkaForTests

CODEC = Codec()
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
ROUNDS = 3
HOURS = (5, 1, 9, 2, 30, 0)


@dataclass
class History:
    """Topics with known records: ``kept`` are all that were committed, as a plain consumer reads them."""

    failures: str
    outcomes: str
    empty: str
    dated: str
    kept: list[Record] = field(default_factory=list)

    @property
    def topics(self) -> frozenset[str]:
        return frozenset({self.failures, self.outcomes, self.empty, self.dated})

    def of(self, wanted: Callable[[Record], bool]) -> list[Record]:
        return in_order([record for record in self.kept if wanted(record)])


def in_order(records: list[Record]) -> list[Record]:
    return sorted(records, key=lambda record: (record.topic, record.partition, record.offset))


def write(producer: Producer, topic: str, partition: int, event: Event, about: Metadata) -> None:
    encoded = CODEC.encode(event, about)
    producer.produce(topic, encoded.value, about.subject.encode(), partition, headers=encoded.headers)


def failed(task: str) -> StepFailed:
    return StepFailed(task_id=task, step_id=f"{task}/1", attempt=1, error_type="E", message="m" * 50)


def ended(task: str) -> TaskCancelRequested:
    return TaskCancelRequested(task_id=task, reason="r", requested_by="somebody")


@pytest.fixture(scope="module")
def history(kafka: "KafkaForTests") -> Iterator[History]:
    """Committed transactions, aborted ones between them, at the end one that is still open; records of stock producers,
    tombstones, and a topic whose producer dates its records as it likes.
    """
    by_broker = {"message.timestamp.type": "LogAppendTime"}
    failures, outcomes, empty = (kafka.topic(f"log.{name}", 3, by_broker) for name in ("failures", "outcomes", "empty"))
    by_producer = {"message.timestamp.type": "CreateTime"}
    made = History(failures, outcomes, empty, kafka.topic("log.dated", 1, by_producer))
    writer, other = (Producer({**kafka.config, "transactional.id": kafka.unique("log")}) for _ in range(2))
    for each in (writer, other):
        each.init_transactions(30)
    for number in range(2 * ROUNDS):
        writer.begin_transaction()
        for index in range(40):
            task, agent = f"t{index % 5}", "/agents/one@2" if index % 2 else "/agents/onerous@1"
            about = Metadata(f"{number}.{index}", agent, task, EPOCH, correlation_id=f"c{index % 3}")
            write(writer, made.failures, index % 2, failed(task), about)
            write(writer, made.outcomes, index % 2, ended(task), about)
        writer.flush(30)
        (writer.abort_transaction if number % 2 else writer.commit_transaction)(30)
        time.sleep(0.02)
    plain = Producer(kafka.config)
    plain.produce(made.outcomes, b"no event", b"t1", 0, headers=[("odd", None), ("odd", b"\xff"), ("odd", b"")])
    plain.produce(made.outcomes, None, None, 0)
    plain.produce(made.outcomes, b"", b"c1", 0)
    for hour in HOURS:
        plain.produce(made.dated, b"%d" % hour, b"t1", timestamp=at(hour))
    assert plain.flush(30) == 0
    made.kept = consumed(kafka, made.topics)
    other.begin_transaction()
    write(other, made.failures, 0, failed("t0"), Metadata("open", "/agents/one@1", "t0", EPOCH))
    assert other.flush(30) == 0
    yield made
    other.abort_transaction(30)


def at(hour: int) -> int:
    """Milliseconds of an hour of the second of January 2020, and of the days after it."""
    return round(datetime(2020, 1, 2 + hour // 24, hour % 24, tzinfo=UTC).timestamp() * 1000)


def consumed(kafka: "KafkaForTests", topics: frozenset[str]) -> list[Record]:
    settings = {"group.id": kafka.unique("log"), "auto.offset.reset": "earliest", "isolation.level": "read_committed"}
    consumer = Consumer({**kafka.config, **settings, "enable.partition.eof": True})
    places = [TopicPartition(topic, number) for topic in topics for number in range(3 if "dated" not in topic else 1)]
    consumer.assign([TopicPartition(place.topic, place.partition, 0) for place in places])
    found, ended_ = [], 0
    while ended_ < len(places):
        message = consumer.poll(20)
        assert message is not None
        if message.error() is None:
            found.append(Record.from_message(message))
        else:
            ended_ += 1
    consumer.close()
    return found


@pytest.fixture(scope="module")
def archive(kafka: "KafkaForTests", history: History, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small segments and row groups, so that reads begin and end within them."""
    folder = tmp_path_factory.mktemp("archive")
    header = Header("main", "cluster", tuple(sorted(history.topics)))
    limits = Limits(segment_records=50, group_records=16)
    with KafkaLog(kafka.config) as log, Archiver(folder, header, log, CODEC, limits=limits) as archiver:
        archiver.run()
    return folder


@pytest.fixture(params=["kafka", "archive"])
def log(request: pytest.FixtureRequest, kafka: "KafkaForTests") -> Iterator[Log]:
    if request.param == "kafka":
        with KafkaLog(kafka.config) as made:
            yield made
    else:
        with ArchiveLog(request.getfixturevalue("archive")) as made_:
            yield made_


def read(log: Log, selection: Selection, start: dict[Place, int] | None = None) -> list[Record]:
    """All records, in order; checks what every read keeps to."""
    last: dict[Place, int] = {}
    records: list[Record] = []
    batch = None
    for batch in log.read(selection, start=start):
        for record in batch.records:
            place = record.topic, record.partition
            assert record.offset > last.get(place, -1)
            last[place] = record.offset
            assert batch.positions[place] > record.offset
            assert selection.takes(record)
        records += batch.records
    assert batch is not None
    return in_order(records)


def same(found: list[Record], expected: list[Record]) -> None:
    """Not equal lists alone: headers come as lists or tuples."""
    assert [plain(record) for record in found] == [plain(record) for record in expected]


def plain(record: Record) -> tuple[object, ...]:
    place = record.topic, record.partition, record.offset, record.timestamp_ms
    return *place, record.key, record.value, list(record.headers)


class TestWhole:
    def test_gives_every_committed_record_and_no_other(self, log: Log, history: History) -> None:
        same(read(log, Selection(topics=history.topics)), history.of(lambda _: True))
        assert len(history.kept) == 2 * 40 * ROUNDS + 9

    def test_spans_reach_to_the_last_stable_offset_and_tell_empty_partitions(self, log: Log, history: History) -> None:
        spans = log.spans(history.topics)
        assert set(spans) == {(topic, number) for topic in history.topics - {history.dated} for number in range(3)} | {
            (history.dated, 0)
        }
        assert spans[history.empty, 1] == (0, 0)
        assert spans[history.dated, 0] == (0, 6)
        # Each transaction leaves a control record; the one that is open is not in.
        assert spans[history.failures, 0] == (0, 2 * ROUNDS * 21)
        assert spans[history.failures, 2] == (0, 0)

    def test_tells_how_far_it_is(self, log: Log, history: History) -> None:
        told: list[tuple[int, int]] = []
        for _ in log.read(Selection(topics=history.topics), on_progress=lambda done, all_: told.append((done, all_))):
            pass
        whole = sum(end - first for first, end in log.spans(history.topics).values())
        assert told == sorted(told)
        assert told[-1] == (whole, whole)

    def test_a_topic_that_it_lacks_is_an_error(self, log: Log) -> None:
        with pytest.raises(LogReadError, match=r"no\.such"):
            log.spans(["no.such"])
        with pytest.raises(LogReadError, match=r"no\.such"):
            read(log, Selection(topics=frozenset({"no.such"})))


class TestSelection:
    @pytest.mark.parametrize("numbers", [{0}, {0, 1}])
    def test_offsets(self, log: Log, history: History, numbers: set[int]) -> None:
        spans = {(history.failures, number): (7 + number, 90) for number in numbers}
        expected = history.of(
            lambda record: (
                record.topic == history.failures
                and record.partition in numbers
                and 7 + record.partition <= record.offset < 90
            )
        )
        assert expected
        same(read(log, Selection(spans=spans)), expected)
        # A stretch of nothing but what a transaction leaves, and one that ends in it.
        assert read(log, Selection(spans={(history.failures, 0): (20, 21)})) == []
        same(
            read(log, Selection(spans={(history.failures, 0): (19, 42)})),
            history.of(lambda record: (record.topic, record.partition, record.offset) == (history.failures, 0, 19)),
        )

    def test_offsets_and_topics_narrow_each_other(self, log: Log, history: History) -> None:
        spans = {(history.failures, 0): (0, 9), (history.outcomes, 0): (0, 9)}
        found = read(log, Selection(topics=frozenset({history.outcomes}), spans=spans))
        same(found, history.of(lambda record: (record.topic, record.partition) == (history.outcomes, 0))[:9])

    def test_time(self, log: Log, history: History) -> None:
        times = sorted({record.timestamp_ms for record in history.of(lambda record: record.topic == history.failures)})
        since, until = times[0] + 1, times[-1]
        selection = Selection(topics=frozenset({history.failures}), since=moment(since), until=moment(until))
        expected = history.of(lambda record: record.topic == history.failures and since <= record.timestamp_ms < until)
        assert 0 < len(expected) < 40 * ROUNDS
        same(read(log, selection), expected)

    @pytest.mark.parametrize(("since", "until"), [(1, 6), (2, 9), (0, 1), (10, 29), (31, 40), (None, 2), (9, None)])
    def test_time_where_it_steps_back(self, log: Log, history: History, since: int | None, until: int | None) -> None:
        first, end = at(since or 0), at(until if until is not None else 99)
        selection = Selection(
            topics=frozenset({history.dated}),
            since=None if since is None else moment(first),
            until=None if until is None else moment(end),
        )
        expected = history.of(lambda record: record.topic == history.dated and first <= record.timestamp_ms < end)
        assert len(expected) == sum((since or 0) <= hour < (99 if until is None else until) for hour in HOURS)
        same(read(log, selection), expected)

    def test_all_times_there_are(self, log: Log, history: History) -> None:
        since, until = datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)
        for selection in (Selection(topics=history.topics, since=since), Selection(topics=history.topics, until=until)):
            same(read(log, selection), history.of(lambda _: True))
        assert read(log, Selection(topics=history.topics, since=until)) == []
        assert read(log, Selection(topics=history.topics, until=since)) == []

    def test_task(self, log: Log, history: History) -> None:
        expected = history.of(lambda record: record.key in (b"t1", b"t3"))
        same(read(log, Selection(topics=history.topics, tasks=frozenset({"t1", "t3"}))), expected)

    def test_agent_of_any_version_by_its_whole_name(self, log: Log, history: History) -> None:
        found = read(log, Selection(topics=history.topics, agents=frozenset({"one"})))
        same(found, history.of(lambda record: ("ce_source", b"/agents/one@2") in record.headers))
        assert len(found) == 2 * ROUNDS * 20

    @pytest.mark.parametrize("name", ["TaskCancelRequested", TaskCancelRequested.full_name])
    def test_event_type(self, log: Log, history: History, name: str) -> None:
        expected = history.of(lambda record: ("ce_type", TaskCancelRequested.full_name.encode()) in record.headers)
        same(read(log, Selection(topics=history.topics, event_types=frozenset({name}))), expected)

    def test_correlation_id_which_is_the_key_where_a_producer_gives_none(self, log: Log, history: History) -> None:
        expected = history.of(
            lambda record: ("ce_correlationid", b"c1") in record.headers or (record.key == b"c1" and not record.headers)
        )
        found = read(log, Selection(topics=history.topics, correlation_ids=frozenset({"c1"})))
        same(found, expected)
        assert any(not record.headers for record in found)

    def test_all_at_once(self, log: Log, history: History) -> None:
        selection = Selection(
            topics=history.topics,
            since=moment(min(record.timestamp_ms for record in history.kept)),
            tasks=frozenset({"t1", "t2"}),
            agents=frozenset({"one", "onerous"}),
            event_types=frozenset({"StepFailed"}),
            correlation_ids=frozenset({"c2"}),
        )
        expected = history.of(selection.takes)
        assert expected
        same(read(log, selection), expected)

    def test_nothing(self, log: Log, history: History) -> None:
        assert read(log, Selection(topics=history.topics, tasks=frozenset({"nobody"}))) == []
        assert read(log, Selection(topics=frozenset({history.empty}))) == []


class TestResume:
    @pytest.mark.parametrize("tasks", [frozenset[str](), frozenset({"t1"})])
    def test_goes_on_where_any_batch_ended(self, log: Log, history: History, tasks: frozenset[str]) -> None:
        selection = Selection(topics=history.topics, tasks=tasks)
        whole = read(log, selection)
        seen: list[Record] = []
        for batch in list(log.read(selection)):
            seen += batch.records
            same(in_order(seen + read(log, selection, dict(batch.positions))), whole)

    def test_after_the_end_there_is_nothing(self, log: Log, history: History) -> None:
        selection = Selection(topics=history.topics)
        *_, last = log.read(selection)
        assert dict(last.positions) == {place: end for place, (_, end) in log.spans(history.topics).items()}
        again: list[Batch] = list(log.read(selection, start=last.positions))
        assert [list(batch.records) for batch in again] == [[]]
        assert dict(again[-1].positions) == dict(last.positions)

    def test_a_position_past_the_end_is_an_error(self, log: Log, history: History) -> None:
        with pytest.raises(LogReadError, match=r"ends at offset 6, and 7 is asked for"):
            read(log, Selection(topics=frozenset({history.dated})), {(history.dated, 0): 7})
        with pytest.raises(LogReadError, match="no partition"):
            read(log, Selection(spans={(history.dated, 4): (0, 7)}))


def moment(ms: int) -> datetime:
    return EPOCH + timedelta(milliseconds=ms)


class TestRetention:
    def test_what_is_deleted_is_an_error_that_says_so(self, kafka: "KafkaForTests", tmp_path: Path) -> None:
        topic = kafka.topic("log.short")
        producer = Producer(kafka.config)
        for number in range(10):
            producer.produce(topic, b"%d" % number)
        assert producer.flush(30) == 0
        with KafkaLog(kafka.config) as log:
            kafka.admin.delete_records([TopicPartition(topic, 0, 4)])[TopicPartition(topic, 0)].result(30)
            header = Header("short", "cluster", (topic,))
            with Archiver(tmp_path, header, log, CODEC) as archiver:
                archiver.run()
            for each in (log, ArchiveLog(tmp_path)):
                assert each.spans([topic]) == {(topic, 0): (4, 10)}
                assert len(read(each, Selection(topics=frozenset({topic})))) == 6
                assert len(read(each, Selection(spans={(topic, 0): (4, 10)}))) == 6
                with pytest.raises(LogTruncatedError, match=r"begins at offset 4, and 3 is asked for"):
                    read(each, Selection(spans={(topic, 0): (3, 10)}))
                with pytest.raises(LogTruncatedError, match=r"begins at offset 4, and 2 is asked for"):
                    read(each, Selection(topics=frozenset({topic})), {(topic, 0): 2})
