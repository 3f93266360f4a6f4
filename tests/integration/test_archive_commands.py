"""``magnatronic archive`` on a running system."""

import json
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from schemas.topics import all_topics

if TYPE_CHECKING:
    from tests.integration.conftest import SystemForTests


@pytest.fixture(scope="module")
def folder(system: "SystemForTests", tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An archive of the session's system, in which a question was asked."""
    asked = system.run("ask", "--timeout", "60", "What is a widget?")
    assert asked.returncode == 0, asked.stderr
    made = tmp_path_factory.mktemp("archives") / "main"
    done = archive(system, made)
    assert done["records"] == done["total_records"] > 20
    return made


def archive(system: "SystemForTests", folder: Path, *arguments: str) -> dict[str, Any]:
    done = system.run("archive", "--to", str(folder), "--json", *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    said: dict[str, Any] = json.loads(done.stdout)
    return said


def verify(system: "SystemForTests", folder: Path, *arguments: str) -> dict[str, Any]:
    done = system.run("archive verify", str(folder), "--json", *arguments)
    said: dict[str, Any] = json.loads(done.stdout)
    assert done.returncode == (0 if said["ok"] else 1), done.stderr
    return said


def test_it_holds_every_topic_and_what_agents_finished(system: "SystemForTests", folder: Path) -> None:
    from replay.archive import ArchiveLog

    with ArchiveLog(folder) as log:
        assert {topic for topic, _ in log.spans()} == set(all_topics())
        assert {"coordinator", "researcher", "embedder"} <= log.handled().keys()


def test_its_head_is_in_topic_audit_and_every_record_in_the_log(system: "SystemForTests", folder: Path) -> None:
    said = verify(system, folder, "--log")
    assert (said["ok"], said["problems"], said["name"]) == (True, [], "main")
    assert said["heads_in_audit"] >= 1
    assert said["compared_with_log"] == said["records"]
    text = system.run("archive verify", str(folder))
    assert "whole" in text.stdout
    assert said["head"] in text.stdout


def test_run_again_it_adds_what_is_new(system: "SystemForTests", folder: Path) -> None:
    before = verify(system, folder)
    done = archive(system, folder)
    assert done["records"] >= 1  # what vouched for the archive before
    after = verify(system, folder)
    assert (after["ok"], after["records"]) == (True, before["records"] + done["records"])
    assert after["heads_in_audit"] == before["heads_in_audit"] + 1


def test_a_head_that_was_sent_and_not_noted_is_sent_again(system: "SystemForTests", tmp_path: Path) -> None:
    folder = tmp_path / "again"
    archive(system, folder, "--topic", "documents")
    head = (folder / "announced").read_text()
    (folder / "announced").unlink()
    archive(system, folder, "--topic", "documents")
    assert (folder / "announced").read_text() == head
    said = verify(system, folder)
    assert (said["ok"], said["head"], said["heads_in_audit"]) == (True, head, 1)


def test_lines_that_were_cut_off_are_told(system: "SystemForTests", folder: Path, tmp_path: Path) -> None:
    import shutil

    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    lines = (copy / "manifest.jsonl").read_bytes().splitlines(keepends=True)
    (copy / "manifest.jsonl").write_bytes(b"".join(lines[:-1]))
    said = verify(system, copy)
    assert not said["ok"]
    assert "topic audit names the head" in said["problems"][0]
    assert verify(system, copy, "--offline")["ok"]


def test_a_part_of_the_topics(system: "SystemForTests", tmp_path: Path) -> None:
    from replay.archive import ArchiveLog

    archive(system, tmp_path / "part", "--topic", "documents", "--topic", "tasks", "--name", "part")
    with ArchiveLog(tmp_path / "part") as log:
        assert {topic for topic, _ in log.spans()} == {"documents", "tasks.high", "tasks.normal", "tasks.low"}
    other = system.run("archive", "--to", str(tmp_path / "part"))
    assert other.returncode == 1
    assert "take another folder" in other.stderr


def test_follow_goes_on_until_it_is_stopped(system: "SystemForTests", tmp_path: Path) -> None:
    process = system.start("archive", "--to", str(tmp_path / "follow"), "--follow", "--every", "0.2", "--json")
    try:
        assert process.stdout is not None
        said = [json.loads(process.stdout.readline()) for _ in range(3)]
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=30)
    finally:
        process.kill()
    assert (process.returncode, errors) == (0, "")
    assert said[0]["total_records"] < said[-1]["total_records"]
    assert verify(system, tmp_path / "follow", "--log")["ok"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("archive",), "--to FOLDER says where to"),
        (("archive", "--to", "x", "--topic", "nope"), "there is no topic 'nope'"),
        (("archive", "verify", "nowhere"), "holds no archive"),
        (("archive", "verify", "nowhere", "--log", "--offline"), "--offline goes without"),
    ],
)
def test_wrong_input_is_told(system: "SystemForTests", arguments: tuple[str, ...], said: str) -> None:
    command, *rest = arguments
    if rest[:1] == ["verify"]:
        command, rest = "archive verify", rest[1:]
    done = system.run(command, *rest)
    assert done.returncode in (1, 2)
    assert said in done.stderr
