"""What every worker is told, and how it ends with its parent.

In: one JSON argument. Out: :class:`WorkerTask`. A worker runs until SIGTERM, or until its standard input closes, which
happens when the benchmark dies.
"""

import os
import signal
import sys
import threading
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import orjson

__all__ = ["WorkerTask", "end_with_parent"]


@dataclass(frozen=True, slots=True)
class WorkerTask:
    """Read ``source`` from its start as consumer group ``group``, and write one output an event to ``target``.

    ``options`` are for the worker that knows them.
    """

    bootstrap_servers: str
    group: str
    source: str
    target: str
    partitions: int
    folder: str
    options: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> str:
        """The worker's argument."""
        return orjson.dumps(asdict(self)).decode()

    @classmethod
    def from_arguments(cls) -> Self:
        """The task that this process was started with."""
        return cls(**orjson.loads(sys.argv[1]))


def end_with_parent() -> None:
    """Send SIGTERM to this process when standard input closes."""

    def wait() -> None:
        # The raw descriptor: a daemon thread that holds the lock of sys.stdin makes the interpreter's exit fail.
        while os.read(0, 1):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, name="parent-watch", daemon=True).start()
