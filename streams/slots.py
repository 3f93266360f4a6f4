"""Slots: which instance of a group this process is, the same again after a restart.

In: a folder and a group. Out: the lowest slot that no living process on this machine holds. The kernel frees the
lock when its process ends, by SIGKILL too. Processes on other machines need slots of their own, such as a
StatefulSet's ordinals.
"""

import fcntl
import os
from pathlib import Path
from typing import Final, Self

from streams.errors import NoFreeSlotError

__all__ = ["SlotLock"]

_MAX_SLOTS: Final = 1024


class SlotLock:
    """Holds a slot of ``group`` from construction until :meth:`release` or the process's end.

    Raises:
        NoFreeSlotError: all of the first 1,024 are held.
    """

    def __init__(self, data_dir: Path, group: str) -> None:
        folder = data_dir / "slots"
        folder.mkdir(parents=True, exist_ok=True)
        for slot in range(_MAX_SLOTS):
            descriptor = os.open(folder / f"{group}-{slot}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                continue
            self.slot = slot
            self._descriptor: int | None = descriptor
            return
        raise NoFreeSlotError(f"all {_MAX_SLOTS} slots of {group} in {folder} are held by living processes")

    def release(self) -> None:
        """Free the slot. The file stays: removing it would let two processes lock two files of one name."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> Self:
        """The lock itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Free the slot."""
        self.release()
