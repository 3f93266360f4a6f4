"""The Unix socket through which other processes reach what a running system owns.

In: one JSON object a line, ``{"op": name, ...arguments}``. Out: one line back, ``{"ok": true, "result": ...}`` or
``{"ok": false, "error": message, "kind": error class}``. The socket lies in the data folder, or, where its path would
be longer than the kernel takes (108 bytes), in a private folder of the user under a name derived from the data folder.
"""

import asyncio
import contextlib
import errno
import hashlib
import logging
import os
import socket
import stat
import tempfile
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, Final

import orjson

from magnatronic import errors
from magnatronic.errors import ControlError, MagnatronicError, NotRunningError, WrongInputError

__all__ = ["ControlServer", "Operation", "call", "socket_path"]

_LOGGER: Final = logging.getLogger(__name__)
_MAX_PATH_BYTES: Final = 107
_MAX_REQUEST_BYTES: Final = 1_048_576
_CONNECT_TIMEOUT_S: Final = 5.0

Operation = Callable[[Mapping[str, Any]], Awaitable[Any]]
"""Takes the request, gives what JSON can hold."""


def socket_path(data_dir: Path) -> Path:
    """Where the system on ``data_dir`` listens; the same for every process of the user."""
    path = data_dir.absolute() / "magnatronic.sock"
    if len(os.fsencode(path)) <= _MAX_PATH_BYTES:
        return path
    digest = hashlib.sha256(os.fsencode(data_dir.resolve())).hexdigest()[:24]
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if not runtime or len(os.fsencode(runtime)) > _MAX_PATH_BYTES - 60:
        runtime = "/tmp" if len(tempfile.gettempdir()) > _MAX_PATH_BYTES - 60 else tempfile.gettempdir()
    return Path(runtime) / f"magnatronic-{os.getuid()}" / f"{digest}.sock"


class ControlServer:
    """Answers requests with ``operations`` until it is stopped. Only the user who started it can connect."""

    def __init__(self, path: Path, operations: Mapping[str, Operation]) -> None:
        self.path = path
        self._operations = operations
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Listen. A socket that a killed process left behind is replaced: who holds the data folder's lock owns it.

        Raises:
            ControlError: the folder of the socket belongs to somebody else, or the socket can't be made.
        """
        _private_folder(self.path.parent)
        self.path.unlink(missing_ok=True)
        before = os.umask(0o177)
        try:
            self._server = await asyncio.start_unix_server(self._accept, self.path, limit=_MAX_REQUEST_BYTES)
        except OSError as error:
            raise ControlError(f"can't listen on {self.path}: {error.strerror or error}") from error
        finally:
            os.umask(before)

    async def stop(self) -> None:
        """Finish nothing, close everything, remove the socket."""
        if self._server is None:
            return
        self._server.close()
        for connection in list(self._connections):
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        self.path.unlink(missing_ok=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            while line := await reader.readline():
                writer.write(await self._answer(line) + b"\n")
                await writer.drain()
        except (ConnectionError, ValueError, asyncio.CancelledError) as error:  # ValueError: a line over the limit
            _LOGGER.debug("a control connection ended: %r", error)
        finally:
            self._connections.discard(task)
            with contextlib.suppress(OSError, RuntimeError):
                writer.close()

    async def _answer(self, line: bytes) -> bytes:
        try:
            request = orjson.loads(line)
            if not isinstance(request, dict) or request.get("op") not in self._operations:
                raise WrongInputError(f"a request is a JSON object with an op of {', '.join(sorted(self._operations))}")
            result = await self._operations[request["op"]](request)
            return orjson.dumps({"ok": True, "result": result}, default=_as_json, option=orjson.OPT_NON_STR_KEYS)
        except orjson.JSONDecodeError as error:
            return _refusal(WrongInputError(f"a request is one line of JSON: {error}"))
        except MagnatronicError as error:
            return _refusal(error)
        except Exception as error:  # whatever goes wrong is the caller's to know, and never ends the server
            _LOGGER.exception("a control request failed")
            return _refusal(ControlError(f"{type(error).__name__}: {error}"))


def call(data_dir: Path, op: str, *, timeout: float | None = 60.0, **arguments: Any) -> Any:
    """Ask the system that runs on ``data_dir``; its result. ``timeout`` is in seconds, None waits for ever.

    Raises:
        NotRunningError: nothing runs there.
        ControlError: it gave no answer, or failed; or what its ``kind`` names.
    """
    path = socket_path(data_dir)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(_CONNECT_TIMEOUT_S)
        try:
            connection.connect(os.fspath(path))
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ECONNREFUSED, errno.ENOTDIR):
                raise NotRunningError(
                    f"no Magnatronic is running on {data_dir}; start it with: magnatronic up"
                ) from None
            raise ControlError(f"can't connect to {path}: {error.strerror or error}") from error
        connection.settimeout(timeout)
        try:
            connection.sendall(orjson.dumps({"op": op, **arguments}) + b"\n")
            with connection.makefile("rb") as lines:
                line = lines.readline()
        except TimeoutError:
            raise ControlError(f"the system on {data_dir} gave no answer to {op!r} within {timeout:g} s") from None
        except OSError as error:
            raise ControlError(f"the system on {data_dir} went away: {error.strerror or error}") from error
    if not line:
        raise ControlError(f"the system on {data_dir} stopped while it was asked")
    answer = orjson.loads(line)
    if answer["ok"]:
        return answer["result"]
    kind = getattr(errors, str(answer["kind"]), ControlError)
    raise kind(answer["error"])


def _refusal(error: MagnatronicError) -> bytes:
    return orjson.dumps({"ok": False, "error": str(error), "kind": type(error).__name__})


def _as_json(value: Any) -> Any:
    return value.hex() if isinstance(value, bytes) else str(value)


def _private_folder(folder: Path) -> None:
    """Make ``folder`` if it is not there, for this user alone; refuse one that others could put a socket into."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    seen = folder.stat()
    if seen.st_uid != os.getuid() or stat.S_IMODE(seen.st_mode) & 0o002:
        raise ControlError(f"{folder} belongs to another user or is writable by all; remove it, or use another folder")
