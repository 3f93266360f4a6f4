"""The watchdog in processes of their own: what it ends, and what it must let live."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from streams import guard
from streams.guard import FATAL, memory_mib, stopped
from streams.watchdog import EXIT_CODE, Watchdog, memory_there_mib

LIMIT_S = 0.8

PROGRAM = """
import asyncio, ctypes, os, re, signal, sys, time
from streams.watchdog import Watchdog

def spin():
    while True:
        pass

def backtrack():
    re.match(r"(a+)+$", "a" * 60 + "b")

def sleep_with_the_lock():
    ctypes.PyDLL(None).sleep(60)

def eat():
    held = []
    while True:
        held.append(bytearray(os.urandom(1024) * 4096))

async def eat_while_the_loop_turns():
    held = []
    while True:
        held.append(bytearray(os.urandom(1024) * 4096))
        await asyncio.sleep(0)

async def work_hard():
    until = time.monotonic() + 2.5 * {limit_s}
    while time.monotonic() < until:
        sum(range(1_000_000))
        await asyncio.sleep(0)

async def wait():
    await asyncio.sleep(2.5 * {limit_s})

async def lose_the_guard():
    os.kill(watchdog.guard_pid, signal.SIGKILL)
    await asyncio.sleep({limit_s})
    spin()

async def heedless():
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGVTALRM])
    spin()

async def main():
    global watchdog
    with Watchdog(loop_timeout_s={limit_s}, memory_limit_mib={memory}) as watchdog:
        print(watchdog.guard_pid, flush=True)
        await asyncio.sleep(0.1)
        result = {what}()
        if asyncio.iscoroutine(result):
            await result
    print("left", flush=True)

asyncio.run(main())
"""


@contextmanager
def program(what: str, *, memory: int = 0, limit_s: float = LIMIT_S) -> Iterator[tuple["subprocess.Popen[str]", int]]:
    """A process that does ``what`` under a watchdog, and the process that watches it."""
    code = PROGRAM.format(what=what, limit_s=limit_s, memory=memory)
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY
    )
    assert process.stdout is not None
    try:
        yield process, int(process.stdout.readline())
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        assert process.stderr is not None
        process.stderr.close()


REPOSITORY = Path(__file__).resolve().parents[2]


def gone(pid: int, within_s: float = 3.0) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            # A child that nobody waited for yet is there, but runs no more.
            if b") Z " in Path(f"/proc/{pid}/stat").read_bytes():
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("what", ["spin", "backtrack", "sleep_with_the_lock"])
def test_a_loop_that_stands_still_ends_the_process_with_its_stacks(what: str) -> None:
    with program(what) as (process, guard_pid):
        started = time.monotonic()
        said, errors = process.communicate(timeout=20)
        assert (process.returncode, said) == (-FATAL, "")
        assert time.monotonic() - started < LIMIT_S + 3
        assert f"the watchdog ends process {process.pid}: its event loop has stood still for {LIMIT_S:g} s" in errors
        assert f"in {what}" in errors
        assert gone(guard_pid)
    assert EXIT_CODE == 154


@pytest.mark.parametrize("what", ["eat", "eat_while_the_loop_turns"])
def test_too_much_memory_ends_the_process_before_the_kernel_does(what: str) -> None:
    with program(what, memory=200, limit_s=60) as (process, guard_pid):
        _, errors = process.communicate(timeout=20)
        assert process.returncode == -FATAL
        assert "MiB of memory, over its limit of 200" in errors
        # Where the loop turns, the stack may be of a moment in between.
        assert f"in {what}" in errors or (what == "eat_while_the_loop_turns" and "most recent call first" in errors)
        assert gone(guard_pid)


def test_a_process_that_blocks_the_signal_is_killed() -> None:
    with program("heedless") as (process, _):
        _, errors = process.communicate(timeout=20)
        assert process.returncode == -signal.SIGKILL
        assert "did not heed SIGVTALRM" in errors


@pytest.mark.parametrize("what", ["work_hard", "wait"])
def test_a_loop_that_turns_is_let_live(what: str) -> None:
    with program(what, memory=1000) as (process, guard_pid):
        said, errors = process.communicate(timeout=20)
        assert (process.returncode, said, errors) == (0, "left\n", "")
        assert gone(guard_pid, 0.1)


def test_a_process_that_was_stopped_goes_on() -> None:
    with program("wait") as (process, _):
        for _ in range(2):
            process.send_signal(signal.SIGSTOP)
            time.sleep(2.5 * LIMIT_S)
            assert stopped(process.pid)
            process.send_signal(signal.SIGCONT)
            time.sleep(0.05)
        said, errors = process.communicate(timeout=20)
        assert (process.returncode, said, errors) == (0, "left\n", "")


def test_a_machine_that_slept_goes_on() -> None:
    """Both processes stand still; the watching one wakes first."""
    with program("wait") as (process, guard_pid):
        process.send_signal(signal.SIGSTOP)
        os.kill(guard_pid, signal.SIGSTOP)
        time.sleep(2.5 * LIMIT_S)
        os.kill(guard_pid, signal.SIGCONT)
        time.sleep(0.1)
        process.send_signal(signal.SIGCONT)
        said, errors = process.communicate(timeout=20)
        assert (process.returncode, said, errors) == (0, "left\n", "")


def test_another_guard_follows_one_that_was_killed() -> None:
    with program("lose_the_guard") as (process, guard_pid):
        _, errors = process.communicate(timeout=20)
        assert process.returncode == -FATAL
        assert "stood still" in errors
        assert gone(guard_pid)


def test_the_guard_does_not_outlive_a_process_that_was_killed() -> None:
    with program("wait") as (process, guard_pid):
        process.kill()
        process.wait()
        assert gone(guard_pid)


async def test_without_limits_nothing_is_started() -> None:
    with Watchdog() as watchdog:
        assert watchdog.guard_pid is None


def test_what_a_process_holds_is_measured() -> None:
    before = memory_mib(os.getpid())
    held = bytearray(os.urandom(1024) * (60 * 1024))
    assert 50 <= memory_mib(os.getpid()) - before <= 100
    del held
    with pytest.raises(OSError, match="No such file"):
        memory_mib(2**22 + 1)


def test_the_memory_that_is_there_is_the_machine_s_or_less() -> None:
    total_kib = int(Path("/proc/meminfo").read_text().split("MemTotal:")[1].split()[0])
    assert 64 < memory_there_mib() <= total_kib // 1024 + 1


def test_the_guard_imports_nothing_of_ours() -> None:
    shown = subprocess.run(
        [sys.executable, "-I", "-S", "-X", "importtime", guard.__file__, str(os.getppid() + 1), "0", "0"],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert shown.returncode == 0
    assert "streams" not in shown.stderr.replace(guard.__file__, "")
