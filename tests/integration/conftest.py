"""A running system, used as its users do: the console script in processes of their own."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import pytest

from magnatronic.cli import main
from magnatronic.control import call
from tests.conftest import SYSTEM_FILES
from tests.support.otlp import Collector

SCRIPT = Path(sys.executable).with_name("magnatronic")

CORPUS = {
    "widgets.md": "# Widgets\n\nA widget is a small device that turns heat into light. Widgets were invented in 1901 "
    "by Ada Lamp.\n\n## Care\n\nClean a widget with a dry cloth. Never put a widget under water.\n",
    "gadgets.rst": "Gadgets\n=======\n\nA gadget is a tool that counts the steps of a dog. Gadgets run for nine days "
    "on one battery.\n",
    "sprockets.txt": "A sprocket is a wheel with teeth that meshes with a chain. The largest sprocket weighs two "
    "tons.\n",
    "gizmos.html": "<html><head><title>Gizmos</title><script>var x = 1;</script></head><body><h1>Gizmos</h1><p>A "
    "gizmo is a valve that opens when it rains. A gizmo costs four euros.</p></body></html>",
}


def clean_environment(**settings: str) -> dict[str, str]:
    """The environment without settings and keys of whoever runs the tests."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("MAGNATRONIC_") and not name.endswith("_API_KEY") and name != "OPENAI_BASE_URL"
    }
    return {**kept, **settings}


def magnatronic(*arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(
        [str(SCRIPT), *arguments],
        capture_output=True,
        text=True,
        timeout=90,
        env=clean_environment(**settings),
        check=False,
    )


class UpProcess:
    """``magnatronic up`` on a data folder."""

    def __init__(self, data_dir: Path, settings: Mapping[str, str] | None = None) -> None:
        self.data_dir = data_dir
        self._settings = dict(settings or {})
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> dict[str, Any]:
        """Start it; where it says that it is, when it is ready."""
        self._process = subprocess.Popen(
            [str(SCRIPT), "up", "--json", "--data-dir", str(self.data_dir)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=clean_environment(**self._settings),
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            _, errors = self._process.communicate()
            raise AssertionError(f"magnatronic up ended with {self._process.returncode}: {errors}")
        info: dict[str, Any] = json.loads(line)
        return info

    def status(self) -> dict[str, Any]:
        """What the system says of itself."""
        status: dict[str, Any] = call(self.data_dir, "status")
        return status

    def kill(self) -> None:
        """SIGKILL the process and the broker's JVM in the same moment, and wait until both are gone."""
        assert self._process is not None
        broker = self.status()["broker_pid"]
        os.kill(self._process.pid, signal.SIGKILL)
        os.kill(broker, signal.SIGKILL)
        self.end()

    def stop(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """Ask it to stop; exit code and standard error."""
        assert self._process is not None
        self._process.send_signal(number)
        return self.end()

    def end(self) -> tuple[int, str]:
        """Wait for its end; exit code and standard error."""
        process, self._process = self._process, None
        assert process is not None
        _, errors = process.communicate(timeout=60)
        return process.returncode, errors

    @property
    def running(self) -> bool:
        """Whether it was started and not yet stopped."""
        return self._process is not None

    def close(self) -> None:
        """Leave nothing behind, whatever happened."""
        if self._process is not None:
            self._process.kill()
            self.end()


class SystemForTests:
    """The session's system, its corpus ingested."""

    def __init__(self, up: UpProcess, corpus: Path) -> None:
        self.up = up
        self.data_dir = up.data_dir
        self.corpus = corpus

    def start(self, command: str, *arguments: str) -> "subprocess.Popen[str]":
        """A command in a process of its own, talking to this system."""
        return subprocess.Popen(
            [str(SCRIPT), *command.split(), "--data-dir", str(self.data_dir), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=clean_environment(),
        )

    def run(self, command: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
        """A command run to its end here, which saves a second of start; as a process would have ended and said."""
        arguments = (*command.split(), "--data-dir", str(self.data_dir), *arguments)
        code: Any = None
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as errors:
            try:
                main(arguments)
            except SystemExit as ended:
                code = ended.code
        return subprocess.CompletedProcess(list(arguments), code, out.getvalue(), errors.getvalue())

    def end(self) -> None:
        """Stop it; it must end well. Stopping what was stopped does nothing."""
        if self.up.running:
            code, errors = self.up.stop()
            assert code == 0, errors
            assert "Traceback" not in errors


RUNNING: Final = pytest.StashKey[SystemForTests]()


def write_corpus(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in CORPUS.items():
        (folder / name).write_text(text)
    return folder


@pytest.fixture(scope="session")
def collector() -> Iterator[Collector]:
    """Gets the session's system's traces."""
    collector = Collector()
    yield collector
    collector.close()


@pytest.fixture(scope="session")
def system(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, collector: Collector
) -> Iterator[SystemForTests]:
    folder = tmp_path_factory.mktemp("system")
    traced = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url, "OTEL_BSP_SCHEDULE_DELAY": "200"}
    up = UpProcess(folder / "data", traced)
    try:
        up.start()
        running = SystemForTests(up, write_corpus(folder / "corpus"))
        done = magnatronic("ingest", "--data-dir", str(up.data_dir), str(running.corpus))
        assert done.returncode == 0, done.stderr
        request.session.stash[RUNNING] = running
        yield running
        running.end()
    finally:
        up.close()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """The session's system ends with the last test that may use it."""
    running = item.session.stash.get(RUNNING, None)
    if running is not None and (nextitem is None or nextitem.path.name not in SYSTEM_FILES):
        running.end()


@pytest.fixture
def up_on() -> Iterator[Any]:
    """Makes an :class:`UpProcess` on a folder; all are gone when the test is over."""
    made: list[UpProcess] = []

    def make(data_dir: Path, **settings: str) -> UpProcess:
        made.append(UpProcess(data_dir, settings))
        return made[-1]

    yield make
    for process in made:
        process.close()


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A folder of four small documents, one of each kind of text."""
    return write_corpus(tmp_path / "corpus")


@pytest.fixture
def system_on() -> Any:
    """Commands for the system that an :class:`UpProcess` runs."""
    return lambda up: SystemForTests(up, up.data_dir)
