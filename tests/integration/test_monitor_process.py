"""The Monitor beside a running system: its end is nobody else's, and it comes back."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from magnatronic.control import call

if TYPE_CHECKING:
    from tests.integration.conftest import SystemForTests


def until(done: Callable[[], Any], timeout_s: float = 120.0) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (found := done()):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    return found


def as_json(done: "subprocess.CompletedProcess[str]") -> Any:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_monitor_s_death_is_nobody_else_s(system: "SystemForTests") -> None:
    def works() -> int | None:
        """The Monitor's process, once it has said that it is ready."""
        status = call(system.data_dir, "status")
        ready = {each["agent"] for each in status["directory"] if each["health"] == "ready"}
        return status["monitor_pid"] if "monitor" in ready else None

    first = until(works)
    os.kill(first, signal.SIGKILL)
    answer = as_json(system.run("ask", "--json", "What is a widget?"))
    assert answer["ok"]
    assert until(lambda: (pid := call(system.data_dir, "status")["monitor_pid"]) != first and pid)
    until(works)


def test_status_shows_who_works(system: "SystemForTests") -> None:
    status = as_json(system.run("status", "--json"))
    health = {each["agent"]: each["health"] for each in status["directory"]}
    agents = {"coordinator", "decomposer", "embedder", "overseer", "researcher", "retriever"}
    assert agents <= health.keys()
    # On a busy machine one of them may be degraded, and an alert open.
    assert {health[agent] for agent in agents} <= {"ready", "busy", "degraded"}
    assert {each["capabilities"][0] for each in status["directory"] if each["capabilities"]} == {"research", "retrieve"}
    assert isinstance(status["alerts"], list)
    shown = system.run("status").stdout
    assert "retriever" in shown
    assert "health" in shown


def test_each_task_s_assignments_asked_the_directory(system: "SystemForTests") -> None:
    answer = as_json(system.run("ask", "--json", "What is a gizmo?"))
    asked = (
        "select JSONExtractString(payload, 'target') as target from events "
        f"where task_id = '{answer['task_id']}' and type like '%Queried'"
    )
    assert as_json(system.run("query", "--json", asked)) == [{"target": "directory"}]
    replayed = as_json(system.run("replay audit", "--task", answer["task_id"], "--json"))
    assert replayed["ok"]
