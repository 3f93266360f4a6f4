"""The control socket: requests, refusals, long paths, leftovers."""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from magnatronic.control import ControlServer, call, socket_path
from magnatronic.errors import AlreadyRunningError, ControlError, NotRunningError, QueryRefusedError, WrongInputError
from magnatronic.system import FolderLock


async def echo(request: Mapping[str, Any]) -> Any:
    return {"said": request["word"]}


async def refuse(_: Mapping[str, Any]) -> Any:
    raise QueryRefusedError("no such table")


async def break_down(_: Mapping[str, Any]) -> Any:
    raise ZeroDivisionError("by zero")


async def dawdle(_: Mapping[str, Any]) -> Any:
    await asyncio.sleep(60)


Serve = Callable[[Path], AbstractAsyncContextManager[Path]]


@pytest.fixture
def serve() -> Serve:
    @asynccontextmanager
    async def serve(data_dir: Path) -> AsyncIterator[Path]:
        await asyncio.to_thread(data_dir.mkdir, parents=True, exist_ok=True)
        operations = {"echo": echo, "refuse": refuse, "break": break_down, "dawdle": dawdle}
        server = ControlServer(socket_path(data_dir), operations)
        await server.start()
        try:
            yield data_dir
        finally:
            await server.stop()

    return serve


async def ask(data_dir: Path, op: str, **arguments: Any) -> Any:
    return await asyncio.to_thread(call, data_dir, op, **arguments)


async def test_an_operation_answers(serve: Serve, tmp_path: Path) -> None:
    async with serve(tmp_path):
        assert await ask(tmp_path, "echo", word="ä\n") == {"said": "ä\n"}


async def test_errors_come_back_as_what_they_are(serve: Serve, tmp_path: Path) -> None:
    async with serve(tmp_path):
        with pytest.raises(QueryRefusedError, match="no such table"):
            await ask(tmp_path, "refuse")
        with pytest.raises(ControlError, match="ZeroDivisionError: by zero"):
            await ask(tmp_path, "break")
        with pytest.raises(WrongInputError, match="an op of break, dawdle, echo, refuse"):
            await ask(tmp_path, "dance")
        assert await ask(tmp_path, "echo", word="still here") == {"said": "still here"}


@pytest.mark.parametrize("line", [b"{\n", b"[]\n", b'{"op": 1}\n', b'"echo"\n', b"\xff\xfe\n"])
async def test_nonsense_is_refused_and_does_no_harm(serve: Serve, tmp_path: Path, line: bytes) -> None:
    def send() -> bytes:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(socket_path(tmp_path)))
            connection.sendall(line)
            return connection.makefile("rb").readline()

    async with serve(tmp_path):
        assert b'"kind":"WrongInputError"' in await asyncio.to_thread(send)
        assert await ask(tmp_path, "echo", word="x") == {"said": "x"}


async def test_an_endless_line_is_cut_off(serve: Serve, tmp_path: Path) -> None:
    def send() -> bytes:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(socket_path(tmp_path)))
            try:
                for _ in range(64):
                    connection.sendall(b"x" * 65_536)
                return connection.recv(1)
            except ConnectionError:
                return b""

    async with serve(tmp_path):
        assert await asyncio.to_thread(send) == b""
        assert await ask(tmp_path, "echo", word="x") == {"said": "x"}


async def test_no_answer_in_time_is_an_error_and_stopping_waits_for_nobody(serve: Serve, tmp_path: Path) -> None:
    async with serve(tmp_path):
        with pytest.raises(ControlError, match=r"gave no answer to 'dawdle' within 0\.2 s"):
            await ask(tmp_path, "dawdle", timeout=0.2)
        waiting = asyncio.create_task(ask(tmp_path, "dawdle"))
        await asyncio.sleep(0.1)
    with pytest.raises(ControlError, match=r"stopped while it was asked|went away"):
        await waiting


async def test_nobody_listens_before_and_after(serve: Serve, tmp_path: Path) -> None:
    with pytest.raises(NotRunningError, match="start it with: magnatronic up"):
        await ask(tmp_path, "echo", word="x")
    async with serve(tmp_path):
        pass
    with pytest.raises(NotRunningError):
        await ask(tmp_path, "echo", word="x")
    assert not socket_path(tmp_path).exists()


async def test_a_socket_left_by_a_killed_process_is_replaced(serve: Serve, tmp_path: Path) -> None:
    left = socket.socket(socket.AF_UNIX)
    left.bind(str(socket_path(tmp_path)))
    left.close()
    with pytest.raises(NotRunningError):
        await ask(tmp_path, "echo", word="x")
    async with serve(tmp_path):
        assert await ask(tmp_path, "echo", word="x") == {"said": "x"}


async def test_only_its_user_can_connect(serve: Serve, tmp_path: Path) -> None:
    async with serve(tmp_path):
        assert socket_path(tmp_path).stat().st_mode & 0o077 == 0


async def test_a_long_data_folder_has_its_socket_elsewhere(serve: Serve, tmp_path: Path) -> None:
    folder = tmp_path / ("d" * 100) / ("e" * 100)
    path = socket_path(folder)
    assert len(str(path).encode()) < 108
    assert path != socket_path(folder.with_name("f" * 100))
    async with serve(folder):
        assert await ask(folder, "echo", word="x") == {"said": "x"}


async def test_a_folder_that_others_can_write_holds_no_socket(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(ControlError, match="writable by all"):
        async with serve(tmp_path / "open"):
            pass


def test_a_folder_has_one_owner(tmp_path: Path) -> None:
    first, second = FolderLock(tmp_path), FolderLock(tmp_path)
    first.acquire()
    with pytest.raises(AlreadyRunningError, match=r"a Magnatronic runs on .* already \(process \d+\)"):
        second.acquire()
    first.release()
    second.acquire()
    second.release()
