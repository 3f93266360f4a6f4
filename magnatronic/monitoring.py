"""The Monitor beside a process: its Faust worker as a child, kept alive.

In: settings, and where Kafka is. Out: :class:`MonitorProcess`, which runs ``faust -A streams.monitor worker`` in a
process of its own, as its users would, and starts it again when it ends. Faust has an event loop and signal handlers of
its own; in a child it can end, hang or eat memory without touching an agent. The child hangs on the same small watchdog
as the broker's JVM, so it ends with its owner however the owner ends.
"""

import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import orjson
from pydantic import SecretStr

from magnatronic.broker import watchdog
from magnatronic.broker.process import last_lines
from magnatronic.errors import PartFailedError
from magnatronic.settings import Settings
from streams.settings import AlertSettings, ClusterSettings, variable

__all__ = ["MonitorProcess"]

_GRACE_S: Final = 3.0
_FIRST_BACKOFF_S: Final = 1.0
_LAST_BACKOFF_S: Final = 60.0
_STEADY_S: Final = 120.0
_WRONG_SETTINGS: Final = 2
_LEVELS: Final = {"DEBUG": "debug", "INFO": "warn", "WARNING": "warn", "ERROR": "error"}
"""At INFO Faust prints its tables and assignments."""

log = logging.getLogger(__name__)


class MonitorProcess:
    """Runs a Monitor worker that ``instance`` names, its output in ``log_path``, until :meth:`stop`.

    ``on_failed`` is called in a thread when no restart helps: its settings are wrong.
    """

    def __init__(
        self,
        settings: Settings,
        servers: str,
        *,
        instance: str,
        log_path: Path,
        on_failed: Callable[[BaseException], None],
    ) -> None:
        self._environment = {
            **os.environ,
            **_environment_of(settings),
            variable("kafka_bootstrap_servers"): servers,
            variable("monitor_instance"): instance,
        }
        self._command = [
            *(sys.executable, "-m", "faust", "-A", "streams.monitor", "-l", _LEVELS[settings.log_level]),
            *("worker", "--without-web"),
        ]
        self._folder = settings.data_dir
        self._log_path = log_path
        self._on_failed = on_failed
        self._stop = threading.Event()
        self._child: subprocess.Popen[bytes] | None = None
        self._pid: int | None = None
        self._thread = threading.Thread(target=self._run, name="monitor keeper", daemon=True)

    @property
    def pid(self) -> int | None:
        """The worker's process id, None while it is not running."""
        return self._pid

    def start(self) -> None:
        """Start it. It takes its time; nothing waits for it."""
        self._log_path.parent.mkdir(parents=True, exist_ok=True)
        self._thread.start()

    def stop(self) -> None:
        """End it: SIGTERM, then SIGKILL. Nothing is lost by it."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        backoff_s = _FIRST_BACKOFF_S
        while not self._stop.is_set():
            started = time.monotonic()
            code = self._run_once()
            if self._stop.is_set():
                return
            if code == _WRONG_SETTINGS:
                said = last_lines(self._log_path, 1)
                log.error("the monitor is not started again: %s", said)
                self._on_failed(PartFailedError(f"the monitor can't start: {said}"))
                return
            if time.monotonic() - started > _STEADY_S:
                backoff_s = _FIRST_BACKOFF_S
            log.warning(
                "the monitor ended with %s and starts again in %.0f s; its log is %s", code, backoff_s, self._log_path
            )
            self._stop.wait(backoff_s)
            backoff_s = min(backoff_s * 2, _LAST_BACKOFF_S)

    def _run_once(self) -> int:
        """Run a worker until it ends, or until it is to stop; its exit status."""
        arguments = [sys.executable, "-I", "-S", watchdog.__file__, str(_GRACE_S), str(self._log_path)]
        with subprocess.Popen(
            [*arguments, *self._command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=self._folder,
            env=self._environment,
            start_new_session=True,  # Ctrl-C is for the owner.
        ) as child:
            assert child.stdin is not None
            assert child.stdout is not None
            pid = child.stdout.readline().strip()
            self._pid = int(pid) if pid else None
            while child.poll() is None:
                if self._stop.wait(0.2):
                    child.stdin.close()
                    child.wait(_GRACE_S + 10.0)
            self._pid = None
            return child.returncode


def _environment_of(settings: Settings) -> dict[str, str]:
    """The variables that give the worker what ``settings`` say, wherever they came from."""
    found = {}
    for name in (*ClusterSettings.model_fields, *AlertSettings.model_fields):
        value = getattr(settings, name)
        if isinstance(value, SecretStr):
            value = value.get_secret_value()
        if value is not None:
            found[variable(name)] = orjson.dumps(value).decode() if isinstance(value, dict) else str(value)
    return found
