"""The command replay pin: from an archive into a file, and what it refuses."""

import asyncio
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import pytest

from magnatronic.cli import main
from magnatronic.keys.file import FileKeys
from replay.archive import Archiver, Header
from replay.golden import check, load
from replay.log import ALL, Batch, Log, Progress
from replay.selection import Place, Selection, Span
from schemas.codec import Codec
from schemas.encryption import SubjectCipher
from schemas.events import TaskSubmitted
from schemas.metadata import Metadata
from schemas.record import Record
from schemas.topics import all_topics
from tests.replay.stations import system_stations

AT: Final = datetime(2026, 1, 1, tzinfo=UTC)
HISTORIES: Final = Path(__file__).parent / "histories"


class PinnedLog(Log):
    """The log in which golden histories' records lay."""

    def __init__(self, records: Collection[Record]) -> None:
        self._records = sorted(records, key=lambda record: (record.topic, record.partition, record.offset))

    def spans(self, topics: Collection[str] = ()) -> dict[Place, Span]:
        ends: dict[Place, Span] = {(topic, 0): (0, 0) for topic in topics or all_topics()}
        for record in self._records:
            ends[record.topic, record.partition] = 0, record.offset + 1
        return ends

    def read(
        self,
        selection: Selection = ALL,
        *,
        start: Mapping[Place, int] | None = None,
        on_progress: Progress | None = None,
    ) -> Iterator[Batch]:
        ends = {place: end for place, (_, end) in self.spans(selection.topics).items()}
        known = [record for record in self._records if record.offset >= (start or {}).get(_place(record), 0)]
        yield Batch([record for record in known if selection.takes(record)], ends)

    def close(self) -> None:
        pass


def _place(record: Record) -> Place:
    return record.topic, record.partition


def archived(folder: Path, *names: str) -> Path:
    """An archive of histories that one system recorded; the outcome of the cancelled one is not what was decided."""
    records = [record for name in names for record in load(HISTORIES / f"{name}.jsonl").records]
    for number, record in enumerate(records):
        if record.topic == "task.outcomes" and record.value is not None:
            said = record.value.replace(b"nobody asks any more", b"nobody asks any MORE")
            records[number] = replace(record, value=said)
    with Archiver(folder, Header("test", "none"), PinnedLog(records), Codec()) as archiver:
        archiver.run()
    return folder


@pytest.fixture(scope="module")
def quoting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return archived(tmp_path_factory.mktemp("archive"), "answer", "document", "unreadable")


