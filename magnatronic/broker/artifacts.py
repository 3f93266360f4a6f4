"""Fetches pinned files from a Maven repository, once, checked by SHA-256.

In: :class:`ArtifactSet`, coordinates with hashes (the broker's are in ``jars.json``). Out: a cache folder that holds
exactly those files. The first call needs the network (or a filled local Maven repository); later ones need neither.
Two processes that fetch at once wait for each other, and a folder appears only when it is complete.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from filelock import FileLock

from magnatronic.broker.errors import ArtifactError

__all__ = ["Artifact", "ArtifactSet", "cache_folder", "sha256_of"]

_STAMP: Final = ".verified.json"
_PARALLEL_DOWNLOADS: Final = 8
_TIMEOUT_S: Final = 60


def cache_folder() -> Path:
    """Where fetched files live: ``$XDG_CACHE_HOME/magnatronic``, by default ``~/.cache/magnatronic``."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "magnatronic"


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True, slots=True)
class Artifact:
    """One file of a Maven repository: ``group:name:version[:classifier[:packaging]]``, its SHA-256 and its bytes."""

    coordinate: str
    sha256: str
    size: int

    @property
    def parts(self) -> tuple[str, str, str, str, str]:
        """Group, name, version, classifier (may be empty) and packaging."""
        group, name, version, *rest = self.coordinate.split(":")
        classifier, packaging = (*rest, "", "")[:2]
        return group, name, version, classifier, packaging or "jar"

    @property
    def filename(self) -> str:
        """The file's name in the repository, such as ``kafka-clients-4.3.1.jar``."""
        _, name, version, classifier, packaging = self.parts
        return f"{name}-{version}{'-' + classifier if classifier else ''}.{packaging}"


@dataclass(frozen=True, slots=True)
class ArtifactSet:
    """Files that belong together in one folder, such as a class path. ``purpose`` is for messages."""

    purpose: str
    artifacts: tuple[Artifact, ...]

    @classmethod
    def load(cls, path: Path) -> "ArtifactSet":
        """Reads a pin file such as ``jars.json``."""
        pinned = json.loads(path.read_text())
        return cls(pinned["purpose"], tuple(Artifact(**artifact) for artifact in pinned["artifacts"]))

    @property
    def digest(self) -> str:
        """Names the set's folder; another set of pins has another folder."""
        lines = sorted(f"{artifact.coordinate} {artifact.sha256}" for artifact in self.artifacts)
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]

    def fetch(self, root: Path | None = None) -> Path:
        """The folder with all files, fetched if need be, under ``root`` (default: ``jars`` of the cache folder).

        Raises:
            ArtifactError: a file is neither here nor to be had, or has another SHA-256 than the pinned one.
        """
        root = cache_folder() / "jars" if root is None else root
        folder = root / self.digest
        if self._verified(folder):
            return folder
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f"{self.digest}.lock"):
            if not self._verified(folder):
                self._materialise(root, folder)
        return folder

    def _verified(self, folder: Path) -> bool:
        """Whether ``folder`` holds the pinned files; one unchanged since it was last hashed is not hashed again."""
        stamp = folder / _STAMP
        try:
            seen = json.loads(stamp.read_text())
        except (OSError, ValueError):
            return False
        changed = False
        for artifact in self.artifacts:
            path = folder / artifact.filename
            try:
                now = _fingerprint(path)
            except OSError:
                return False
            if seen.get(artifact.filename) == now:
                continue
            if path.stat().st_size != artifact.size or sha256_of(path) != artifact.sha256:
                return False
            changed = True
        if changed:
            self._write_stamp(folder)
        return True

    def _write_stamp(self, folder: Path) -> None:
        fingerprints = {artifact.filename: _fingerprint(folder / artifact.filename) for artifact in self.artifacts}
        draft = folder / f"{_STAMP}.{os.getpid()}"
        draft.write_text(json.dumps(fingerprints))
        draft.replace(folder / _STAMP)

    def _materialise(self, root: Path, folder: Path) -> None:
        staging = Path(tempfile.mkdtemp(prefix=f"{self.digest}.", dir=root))
        try:
            content = staging / "content"
            content.mkdir()
            with ThreadPoolExecutor(_PARALLEL_DOWNLOADS) as pool:
                jobs = [pool.submit(self._place, artifact, content, staging, folder) for artifact in self.artifacts]
                for job in jobs:
                    job.result()
            self._write_stamp(content)
            if folder.exists():
                # It failed the check: moved aside first, so that no reader ever sees half a folder.
                folder.rename(staging / "damaged")
            content.rename(folder)
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def _place(self, artifact: Artifact, content: Path, staging: Path, damaged: Path) -> None:
        """Puts one file into ``content``: from the damaged folder, the local repository, or a remote one."""
        target = content / artifact.filename
        for known in (damaged / artifact.filename, *_local_copies(artifact)):
            if known.is_file() and known.stat().st_size == artifact.size and sha256_of(known) == artifact.sha256:
                shutil.copyfile(known, target)
                return
        fetched = self._download(artifact, staging / "repository")
        found = sha256_of(fetched)
        if found != artifact.sha256:
            raise ArtifactError(
                f"{artifact.coordinate} for {self.purpose} has SHA-256 {found}, but {artifact.sha256} is pinned; "
                "the repository or something on the way to it serves another file"
            )
        fetched.rename(target)

    def _download(self, artifact: Artifact, repository: Path) -> Path:
        # jgo writes a download in place and expects to be alone, hence the private repository of each fetch.
        from jgo.maven import MavenContext
        from requests import RequestException

        context = MavenContext(repo_cache=repository, local_repos=[], timeout=_TIMEOUT_S, remote_repos=_remotes())
        try:
            return Path(_coordinate(context, artifact).resolve())
        except (RequestException, RuntimeError, OSError) as error:
            raise ArtifactError(
                f"can't fetch {artifact.coordinate} for {self.purpose}: {_brief(error)}; the first start needs the "
                "network or a filled local Maven repository (later starts need neither)"
            ) from error


def _coordinate(context: Any, artifact: Artifact) -> Any:
    group, name, version, classifier, packaging = artifact.parts
    return context.project(group, name).at_version(version).artifact(classifier=classifier, packaging=packaging)


def _local_copies(artifact: Artifact) -> Iterable[Path]:
    """Where Maven's local repository would keep ``artifact``."""
    from jgo.config import GlobalSettings

    group, name, version, _, _ = artifact.parts
    yield Path(GlobalSettings.load().repo_cache).joinpath(*group.split("."), name, version, artifact.filename)


def _remotes() -> dict[str, str] | None:
    """The repositories of the user's jgo settings file (a company's mirror), or None for jgo's default."""
    from jgo.config import GlobalSettings

    return dict(GlobalSettings.load().repositories) or None


def _fingerprint(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


def _brief(error: BaseException) -> str:
    """The innermost cause, which names the host that was not reached, in one line."""
    text = str(error).splitlines()[0] if str(error) else ""
    return f"{type(error).__name__}: {text}"[:300]
