"""Rules for every file of the repository that no linter checks."""

import ast
import importlib
import re
import subprocess
from functools import cache
from pathlib import Path

import pytest

from magnatronic.roots import ROOTS

REPOSITORY = Path(__file__).resolve().parents[2]
LONGEST_MODULE = 620
TEXT_LIMIT = 4_000_000

# Written in pieces, so that this file passes its own test.
REGISTRY_HOSTS = [
    re.compile(rf"\b{name}".encode())
    for name in (
        r"pypi\." "org",
        r"files\.pythonhosted\." "org",
        r"repo1?\.maven(\.apache)?\." "org",
        r"repo\.maven\." "apache",
        r"registry\.npmjs\." "org",
        r"index\.docker\." "io",
    )
]
MACHINE_PATHS = re.compile(rb"(?<![\w.$}])/(?:home|Users|root|work)/[\w.-]+|[A-Z]:\\\\Users\\\\")


@cache
def _tracked() -> tuple[Path, ...]:
    listed = subprocess.run(["git", "ls-files", "-z"], capture_output=True, text=True, cwd=REPOSITORY, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    return tuple(path for name in listed.stdout.split("\0") if name and (path := REPOSITORY / name).is_file())


def _modules(*folders: str) -> list[Path]:
    return [
        path
        for path in _tracked()
        if path.suffix == ".py" and path.relative_to(REPOSITORY).parts[0] in (folders or ROOTS)
    ]


def _name(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


def _found(pattern: re.Pattern[bytes]) -> list[str]:
    return [
        f"{_name(path)}: {match.group().decode(errors='replace')}"
        for path in _tracked()
        if path.stat().st_size <= TEXT_LIMIT and (match := pattern.search(path.read_bytes()))
    ]


@pytest.mark.parametrize("host", REGISTRY_HOSTS, ids=lambda host: host.pattern.decode())
def test_no_registry_host(host: re.Pattern[bytes]) -> None:
    assert not _found(host)


def test_no_path_of_a_machine() -> None:
    assert not _found(MACHINE_PATHS)


def test_patterns_find_what_they_are_for() -> None:
    assert any(host.search(b"https://pypi" + b".org/simple") for host in REGISTRY_HOSTS)
    assert any(host.search(b"https://repo.maven" + b".apache.org/maven2") for host in REGISTRY_HOSTS)
    assert MACHINE_PATHS.search(b'path = "/home' + b'/someone/x"')


def test_every_module_says_what_it_is_for() -> None:
    silent = []
    for path in _modules(*ROOTS, "bench"):
        tree = ast.parse(path.read_bytes())
        if tree.body and not ast.get_docstring(tree):
            silent.append(_name(path))
    assert not silent


def test_no_module_is_too_long() -> None:
    long = {_name(path): lines for path in _modules(*ROOTS, "bench") if (lines := _lines(path)) > LONGEST_MODULE}
    assert not long


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n")


@pytest.mark.parametrize("root", ROOTS)
def test_exported_names_exist(root: str) -> None:
    missing = []
    for path in _modules(root):
        relative = path.relative_to(REPOSITORY).with_suffix("")
        parts = relative.parts[:-1] if relative.name == "__init__" else relative.parts
        if parts[-1] == "__main__":
            continue
        module = importlib.import_module(".".join(parts))
        missing += [f"{module.__name__}.{name}" for name in getattr(module, "__all__", ()) if not hasattr(module, name)]
    assert not missing