@pytest.fixture(scope="module")
def failing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return archived(tmp_path_factory.mktemp("archive"), "expired", "cancelled")


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs ``replay pin`` on an archive in an empty folder: exit code, standard output, standard error."""
    monkeypatch.chdir(tmp_path)

    def run(archive: Path, *arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(["replay", "pin", "--from", str(archive), *arguments])
        shown = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, shown.out, shown.err

    return run


@pytest.mark.parametrize(
    ("name", "recorded_by"), [("answer", "quoting"), ("document", "quoting"), ("expired", "failing")]
)
def test_what_is_pinned_is_what_was_recorded(
    name: str, recorded_by: str, run: Run, request: pytest.FixtureRequest
) -> None:
    known = load(HISTORIES / f"{name}.jsonl")
    code, out, errors = run(request.getfixturevalue(recorded_by), known.id, "--name", name, "--about", known.about)
    assert (code, errors) == (0, "")
    path = Path("tests", "replay", "histories", f"{name}.jsonl")
    assert out.startswith(f"wrote {path}: {path.stat().st_size:,} bytes, {len(known.records)} records, ")
    pinned = load(path)
    assert sorted(map(repr, pinned.records)) == sorted(map(repr, known.records))
    assert (pinned.id, pinned.kind, pinned.about, pinned.digest) == (known.id, known.kind, known.about, known.digest)
    assert pinned.steps == known.steps
    assert asyncio.run(check(pinned, stations=system_stations(), codec=Codec())) == []


def test_it_says_what_it_wrote_as_json_and_overwrites_nothing(run: Run, quoting: Path) -> None:
    known = load(HISTORIES / "answer.jsonl")
    code, out, errors = run(quoting, known.id, "--to", "kept", "--json")
    assert (code, errors) == (0, "")
    said: dict[str, Any] = json.loads(out)
    path = Path("kept", f"{known.id}.jsonl")
    assert said == {
        "path": str(path),
        "bytes": path.stat().st_size,
        "id": known.id,
        "kind": "task",
        "records": len(known.records),
        "steps": len(known.steps),
        "agents": known.versions,
        "digest": known.digest,
        "reason": "",
    }
    before = path.read_bytes()
    code, out, errors = run(quoting, known.id, "--to", "kept")
    assert (code, out) == (2, "")
    assert f"there is a {path} already; give another --name" in errors
    assert path.read_bytes() == before


def test_a_history_that_does_not_audit_clean_needs_a_reason(run: Run, failing: Path) -> None:
    known = load(HISTORIES / "cancelled.jsonl")
    code, out, errors = run(failing, known.id, "--name", "tampered")
    assert (code, out) == (2, "")
    assert f"task {known.id} does not audit clean: output differs: coordinator on TaskCancelRequested" in errors
    assert "say why: --force REASON" in errors
    assert not Path("tests").exists()
    code, _, errors = run(failing, known.id, "--name", "tampered", "--force", "shows what tampering looks like")
    assert (code, errors) == (0, "")
    pinned = load(Path("tests", "replay", "histories", "tampered.jsonl"))
    assert pinned.reason == "shows what tampering looks like"
    assert {step.verdict for step in pinned.steps} == {"same", "cancelled", "differs"}
    assert asyncio.run(check(pinned, stations=system_stations(), codec=Codec())) == [], "it stays as wrong as it was"


def test_what_is_personal_stays_sealed_though_the_keys_are_there(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = FileKeys(tmp_path / "keys")
    monkeypatch.setenv("MAGNATRONIC_DATA_DIR", str(tmp_path))
    key_id = keys.key_for("ada@example.org")
    about = Metadata("e1", "/clients/test", "t1", AT, correlation_id="t1", data_subjects=(key_id,))
    event = TaskSubmitted(task_id="t1", objective="What does Ada Lovelace owe?")
    value, headers = Codec(cipher=SubjectCipher(keys)).encode(event, about)
    record = Record("tasks.normal", 0, 0, 1_767_225_600_000, b"t1", value, headers)
    folder = tmp_path / "archive"
    with Archiver(folder, Header("test", "none"), PinnedLog([record]), Codec()) as archiver:
        archiver.run()
    code, out, errors = run(folder, "t1")
    assert (code, out) == (2, "")
    assert "it is about a data subject, and what is personal stays sealed in the file" in errors
    code, _, _ = run(folder, "t1", "--force", "shows a sealed task")
    assert code == 0
    path = Path("tests", "replay", "histories", "t1.jsonl")
    assert "Lovelace" not in path.read_text(encoding="utf-8")
    pinned = load(path)
    assert pinned.records == (record,)
    assert [step.verdict for step in pinned.steps] == ["erased"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nobody"], "the log holds no task 'nobody'"),
        (["nobody", "--name", "///"], "'///' can't name a file"),
        ([load(HISTORIES / "answer.jsonl").id, "--to", "/dev/null/x"], "can't be written"),
        (
            ["unreadable-task"],
            "task unreadable-task does not audit clean: the task has no outcome. If it is to be kept",
        ),
        ([], "Missing argument 'ID'"),
    ],
)
def test_wrong_input_is_one_clear_line(arguments: list[str], said: str, run: Run, quoting: Path) -> None:
    code, out, errors = run(quoting, *arguments)
    assert (code, out) == (2, "")
    assert said in errors
    assert errors.count("\n") == 1
