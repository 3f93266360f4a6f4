"""The journal of a what-if's own calls: what was paid for is on disk before it is used, and never paid for twice.

In: an effect and whose call it was. Out: a line in ``calls.jsonl``, written and synced (several at once, where several
wait) before :meth:`CallLog.keep` returns. After a crash the file is read again; a last line that is torn is cut off.
"""

import asyncio
import base64
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, NamedTuple
from zlib import crc32

import orjson

from replay.errors import WhatIfError
from schemas.codec import Codec
from schemas.events import Effect
from schemas.metadata import Envelope
from schemas.record import Record

__all__ = ["CallKey", "CallLog", "Kept"]

_TOPIC: Final = "effects"


class CallKey(NamedTuple):
    """Whose call it was: the task, the step (agent, event), in which attempt, and the call's identity in it."""

    task: str
    agent: str
    event: str
    attempt: int
    kind: str
    scope: str
    hashed: str
    occurrence: int


class Kept(NamedTuple):
    """A call's result, and its place in the order in which results came."""

    number: int
    effect: Effect


class CallLog:
    """All calls that one what-if made. Use it on one event loop; close it at the end.

    Raises:
        WhatIfError: the file is damaged in its middle.
    """

    def __init__(self, path: Path, codec: Codec) -> None:
        self._codec = codec
        self._path = path
        self._known: dict[CallKey, Kept] = {}
        self._waiting: list[tuple[bytes, asyncio.Future[None]]] = []
        self._writing: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="what-if-calls")
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        self._load()

    def __len__(self) -> int:
        """How many calls are kept."""
        return len(self._known)

    def find(self, key: CallKey) -> Kept | None:
        """What came of the call, if it was made before."""
        return self._known.get(key)

    def effects(self) -> list[Effect]:
        """What came of all calls."""
        return [kept.effect for kept in self._known.values()]

    async def keep(self, key: CallKey, made: Envelope) -> Kept:
        """Have the call's result on disk."""
        assert isinstance(made.event, Effect)
        value, headers = self._codec.encode(made.event, made.metadata)
        told = {
            "key": tuple(key),
            "value": base64.b64encode(value).decode(),
            "headers": [[name, base64.b64encode(content).decode()] for name, content in headers],
        }
        raw = orjson.dumps(told)
        kept = self._known[key] = Kept(len(self._known), made.event)
        written = asyncio.get_running_loop().create_future()
        self._waiting.append((b"%08x %b\n" % (crc32(raw), raw), written))
        if self._writing is None:
            self._writing = asyncio.create_task(self._write())
        await written
        return kept

    async def _write(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while self._waiting:
                batch, self._waiting = self._waiting, []
                try:
                    await loop.run_in_executor(self._thread, self._put, [line for line, _ in batch])
                except OSError as error:
                    for _, written in batch:
                        if not written.done():
                            written.set_exception(WhatIfError(f"{self._path}: {error}; make room, then run it again"))
                else:
                    for _, written in batch:
                        if not written.done():
                            written.set_result(None)
        finally:
            self._writing = None

    def _put(self, lines: Sequence[bytes]) -> None:
        raw = memoryview(b"".join(lines))
        while raw:
            raw = raw[os.write(self._file, raw) :]
        os.fdatasync(self._file)

    def _load(self) -> None:
        raw = self._path.read_bytes()
        at = 0
        for line in raw.splitlines(keepends=True):
            body = line[9:-1]
            if not line.endswith(b"\n") or line[:8] != b"%08x" % crc32(body):
                if at + len(line) < len(raw):
                    raise WhatIfError(
                        f"{self._path} is damaged at byte {at}; move its folder away, and the what-if starts anew"
                    )
                os.ftruncate(self._file, at)  # the call that was under way when the process ended
                return
            self._take(body)
            at += len(line)

    def _take(self, body: bytes) -> None:
        told = orjson.loads(body)
        headers = [(name, base64.b64decode(content)) for name, content in told["headers"]]
        record = Record(_TOPIC, 0, len(self._known), 0, None, base64.b64decode(told["value"]), headers)
        effect = self._codec.decode(record).event
        assert isinstance(effect, Effect)
        self._known[CallKey(*told["key"])] = Kept(len(self._known), effect)

    def close(self) -> None:
        """Let go of the file."""
        self._thread.shutdown()
        os.close(self._file)
