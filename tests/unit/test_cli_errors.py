"""The command line as its users meet it: each wrong input is one clear line on standard error, and exit code 2.

Most run inside this process, which saves a second each; what has to do with processes starts real ones.
"""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from magnatronic.cli import main

SCRIPT = Path(sys.executable).with_name("magnatronic")


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command here: exit code, standard output, standard error."""

    def run(*arguments: str, **settings: str) -> tuple[int, str, str]:
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        shown = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, shown.out, shown.err

    return run


def start(*arguments: str, **settings: str) -> "subprocess.Popen[str]":
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MAGNATRONIC_")}
    return subprocess.Popen(
        [str(SCRIPT), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**kept, **settings},
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["frobnicate"], "No such command 'frobnicate'"),
        (["ask"], "Missing argument 'QUESTION'"),
        (["ask", "why", "--nonsense"], "No such option"),
        (["ask", " "], "the objective is empty"),
        (["submit", "do it", "--priority", "urgent"], "'urgent' is not one of 'high', 'normal', 'low'"),
        (["submit", "do it", "--deadline", "soon"], "'soon' is no time; write 90s"),
        (["submit", "do it", "--task-id", ""], "a task id has 1 to 200 characters"),
        (["submit", "do it", "--plan", "{here}/no.json"], "does not exist"),
        (["submit", "do it", "--plan", "{here}/broken.json"], "is no JSON"),
        (["submit", "do it"], "no Magnatronic is running on {here}/data; start it with: magnatronic up"),
        (["ask", "why?"], "no Magnatronic is running on {here}/data; start it with: magnatronic up"),
        (["watch"], "no Magnatronic is running"),
        (["watch", "--topic", "gossip"], "there is no topic gossip"),
        (["topics"], "no Magnatronic is running"),
        (["query", "select 1"], "no Magnatronic is running"),
        (["query"], "give either SQL or --named NAME"),
        (["query", "select 1", "--named", "topics"], "give either SQL or --named NAME"),
        (["query", "--named", "gossip"], "no query is called 'gossip'"),
        (["replay", "audit"], "no Magnatronic is running"),
        (["replay", "audit", "--since", "1h", "--until", "2h"], "is not before --until"),
        (["replay", "verify", "{here}/none.json"], "No such file"),
        (["replay", "verify", "{here}/broken.json"], "this is no audit report"),
        (["replay", "audit", "--task", "t1"], "no Magnatronic is running"),
        (["ingest"], "Missing argument 'PATHS...'"),
        (["ingest", "{here}/nowhere"], "there is no {here}/nowhere"),
        (["ingest", "{here}/empty"], "there is nothing to ingest"),
        (["run", "coordinator"], "no Magnatronic is running"),
        (["rebuild", "tables"], "'tables' is not one of 'clickhouse', 'milvus', 'state'"),
        (["rebuild", "clickhouse"], "no Magnatronic is running"),
        (["rebuild", "milvus", "--agent", "coordinator"], "--agent is for rebuild state"),
        (["rebuild", "milvus", "--from", "{here}/none"], "does not exist"),
        (["rebuild", "state"], "no Magnatronic was ever started on {here}/data"),
        (["rebuild", "state", "--keep"], "takes no --keep, --carry or --discard"),
        (["up", "--data-dir", "{here}/broken.json"], "is a file"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(run: Run, tmp_path: Path, arguments: list[str], said: str) -> None:
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "empty").mkdir()
    code, output, errors = run(
        *(argument.format(here=tmp_path) for argument in arguments), MAGNATRONIC_DATA_DIR=str(tmp_path / "data")
    )
    assert (code, output) == (2, "")
    assert errors.count("\n") == 1
    assert said.format(here=tmp_path) in errors
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"MAGNATRONIC_DATADIR": "x"}, "MAGNATRONIC_DATADIR is no setting of Magnatronic; did you mean"),
        ({"MAGNATRONIC_PARTITIONS": "many"}, "MAGNATRONIC_PARTITIONS"),
        ({"MAGNATRONIC_LLM_PROVIDER": "openai"}, "MAGNATRONIC_OPENAI_API_KEY"),
    ],
)
def test_wrong_settings_are_wrong_input(run: Run, settings: dict[str, str], said: str) -> None:
    code, _, errors = run("topics", **settings)
    assert (code, errors.count("\n")) == (2, 1)
    assert said in errors


def test_an_unknown_role_names_the_roles(run: Run, tmp_path: Path) -> None:
    settings = {"MAGNATRONIC_KAFKA_BOOTSTRAP_SERVERS": "127.0.0.1:1", "MAGNATRONIC_DATA_DIR": str(tmp_path)}
    code, _, errors = run("run", "juggler", **settings)
    assert code == 2
    assert "there is no role 'juggler'; choose one of: decomposer, coordinator" in errors


@pytest.mark.parametrize(
    ("role", "variable"),
    [("sink-clickhouse", "CLICKHOUSE_URL"), ("sink-milvus", "MILVUS_URI"), ("agents", "MILVUS_URI")],
)
def test_a_role_that_needs_a_server_says_which_setting(run: Run, tmp_path: Path, role: str, variable: str) -> None:
    settings = {"MAGNATRONIC_KAFKA_BOOTSTRAP_SERVERS": "127.0.0.1:1", "MAGNATRONIC_DATA_DIR": str(tmp_path)}
    code, _, errors = run("run", role, **settings)
    assert code == 2
    assert f"set MAGNATRONIC_{variable}" in errors


def test_a_cluster_out_of_reach_is_a_failure_in_one_line(run: Run) -> None:
    code, _, errors = run("submit", "do it", MAGNATRONIC_KAFKA_BOOTSTRAP_SERVERS="127.0.0.1:1")
    assert code == 1
    assert errors.startswith("magnatronic: no Kafka answers at 127.0.0.1:1: ")
    assert errors.count("\n") == 1


def test_the_traceback_is_shown_to_who_debugs(run: Run, tmp_path: Path) -> None:
    assert "Traceback" not in run("topics", MAGNATRONIC_DATA_DIR=str(tmp_path / "data"))[2]
    assert "Traceback" in run("topics", MAGNATRONIC_LOG_LEVEL="debug")[2]


def test_help_loads_nothing_that_takes_long() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", str(SCRIPT), "--help"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Usage: " in done.stdout
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines() if "|" in line}
    assert "click" in loaded
    slow = {"anthropic", "chdb", "faust", "google", "numpy", "onnxruntime", "openai", "pyarrow", "pymilvus", "torch"}
    assert not loaded & slow


def test_every_command_is_listed_and_takes_json(run: Run) -> None:
    listed = run("--help")[1]
    for command in ("demo", "up", "run", "ingest", "submit", "ask", "watch", "query", "topics"):
        assert f"  {command} " in listed
        code, shown, _ = run(command, "--help")
        assert code == 0
        assert "--json" in shown
    assert "  audit " in run("replay", "--help")[1]
    assert "--json" in run("replay", "audit", "--help")[1]
    for command in ("list", "show", "redrive", "discard"):
        assert "--json" in run("dlq", command, "--help")[1]


def test_no_command_shows_the_help(run: Run) -> None:
    code, shown, _ = run()
    assert code == 0
    assert "Usage: magnatronic" in shown


def test_version(run: Run) -> None:
    assert run("--version")[1].startswith("magnatronic 0.")


def test_the_named_queries_are_listed_without_a_system(run: Run) -> None:
    listed = json.loads(run("query", "--list", "--json")[1])
    assert {"name": "open-tasks", "title": "Tasks without an outcome, oldest first"} in listed


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    piped = subprocess.run(
        f"{SCRIPT} query --list | head -c 1", shell=True, capture_output=True, text=True, timeout=60, check=False
    )
    assert piped.stderr == ""


def test_ctrl_c_ends_with_130() -> None:
    # A server that accepts and says nothing keeps the command waiting.
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(30)
        process = start("watch", MAGNATRONIC_KAFKA_BOOTSTRAP_SERVERS=f"127.0.0.1:{server.getsockname()[1]}")
        connection, _ = server.accept()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
        connection.close()
    assert process.returncode == 130
    assert "Traceback" not in errors
