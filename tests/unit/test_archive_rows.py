"""Records as rows: byte for byte the same again, whatever is in them; and the hash over them."""

from datetime import UTC, datetime
from pathlib import Path

import orjson
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from replay.archive import Gap, Header, Manifest, Segment, Stretch
from replay.archive.plan import load_plan, make_plan, save_plan
from replay.archive.rows import SCHEMA, LeftSealed, RecordsHash, Rows, records_of
from replay.errors import ArchiveDamagedError, ArchiveError, ArchiveGapError
from schemas.codec import Codec
from schemas.encryption import SubjectCipher
from schemas.events import TaskSubmitted
from schemas.metadata import Metadata
from schemas.record import Record
from tests.support.keys import ADA, MemoryKeys

CODEC = Codec()

contents = st.none() | st.binary(max_size=20)
headers = st.lists(
    st.tuples(st.sampled_from(["ce_id", "ce_type", "ä", ""]) | st.text(max_size=3), contents), max_size=4
)
records = st.builds(
    Record, st.just("t"), st.just(1), st.integers(0, 2**62), st.integers(0, 2**50), contents, contents, headers
)


def plain(record: Record) -> tuple[object, ...]:
    return record.offset, record.timestamp_ms, record.key, record.value, list(record.headers)


@given(st.lists(records, min_size=1, max_size=30))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_records_come_back_as_they_were(tmp_path: Path, given_records: list[Record]) -> None:
    rows = Rows(CODEC)
    for record in given_records:
        rows.add(record)
    batch = rows.take()
    assert (len(rows), rows.bytes) == (0, 0)
    with pq.ParquetWriter(tmp_path / "rows.parquet", SCHEMA, compression="zstd") as writer:
        writer.write_batch(batch)
    read = pq.ParquetFile(tmp_path / "rows.parquet").read_row_group(0)
    # A slice must not see the headers of the rows before it.
    for start in (0, len(given_records) // 2):
        found = [
            record for part in read.slice(start).combine_chunks().to_batches() for record in records_of(("t", 1), part)
        ]
        assert [plain(record) for record in found] == [plain(record) for record in given_records[start:]]
        assert {(record.topic, record.partition) for record in found} == {("t", 1)}


@given(st.lists(records, max_size=6), st.lists(records, max_size=6))
@settings(max_examples=200, deadline=None)
def test_different_records_have_different_hashes(first: list[Record], second: list[Record]) -> None:
    same = [plain(record) for record in first] == [plain(record) for record in second]
    assert (hashed(first) == hashed(second)) is same


@given(st.lists(records, max_size=6), st.integers(0, 6))
@settings(max_examples=50, deadline=None)
def test_the_hash_does_not_depend_on_batches(all_: list[Record], at: int) -> None:
    parts = RecordsHash()
    parts.add(all_[:at])
    parts.add(all_[at:])
    assert (parts.hexdigest, parts.records) == (hashed(all_), len(all_))


def hashed(all_: list[Record]) -> str:
    made = RecordsHash()
    made.add(all_)
    return made.hexdigest


def test_the_hash_is_the_one_that_old_archives_have() -> None:
    all_ = [Record("t", 0, 1, 2, b"k", None, [("a", b"x"), ("b", None)]), Record("t", 0, 5, 6, None, b"", ())]
    assert hashed(all_) == "35adbfde88810342d689823a68271d04dec7cd9c5f014c0f7630bff66058c794"


def test_what_does_not_decode_says_why() -> None:
    rows = Rows(CODEC)
    rows.add(Record("tasks.high", 0, 7, 1, b"k", b"junk", [("ce_type", b"\xff"), ("ce_id", b"i")]))
    (row,) = rows.take().to_pylist()
    assert (row["payload"], row["event_type"], row["id"], row["source"]) == (None, "�", "i", None)
    assert row["error"].startswith("MalformedError: tasks.high[0]@7: the value starts with 6a756e6b")


def test_what_is_personal_stays_sealed() -> None:
    sealing = Codec(cipher=SubjectCipher(MemoryKeys()))
    about = Metadata("e1", "/clients/test", "t1", datetime(2026, 1, 1, tzinfo=UTC), data_subjects=(ADA,))
    encoded = sealing.encode(TaskSubmitted(task_id="t1", objective="Call Ada at 555-0199"), about)
    record = Record("tasks.normal", 0, 0, 0, b"t1", encoded.value, encoded.headers)
    rows = Rows(Codec(cipher=LeftSealed()))
    rows.add(record)
    batch = rows.take()
    (row,) = batch.to_pylist()
    assert (row["id"], row["error"], orjson.loads(row["payload"])["objective"]) == ("e1", None, "")
    assert "555-0199" not in repr(row)
    (again,) = records_of(("tasks.normal", 0), batch)
    event = sealing.decode(again).event
    assert isinstance(event, TaskSubmitted)
    assert event.objective == "Call Ada at 555-0199"


def segment(number: int, start: int, end: int, *, cut: bool = True, gaps: tuple[Gap, ...] = ()) -> Segment:
    return Segment(number, "", 0, "", 0, 0, 0, (Stretch("t", 0, start, end, 0, ""),), gaps, cut)


class TestManifest:
    @pytest.fixture
    def manifest(self, tmp_path: Path) -> Manifest:
        made = Manifest.create(tmp_path, Header("main", "c", ("t",)))
        made.append(segment(0, 0, 10))
        made.append(segment(1, 12, 20, gaps=(Gap("t", 0, 10, 12),)))
        return made

    def test_is_read_as_it_was_written(self, manifest: Manifest) -> None:
        again = Manifest.load(manifest.folder)
        assert (again.header, again.segments, again.hashes) == (manifest.header, manifest.segments, manifest.hashes)
        assert again.spans() == {("t", 0): (0, 20)}
        assert list(again.gaps()) == [Gap("t", 0, 10, 12)]
        assert again.cuts == 2
        assert len(set(again.hashes)) == 3

    @pytest.mark.parametrize("at", range(3))
    def test_every_byte_counts(self, manifest: Manifest, at: int) -> None:
        path = manifest.folder / "manifest.jsonl"
        lines = path.read_bytes().splitlines(keepends=True)
        for place in range(0, len(lines[at]) - 1, 7):
            line = bytearray(lines[at])
            line[place] ^= 1
            path.write_bytes(b"".join([*lines[:at], bytes(line), *lines[at + 1 :]]))
            with pytest.raises(ArchiveError):
                Manifest.load(manifest.folder)

    @pytest.mark.parametrize("cut", [1, 40])
    def test_a_line_that_was_cut_short_is_not_there(self, manifest: Manifest, cut: int) -> None:
        path = manifest.folder / "manifest.jsonl"
        raw = path.read_bytes()
        path.write_bytes(raw[:-cut])
        again = Manifest.load(manifest.folder)
        assert again.segments == manifest.segments[:1]
        again.repair()
        again.append(segment(1, 12, 20, gaps=(Gap("t", 0, 10, 12),)))
        assert path.read_bytes() == raw

    def test_cut_short_in_its_first_line_it_is_none_yet(self, tmp_path: Path) -> None:
        (tmp_path / "manifest.jsonl").write_bytes(b'{"name":"ma')
        assert not Manifest.exists(tmp_path)
        Manifest.create(tmp_path, Header("main", "c"))
        assert Manifest.load(tmp_path).header == Header("main", "c")

    def test_of_another_format_it_is_refused(self, tmp_path: Path) -> None:
        Manifest.create(tmp_path, Header("main", "c", (), 2))
        with pytest.raises(ArchiveError, match="is of format 2, and this release reads format 1"):
            Manifest.load(tmp_path)

    def test_what_is_none_is_told(self, tmp_path: Path) -> None:
        with pytest.raises(ArchiveError, match="holds no archive"):
            Manifest.load(tmp_path)
        (tmp_path / "manifest.jsonl").write_bytes(orjson.dumps([1]) + b"\n")
        with pytest.raises(ArchiveDamagedError, match="line 1 can't be read"):
            Manifest.load(tmp_path)


class TestPlan:
    @pytest.fixture
    def manifest(self, tmp_path: Path) -> Manifest:
        made = Manifest.create(tmp_path, Header("main", "c", ("t",)))
        made.append(segment(0, 0, 10))
        return made

    def test_takes_what_is_new(self, manifest: Manifest) -> None:
        plan = make_plan(manifest, {("t", 0): (3, 30), ("t", 1): (7, 9)}, {"a": []}, allow_gaps=False)
        assert plan.starts == {("t", 0): 10, ("t", 1): 7}
        assert plan.ends == {("t", 0): 30, ("t", 1): 9}
        assert plan.gaps == ()

    def test_is_kept_until_its_cut_is_complete(self, manifest: Manifest) -> None:
        assert load_plan(manifest.folder, 1) is None
        plan = make_plan(manifest, {("t", 0): (12, 30)}, {"a": [["t", 0, 5, []]]}, allow_gaps=True)
        assert plan.gaps == (Gap("t", 0, 10, 12),)
        save_plan(manifest.folder, plan)
        assert load_plan(manifest.folder, 1) == plan
        assert load_plan(manifest.folder, 2) is None

    def test_what_the_log_has_lost_is_an_error(self, manifest: Manifest) -> None:
        with pytest.raises(ArchiveGapError, match="t/0 10 to 12"):
            make_plan(manifest, {("t", 0): (12, 30)}, {}, allow_gaps=False)
        with pytest.raises(ArchiveError, match="ends at offset 9, and the archive"):
            make_plan(manifest, {("t", 0): (0, 9)}, {}, allow_gaps=True)
        with pytest.raises(ArchiveError, match="no partition t/0"):
            make_plan(manifest, {}, {}, allow_gaps=True)
