"""What-ifs with the code of another git revision: in its own process, as it was, or told why it can't be."""

import shutil
import subprocess
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from agents.context import Ports
from replay.errors import UndecidedError, WhatIfError
from replay.whatif.answers import Answers
from replay.whatif.budget import Budget
from replay.whatif.calls import CallLog
from replay.whatif.changes import Changes
from replay.whatif.result import Departure, Status, TaskResult
from replay.whatif.revision import RevisionFleet, checkout, commit_of
from replay.whatif.simulation import Simulation
from schemas.codec import Codec
from schemas.record import Record
from tests.support.whatif import QUESTIONS, Model, fleet_of, past_of, posts_of, recorded

ROOT = Path(__file__).resolve().parents[2]
NAMES = tuple(agent.name for agent in fleet_of())


def git(folder: Path, *arguments: str) -> str:
    author = ("-c", "user.name=test", "-c", "user.email=test@localhost", "-c", "commit.gpgsign=false")
    done = subprocess.run(["git", "-C", str(folder), *author, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tags of revisions: ``now`` (the code as it is), changed ones, and ``empty`` without any code."""
    folder = tmp_path_factory.mktemp("repository")
    git(folder, "init", "-q")
    (folder / "readme").write_text("nothing else")
    commit(folder, "empty")
    for part in ("schemas", "agents"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    commit(folder, "now")
    changed(folder, "brief", "agents/overseer.py", "LEXICAL_ACCEPT: Final = 0.85", "LEXICAL_ACCEPT: Final = 7.0")
    changed(folder, "printing", "agents/retriever.py", "limit = _PASSAGES", "print('hello')\n        limit = _PASSAGES")
    reach = "import socket; socket.create_connection(('127.0.0.1', 9))\n        limit = _PASSAGES"
    changed(folder, "reaching", "agents/retriever.py", "limit = _PASSAGES", reach)
    changed(
        folder, "stricter", "schemas/events/tasks.py", 'submitted_by: str = ""', "submitted_by: str\n    author: str"
    )
    changed(folder, "broken", "agents/step.py", "import", "import nothing_of_this_name, ")
    return folder


def commit(folder: Path, name: str) -> None:
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", name)
    git(folder, "tag", name)


def changed(folder: Path, name: str, path: str, old: str, new: str) -> None:
    git(folder, "checkout", "-q", "now")
    text = (folder / path).read_text()
    assert old in text
    (folder / path).write_text(text.replace(old, new, 1))
    commit(folder, name)


@asynccontextmanager
async def fleet_at(revision: str, repository: Path, folder: Path, prompts: dict[str, str] | None = None) -> Any:
    commit = commit_of(revision, repository)
    path = checkout(commit, repository, folder / "code")
    assert checkout(commit, repository, folder / "code") == path  # made once
    async with RevisionFleet(path, revision, NAMES, prompts or {}, Codec(), folder / "worker.log") as fleet:
        yield fleet


async def simulated(records: list[Record], fleet: Any, folder: Path, changes: Changes | None = None) -> TaskResult:
    calls = CallLog(folder / "calls.jsonl", Codec())
    try:
        answers = Answers(
            changes or Changes(), Ports(), calls, Budget(), estimate=lambda request: (0, 0.0), run_id="test"
        )
        return await Simulation(past_of(records), fleet, posts_of(fleet_of()), answers, Codec()).run()
    finally:
        calls.close()


async def test_the_same_code_decides_the_same(repository: Path, tmp_path: Path) -> None:
    histories = [await recorded(objective) for objective in QUESTIONS]
    histories.append(await recorded(QUESTIONS[1], llm=Model(failures=3)))
    async with fleet_at("now", repository, tmp_path) as fleet:
        for records in histories:
            result = await simulated(records, fleet, tmp_path)
            assert (result.status, result.divergences) == (Status.SAME, ())
            assert result.before == result.after


async def test_other_code_decides_otherwise(repository: Path, tmp_path: Path) -> None:
    records = await recorded("What is uvloop?")
    async with fleet_at("brief", repository, tmp_path) as fleet:
        result = await simulated(records, fleet, tmp_path)
    assert result.status is Status.STOPPED  # what it no longer takes for granted it would have embedded
    assert result.first is not None
    assert (result.first.agent, result.first.kind, result.first.what) == (
        "overseer", Departure.ASKS, "TextsEmbedded",
    )  # fmt: skip
    assert result.would[0]["agent"] == "overseer"


async def test_prompts_can_change_with_the_code(repository: Path, tmp_path: Path) -> None:
    records = await recorded("What is uvloop?")
    prompts = {"answer": "In verse."}
    async with fleet_at("now", repository, tmp_path, prompts) as fleet:
        result = await simulated(records, fleet, tmp_path, Changes(prompts=prompts))
    assert [would["would"] for would in result.would] == ["would call"]
    assert '"system":"In verse."' in result.would[0]["request"]


async def test_what_the_code_prints_is_in_no_one_s_way(repository: Path, tmp_path: Path) -> None:
    records = await recorded("What is uvloop?")
    async with fleet_at("printing", repository, tmp_path) as fleet:
        assert (await simulated(records, fleet, tmp_path)).status is Status.SAME
    assert (tmp_path / "worker.log").read_text() == "hello\n"


async def test_code_that_reaches_outside_fails_there(repository: Path, tmp_path: Path) -> None:
    records = await recorded("What is uvloop?")
    async with fleet_at("reaching", repository, tmp_path) as fleet:
        result = await simulated(records, fleet, tmp_path)
    failed = next(each for each in result.divergences if each.kind is Departure.FAILS)
    assert "PermissionError: code in a what-if tried socket" in failed.after


async def test_events_that_the_code_can_t_take_are_told(repository: Path, tmp_path: Path) -> None:
    records = await recorded("What is uvloop?")
    async with fleet_at("stricter", repository, tmp_path) as fleet:
        with pytest.raises(UndecidedError, match=r"(?s)the code of stricter .*author.*Field required"):
            await simulated(records, fleet, tmp_path)


@pytest.mark.parametrize(
    ("revision", "said"),
    [
        ("broken", "cannot import name 'nothing_of_this_name'"),
        ("empty", "did not match any files"),
        ("no-such-revision", "there is no such revision"),
        ("--help", "is no revision"),
    ],
)
async def test_a_revision_that_can_t_be_had_is_told(repository: Path, tmp_path: Path, revision: str, said: str) -> None:
    with pytest.raises(WhatIfError, match=said):
        async with fleet_at(revision, repository, tmp_path):
            pass


async def test_no_key_reaches_other_code(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    async with fleet_at("now", repository, tmp_path) as fleet:
        environment = _environment(fleet.pid)
    assert b"secret" not in environment
    assert b"PYTHONPATH=" in environment


def _environment(pid: int) -> bytes:
    return Path(f"/proc/{pid}/environ").read_bytes()
