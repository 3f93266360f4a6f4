"""`magnatronic forget` before it does anything: who can't be forgotten, and who is asked."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from magnatronic.cli.forget import forget
from magnatronic.discovery import FoundSystem
from magnatronic.errors import NotRunningError, WrongInputError
from magnatronic.keys import FileKeys
from magnatronic.settings import Settings


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FoundSystem:
    """A system that nobody can reach: whatever would be told to it fails."""
    made = FoundSystem(Settings.load(data_dir=tmp_path), {"bootstrap.servers": "127.0.0.1:1"})
    monkeypatch.setattr("magnatronic.discovery.find_system", lambda data_dir: made)
    return made


def test_nothing_is_destroyed_where_nobody_could_be_told(tmp_path: Path) -> None:
    keys = FileKeys(tmp_path / "keys")
    key_id = keys.key_for("Ada")
    done = CliRunner().invoke(forget, ["--yes", "--data-dir", str(tmp_path), "Ada"])
    assert isinstance(done.exception, NotRunningError)
    assert keys.data_key(key_id)


def test_who_was_never_heard_of_is_told(found: FoundSystem, tmp_path: Path) -> None:
    done = CliRunner().invoke(forget, ["--yes", "--data-dir", str(tmp_path), "Ada"])
    assert isinstance(done.exception, WrongInputError)
    assert "no data subject 'Ada'" in str(done.exception)


def test_it_asks_first(found: FoundSystem, tmp_path: Path) -> None:
    keys = FileKeys(tmp_path / "keys")
    key_id = keys.key_for("Ada")
    for answer in ("n\n", "\n", ""):
        done = CliRunner().invoke(forget, ["--data-dir", str(tmp_path), "Ada"], input=answer)
        assert done.exit_code == 1
        assert "can never be read again" in done.output
        assert keys.data_key(key_id)


def test_without_a_key_store_there_is_nobody_to_forget(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MAGNATRONIC_KEY_STORE", "off")
    off = FoundSystem(Settings.load(data_dir=tmp_path), {})
    monkeypatch.setattr("magnatronic.discovery.find_system", lambda data_dir: off)
    done = CliRunner().invoke(forget, ["--yes", "--data-dir", str(tmp_path), "Ada"])
    assert isinstance(done.exception, WrongInputError)
    assert "MAGNATRONIC_KEY_STORE" in str(done.exception)
