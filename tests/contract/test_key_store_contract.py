"""What every key store does, in a folder and in a Vault alike; then what only one of them can get wrong."""

import multiprocessing
import os
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from magnatronic.errors import WrongInputError
from magnatronic.keys import FileKeys, SubjectKeys, VaultKeys
from schemas.encryption import KEY_BYTES, KEY_ID, SubjectCipher
from schemas.errors import KeyStoreError, SubjectForgottenError
from tests.support.vault import TOKEN, VaultServer

Opened = Callable[[], SubjectKeys]


@pytest.fixture
def vault() -> Iterator[VaultServer]:
    with VaultServer() as server:
        yield server


@pytest.fixture(params=["file", "vault"])
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Opened]:
    """Opens the same store once more, as another process would."""
    if request.param == "file":
        yield lambda: FileKeys(tmp_path / "keys")
        return
    made: list[VaultKeys] = []

    def opens() -> SubjectKeys:
        made.append(VaultKeys(request.getfixturevalue("vault").url, TOKEN))
        return made[-1]

    yield opens
    for keys in made:
        keys.close()


def test_a_subject_has_one_key_that_lasts(opened: Opened) -> None:
    keys = opened()
    ada, bob = keys.key_for("Ada"), keys.key_for("Bob")
    assert KEY_ID.fullmatch(ada)
    assert ada != bob
    again = opened()
    assert (again.key_for("Ada"), again.key_for(" Ada ")) == (ada, ada)
    key = keys.data_key(ada)
    assert key is not None
    assert len(key) == KEY_BYTES
    assert again.data_key(ada) == key != keys.data_key(bob)
    assert again.ids_of("Ada") == (ada,)
    assert again.ids_of("Eve") == ()


def test_what_is_destroyed_stays_destroyed(opened: Opened) -> None:
    keys = opened()
    ada, bob = keys.key_for("Ada"), keys.key_for("Bob")
    assert keys.destroy(ada)
    for each in (keys, opened()):
        assert each.data_key(ada) is None
        assert not each.destroy(ada)
        assert each.data_key(bob)
        assert each.ids_of("Ada") == (ada,)
    # Who comes back is somebody else.
    other = keys.key_for("Ada")
    assert other != ada
    assert keys.ids_of("Ada") == (ada, other)
    assert keys.data_key(ada) is None
    assert keys.data_key(other)
    assert opened().key_for("Ada") == other


@pytest.mark.parametrize("key_id", [f"ds-{0:032x}", "ds-1", "", "../master.key", f"ds-{0:032x}/../x", "ds-" + "G" * 32])
def test_there_is_no_other_key(opened: Opened, key_id: str) -> None:
    keys = opened()
    for _ in range(2):
        with pytest.raises(LookupError):
            keys.data_key(key_id)
        with pytest.raises(LookupError):
            keys.destroy(key_id)
        keys.key_for("Ada")


@pytest.mark.parametrize("name", ["", "  ", "x" * 501])
def test_names_that_are_none(opened: Opened, name: str) -> None:
    with pytest.raises(WrongInputError, match="data subject's name"):
        opened().key_for(name)


def test_many_at_once_agree(opened: Opened) -> None:
    stores = [opened() for _ in range(4)]
    with ThreadPoolExecutor(8) as pool:
        ids = set(pool.map(lambda number: stores[number % 4].key_for("Ada"), range(24)))
    assert len(ids) == 1
    assert len({store.data_key(ids.copy().pop()) for store in stores}) == 1


def test_the_cipher_goes_by_the_store(opened: Opened) -> None:
    keys = opened()
    ada = keys.key_for("Ada")
    sealed = SubjectCipher(keys).seal((ada,), (b"a",), b"secret")
    assert SubjectCipher(opened()).open((ada,), (b"a",), sealed) == b"secret"
    keys.destroy(ada)
    assert SubjectCipher(opened()).open((ada,), (b"a",), sealed) is None
    with pytest.raises(SubjectForgottenError):
        SubjectCipher(opened()).seal((ada,), (b"a",), b"secret")


# A folder


def _make(folder: Path, number: int, found: "multiprocessing.Queue[str]") -> None:
    found.put(FileKeys(folder).key_for(f"subject {number % 3}"))


