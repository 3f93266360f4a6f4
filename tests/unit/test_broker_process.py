"""The launcher: ready, or an error with the last lines; no child outlives its owner. The children here are shells."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from magnatronic.broker.errors import JavaProcessError
from magnatronic.broker.process import JavaProcess, free_ports, last_lines

SLEEP = ["/bin/sh", "-c", "echo up; exec sleep 600"]
STUBBORN = ["/bin/sh", "-c", "trap '' TERM; echo up; while :; do sleep 0.1; done"]


def _gone(pid: int, within_s: float = 5.0) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.02)
    return False


def _process(tmp_path: Path, command: list[str], grace_s: float = 5.0) -> JavaProcess:
    log = tmp_path / "out.log"
    return JavaProcess(
        "the program",
        command,
        output_path=log,
        ready=lambda: "up" in last_lines(log),
        start_timeout_s=5,
        grace_s=grace_s,
    )


def test_starts_and_stops(tmp_path: Path) -> None:
    process = _process(tmp_path, SLEEP)
    with process:
        pid = process.pid
        assert psutil.Process(pid).name() == "sleep"
    assert not psutil.pid_exists(pid)
    assert not process.running
    with pytest.raises(JavaProcessError, match="the program is not running"):
        _ = process.pid
    process.stop()


def test_can_start_again(tmp_path: Path) -> None:
    process = _process(tmp_path, SLEEP)
    for _ in range(2):
        process.start()
        with pytest.raises(JavaProcessError, match="runs already"):
            process.start()
        process.stop()


def test_what_ignores_a_stop_is_killed_after_the_grace_time(tmp_path: Path) -> None:
    process = _process(tmp_path, STUBBORN, grace_s=0.5).start()
    pid = process.pid
    began = time.monotonic()
    process.stop()
    assert not psutil.pid_exists(pid)
    assert 0.5 <= time.monotonic() - began < 4


def test_kill_is_a_crash(tmp_path: Path) -> None:
    process = _process(tmp_path, STUBBORN, grace_s=60).start()
    pid = process.pid
    process.kill()
    assert not psutil.pid_exists(pid)
    assert not process.running


def test_an_early_end_shows_the_last_lines(tmp_path: Path) -> None:
    process = _process(tmp_path, ["/bin/sh", "-c", "echo reading; echo port is taken >&2; exit 3"])
    with pytest.raises(JavaProcessError, match=r"(?s)ended with exit status 3 before .*reading\nport is taken"):
        process.start()
    assert not process.running


def test_a_missing_program_is_told(tmp_path: Path) -> None:
    with pytest.raises(JavaProcessError, match=r"(?s)exit status 127 .*/no/java: .*No such file"):
        _process(tmp_path, ["/no/java"]).start()


def test_silence_ends_with_an_error_and_nothing_running(tmp_path: Path) -> None:
    log = tmp_path / "out.log"
    process = JavaProcess(
        "the program",
        ["/bin/sh", "-c", "echo $$; exec sleep 600"],
        output_path=log,
        ready=lambda: False,
        start_timeout_s=0.5,
    )
    with pytest.raises(JavaProcessError, match=r"the program was not ready within 0\.5 s"):
        process.start()
    assert not psutil.pid_exists(int(last_lines(log)))


OWNER = """
import json, os, sys, threading, time
from pathlib import Path
from magnatronic.broker.process import JavaProcess, last_lines
log = Path(sys.argv[1])
ready = lambda: "up" in last_lines(log)
process = JavaProcess("child", json.loads(sys.argv[2]), output_path=log, ready=ready, grace_s=1)
starter = threading.Thread(target=process.start)
starter.start()
starter.join()
if len(sys.argv) > 3:
    if os.fork() == 0:  # a worker that inherits everything, and lives on
        time.sleep(20)
        os._exit(0)
print(process.pid, flush=True)
time.sleep(600)
"""


def _owner(tmp_path: Path, command: list[str], *rest: str) -> tuple[subprocess.Popen[str], int]:
    arguments = [sys.executable, "-c", OWNER, str(tmp_path / "out.log"), json.dumps(command), *rest]
    owner = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert owner.stdout is not None
    pid = int(owner.stdout.readline())
    owner.stdout.close()
    return owner, pid


@pytest.mark.parametrize("command", [SLEEP, STUBBORN], ids=["polite", "stubborn"])
def test_ends_with_its_owner_even_on_sigkill(tmp_path: Path, command: list[str]) -> None:
    owner, pid = _owner(tmp_path, command)
    # The thread that started it is long gone, which must not matter.
    time.sleep(0.7)
    assert psutil.pid_exists(pid)
    owner.kill()
    owner.wait()
    assert _gone(pid)


def test_ends_with_its_owner_though_a_fork_holds_the_pipe(tmp_path: Path) -> None:
    owner, pid = _owner(tmp_path, SLEEP, "fork")
    owner.kill()
    owner.wait()
    try:
        assert _gone(pid)
    finally:
        os.killpg(owner.pid, signal.SIGKILL)


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_ends_with_its_watchdog(tmp_path: Path) -> None:
    process = _process(tmp_path, STUBBORN).start()
    pid = process.pid
    watchdog = psutil.Process(pid).parent()
    assert watchdog is not None
    watchdog.kill()
    assert _gone(pid)
    process.stop()


def test_ctrl_c_reaches_the_owner_only(tmp_path: Path) -> None:
    process = _process(tmp_path, SLEEP).start()
    assert os.getpgid(process.pid) != os.getpgid(os.getpid())
    process.stop()


def test_last_lines_of_a_long_log_and_of_none(tmp_path: Path) -> None:
    log = tmp_path / "long.log"
    log.write_text("".join(f"line {number}\n" for number in range(100_000)))
    assert last_lines(log, 2) == "line 99998\nline 99999"
    assert last_lines(tmp_path / "none.log") == ""
    assert last_lines(log, 2, since=log.stat().st_size - 4) == "999"


def test_an_error_above_the_last_lines_is_shown(tmp_path: Path) -> None:
    log = tmp_path / "failed.log"
    log.write_text("12:00 ERROR port is taken\n" + "12:01 INFO bye\n" * 100)
    assert last_lines(log, 2) == "12:00 ERROR port is taken\n12:01 INFO bye\n12:01 INFO bye"


def test_free_ports_differ() -> None:
    ports = free_ports(20)
    assert len(set(ports)) == 20
