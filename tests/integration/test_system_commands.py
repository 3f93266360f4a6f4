"""The running system as its users meet it: every command against one `magnatronic up`."""

import asyncio
import json
import os
import select
import signal
import socket
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from magnatronic.roles import stations
from replay.golden import check, load
from schemas.codec import Codec

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.integration.conftest import SystemForTests, UpProcess


def as_json(done: "subprocess.CompletedProcess[str]") -> Any:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_ask_prints_the_answer_with_its_citations(system: "SystemForTests") -> None:
    done = system.run("ask", "What is a widget?")
    assert done.returncode == 0, done.stderr
    assert "A widget is a small device that turns heat into light [1]." in done.stdout
    assert f"[1] Widgets › Widgets  {(system.corpus / 'widgets.md').as_uri()}" in done.stdout
    for step in ("PlanProposed", "StepAssigned", "StepCompleted", "StepAssessed", "TaskCompleted"):
        assert step in done.stderr


def test_a_command_is_a_process_like_any_other(system: "SystemForTests") -> None:
    process = system.start("ask", "What is a gizmo?")
    answer, progress = process.communicate(timeout=60)
    assert process.returncode == 0, progress
    assert "A gizmo is a valve that opens when it rains [1]." in answer
    assert "TaskCompleted" in progress


def test_watch_goes_on_until_ctrl_c(system: "SystemForTests") -> None:
    process = system.start("watch", "--json", "--topic", "tasks", "--topic", "task.outcomes")
    assert process.stdout is not None
    readable = select.poll()
    readable.register(process.stdout, select.POLLIN)
    for _ in range(50):  # until it watches: it starts with what comes then
        task_id = system.run("submit", "What is a widget?").stdout.strip()
        if readable.poll(500):
            break
    lines = [json.loads(process.stdout.readline())]  # it may have begun between a task and its outcome
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors.strip()) == (130, "")
    assert {line["topic"] for line in lines} <= {"tasks.normal", "task.outcomes"}
    assert all(line["key"] for line in lines)
    assert task_id


def test_quiet_shows_nothing_but_the_answer(system: "SystemForTests") -> None:
    done = system.run("ask", "--quiet", "What is a sprocket?")
    assert (done.returncode, done.stderr) == (0, "")
    assert "a wheel with teeth" in done.stdout


def test_a_compound_question_takes_several_steps(system: "SystemForTests") -> None:
    answer = as_json(system.run("ask", "--json", "Compare widgets and gadgets."))
    assert answer["ok"]
    titles = {citation["title"] for citation in answer["citations"]}
    assert titles == {"Widgets", "Gadgets"}
    kinds = [event["type"] for event in answer["events"]]
    assert kinds.count("StepAssigned") >= 2
    assert kinds[-1] == "TaskCompleted"
    plans = as_json(system.run("query", "--json", f"select steps from tasks where task_id = '{answer['task_id']}'"))
    assert plans[0]["steps"] == kinds.count("StepAssigned")


def test_a_plan_of_one_s_own_is_carried_out_or_refused(system: "SystemForTests", tmp_path: Path) -> None:
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    steps = [{"id": "one", "capability": "retrieve", "objective": "What is a gadget?", "depends_on": []}]
    good.write_text(json.dumps({"steps": steps}))
    bad.write_text(json.dumps({"steps": [{**steps[0], "capability": "juggle"}]}))
    answer = as_json(system.run("ask", "--json", "--plan", str(good), "Anything"))
    assert "counts the steps of a dog" in answer["answer"]
    refused = system.run("ask", "--plan", str(bad), "Anything")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "juggle" in refused.stderr


def test_submit_then_watch_then_replay(system: "SystemForTests") -> None:
    done = system.run("submit", "Who invented widgets?")
    task_id = done.stdout.strip()
    assert done.returncode == 0, done.stderr
    watched = system.run("watch", "--task", task_id, "--json", "--timeout", "30")
    assert watched.returncode == 0, watched.stderr
    events = [json.loads(line) for line in watched.stdout.splitlines()]
    assert [event["key"] for event in events] == [task_id] * len(events)
    assert (events[0]["type"], events[-1]["type"]) == ("TaskSubmitted", "TaskCompleted")
    known = {event["id"] for event in events}
    assert all(event["causation_id"] in known for event in events if event["causation_id"])
    replayed = as_json(system.run("replay audit", "--task", task_id, "--json"))
    assert replayed["ok"]
    assert replayed["outputs"] == sum(event["type"] not in EFFECTS and bool(event["causation_id"]) for event in events)
    shown = system.run("replay audit", "--task", task_id)
    assert shown.returncode == 0
    assert "every step decides as recorded" in shown.stdout
    assert replayed["digest"] in shown.stdout


EFFECTS = {"LlmCalled", "ToolCalled", "MemoryRecalled", "TextsEmbedded", "Queried"}


