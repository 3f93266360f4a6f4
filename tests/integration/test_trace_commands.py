"""The command trace on a running system: what real agents did, as it is known now and as it was then."""

import json
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest
from confluent_kafka import Producer

if TYPE_CHECKING:
    from tests.integration.conftest import SystemForTests


def as_json(done: "subprocess.CompletedProcess[str]") -> Any:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def task(system: "SystemForTests") -> str:
    """A task of three steps that is done, with a record among its own that is no event."""
    task_id = f"trace-{uuid4()}"
    as_json(system.run("ask", "--json", "--task-id", task_id, "Compare widgets with gadgets"))
    producer = Producer({"bootstrap.servers": system.up.status()["bootstrap_servers"]})
    producer.produce("work.results.normal", b"no event at all", task_id)
    assert producer.flush(30) == 0
    for _ in range(100):
        found = as_json(system.run("trace", "--json", task_id))
        if any(entry["type"] == "DeadLettered" for entry in found["entries"]):
            return task_id
    raise AssertionError("nobody gave the record up")


def test_a_task_is_told_from_its_submission_to_its_outcome(system: "SystemForTests", task: str) -> None:
    found = as_json(system.run("trace", "--json", task))
    entries = {entry["place"]: entry for entry in found["entries"]}
    assert found["outcome"] == "TaskCompleted"
    assert {each["agent"] for each in found["decisions"]} == {
        *("decomposer", "coordinator", "retriever", "researcher", "overseer")
    }
    for each in found["decisions"]:
        cause = entries[each["on"]]
        for place in (*each["outputs"], *each["calls"]):
            assert entries[place]["causation_id"] == cause["id"]
            assert entries[place]["source"] == f"/agents/{each['agent']}@{each['version']}"
        for call in each["calls"]:
            assert entries[call]["event"]["event_id"] == cause["id"]
    answered = {place for each in found["decisions"] for place in (*each["outputs"], *each["calls"])}
    caused = {place for place, entry in entries.items() if entry["causation_id"] and entry["type"] != "DeadLettered"}
    assert caused == answered
    way = sum(hop["waited_s"] + hop["called_s"] + hop["handled_s"] for hop in found["path"])
    assert way == pytest.approx(found["wall_s"])
    assert found["sums"]["llm_calls"] >= 4
    assert found["sums"]["prompt_tokens"] > 0


def test_what_an_agent_gave_up_is_in_it(system: "SystemForTests", task: str) -> None:
    found = as_json(system.run("trace", "--json", task))
    (unreadable,) = [entry for entry in found["entries"] if entry["type"] == "?"]
    (gave_up,) = [each for each in found["decisions"] if each["dead_letter"] is not None]
    assert gave_up["on"] == unreadable["place"]
    assert gave_up["agent"] == "overseer"
    assert found["sums"]["dead_letters"] == 1
    shown = system.run("trace", task).stdout
    assert "overseer" in shown
    assert "gave up" in shown


def test_the_tree_and_the_page(system: "SystemForTests", task: str, tmp_path: Path) -> None:
    done = system.run("trace", task)
    assert done.returncode == 0, done.stderr
    for part in (f"task {task}", "completed", "PlanProposed", "researcher@", "score", "grounded", "the longest way"):
        assert part in done.stdout, part
    assert "Use only" not in done.stdout
    assert "system:" in system.run("trace", task, "--full").stdout
    page = tmp_path / "trace.html"
    done = system.run("trace", task, "--html", str(page))
    assert (done.returncode, done.stdout) == (0, "")
    assert "A gadget is a tool that counts the steps of a dog." in page.read_text()
    assert "<script" not in page.read_text()
    nowhere = system.run("trace", task, "--html", str(tmp_path / "no" / "folder.html"))
    assert nowhere.returncode == 2
    assert "can't be written" in nowhere.stderr


