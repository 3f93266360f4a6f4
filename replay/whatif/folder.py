"""A what-if's own folder: what it is, the calls that it made, and each task's result as soon as there is one.

In: a manifest, results. Out: files that are whole or not there: each is written beside its place, synced, and moved
there. One process at a time has the folder. A run that was killed goes on with the tasks that its manifest names.
"""

import fcntl
import os
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import orjson

from replay.errors import WhatIfError
from replay.whatif.result import Status, TaskResult, from_dict

__all__ = ["Folder"]

_AGAIN = frozenset({Status.BUDGET})
"""Results that another run, with more to spend, may better."""


class Folder:
    """The folder of one what-if. A context manager that holds its lock.

    Raises:
        WhatIfError: another process has it, or it can't be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._results = path / "tasks"
        self._lock: int | None = None

    def __enter__(self) -> Self:
        try:
            self._results.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise WhatIfError(f"the folder {self.path} can't be used: {error}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            self._lock = None
            raise WhatIfError(f"another process runs this what-if, in {self.path}; let it end, or end it") from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    @property
    def calls(self) -> Path:
        """Where its calls are kept."""
        return self.path / "calls.jsonl"

    def manifest(self, make: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """What it is: as an earlier run wrote it down, else as ``make`` says."""
        path = self.path / "manifest.json"
        try:
            found: dict[str, Any] = orjson.loads(path.read_bytes())
        except FileNotFoundError:
            self.write("manifest.json", _json(make()))
            found = orjson.loads(path.read_bytes())
        return found

    def result(self, task_id: str) -> TaskResult | None:
        """What an earlier run found of the task; None where it has to be done, or done again."""
        try:
            found = from_dict(orjson.loads(self._path(task_id).read_bytes()))
        except FileNotFoundError:
            return None
        return None if found.status in _AGAIN else found

    def keep(self, result: TaskResult) -> None:
        """Have a task's result on disk."""
        self._put(self._path(result.task_id), _json(result.as_dict()))

    def write(self, name: str, content: bytes) -> Path:
        """Write one file of it, whole."""
        return self._put(self.path / name, content)

    def _path(self, task_id: str) -> Path:
        return self._results / f"{sha256(task_id.encode()).hexdigest()[:32]}.json"

    def _put(self, path: Path, content: bytes) -> Path:
        beside = path.with_name(f"{path.name}.part")
        try:
            with beside.open("wb") as file:
                file.write(content)
                file.flush()
                os.fdatasync(file.fileno())
            beside.replace(path)
        except OSError as error:
            raise WhatIfError(f"{path} can't be written: {error}; make room, then run it again") from error
        return path


def _json(value: Any) -> bytes:
    return orjson.dumps(value, option=orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS)