def test_a_task_is_pinned_as_it_lies_in_the_log(system: "SystemForTests", tmp_path: Path) -> None:
    task_id = as_json(system.run("ask", "What is a widget?", "--json"))["task_id"]
    said = as_json(system.run("replay pin", task_id, "--to", str(tmp_path), "--name", "widget", "--json"))
    assert set(said["agents"]) == {"decomposer", "coordinator", "retriever", "overseer"}
    history = load(tmp_path / "widget.jsonl")
    assert (history.id, len(history.records)) == (task_id, said["records"])
    assert asyncio.run(check(history, stations=stations(), codec=Codec())) == []


def test_the_same_task_id_makes_no_second_task(system: "SystemForTests") -> None:
    first = as_json(system.run("ask", "--json", "--task-id", "my task/1", "What is a gizmo?"))
    assert first["task_id"] == "my task/1"
    assert system.run("submit", "--task-id", "my task/1", "What is a gizmo?").stdout == "my task/1\n"
    system.run("ask", "What is a gizmo?")  # a later task: when it is done, so would be a second run of the first
    counted = "select count() as n from events where task_id = 'my task/1' and topic = 'task.outcomes'"
    assert as_json(system.run("query", "--json", counted)) == [{"n": 1}]


def test_a_question_the_corpus_does_not_answer_ends(system: "SystemForTests") -> None:
    done = system.run("ask", "--json", "What is the capital of France?")
    answer = json.loads(done.stdout)
    assert done.returncode == (0 if answer["ok"] else 1)
    assert answer["citations"] == []


def test_a_task_whose_deadline_has_passed_expires(system: "SystemForTests") -> None:
    done = system.run("ask", "--deadline", "2020-01-01T00:00:00Z", "What is a widget?")
    assert (done.returncode, done.stdout) == (1, "")
    assert "expired" in done.stderr


def test_queries_see_what_has_just_happened(system: "SystemForTests") -> None:
    task_id = system.run("submit", "What is a gadget?").stdout.strip()
    rows = as_json(system.run("query", "--json", f"select count() as n from events where task_id = '{task_id}'"))
    assert rows[0]["n"] >= 1
    table = system.run("query", "select 1 as one, 'x' as letter")
    assert "one" in table.stdout
    assert "letter" in table.stdout
    assert as_json(system.run("query", "--json", "--named", "open-tasks")) is not None


@pytest.mark.parametrize(
    ("sql", "said"),
    [
        ("selec 1", "Syntax error"),
        ("select nope from events", "nope"),
        ("drop table event_log", "only reads are allowed"),
        ("select * from file('/etc/passwd')", ""),
    ],
)
def test_wrong_sql_is_wrong_input(system: "SystemForTests", sql: str, said: str) -> None:
    done = system.run("query", sql)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("magnatronic: ClickHouse refuses the query: ")
    assert said in done.stderr


def test_topics_are_those_of_the_cluster(system: "SystemForTests") -> None:
    rows = {row["name"]: row for row in as_json(system.run("topics", "--json"))}
    assert rows["documents"]["records"] >= 4
    assert rows["tasks.normal"]["partitions"] == 4
    assert rows["control"]["partitions"] == 1
    assert rows["telemetry"]["retention_ms"] == 7 * 24 * 3600 * 1000
    assert "forever" in system.run("topics").stdout


def test_the_whole_log_is_audited_while_the_system_runs_and_the_report_verified(
    system: "SystemForTests", tmp_path: Path
) -> None:
    report, html = tmp_path / "audit.json", tmp_path / "audit.html"
    done = system.run("replay audit", "--report", str(report), "--html", str(html))
    assert done.returncode == 0, done.stdout
    claimed = json.loads(report.read_bytes())
    assert claimed["agents"]["embedder"]["outputs"] > 4
    assert claimed["digest"] in done.stdout
    assert html.read_text().startswith("<!doctype html>")
    verified = system.run("replay verify", str(report))
    assert (verified.returncode, verified.stdout.splitlines()[-1]) == (0, "the report is confirmed")
    forged = tmp_path / "forged.json"
    forged.write_text(json.dumps({**claimed, "digest": "0" * 64}))
    refused = system.run("replay verify", str(forged))
    assert refused.returncode == 1
    assert "the report is NOT confirmed" in refused.stdout
    assert f"the digest of recorded outputs is {'0' * 64} in the report" in refused.stdout


@pytest.mark.parametrize("command", ["replay audit", "watch"])
def test_an_unknown_task_is_wrong_input(system: "SystemForTests", command: str) -> None:
    done = system.run(command, "--task", "no such task")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "the log holds no task 'no such task'" in done.stderr