def test_processes_agree(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    found: multiprocessing.Queue[str] = context.Queue()
    processes = [context.Process(target=_make, args=(tmp_path / "keys", number, found)) for number in range(6)]
    for process in processes:
        process.start()
    ids = {found.get(timeout=60) for _ in processes}
    for process in processes:
        process.join(30)
    assert len(ids) == 3
    assert all(FileKeys(tmp_path / "keys").data_key(key_id) for key_id in ids)


def test_only_its_user_can_read_it_and_nothing_names_anybody(tmp_path: Path) -> None:
    folder = tmp_path / "keys"
    keys = FileKeys(folder)
    ada = keys.key_for("Ada Lovelace")
    key = keys.data_key(ada)
    assert key is not None
    for path in (folder, *folder.rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0 or path.name == "lock", path
        assert b"Lovelace" not in os.fsencode(path)
        if path.is_file():
            assert b"Lovelace" not in path.read_bytes()
            assert key not in path.read_bytes()
    wrapped = (folder / "keys" / ada).read_bytes()
    keys.destroy(ada)
    assert wrapped[10:] not in b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    folder.chmod(0o750)
    with pytest.raises(KeyStoreError, match="chmod 700"):
        keys.data_key(ada)


def test_the_master_key_is_needed(tmp_path: Path) -> None:
    folder = tmp_path / "keys"
    ada = FileKeys(folder, master=b"1" * 32).key_for("Ada")
    assert not (folder / "master.key").exists()
    assert FileKeys(folder, master=b"1" * 32).data_key(ada)
    with pytest.raises(KeyStoreError, match="not wrapped by"):
        FileKeys(folder, master=b"2" * 32).data_key(ada)
    for wrong in (FileKeys(folder).data_key, FileKeys(folder).key_for):
        with pytest.raises(KeyStoreError, match="is gone"):
            wrong(ada)
    with pytest.raises(KeyStoreError, match="3 bytes instead of 32"):
        FileKeys(folder, master=b"abc")
    (folder / "master.key").write_bytes(b"short")
    with pytest.raises(KeyStoreError, match="5 bytes instead of 32"):
        FileKeys(folder).data_key(ada)


def test_a_damaged_key_is_told_and_can_still_be_destroyed(tmp_path: Path) -> None:
    keys = FileKeys(tmp_path / "keys")
    ada = keys.key_for("Ada")
    path = tmp_path / "keys" / "keys" / ada
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(KeyStoreError, match="restore both"):
        keys.data_key(ada)
    assert keys.destroy(ada)
    assert keys.data_key(ada) is None


def test_reading_makes_nothing(tmp_path: Path) -> None:
    keys = FileKeys(tmp_path / "keys")
    assert keys.ids_of("Ada") == ()
    with pytest.raises(LookupError):
        keys.data_key(f"ds-{1:032x}")
    assert not (tmp_path / "keys").exists()


# A Vault


def test_a_vault_in_trouble_is_asked_again(vault: VaultServer) -> None:
    keys = VaultKeys(vault.url, TOKEN, sleep=lambda _: None)
    vault.failures = [503, 429]
    ada = keys.key_for("Ada")
    vault.failures = [503] * 3
    with pytest.raises(KeyStoreError, match="unseal") as told:
        keys.data_key(ada)
    assert told.value.retryable
    vault.failures = [500]
    assert keys.data_key(ada)
    keys.close()
    away = VaultKeys("http://127.0.0.1:9", TOKEN, sleep=lambda _: None)
    with pytest.raises(KeyStoreError, match="does not answer") as told:
        away.data_key(ada)
    assert told.value.retryable
    away.close()


def test_what_a_vault_refuses_is_told(vault: VaultServer) -> None:
    with_wrong_token = VaultKeys(vault.url, "wrong")
    with pytest.raises(KeyStoreError, match="MAGNATRONIC_VAULT_TOKEN") as told:
        with_wrong_token.key_for("Ada")
    assert not told.value.retryable
    keys = VaultKeys(vault.url, TOKEN)
    vault.has_transit_key = False
    with pytest.raises(KeyStoreError, match="make the transit key"):
        keys.key_for("Ada")
    vault.has_transit_key = True
    ada = keys.key_for("Ada")
    vault.entries[f"magnatronic/keys/{ada}"][0]["wrapped"] = "vault:v1:AAAAAAAAAAAAAAAAAAAAAAAAAAAA"
    with pytest.raises(KeyStoreError, match="unable to decrypt"):
        keys.data_key(ada)
    for one in (keys, with_wrong_token):
        one.close()
    odd = VaultKeys("http://x", TOKEN, transport=httpx.MockTransport(lambda _: httpx.Response(200, text="<html>")))
    with pytest.raises(KeyStoreError, match="no answer of a Vault"):
        odd.ids_of("Ada")


def test_a_vault_that_ends_in_the_middle_of_destroying_knows_no_lost_key(vault: VaultServer) -> None:
    keys = VaultKeys(vault.url, TOKEN, sleep=lambda _: None)
    ada = keys.key_for("Ada")
    calls = len(vault.calls)
    keys.destroy(ada)
    steps = len(vault.calls) - calls
    for broken_at in range(steps):
        again = keys.key_for("Ada")
        vault.breaks_after = broken_at
        with pytest.raises(KeyStoreError):
            keys.destroy(again)
        vault.breaks_after = None
        assert keys.data_key(again), "the key is there until it is marked and deleted"
        assert keys.destroy(again)
        assert keys.data_key(again) is None
    keys.close()


def test_the_name_is_in_no_entry(vault: VaultServer) -> None:
    keys = VaultKeys(vault.url, TOKEN)
    keys.key_for("Ada Lovelace")
    assert "Lovelace" not in str(vault.entries)
    assert not any("Lovelace" in call for call in vault.calls)
    keys.close()
