"""Which key store the settings name, and what a process without one does."""

import base64
from pathlib import Path

import pytest

from magnatronic.client import Client
from magnatronic.discovery import make_codec
from magnatronic.errors import WrongInputError
from magnatronic.keys import FileKeys, VaultKeys
from magnatronic.settings import Settings, SettingsError
from schemas.encryption import NoKeys, SubjectCipher

KEY = base64.b64encode(b"k" * 32).decode()


def settings(monkeypatch: pytest.MonkeyPatch, **variables: str) -> Settings:
    for name, value in variables.items():
        monkeypatch.setenv(f"MAGNATRONIC_{name.upper()}", value)
    return Settings.load()


def test_beside_an_embedded_broker_it_is_a_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = settings(monkeypatch, data_dir=str(tmp_path))
    keys = made.keys()
    assert isinstance(keys, FileKeys)
    assert keys.folder == tmp_path / "keys"
    codec = make_codec(made, deciding=True)
    assert isinstance(codec.cipher, SubjectCipher)
    ada = keys.key_for("Ada")
    other = make_codec(made).cipher
    assert other is not None
    assert codec.cipher.seal((ada,), (), b"x") == other.seal((ada,), (), b"x")


def test_on_a_cluster_it_must_be_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = settings(monkeypatch, kafka_bootstrap_servers="x:1")
    assert made.keys() is None
    assert make_codec(made).cipher is None
    assert isinstance(make_codec(made, deciding=True).cipher, NoKeys)
    named = settings(monkeypatch, key_store=f"file://{tmp_path}", key_encryption_key=KEY).keys()
    assert isinstance(named, FileKeys)
    key_id = named.key_for("Ada")
    assert not (tmp_path / "master.key").exists()
    assert named.data_key(key_id)


def test_it_can_be_off(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = settings(monkeypatch, data_dir=str(tmp_path), key_store="off")
    assert made.keys() is None
    assert make_codec(made).cipher is None


def test_a_vault_needs_a_token_that_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError, match="MAGNATRONIC_VAULT_TOKEN"):
        settings(monkeypatch, key_store="https://vault:8200/")
    made = settings(monkeypatch, vault_token="hvs.secret", key_encryption_key=KEY)
    keys = made.keys()
    assert isinstance(keys, VaultKeys)
    assert keys.place == "https://vault:8200"
    keys.close()
    assert "hvs.secret" not in repr(made)
    assert KEY not in repr(made)


@pytest.mark.parametrize("wrong", ["short", base64.b64encode(b"k" * 31).decode(), "!" * 44])
def test_a_wrong_key_encryption_key_is_told_without_it(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    with pytest.raises(SettingsError, match="KEY_ENCRYPTION_KEY: must be 32 bytes in base64") as told:
        settings(monkeypatch, key_encryption_key=wrong)
    assert wrong not in str(told.value)


def test_a_client_without_a_key_store_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    client = object.__new__(Client)
    client.codec = make_codec(settings(monkeypatch, key_store="off"))
    assert client.key_ids(None) == ()
    with pytest.raises(WrongInputError, match="MAGNATRONIC_KEY_STORE"):
        client.key_ids("Ada")