def test_ingest_replaces_counts_and_names_what_it_skips(system: "SystemForTests", tmp_path: Path) -> None:
    document = tmp_path / "doodads.md"
    document.write_text("# Doodads\n\nA doodad is a lamp that sings at dawn.\n")
    (tmp_path / "broken.pdf").write_bytes(b"%PDF nothing")
    done = system.run("ingest", str(tmp_path))
    assert done.returncode == 1
    assert f"skipped {tmp_path / 'broken.pdf'}: it can't be read as PDF" in done.stderr
    assert "1 documents submitted, 1 indexed as 1 chunks, 1 skipped" in done.stdout
    assert "sings at dawn" in as_json(system.run("ask", "--json", "What is a doodad?"))["answer"]

    document.write_text("# Doodads\n\nA doodad is a boat that sinks at dusk.\n")
    (tmp_path / "broken.pdf").unlink()
    report = as_json(system.run("ingest", "--json", str(tmp_path)))
    assert (report["submitted"], report["indexed"], report["skipped"]) == (1, 1, [])
    answer = as_json(system.run("ask", "--json", "What is a doodad?"))["answer"]
    assert "sinks at dusk" in answer
    assert "sings" not in answer

    embedded = "select count() as n from events where type = 'magnatronic.effects.TextsEmbedded'"
    before = as_json(system.run("query", "--json", embedded))
    assert as_json(system.run("ingest", "--json", str(tmp_path)))["indexed"] == 1
    assert as_json(system.run("query", "--json", embedded)) == before


def test_a_document_larger_than_a_message_is_ingested_in_parts(system: "SystemForTests", tmp_path: Path) -> None:
    folder = tmp_path / "large"
    folder.mkdir()
    # Mostly one word without an end, so that it is large and yet few chunks.
    filler = "\n\n".join("x" * 200_000 for _ in range(6))
    (folder / "large.txt").write_text(f"{filler}\n\nThe thingamajig is a pump for warm sand.\n")
    report = as_json(system.run("ingest", "--json", str(folder)))
    assert report["submitted"] == report["indexed"] == 2
    (folder / "large.txt").write_text("The thingamajig is a whistle for cold air.\n")
    assert as_json(system.run("ingest", "--json", str(folder)))["submitted"] == 1
    removed = "select count() as n from events where type like '%DocumentRemoved' and key like '%large.txt#part-2'"
    assert as_json(system.run("query", "--json", removed)) == [{"n": 1}]
    answer = as_json(system.run("ask", "--json", "What is the thingamajig?"))["answer"]
    assert "whistle" in answer
    assert "pump" not in answer


def test_a_second_up_on_the_same_folder_is_refused(system: "SystemForTests") -> None:
    done = system.run("up")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert f"a Magnatronic runs on {system.data_dir} already (process " in done.stderr


def test_a_role_beside_the_system_shares_its_work(system: "SystemForTests") -> None:
    process = system.start("run", "coordinator", "--json")
    assert process.stdout is not None
    ready = json.loads(process.stdout.readline())
    try:
        url, slot = ready.pop("metrics"), f"{socket.gethostname()}-coordinator-0"
        assert ready == {"event": "ready", "role": "coordinator", "slot": slot}
        for _ in range(3):
            assert as_json(system.run("ask", "--json", "What is a widget?"))["ok"]
        assert f'agent="coordinator",instance="{slot}"' in httpx.get(f"{url}/metrics", timeout=10).text
        assert httpx.get(f"{url}/ready", timeout=10).status_code == 200
    finally:
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")
    assert as_json(system.run("ask", "--json", "What is a gadget?"))["ok"]


def test_up_stops_gracefully_and_goes_on_where_it_was(
    up_on: "Callable[..., UpProcess]",
    system_on: "Callable[[UpProcess], SystemForTests]",
    tmp_path: Path,
    corpus: Path,
) -> None:
    up = up_on(tmp_path / "data")
    info = up.start()
    here = system_on(up)
    assert Path(info["socket"]).is_socket()
    assert as_json(here.run("ingest", "--json", str(corpus)))["indexed"] == 4
    assert up.stop(signal.SIGINT)[0] == 130
    with pytest.raises(ProcessLookupError):
        os.kill(info["broker_pid"], 0)
    assert "Traceback" not in (up.data_dir / "logs" / "magnatronic.log").read_text()

    up.start()
    assert "turns heat into light" in as_json(here.run("ask", "--json", "What is a widget?"))["answer"]
    assert up.stop() == (0, "")


def test_a_part_that_dies_ends_the_system_with_its_name(up_on: "Callable[..., UpProcess]", tmp_path: Path) -> None:
    up = up_on(tmp_path / "data")
    info = up.start()
    os.kill(info["broker_pid"], signal.SIGKILL)
    code, errors = up.end()
    assert code == 1
    assert "the Kafka process ended; its log is" in errors
    assert "Traceback" not in errors
