"""A data folder's lock: one writer at a time.

In: a lock file's path. Out: :class:`FolderLock`, held by this process and by the JVM that inherits it, so that it is
free only when both are gone.
"""

import fcntl
import os
import time
from pathlib import Path

import psutil

from magnatronic.broker.errors import DataFolderInUseError

__all__ = ["FolderLock"]


class FolderLock:
    """An flock that the JVM inherits: it is free when this process *and* the JVM are gone, so data has one writer."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor: int | None = None

    @property
    def descriptor(self) -> int:
        """The file descriptor of the held lock."""
        assert self._descriptor is not None
        return self._descriptor

    def acquire(self, patience_s: float = 20.0) -> None:
        """Takes the lock; waits only where the owner is dead and its JVM still on the way out.

        Raises:
            DataFolderInUseError: a living process has it.
        """
        if self._descriptor is not None:
            raise DataFolderInUseError(f"this broker runs already on {self._path.parent}")
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        deadline = time.monotonic() + patience_s
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                owner = os.pread(descriptor, 32, 0).decode().strip()
                if _alive(owner) or time.monotonic() > deadline:
                    os.close(descriptor)
                    raise DataFolderInUseError(
                        f"the data folder {self._path.parent} is in use by process {owner or 'unknown'}; "
                        "stop that one, or set another MAGNATRONIC_DATA_DIR"
                    ) from None
                time.sleep(0.1)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        self._descriptor = descriptor

    def release(self) -> None:
        """Frees the lock, if held."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)


def _alive(pid: str) -> bool:
    """Whether a process with this id runs; one that is dead but not yet waited for by its parent doesn't."""
    try:
        return bool(psutil.Process(int(pid)).status() != psutil.STATUS_ZOMBIE)
    except (ValueError, psutil.NoSuchProcess):
        return False
