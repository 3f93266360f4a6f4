"""Which code decided: what a report says of it, so that another person can run the same.

In: agents. Out: :class:`~replay.report.CodeVersion`: versions, the git commit where the code lies in a work tree, and a
hash over all source files that agents decide by: their packages, and the packages of events and of the step itself.
"""

import importlib.metadata
import importlib.util
import subprocess
import sys
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

from agents.agent import Agent
from replay.report import CodeVersion

__all__ = ["code_version"]

_ALWAYS: Final = ("agents", "schemas")
_GIT_TIMEOUT_S: Final = 10.0


def code_version(agents: Iterable[Agent[Any]]) -> CodeVersion:
    """The version of the code of ``agents`` that is loaded here."""
    agents = tuple(agents)
    modules = {base.__module__ for agent in agents for base in type(agent).__mro__}
    roots = {*_ALWAYS, *(module.partition(".")[0] for module in modules if not _is_library(module))}
    return CodeVersion(
        package=_package_version(),
        commit=_commit(Path(__file__).resolve().parent),
        agents={agent.name: agent.version for agent in sorted(agents, key=lambda each: each.name)},
        sources=_sources_hash(roots, modules),
    )


def _is_library(module: str) -> bool:
    top = module.partition(".")[0]
    return top in sys.stdlib_module_names or top in ("pydantic", "typing_extensions")


def _package_version() -> str:
    try:
        return importlib.metadata.version("magnatronic")
    except importlib.metadata.PackageNotFoundError:
        return ""


def _sources_hash(roots: Iterable[str], modules: Iterable[str]) -> str:
    """Over name and content of each file, in order of the names: ``agents/coordinator.py``."""
    files: dict[str, Path] = {}
    for root in roots:
        spec = importlib.util.find_spec(root) if root in sys.modules else None
        for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
            files |= {f"{root}/{path.relative_to(folder).as_posix()}": path for path in Path(folder).rglob("*.py")}
    for name in modules:
        # A module of its own, outside any package.
        path = getattr(sys.modules.get(name), "__file__", None)
        if path and not _is_library(name) and not any(found == Path(path) for found in files.values()):
            files[f"{name}.py"] = Path(path)
    digest = sha256()
    for name, path in sorted(files.items()):
        content = path.read_bytes()
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def _commit(folder: Path) -> str:
    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=_GIT_TIMEOUT_S,
            check=True,
        )
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return ""
