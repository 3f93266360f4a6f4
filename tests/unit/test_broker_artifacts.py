"""Fetching pinned files: checked, atomic, shared by processes, offline afterwards. The repository is a local server."""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from magnatronic.broker.artifacts import Artifact, ArtifactSet, cache_folder
from magnatronic.broker.errors import ArtifactError
from magnatronic.broker.lock import KAFKA_VERSION, ROOTS
from magnatronic.broker.node import KAFKA_JARS


class _Handler(SimpleHTTPRequestHandler):
    served: list[str]

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.served.append(self.path)
        super().do_GET()


class Repository:
    """A Maven repository on a free port, with a home folder whose settings name it as the only one."""

    def __init__(self, folder: Path, home: Path) -> None:
        self.folder = folder
        self.home = home
        self.served: list[str] = []
        handler = type("Handler", (_Handler,), {"served": self.served})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(folder)))
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,))
        self.thread.start()
        home.mkdir(exist_ok=True)
        (home / ".jgorc").write_text(f"[repositories]\nlocal = http://127.0.0.1:{self.server.server_port}\n")

    def add(self, coordinate: str, content: bytes) -> Artifact:
        artifact = Artifact(coordinate, hashlib.sha256(content).hexdigest(), len(content))
        group, name, version, _, _ = artifact.parts
        place = self.folder.joinpath(*group.split("."), name, version)
        place.mkdir(parents=True, exist_ok=True)
        (place / artifact.filename).write_bytes(content)
        return artifact

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Repository]:
    (tmp_path / "remote").mkdir()
    made = Repository(tmp_path / "remote", tmp_path / "home")
    monkeypatch.setenv("HOME", str(made.home))
    monkeypatch.delenv("M2_REPO", raising=False)
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    yield made
    made.close()


@pytest.fixture
def two(repository: Repository) -> ArtifactSet:
    jar = repository.add("org.example:one:1.0", b"first" * 1000)
    archive = repository.add("org.example:two:2.0:all:tar.gz", b"second" * 1000)
    return ArtifactSet("a test", (jar, archive))


def test_fetches_once_and_needs_no_network_afterwards(repository: Repository, two: ArtifactSet, tmp_path: Path) -> None:
    folder = two.fetch(tmp_path / "jars")
    assert sorted(path.name for path in folder.glob("[!.]*")) == ["one-1.0.jar", "two-2.0-all.tar.gz"]
    assert (folder / "one-1.0.jar").read_bytes() == b"first" * 1000
    repository.served.clear()
    assert two.fetch(tmp_path / "jars") == folder
    assert not repository.served


def test_offline_at_the_first_fetch_says_what_to_do(repository: Repository, two: ArtifactSet, tmp_path: Path) -> None:
    repository.close()
    with pytest.raises(
        ArtifactError, match=r"can't fetch org\.example:\w+.* for a test: .*first start needs the network"
    ):
        two.fetch(tmp_path / "jars")
    assert not (tmp_path / "jars" / two.digest).exists()


def test_a_file_that_is_not_the_pinned_one_is_refused(repository: Repository, tmp_path: Path) -> None:
    repository.add("org.example:one:1.0", b"evil")
    wanted = ArtifactSet("a test", (Artifact("org.example:one:1.0", "0" * 64, 4),))
    with pytest.raises(
        ArtifactError, match=r"org\.example:one:1\.0 for a test has SHA-256 \w{64}, but 0{64} is pinned"
    ):
        wanted.fetch(tmp_path / "jars")
    assert [path for path in (tmp_path / "jars").iterdir() if path.suffix != ".lock"] == []


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _flip(path: Path) -> None:
    path.write_bytes(b"X" + path.read_bytes()[1:])


@pytest.mark.parametrize("damage", [_truncate, _flip, Path.unlink])
def test_a_damaged_file_is_fetched_again_and_only_that_one(
    repository: Repository, two: ArtifactSet, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    folder = two.fetch(tmp_path / "jars")
    damage(folder / "one-1.0.jar")
    repository.served.clear()
    assert two.fetch(tmp_path / "jars") == folder
    assert (folder / "one-1.0.jar").read_bytes() == b"first" * 1000
    assert {path for path in repository.served if not path.endswith(".sha1")} == {"/org/example/one/1.0/one-1.0.jar"}


def test_a_touched_file_is_hashed_again_and_kept(repository: Repository, two: ArtifactSet, tmp_path: Path) -> None:
    folder = two.fetch(tmp_path / "jars")
    os.utime(folder / "one-1.0.jar", (1, 1))
    repository.served.clear()
    two.fetch(tmp_path / "jars")
    assert not repository.served
    stamp = json.loads((folder / ".verified.json").read_text())
    assert stamp["one-1.0.jar"][1] == 1_000_000_000


def test_the_local_maven_repository_is_used_if_it_holds_the_pinned_file(
    repository: Repository, two: ArtifactSet, tmp_path: Path
) -> None:
    local = repository.home / ".m2" / "repository" / "org" / "example"
    for artifact, content in zip(two.artifacts, (b"first" * 1000, b"other" * 1200), strict=True):
        _, name, version, _, _ = artifact.parts
        (local / name / version).mkdir(parents=True)
        (local / name / version / artifact.filename).write_bytes(content)
    folder = two.fetch(tmp_path / "jars")
    assert (folder / "two-2.0-all.tar.gz").read_bytes() == b"second" * 1000
    assert not any("one-1.0" in path for path in repository.served)


def test_processes_that_fetch_at_once_share_one_result(
    repository: Repository, two: ArtifactSet, tmp_path: Path
) -> None:
    pins = tmp_path / "pins.json"
    rows = [{"coordinate": one.coordinate, "sha256": one.sha256, "size": one.size} for one in two.artifacts]
    pins.write_text(json.dumps({"purpose": "a test", "artifacts": rows}))
    code = (
        "import sys; from pathlib import Path; from magnatronic.broker.artifacts import ArtifactSet;"
        "print(ArtifactSet.load(Path(sys.argv[1])).fetch(Path(sys.argv[2])))"
    )
    command = [sys.executable, "-c", code, str(pins), str(tmp_path / "jars")]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    folders = {process.communicate(timeout=60)[0].strip() for process in running}
    assert [process.returncode for process in running] == [0, 0, 0]
    assert folders == {str(tmp_path / "jars" / two.digest)}
    downloads = [path for path in repository.served if path.endswith(".jar")]
    assert len(downloads) == 1


def test_cache_folder_follows_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "magnatronic"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "magnatronic"


def test_kafkas_pins_hold_every_root_at_one_version() -> None:
    coordinates = {artifact.coordinate for artifact in KAFKA_JARS.artifacts}
    assert coordinates >= set(ROOTS)
    assert all(re.fullmatch(r"[0-9a-f]{64}", artifact.sha256) for artifact in KAFKA_JARS.artifacts)
    ours = {one.split(":")[2] for one in coordinates if one.startswith("org.apache.kafka:")}
    assert ours == {KAFKA_VERSION}
    names = [":".join(one.split(":")[:2]) for one in coordinates]
    assert len(names) == len(set(names))
