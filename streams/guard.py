"""The process that watches another one: what :class:`streams.watchdog.Watchdog` starts, and nobody else.

In: a byte on standard input whenever the watched process's event loop turns; its end when that process is gone. Out:
the watched process's end, with a line on standard error, when its loop stands still or its memory is over the limit. It
is a process of its own because nothing inside one can be relied upon: a C call may hold the interpreter lock for ever,
and a clock inside can't tell a loop that hangs from a process that was stopped. It imports the standard library alone
and takes some 8 MiB.
"""

import contextlib
import os
import select
import signal
import sys
import time

__all__ = ["FATAL", "main", "memory_mib", "stopped"]

FATAL = signal.SIGVTALRM
"""What ends the watched process: its handler writes all stacks without the interpreter's help. Nothing else uses it, so
that the exit code (128 + 26 = 154 in a shell or container) says who it was."""

_TICK_S = 0.5
_GRACE_S = 5.0
"""For writing the stacks. A process that is still there afterwards is killed."""


def memory_mib(pid: int) -> int:
    """What the process holds in memory and can't give back to the kernel: neither code nor mapped files, in MiB.

    Raises:
        OSError: there is no such process.
    """
    with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as status:
        fields = dict(line.split(":", 1) for line in status if ":" in line)
    return sum(int(fields.get(name, "0").split()[0]) for name in ("RssAnon", "RssShmem")) // 1024


def stopped(pid: int) -> bool:
    """Whether the process was stopped by a signal or a debugger.

    Raises:
        OSError: there is no such process.
    """
    with open(f"/proc/{pid}/stat", "rb") as stat:
        # The command's name, in parentheses, may itself hold any character.
        return stat.read().rpartition(b")")[2].split()[0] in (b"T", b"t")


def _watch(pid: int, loop_timeout_s: float, memory_limit_mib: int) -> str:
    """Watch until there is a reason to end the process; the reason, empty when it has ended by itself."""
    tick_s = min(_TICK_S, loop_timeout_s / 4) if loop_timeout_s else _TICK_S
    silent_s, last = 0.0, time.monotonic()
    while os.getppid() == pid:
        readable, _, _ = select.select([0], [], [], tick_s)
        now = time.monotonic()
        # Time that this process did not run either, on a machine that slept or is swamped, is nobody's fault.
        passed_s, last = min(now - last, 2 * tick_s), now
        if readable:
            if not os.read(0, 65_536):
                return ""
            silent_s = 0.0
        elif stopped(pid):
            silent_s = 0.0
        else:
            silent_s += passed_s
        if loop_timeout_s and silent_s >= loop_timeout_s:
            return f"its event loop has stood still for {loop_timeout_s:g} s"
        if memory_limit_mib and (held := memory_mib(pid)) > memory_limit_mib:
            return f"it holds {held} MiB of memory, over its limit of {memory_limit_mib}"
    return ""


def _end(pid: int, reason: str) -> None:
    _say(f"magnatronic: the watchdog ends process {pid}: {reason}. Where its threads are:")
    os.kill(pid, FATAL)
    deadline = time.monotonic() + _GRACE_S
    while os.getppid() == pid and time.monotonic() < deadline:
        time.sleep(0.05)
    if os.getppid() == pid:
        _say(f"magnatronic: process {pid} did not heed {FATAL.name} for {_GRACE_S:g} s; it is killed")
        os.kill(pid, signal.SIGKILL)


def _say(line: str) -> None:
    with contextlib.suppress(OSError):  # nobody reads it; the watched process ends all the same
        os.write(2, f"{line}\n".encode())


def main(arguments: list[str]) -> int:
    """Watch process ``arguments[0]``: ``[1]`` seconds without a turn of its loop and ``[2]`` MiB at most, 0 for any."""
    pid, loop_timeout_s, memory_limit_mib = int(arguments[0]), float(arguments[1]), int(arguments[2])
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
        reason = _watch(pid, loop_timeout_s, memory_limit_mib)
        if reason:
            _end(pid, reason)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