def test_a_moment_between_two_events_shows_just_what_stood_then(system: "SystemForTests", task: str) -> None:
    whole = as_json(system.run("trace", "--json", task))
    assigned = [entry for entry in whole["entries"] if entry["type"] == "StepAssigned"]
    last = max(assigned, key=lambda entry: entry["time"])
    moment = last["time"]
    then = as_json(system.run("trace", "--json", task, "--at", moment))
    assert then["outcome"] is None
    assert [entry["place"] for entry in then["entries"]] == [
        entry["place"] for entry in whole["entries"] if entry["time"] <= moment
    ]
    lanes = {lane["agent"].partition("@")[0]: lane for lane in then["then"]["lanes"]}
    state = json.loads(then["then"][f"state of coordinator, lane {task}"])
    assert [step["status"] for step in state["steps"]] == ["accepted", "accepted", "assigned"]
    assert lanes["researcher"]["not decided yet"].startswith("StepAssigned")
    assert then["then"]["notes"] == []
    done = system.run("trace", task, "--at", moment)
    assert "under way" in done.stdout
    assert "not decided yet" in done.stdout
    ended = as_json(system.run("trace", "--json", task, "--at", "0s"))
    assert json.loads(ended["then"][f"state of coordinator, lane {task}"])["finished"]


def test_an_agent_a_policy_and_memory_as_they_stood(system: "SystemForTests", task: str) -> None:
    whole = as_json(system.run("trace", "--json", task))
    moment = next(entry["time"] for entry in whole["entries"] if entry["type"] == "StepCompleted")
    agent = as_json(system.run("trace", "--json", "--agent", "coordinator", "--at", moment))
    # Roles that ran beside the system before are gone by now.
    assert len([each for each in agent["instances"] if each["health"] != "gone"]) == 1
    assert task in {lane["lane"] for lane in agent["open lanes"]}
    now = as_json(system.run("trace", "--json", "--agent", "coordinator"))
    assert task not in {lane["lane"] for lane in now["open lanes"]}
    assert "the minute before" in system.run("trace", "--agent", "coordinator").stdout
    assert system.run("trace", "--policy", "no such policy").returncode == 2

    widgets = (system.corpus / "widgets.md").as_uri()
    listed = as_json(system.run("trace", "--memory", "--json"))
    assert widgets in {row["document"] for row in listed["documents"]}
    chunks = as_json(system.run("trace", "--json", "--memory", widgets))["chunks that stood"]
    assert any("turns heat into light" in chunk["text"] for chunk in chunks)
    submitted = as_json(system.run("trace", "--json", widgets))
    assert submitted["kind"] == "document"
    before = as_json(system.run("trace", "--json", "--memory", widgets, "--at", submitted["began"]))
    assert before["state"] in ("not indexed yet", "indexed")
    then = as_json(system.run("trace", "--json", widgets, "--at", submitted["entries"][-1]["time"]))["then"]
    assert json.loads(then[f"state of embedder, lane {widgets}"])["chunk_ids"] == [chunk["chunk"] for chunk in chunks]
    assert then["notes"] == []


def test_an_archive_gives_the_same_trace(system: "SystemForTests", task: str, tmp_path: Path) -> None:
    archived = system.run("archive", "--to", str(tmp_path / "archive"))
    assert archived.returncode == 0, archived.stderr
    source = "--from", str(tmp_path / "archive")
    live = as_json(system.run("trace", "--json", task))
    assert as_json(system.run("trace", "--json", task, *source)) == live
    moment = live["entries"][len(live["entries"]) // 2]["time"]
    then = as_json(system.run("trace", "--json", task, "--at", moment))
    assert as_json(system.run("trace", "--json", task, "--at", moment, *source)) == then
    memory = as_json(system.run("trace", "--json", "--memory", "--at", moment))
    assert as_json(system.run("trace", "--json", "--memory", "--at", moment, *source)) == memory


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["no such task"], "the log holds no task 'no such task'"),
        ([], "give a task's or document's ID, or one of"),
        (["one", "--agent", "coordinator"], "give a task's or document's ID, or one of"),
        (["--agent", "nobody"], "there is no agent 'nobody'; there are: decomposer"),
        (["--memory", "no such document"], "the log holds no document 'no such document'"),
        (["one", "--at", "2999-01-01T00:00:00Z"], "is still to come"),
        (["one", "--at", "yesterday"], "'yesterday' is no time"),
    ],
)
def test_wrong_input_is_named(system: "SystemForTests", arguments: list[str], said: str) -> None:
    done = system.run("trace", *arguments)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert said in done.stderr


def test_a_moment_before_the_task_is_wrong_input(system: "SystemForTests", task: str) -> None:
    done = system.run("trace", task, "--at", "2020-01-01T00:00:00Z")
    assert done.returncode == 2
    assert "its first record is of" in done.stderr
