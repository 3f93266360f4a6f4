"""Runs a JVM as a child that never outlives its owner.

In: a command line, a log file and a readiness check. Out: :class:`JavaProcess`, started and ready, or an error with the
JVM's last lines. The JVM hangs on a small watchdog process (:mod:`magnatronic.broker.watchdog`), so it ends with its
owner however the owner ends.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Final, Self

from magnatronic.broker import watchdog
from magnatronic.broker.errors import JavaProcessError

__all__ = ["LOCALHOST", "JavaProcess", "free_ports", "last_lines"]

LOCALHOST: Final = "127.0.0.1"
_SHOWN_LINES: Final = 25
_SHOWN_ERRORS: Final = 10
_ERROR: Final = re.compile(r"\b(ERROR|FATAL)\b|Exception:|^Caused by")
_POLL_S: Final = 0.02


def last_lines(path: Path, count: int = _SHOWN_LINES, since: int = 0) -> str:
    """The last lines of a log file from byte ``since`` on, or an empty text where there is none.

    Errors above them, which what a program says while it shuts down may have pushed out of sight, come first. Reads at
    most 64 KiB.
    """
    try:
        with path.open("rb") as file:
            file.seek(max(since, os.fstat(file.fileno()).st_size - 65_536))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    above = [line for line in lines[:-count] if _ERROR.search(line)]
    return "\n".join(above[-_SHOWN_ERRORS:] + lines[-count:])


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nothing listens on right now; all are held at once, so that they differ."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind((LOCALHOST, 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


class JavaProcess:
    """One JVM. ``name`` is for messages; ``ready`` is called until it is true or ``start_timeout_s`` is over.

    ``output_path`` gets the JVM's standard output and error (it starts empty at each start), ``log_paths`` are further
    logs that the program writes itself and that are quoted when it fails. ``keep_open`` are file descriptors that
    the watchdog and the JVM inherit: a lock held through one is free only when all three are gone. A stop is SIGTERM,
    then SIGKILL after ``grace_s``.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        output_path: Path,
        ready: Callable[[], bool],
        log_paths: Sequence[Path] = (),
        cwd: Path | None = None,
        start_timeout_s: float = 60.0,
        grace_s: float = 10.0,
        keep_open: Sequence[int] = (),
    ) -> None:
        self.name = name
        self.command = list(command)
        self.output_path = output_path
        self._log_paths = (output_path, *log_paths)
        self._ready = ready
        self._cwd = cwd
        self._start_timeout_s = start_timeout_s
        self._grace_s = grace_s
        self._keep_open = tuple(keep_open)
        self._log_sizes: dict[Path, int] = {}
        self._watchdog: subprocess.Popen[bytes] | None = None
        self._pid: int | None = None

    @property
    def pid(self) -> int:
        """The JVM's process id.

        Raises:
            JavaProcessError: it is not running.
        """
        if self._pid is None:
            raise JavaProcessError(f"{self.name} is not running")
        return self._pid

    @property
    def running(self) -> bool:
        """Whether the JVM lives."""
        return self._watchdog is not None and self._watchdog.poll() is None

    def start(self) -> Self:
        """Starts the JVM and returns when it is ready.

        Raises:
            JavaProcessError: it ended or was not ready in time. The message has its last lines, and nothing is left
                running.
        """
        if self.running:
            raise JavaProcessError(f"{self.name} runs already (pid {self._pid})")
        self.output_path.write_bytes(b"")
        # Logs are appended to; what earlier starts said is no explanation of this one.
        self._log_sizes = {path: path.stat().st_size if path.exists() else 0 for path in self._log_paths}
        # -I and -S: no site-packages, so the watchdog starts in 20 ms and stays at about 8 MiB.
        arguments = [sys.executable, "-I", "-S", watchdog.__file__, str(self._grace_s), str(self.output_path)]
        self._watchdog = subprocess.Popen(
            [*arguments, *self.command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=self._cwd,
            pass_fds=self._keep_open,
            start_new_session=True,  # Ctrl-C is for the owner, who stops its work first.
        )
        pid = _stream(self._watchdog.stdout).readline()
        self._pid = int(pid) if pid.strip() else None
        try:
            self._wait_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def _wait_ready(self) -> None:
        deadline = time.monotonic() + self._start_timeout_s
        while True:
            if not self.running:
                code = self._watchdog.returncode if self._watchdog is not None else None
                raise JavaProcessError(self._explain(f"ended with exit status {code} before it was ready"))
            if self._ready():
                return
            if time.monotonic() > deadline:
                raise JavaProcessError(self._explain(f"was not ready within {self._start_timeout_s:g} s"))
            time.sleep(_POLL_S)

    def _explain(self, what: str) -> str:
        shown = [
            f"{path}:\n{tail}" for path, since in self._log_sizes.items() if (tail := last_lines(path, since=since))
        ]
        return "\n".join([f"{self.name} {what}; its last lines:", *(shown or ["(it wrote none)"])])

    def stop(self) -> None:
        """Stops the JVM: SIGTERM, then SIGKILL after the grace time. Stopping what doesn't run does nothing."""
        process, self._watchdog, self._pid = self._watchdog, None, None
        if process is None:
            return
        _stream(process.stdin).close()
        try:
            process.wait(self._grace_s + 10)
        except subprocess.TimeoutExpired:
            process.kill()  # The kernel takes the JVM down with it.
            process.wait()
        _stream(process.stdout).close()

    def kill(self) -> None:
        """SIGKILLs the JVM, as a crash would, and waits for its end."""
        process = self._watchdog
        if process is not None:
            os.kill(self.pid, signal.SIGKILL)
            process.wait()
        self.stop()

    def __enter__(self) -> Self:
        """Starts the JVM."""
        return self.start()

    def __exit__(self, *_: object) -> None:
        """Stops the JVM."""
        self.stop()


def _stream(stream: IO[bytes] | None) -> IO[bytes]:
    assert stream is not None
    return stream
