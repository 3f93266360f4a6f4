"""Our top-level names are ours, and a clash is told in one line."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from magnatronic.roots import ROOTS, assert_import_roots

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("root", ROOTS)
def test_root_comes_from_this_repository(root: str) -> None:
    origin = importlib.import_module(root).__file__
    assert origin is not None
    assert Path(origin).resolve() == REPOSITORY / root / "__init__.py"


def test_no_clash_here() -> None:
    assert_import_roots()


def _run(path: Path, code: str) -> subprocess.CompletedProcess[str]:
    script = f"import sys; sys.path[:0] = [{str(path)!r}]; {code}"
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=path, check=False)


def test_clash_is_told_in_one_line(tmp_path: Path) -> None:
    # What openai-agents does: its distribution owns the import name `agents`.
    (tmp_path / "agents").mkdir()
    (tmp_path / "agents" / "__init__.py").write_text("")
    info = tmp_path / "openai_agents-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: openai-agents\nVersion: 1.0\n")
    (info / "RECORD").write_text("agents/__init__.py,,\n")
    done = _run(tmp_path, "from magnatronic.roots import assert_import_roots; assert_import_roots()")
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert "openai-agents shadows Magnatronic's 'agents'" in last
    assert "uninstall openai-agents" in last


def test_the_command_line_tells_a_clash_before_anything_else(tmp_path: Path) -> None:
    (tmp_path / "agents").mkdir()
    (tmp_path / "agents" / "__init__.py").write_text("")
    done = _run(tmp_path, "from magnatronic.cli import main; main(['topics'])")
    assert done.returncode == 1
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert "another package shadows Magnatronic's 'agents'" in done.stderr


def test_clash_without_metadata_names_the_folder(tmp_path: Path) -> None:
    (tmp_path / "streams.py").write_text("")
    done = _run(tmp_path, "from magnatronic.roots import assert_import_roots; assert_import_roots()")
    last = done.stderr.splitlines()[-1]
    assert "another package shadows Magnatronic's 'streams'" in last
    assert str(tmp_path) in last
