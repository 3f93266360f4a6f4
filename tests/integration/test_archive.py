"""Archives of a real log: killed at any moment, changed by somebody, overtaken by retention."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson
import pyarrow.parquet as pq
import pytest
from confluent_kafka import Producer, TopicPartition

from replay.archive import Archived, ArchiveLog, Archiver, Header, Manifest, verify
from replay.archive.rows import RecordsHash, records_of
from replay.archive.segment import file_hash
from replay.errors import (
    ArchiveBusyError,
    ArchiveDamagedError,
    ArchiveError,
    ArchiveGapError,
    LogTruncatedError,
)
from replay.finished import Finished
from replay.kafka_log import KafkaLog
from replay.selection import Selection
from schemas.codec import Codec
from schemas.events import StepFailed
from schemas.metadata import Metadata
from tests.support.archiving_worker import LIMITS, archive

if TYPE_CHECKING:
    from tests.conftest import KafkaForTests

CODEC = Codec()
ROOT = Path(__file__).parents[2]


def write(kafka: "KafkaForTests", topic: str, count: int, *, partitions: int = 3) -> None:
    """Events, in transactions of which each third one is aborted."""
    from datetime import UTC, datetime

    producer = Producer({**kafka.config, "transactional.id": kafka.unique("archive"), "linger.ms": 5})
    producer.init_transactions(30)
    written = number = 0
    while written < count:
        producer.begin_transaction()
        for _ in range(min(count - written, 1500)):
            task = f"t{written % 7}"
            event = StepFailed(task_id=task, step_id=f"{task}/1", attempt=1, error_type="E", message=f"{written}")
            about = Metadata(f"{number}.{written}", "/agents/one@1", task, datetime(2026, 1, 1, tzinfo=UTC))
            encoded = CODEC.encode(event, about)
            producer.produce(topic, encoded.value, task, written % partitions, headers=encoded.headers)
            written += 1
        number += 1
        producer.flush(30)
        if number % 3:
            producer.commit_transaction(30)
        else:
            producer.abort_transaction(30)


def run(kafka: "KafkaForTests", folder: Path, topics: tuple[str, ...], **options: Any) -> Archived:
    with (
        KafkaLog(kafka.config) as log,
        Archiver(folder, Header("main", "cluster", topics), log, CODEC, limits=LIMITS, **options) as archiver,
    ):
        return archiver.run()


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "archive.lock"}


class Killed:
    """Runs that are killed, one after another, each at a random moment."""

    def __init__(self, kafka: "KafkaForTests", folder: Path, topics: tuple[str, ...], chance: random.Random) -> None:
        self._command = [sys.executable, "-m", "tests.support.archiving_worker", kafka.bootstrap_servers]
        self._command += [str(folder), *topics]
        self._manifest = folder / "manifest.jsonl"
        self._chance = chance

    def run(self) -> bool:
        """Whether it was killed before it was through: somewhere in the beginning, or in a segment after the first."""
        before, segments = self._lines(), self._chance.choice((0, 1, 1, 2))
        process = subprocess.Popen(self._command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        while process.poll() is None and self._lines() - before < segments:
            time.sleep(0.002)
        try:
            process.wait(self._chance.uniform(0, 0.15 if segments else 1.0))
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
        said, _ = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL)
        return "done" not in said

    def _lines(self) -> int:
        return self._manifest.read_bytes().count(b"\n") if self._manifest.exists() else 0


def test_killed_at_any_moment_it_makes_the_same_files(kafka: "KafkaForTests", tmp_path: Path) -> None:
    topics = kafka.topic("archive.a", 3), kafka.topic("archive.b", 3)
    for topic, count in zip(topics, (36_000, 6_000), strict=True):
        write(kafka, topic, count)
    archive(kafka.bootstrap_servers, tmp_path / "whole", topics)
    seed = random.randrange(1 << 32)
    killed, kills, ended = Killed(kafka, tmp_path / "killed", topics, random.Random(seed)), 0, False
    while not ended:
        assert kills < 60, f"it does not get on (seed {seed})"
        ended = not killed.run()
        kills += not ended
    assert kills >= 3, f"it was too quick to be killed (seed {seed})"
    assert files(tmp_path / "killed") == files(tmp_path / "whole"), f"seed {seed}, {kills} kills"
    assert len(files(tmp_path / "whole")) > 10
    with KafkaLog(kafka.config) as log:
        seen = verify(tmp_path / "killed", log=log)
    assert (seen.problems, seen.compared, seen.gone) == ((), seen.records, 0)


def test_killed_while_the_log_grows_it_has_every_record_once(kafka: "KafkaForTests", tmp_path: Path) -> None:
    topics = (kafka.topic("archive.grows", 3),)
    seed = random.randrange(1 << 32)
    killed = Killed(kafka, tmp_path / "killed", topics, random.Random(seed))
    for _ in range(5):
        write(kafka, topics[0], 6_000)
        killed.run()
    archive(kafka.bootstrap_servers, tmp_path / "killed", topics)
    with KafkaLog(kafka.config) as log, ArchiveLog(tmp_path / "killed") as archived:
        seen = verify(tmp_path / "killed", log=log)
        assert (seen.problems, seen.compared) == ((), seen.records), f"seed {seed}"
        assert archived.spans() == log.spans(topics)
        selection = Selection(topics=frozenset(topics))
        assert [_places(each, selection) for each in (archived, log)] == [_places(log, selection)] * 2


def _places(log: Any, selection: Selection) -> list[tuple[str, int, int]]:
    return sorted((each.topic, each.partition, each.offset) for batch in log.read(selection) for each in batch.records)


@pytest.fixture(scope="module")
def topic(kafka: "KafkaForTests") -> str:
    made = kafka.topic("archive.small", 3)
    write(kafka, made, 12_000)
    return made


@pytest.fixture(scope="module")
def whole(kafka: "KafkaForTests", topic: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "archive"
    done = run(kafka, folder, (topic,))
    assert done.total_segments == done.segments > 2
    return folder


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


class TestWhatIsWritten:
    def test_rows_say_what_the_events_are(self, whole: Path) -> None:
        table = pq.read_table(whole / "000000.parquet")
        assert table.num_rows == LIMITS.segment_records
        row = table.slice(0, 1).to_pylist()[0]
        assert row["event_type"] == "magnatronic.tasks.StepFailed"
        assert (row["source"], row["subject"], row["error"]) == ("/agents/one@1", "t0", None)
        assert orjson.loads(row["payload"])["message"] == "0"
        assert ("ce_type", b"magnatronic.tasks.StepFailed") in [
            (each["name"], each["value"]) for each in row["headers"]
        ]

    def test_nothing_new_adds_nothing(self, kafka: "KafkaForTests", topic: str, copy: Path) -> None:
        before = files(copy)
        assert run(kafka, copy, (topic,)).segments == 0
        assert files(copy) == before

    def test_what_agents_finished_is_kept(self, kafka: "KafkaForTests", topic: str, copy: Path) -> None:
        finished = Finished.committed({(topic, 0): ([5, 6, 9], 12)})
        done = run(kafka, copy, (topic,), finished=lambda: {"one": finished})
        assert (done.segments, done.records) == (1, 0)
        with ArchiveLog(copy) as log:
            handled = log.handled()["one"]
            assert [offset for offset in range(15) if handled.finished(topic, 0, offset)] == [
                0,
                1,
                2,
                3,
                4,
                7,
                8,
                10,
                11,
            ]
            assert not handled.finished(topic, 1, 0)
        assert verify(copy).ok

    def test_one_process_at_a_time(self, kafka: "KafkaForTests", topic: str, copy: Path) -> None:
        with (
            KafkaLog(kafka.config) as log,
            Archiver(copy, Header("main", "cluster", (topic,)), log, CODEC),
            pytest.raises(ArchiveBusyError, match="another process"),
        ):
            run(kafka, copy, (topic,))

    def test_another_clusters_name_or_topics_are_refused(self, kafka: "KafkaForTests", topic: str, copy: Path) -> None:
        with KafkaLog(kafka.config) as log:
            for header in (
                Header("main", "other", (topic,)),
                Header("x", "cluster", (topic,)),
                Header("main", "cluster"),
            ):
                with pytest.raises(ArchiveError, match="is that of"):
                    Archiver(copy, header, log, CODEC)
            (copy.parent / "photos").mkdir()
            (copy.parent / "photos" / "cat.jpeg").touch()
            with pytest.raises(ArchiveError, match=r"holds cat\.jpeg"):
                Archiver(copy.parent / "photos", header, log, CODEC)

    def test_a_topic_made_anew_is_refused(self, kafka: "KafkaForTests", tmp_path: Path) -> None:
        made = kafka.topic("archive.anew")
        write(kafka, made, 10, partitions=1)
        run(kafka, tmp_path, (made,))
        kafka.admin.delete_topics([made])[made].result(30)
        kafka.create_topics(made)
        with pytest.raises(ArchiveError, match="was the topic made anew"):
            run(kafka, tmp_path, (made,))


def rewrite(folder: Path, change: Callable[[list[dict[str, Any]]], object]) -> None:
    """Change lines of the manifest as they are."""
    path = folder / "manifest.jsonl"
    lines = [orjson.loads(line) for line in path.read_bytes().splitlines()]
    change(lines)
    path.write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in lines))


def forge(folder: Path) -> None:
    """What somebody does who knows the format: takes the last record of a file out, and makes file and chain anew."""
    old = Manifest.load(folder)
    path = folder / old.segments[1].file
    table = pq.read_table(path)
    pq.write_table(table.slice(0, table.num_rows - 1), path)
    aside = folder / "aside"
    aside.mkdir()
    manifest = Manifest.create(aside, old.header)
    for segment in old.segments:
        if segment.number != 1:
            manifest.append(segment)
            continue
        *stretches, last = (each for each in segment.stretches if each.records)
        rows = table.slice(table.num_rows - last.records, last.records - 1).combine_chunks().to_batches()
        found = RecordsHash()
        for batch in rows:
            found.add(records_of(last.place, batch))
        changed = replace(last, records=last.records - 1, sha256=found.hexdigest)
        manifest.append(
            replace(
                segment,
                bytes=path.stat().st_size,
                sha256=file_hash(path),
                records=segment.records - 1,
                stretches=(*stretches, changed),
            )
        )
    shutil.move(aside / "manifest.jsonl", folder / "manifest.jsonl")
    aside.rmdir()


class TestVerify:
    def test_a_whole_one(self, kafka: "KafkaForTests", whole: Path) -> None:
        head = Manifest.load(whole).head
        seen = verify(whole, heads=[head])
        assert (seen.ok, seen.head, seen.heads, seen.compared) == (True, head, 1, None)

    def test_a_changed_byte_of_a_file(self, copy: Path) -> None:
        path = copy / "000001.parquet"
        raw = bytearray(path.read_bytes())
        raw[len(raw) // 2] ^= 1
        path.write_bytes(raw)
        assert [problem for problem in verify(copy).problems if "000001.parquet was changed" in problem]

    def test_a_missing_file(self, copy: Path) -> None:
        (copy / "000001.parquet").unlink()
        assert "000001.parquet" in verify(copy).problems[0]
        with pytest.raises(ArchiveDamagedError, match=r"000001\.parquet is missing"):
            ArchiveLog(copy)

    @pytest.mark.parametrize(
        "change",
        [
            lambda lines: lines[2].update(records=7),
            lambda lines: lines[2]["stretches"][0].update(sha256="0" * 64),
            lambda lines: lines.pop(2),
            lambda lines: lines.insert(2, lines[3]),
            lambda lines: lines[2].update(previous=lines[1]["previous"]),
            lambda lines: lines[0].update(name="other"),
        ],
    )
    def test_a_changed_line(self, copy: Path, change: Callable[[list[dict[str, Any]]], object]) -> None:
        rewrite(copy, change)
        assert not verify(copy).ok
        with pytest.raises(ArchiveDamagedError, match="line "):
            ArchiveLog(copy)

    def test_the_last_lines_cut_off_are_missed_in_topic_audit(self, copy: Path) -> None:
        head = Manifest.load(copy).head
        rewrite(copy, lambda lines: lines.pop())
        assert verify(copy).ok
        seen = verify(copy, heads=[head])
        assert seen.heads == 0
        assert f"the head {head}" in seen.problems[0]

    def test_a_forged_one_is_seen_in_topic_audit_and_in_the_log(
        self, kafka: "KafkaForTests", topic: str, copy: Path
    ) -> None:
        head = Manifest.load(copy).head
        forge(copy)
        assert verify(copy).ok  # all of it fits together
        assert f"the head {head}" in verify(copy, heads=[head]).problems[0]
        with KafkaLog(kafka.config) as log:
            problems = verify(copy, log=log).problems
        assert ["the log has other records" in problem for problem in problems] == [True]

    def test_records_that_do_not_make_their_hash(self, copy: Path) -> None:
        """A file and its hash were made anew, and the hash over the records was not."""
        path = copy / "000001.parquet"
        table = pq.read_table(path)
        keys = table.column("key").to_pylist()
        pq.write_table(table.set_column(4, "key", [[b"other", *keys[1:]]]), path)
        manifest, forged = Manifest.load(copy), copy / "forged"
        forged.mkdir()
        made = Manifest.create(forged, manifest.header)
        for segment in manifest.segments:
            new: dict[str, Any] = (
                {"bytes": path.stat().st_size, "sha256": file_hash(path)} if segment.number == 1 else {}
            )
            made.append(replace(segment, **new))
        shutil.move(forged / "manifest.jsonl", copy / "manifest.jsonl")
        (problem,) = verify(copy).problems
        assert "the records' hash is another one" in problem

    def test_a_line_cut_short_by_a_crash_is_taken_back(self, kafka: "KafkaForTests", topic: str, copy: Path) -> None:
        before = files(copy)
        with (copy / "manifest.jsonl").open("ab") as file:
            file.write(orjson.dumps(asdict(Manifest.load(copy).segments[0]))[:100])
        with ArchiveLog(copy) as log:
            assert len(log.manifest.segments) == before["manifest.jsonl"].count(b"\n") - 1
        run(kafka, copy, (topic,))
        assert files(copy) == before


class TestRetention:
    def test_what_it_deleted_first_is_an_error_until_it_is_noted(self, kafka: "KafkaForTests", tmp_path: Path) -> None:
        topic = kafka.topic("archive.short")

        def delete(before: int) -> None:
            place = TopicPartition(topic, 0, before)
            kafka.admin.delete_records([place])[place].result(30)

        write(kafka, topic, 10, partitions=1)
        run(kafka, tmp_path, (topic,))
        write(kafka, topic, 10, partitions=1)
        delete(11)
        assert run(kafka, tmp_path, (topic,)).gaps == ()  # what is archived may be deleted
        write(kafka, topic, 20, partitions=1)
        delete(30)
        with pytest.raises(ArchiveGapError, match=rf"{topic}/0 22 to 30; `--allow-gaps`"):
            run(kafka, tmp_path, (topic,))
        done = run(kafka, tmp_path, (topic,), allow_gaps=True)
        assert [(gap.start, gap.end) for gap in done.gaps] == [(22, 30)]
        with KafkaLog(kafka.config) as kept:
            seen = verify(tmp_path, log=kept)
        assert (seen.problems, seen.gaps, seen.compared, seen.gone) == ((), 1, 12, 20)
        with ArchiveLog(tmp_path) as log:
            assert log.spans() == {(topic, 0): (0, 43)}
            selection = Selection(topics=frozenset({topic}))
            offsets = [offset for _, _, offset in _places(log, selection)]
            assert offsets == [*range(10), *range(11, 21), *range(30, 42)]
            with pytest.raises(LogTruncatedError, match="lacks offsets 22 to 30"):
                list(log.read(Selection(spans={(topic, 0): (20, 31)})))
            assert [place[2] for place in _places(log, Selection(spans={(topic, 0): (30, 33)}))] == [30, 31, 32]

    def test_what_is_deleted_while_it_is_read_is_no_silent_gap(self, kafka: "KafkaForTests") -> None:
        topic = kafka.topic("archive.deleted", config={"segment.bytes": "1048576"})
        producer = Producer(kafka.config)
        for _ in range(4000):
            producer.produce(topic, os.urandom(1000))
            producer.poll(0)
        assert producer.flush(30) == 0
        small = {"queued.max.messages.kbytes": 100, "fetch.message.max.bytes": 50_000}
        with KafkaLog({**kafka.config, **small}) as log:
            reading = log.read(Selection(topics=frozenset({topic})))
            assert next(reading).records
            place = TopicPartition(topic, 0, 3990)
            kafka.admin.delete_records([place])[place].result(30)
            with pytest.raises(LogTruncatedError, match=r"no longer holds offset \d+.*--from FOLDER"):
                list(reading)
