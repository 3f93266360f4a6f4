"""Records on disk in parts by the hash of their group, so that a log of any length is joined in little memory.

In: records in any order, each with the hash of its group (a Grace hash join: what belongs together is in one part).
Out: one part after the other, its groups in order of their hashes, each with its records in the order in which they
came. Parts are ranges of that hash, so the order of all groups does not depend on how many parts there are.
"""

import gc
import marshal
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any, BinaryIO, Final, Self

__all__ = ["Group", "Spool", "group_hash", "read_part", "seldom_collecting"]

Group = tuple[bytes, list[Any]]
"""A group's hash and its items."""

_BLOCK: Final = 64
_BLOCK_BYTES: Final = 262_144
_MOST_PARTS: Final = 256
_LENGTH: Final = struct.Struct("<Q")


@contextmanager
def seldom_collecting() -> Iterator[None]:
    """Without the garbage collector: what is made of records dies by itself, and to look for cycles among all of them
    again and again takes a tenth of the time.
    """
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def group_hash(name: bytes) -> bytes:
    """What groups are ordered by: the SHA-256 of their names."""
    return sha256(name).digest()


class Spool:
    """Parts in a folder of its own under ``folder`` (None: the system's for temporary files), gone when it is closed.

    ``items`` is how many are expected; a part then holds about ``a_part`` of them. Items are tuples of what
    :mod:`marshal` writes: numbers, strings, bytes, tuples, lists, None. A context manager.
    """

    def __init__(self, items: int, *, folder: Path | None = None, a_part: int = 20_000) -> None:
        wanted, self._shift = max(1, min(_MOST_PARTS, items // a_part)), 16
        while 1 << (16 - self._shift) < wanted:
            self._shift -= 1
        self._folder = TemporaryDirectory(prefix="magnatronic-replay-", dir=folder)
        count = 1 << (16 - self._shift)
        self._paths = [Path(self._folder.name) / f"part-{number:04}" for number in range(count)]
        self._files: list[BinaryIO | None] = [None] * count
        self._blocks: list[list[Any]] = [[] for _ in range(count)]
        self._sizes = [0] * count
        self.items = 0

    def add(self, group: bytes, item: Any, size: int = 0) -> None:
        """Add ``item``, of about ``size`` bytes, to the group of this hash."""
        number = int.from_bytes(group[:2], "big") >> self._shift
        block = self._blocks[number]
        block.append((group, item))
        self.items += 1
        self._sizes[number] += size
        if len(block) >= _BLOCK or self._sizes[number] > _BLOCK_BYTES:
            self._write(number)

    def parts(self) -> list[Path]:
        """Write what is left, and give the files of the parts that hold something, in order."""
        for number, block in enumerate(self._blocks):
            if block:
                self._write(number)
            if (file := self._files[number]) is not None:
                file.close()
        return [path for path, file in zip(self._paths, self._files, strict=True) if file is not None]

    def _write(self, number: int) -> None:
        file = self._files[number]
        if file is None:
            file = self._files[number] = open(self._paths[number], "wb")  # noqa: SIM115 - closed by parts or close
        data = marshal.dumps(self._blocks[number])
        file.write(_LENGTH.pack(len(data)))
        file.write(data)
        self._blocks[number], self._sizes[number] = [], 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files:
            if file is not None:
                file.close()
        self._folder.cleanup()


def read_part(path: Path) -> Sequence[Group]:
    """The groups of a part, in order of their hash."""
    groups: dict[bytes, list[Any]] = {}
    for group, item in _items(path):
        found = groups.get(group)
        if found is None:
            groups[group] = [item]
        else:
            found.append(item)
    return [(group, groups[group]) for group in sorted(groups)]


def _items(path: Path) -> Iterator[tuple[bytes, Any]]:
    with open(path, "rb") as file:
        while head := file.read(_LENGTH.size):
            yield from marshal.loads(file.read(_LENGTH.unpack(head)[0]))
