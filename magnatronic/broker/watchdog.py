"""Stands between an owner and its JVM, and outlives neither. Run as a script, by path, with the standard library only.

In: ``GRACE_S LOG COMMAND...`` as arguments, and standard input, a pipe whose other end only the owner holds. Out: the
command as a child, its output appended to LOG, its pid on standard output, and its exit status as this one's.
The pipe closes when the owner asks for a stop or dies, even by SIGKILL: the child then gets SIGTERM, and SIGKILL after
the grace time. Should this process itself be killed, Linux kills the child (PR_SET_PDEATHSIG, which is safe here
because this process has one thread: the signal is sent when the forking *thread* ends).
"""

import ctypes
import os
import select
import signal
import sys
import time

__all__ = ["main"]

PR_SET_PDEATHSIG = 1
POLL_S = 0.5


def main(grace_s: float, log: str, command: list[str]) -> int:
    """Runs ``command`` until it ends or standard input closes; its exit status, 128 + n for signal n."""
    owner = os.getppid()
    libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
    child_ended, notify = os.pipe()
    os.set_blocking(notify, False)
    signal.set_wakeup_fd(notify)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        _become(command, log, libc, parent)
    os.write(1, f"{child}\n".encode())
    os.close(1)
    deadline = None
    sources = [0, child_ended]
    while True:
        readable, _, _ = select.select(sources, [], [], POLL_S)
        if child_ended in readable:
            os.read(child_ended, 512)
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code
        # A fork of the owner may hold the pipe open after the owner is gone; then its pid tells.
        orphaned = os.getppid() != owner
        if deadline is None and (orphaned or (0 in readable and not os.read(0, 512))):
            sources = [child_ended]
            deadline = time.monotonic() + grace_s
            os.kill(child, signal.SIGTERM)
        elif deadline is not None and time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)


def _become(command: list[str], log: str, libc: ctypes.CDLL | None, parent: int) -> None:
    """In the forked child: set up its files and its end, then turn into ``command``."""
    try:
        if libc is not None:
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() != parent:
                os._exit(1)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        null = os.open(os.devnull, os.O_RDONLY)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(null, 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.execv(command[0], command)
    except OSError as error:
        os.write(2, f"{command[0]}: {error}\n".encode())
    finally:
        os._exit(127)


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), sys.argv[2], sys.argv[3:]))
