"""The worker and sink processes under test, and whoever runs them.

In: slots to start, kill, pause and stop. Out: processes, started again when they end by a fault that a restart helps
against, as an orchestrator does. A process that ends in any other way fails the run.
"""

import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import tests.chaos.harness.projection
import tests.chaos.harness.worker
from tests.chaos.harness.checks import ChaosError
from tests.chaos.harness.worker import FENCED, READY, RETRYABLE

__all__ = ["SINK", "WORKER", "Child", "Children", "last_lines"]

_CODES: Final = {FENCED: "fenced", RETRYABLE: "cluster error"}

_TELLING_S: Final = 1.0

WORKER: Final = tests.chaos.harness.worker.__name__
SINK: Final = tests.chaos.harness.projection.__name__


def last_lines(path: Path, count: int = 40) -> str:
    """The end of a process's log."""
    return "\n".join(path.read_text(errors="replace").splitlines()[-count:]) if path.exists() else ""


@dataclass(slots=True)
class Child:
    """A process and what is known of it. ``since`` is where its log begins in the slot's file."""

    process: subprocess.Popen[bytes]
    since: int
    stopping: bool = False


class Children:
    """The living processes by name. Only the thread that made this may start any: they end with their parent thread."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._commands: dict[str, list[str]] = {}
        self.living: dict[str, Child] = {}
        self._zombies: list[tuple[str, Child]] = []
        self.ends: dict[str, int] = {}
        """How often processes ended by themselves, by reason."""

    def log_path(self, name: str) -> Path:
        return self._logs / f"{name}.log"

    def start(self, name: str, module: str, argument: str) -> None:
        """Start ``module`` as ``name``, which runs again whenever it should."""
        assert name not in self.living, f"{name} runs already"
        self._commands[name] = [sys.executable, "-m", module, argument]
        path = self.log_path(name)
        with path.open("ab") as log:
            since = log.tell()
            process = subprocess.Popen(self._commands[name], stdout=log, stderr=log)
        self.living[name] = Child(process, since)

    def again(self, name: str) -> None:
        """Start ``name`` as it was started the last time."""
        _, _, module, argument = self._commands[name]
        self.start(name, module, argument)

    def kill(self, name: str) -> None:
        child = self.living.pop(name)
        child.process.kill()
        child.process.wait(20)

    def pause(self, name: str) -> None:
        self.living[name].process.send_signal(signal.SIGSTOP)

    def resume(self, name: str) -> None:
        self.living[name].process.send_signal(signal.SIGCONT)

    def set_aside(self, name: str) -> Child:
        """Take a paused process off its name, so that another can have it; :meth:`wake` lets it go on."""
        return self.living.pop(name)

    def wake(self, name: str, child: Child) -> None:
        """Let a process go on that was replaced: it must end by itself now, fenced."""
        self._zombies.append((name, child))
        child.process.send_signal(signal.SIGCONT)

    def terminate(self, name: str) -> None:
        """Ask ``name`` to stop gracefully; :meth:`stopped` tells when it has. It should be ready."""
        child = self.living[name]
        child.stopping = True
        child.process.send_signal(signal.SIGTERM)

    def stopped(self, name: str) -> bool:
        """Whether ``name`` has ended; to be asked until it is so.

        Raises:
            ChaosError: it ended badly.
        """
        code = self.living[name].process.poll()
        if code is None:
            return False
        del self.living[name]
        if code:  # It may have been fenced or cut off just then.
            self._ended_by_itself(name, code)
        return True

    def ready(self, name: str) -> bool:
        """Whether the process has come so far that it can be stopped gracefully."""
        child = self.living[name]
        with self.log_path(name).open("rb") as log:
            log.seek(child.since)
            return f" {READY}\n".encode() in log.read(65_536)

    def tend(self) -> None:
        """Start again who ended by a fault.

        Raises:
            ChaosError: somebody ended in another way.
        """
        for name, child in list(self.living.items()):
            if child.stopping or (code := child.process.poll()) is None:
                continue
            self._ended_by_itself(name, code)
            del self.living[name]
            self.again(name)
        for name, child in list(self._zombies):
            if (code := child.process.poll()) is not None:
                self._ended_by_itself(f"replaced {name}", code, log=name)
                self._zombies.remove((name, child))

    @property
    def zombies(self) -> int:
        """How many replaced processes woke up and have not ended yet."""
        return len(self._zombies)

    def _ended_by_itself(self, name: str, code: int, *, log: str | None = None) -> None:
        if code not in _CODES:
            raise ChaosError(f"{name} ended with status {code}:\n{last_lines(self.log_path(log or name))}")
        reason = f"{name.rstrip('0123456789').rstrip('-')} {_CODES[code]}"
        self.ends[reason] = self.ends.get(reason, 0) + 1

    def tell(self) -> None:
        """Have the workers write into their logs what they are doing."""
        for asked in (signal.SIGUSR1, signal.SIGUSR2):
            for name, child in self.living.items():
                if name.startswith("worker-") and child.process.poll() is None and self.ready(name):
                    child.process.send_signal(asked)
            time.sleep(_TELLING_S)

    def end(self) -> None:
        """Kill whatever lives."""
        for child in [*self.living.values(), *(child for _, child in self._zombies)]:
            child.process.kill()
            child.process.wait(20)
        self.living.clear()
        self._zombies.clear()
