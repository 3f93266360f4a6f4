"""What-ifs over the log of a running system: nothing differs unless something is changed; no topic is written to."""

import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import confluent_kafka
import pytest

from magnatronic.client import Client
from magnatronic.discovery import find_system
from replay.kafka_log import KafkaLog
from schemas.topics import TOPICS
from tests.support.chat import chat_server

if TYPE_CHECKING:
    from tests.integration.conftest import SystemForTests

QUESTIONS = ("What is a widget?", "Compare widgets and gadgets.", "What is the capital of France?")
LIVE = frozenset(
    name for topic in TOPICS if topic.key in ("task_id", "target", "document_id") for name in topic.names()
)
"""Those that a running system leaves alone while nobody asks anything."""


@pytest.fixture(scope="module")
def tasks(system: "SystemForTests") -> list[str]:
    """Tasks that are over: answered ones, one that expired."""
    asked = [json.loads(system.run("ask", "--json", question).stdout)["task_id"] for question in QUESTIONS]
    system.run("ask", "--deadline", "2020-01-01T00:00:00Z", "--task-id", "whatif-expired", "What is a widget?")
    return [*asked, "whatif-expired"]


@pytest.fixture
def untouched(system: "SystemForTests", monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fails the test when a producer is made, or a topic of tasks or documents grows."""

    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("a what-if made a producer")

    def ends() -> dict[tuple[str, int], int]:
        with KafkaLog(find_system(system.data_dir).kafka) as log:
            return {place: end for place, (_, end) in log.spans(LIVE).items()}

    before = ends()
    monkeypatch.setattr(confluent_kafka, "Producer", forbidden)
    yield
    assert ends() == before


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def what_if(system: "SystemForTests", tasks: list[str], *options: str, code: int = 0) -> Any:
    named = [part for task in tasks for part in ("--task", task)]
    done = system.run("replay what-if", "--json", *named, *options)
    assert done.returncode == code, done.stderr
    return json.loads(done.stdout)


@pytest.mark.usefixtures("untouched")
def test_unchanged_tasks_are_as_recorded(system: "SystemForTests", tasks: list[str]) -> None:
    report = what_if(system, tasks)
    assert report["totals"]["by_status"] == {"same": len(tasks)}
    assert report["totals"]["made"] == 0
    for task in report["tasks"]:
        assert task["before"] == task["after"]
    assert [task["task_id"] for task in report["tasks"]] == tasks
    shown = system.run("replay what-if", *[part for task in tasks for part in ("--task", task)])
    assert "nothing changed" in shown.stdout
    assert "report.html" in shown.stdout


@pytest.mark.usefixtures("untouched")
def test_a_changed_prompt_stops_or_is_answered(system: "SystemForTests", tasks: list[str], tmp_path: Path) -> None:
    prompt = tmp_path / "answer.txt"
    prompt.write_text("Answer in one sentence.\n")
    changed = ("--prompt", f"answer={prompt}")
    stopped = what_if(system, tasks, *changed)
    assert stopped["totals"]["would"] == {"would call": 4}
    assert stopped["totals"]["by_status"] == {"same": 1, "stopped": 3}
    asked = what_if(system, tasks, *changed, "--ask", "extractive", "--recall", "live")
    assert asked["complete"]
    assert asked["totals"]["by_status"] == {"same": 1, "diverged": 3}
    assert asked["totals"]["outcomes_differ"] == 0
    first = asked["tasks"][0]["divergences"][0]
    assert (first["agent"], first["what"], first["field"]) == ("retriever", "LlmCalled", "system")
    page = (Path(asked["folder"]) / "report.html").read_text()
    assert "Answer in one sentence." in page
    # Run again, it is all there: nothing is asked a second time.
    again = what_if(system, tasks, *changed, "--ask", "extractive", "--recall", "live")
    assert again == asked


@pytest.fixture(scope="module")
def many(system: "SystemForTests") -> list[str]:
    """Some dozens of tasks that are over."""
    things = ("widget", "gadget", "sprocket", "gizmo")
    forms = ("What is a {0}?", "Compare a {0} with a {1}.", "What is a {0} and what is a {1}?", "Who made the {0}?")
    asked = [
        form.format(thing, things[index - 1]) for form in forms for index, thing in enumerate(things) for _ in range(3)
    ]
    with Client.connect(system.data_dir, name="test") as client:
        return [outcome.task_id for outcome in client.ask_all(asked, timeout=60)]


def ends(report: dict[str, Any]) -> list[Any]:
    """How each task ended, apart from what a clock decides: which of two answers side by side came first."""
    return [
        (task["task_id"], task["made"], task["after"]["outcome"], sentences(task["after"]["answer"]))
        for task in report["tasks"]
    ]


def sentences(answer: str) -> list[str]:
    return sorted(re.split(r" *\[\d+\]\.? *|\. +", answer))


@pytest.mark.usefixtures("untouched")
def test_killed_halfway_it_goes_on_where_it_was(system: "SystemForTests", many: list[str], tmp_path: Path) -> None:
    (tmp_path / "answer.txt").write_text("Answer from the passages, briefly.")
    options = ["--json", *(part for task in many for part in ("--task", task)), "--recall", "live"]
    options += ["--prompt", f"answer={tmp_path / 'answer.txt'}", "--ask", "openai", "--model", "local"]
    with chat_server(wait_s=0.03, refuse=7, slow=11) as calm:
        whole = json.loads(system.run("replay what-if", *options, "--base-url", calm.url, "--id", "whole").stdout)
    with chat_server(wait_s=0.03, refuse=7, slow=11) as chat:
        arguments = (*options, "--base-url", chat.url, "--id", "killed")
        folder = system.data_dir / "what-if" / "killed"
        process = system.start("replay what-if", *arguments)
        try:
            wait_until(lambda: len(list(folder.glob("tasks/*.json"))) >= len(many) // 3)
        finally:
            process.kill()
            process.communicate()
        finished = {path: path.read_bytes() for path in folder.glob("tasks/*.json")}
        paid = (folder / "calls.jsonl").read_bytes().count(b"\n")
        assert len(finished) < len(many)
        killed = json.loads(system.run("replay what-if", *arguments).stdout)
    assert {path: path.read_bytes() for path in finished} == finished
    assert whole["complete"]
    assert killed["complete"]
    assert ends(killed) == ends(whole)
    # With the same calls, but no interruption and nobody to ask: the very same, down to what a clock measured.
    folder.with_name("calls-only").mkdir()
    shutil.copy(folder / "calls.jsonl", folder.with_name("calls-only"))
    unbroken = json.loads(system.run("replay what-if", *options, "--base-url", chat.url, "--id", "calls-only").stdout)
    assert unbroken["tasks"] == killed["tasks"]
    made = (folder / "calls.jsonl").read_bytes().count(b"\n")
    under_way = 8
    assert paid > 10
    assert made <= sum(chat.did.values()) <= made + under_way
    assert whole["totals"]["made"] == made == calm.did["answered"] + calm.did["refused"]


def test_what_can_t_be_met_is_said(system: "SystemForTests", tasks: list[str], tmp_path: Path) -> None:
    def refused(*options: str) -> str:
        done = system.run("replay what-if", *options)
        assert done.returncode == 2, done.stdout
        return done.stderr

    (tmp_path / "x").write_text("x")
    assert "there is no prompt 'anwser'" in refused("--prompt", f"anwser={tmp_path / 'x'}")
    assert "has no {finding}" in refused("--prompt", f"review={tmp_path / 'x'}")
    assert "write NAME=FILE" in refused("--prompt", "answer")
    assert "does not hold the submission of no-such-task" in refused("--task", "no-such-task")
    assert "give --ask or --provider" in refused("--model", "m")
    assert "--max-usd can't be kept to" in refused(
        "--task", tasks[0], "--ask", "openai", "--base-url", "http://127.0.0.1:9", "--model", "mine", "--max-usd", "1"
    )
    assert "is no time" in refused("--since", "yesterday")


def test_an_archive_is_history_as_good_as_the_log(system: "SystemForTests", tasks: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "archive"
    archived = system.run("archive", "--to", str(folder), "--json")
    assert archived.returncode == 0, archived.stderr
    from_log = what_if(system, tasks, "--temperature", "0.5", "--ask", "extractive", "--id", "log")
    from_archive = what_if(
        system, tasks, "--temperature", "0.5", "--ask", "extractive", "--id", "archive", "--from", str(folder)
    )
    assert from_archive["totals"]["by_status"] == from_log["totals"]["by_status"] == {"diverged": 4}
    assert [task["digest"] for task in from_archive["tasks"]] == [task["digest"] for task in from_log["tasks"]]
