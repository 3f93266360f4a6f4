"""The key store of one machine: a folder that only its user can read.

In: a folder and, from a setting, a master key of 32 bytes; without one it is made at the first use and lies in the
folder. Out: data keys, each in a file of its own, wrapped by the master key (AES-SIV, bound to the id). Files appear
whole or not at all, also when the machine stops: written beside, synced, renamed. A lock file keeps processes that make
or destroy keys apart. A destroyed key's file is overwritten, then replaced by a mark that stays.

    master.key          the master key, unless a setting has it
    subjects/<hash>     the key ids of a subject, whose name is only there as a keyed hash
    keys/<id>           the wrapped key, or the mark that it was destroyed
"""

import contextlib
import fcntl
import hmac
import os
import secrets
import stat
import tempfile
import threading
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Final

import orjson
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESSIV
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from magnatronic.keys.store import checked_name, new_key_id
from schemas.encryption import KEY_BYTES, KEY_ID
from schemas.errors import KeyStoreError

__all__ = ["FileKeys"]

_MASTER: Final = "master.key"
_WRAPPED: Final = b"wrapped 1\n"
_DESTROYED: Final = b"destroyed\n"


class FileKeys:
    """See :class:`magnatronic.keys.store.SubjectKeys`. ``master`` is the master key, None for the folder's own."""

    def __init__(self, folder: Path, *, master: bytes | None = None) -> None:
        if master is not None and len(master) != KEY_BYTES:
            raise KeyStoreError(f"the key encryption key has {len(master)} bytes instead of {KEY_BYTES}")
        self.folder = folder.absolute()
        self.place = str(self.folder)
        self._given = master
        self._derived: tuple[AESSIV, bytes] | None = None
        self._threads = threading.Lock()

    def key_for(self, subject: str) -> str:
        """See :meth:`magnatronic.keys.store.SubjectKeys.key_for`."""
        name = checked_name(subject)
        with self._told(), self._alone():
            ids = self._ids(name)
            if ids and not self._read(ids[-1]).startswith(_DESTROYED):
                return ids[-1]
            wrapping, _ = self._keys(make=True)
            key_id = new_key_id()
            # The key first: an id that somebody is given always has one.
            self._write(
                self._key_path(key_id), _WRAPPED + wrapping.encrypt(secrets.token_bytes(KEY_BYTES), [key_id.encode()])
            )
            self._write(self._subject_path(name), orjson.dumps({"v": 1, "ids": [*ids, key_id]}))
            return key_id

    def ids_of(self, subject: str) -> tuple[str, ...]:
        """See :meth:`magnatronic.keys.store.SubjectKeys.ids_of`."""
        name = checked_name(subject)
        with self._told():
            return tuple(self._ids(name))

    def data_key(self, key_id: str) -> bytes | None:
        """See :meth:`schemas.encryption.KeyStore.data_key`."""
        with self._told():
            found = self._read(key_id)
            if found.startswith(_DESTROYED):
                return None
            wrapping, _ = self._keys(make=False)
            try:
                if found.startswith(_WRAPPED):
                    return wrapping.decrypt(found[len(_WRAPPED) :], [key_id.encode()])
            except InvalidTag:
                pass
            raise KeyStoreError(
                f"{self._key_path(key_id)} is not wrapped by this store's master key; restore both from one backup, "
                "or set the MAGNATRONIC_KEY_ENCRYPTION_KEY that it was made with"
            )

    def destroy(self, key_id: str) -> bool:
        """See :meth:`magnatronic.keys.store.SubjectKeys.destroy`."""
        with self._told(), self._alone():
            if self._read(key_id).startswith(_DESTROYED):
                return False
            path = self._key_path(key_id)
            with path.open("r+b") as file:
                # In place, so that nothing of the key stays in its blocks; whoever reads it now sees the mark too.
                file.write(_DESTROYED + secrets.token_bytes(max(path.stat().st_size - len(_DESTROYED), 0)))
                file.flush()
                os.fsync(file.fileno())
            self._write(path, _DESTROYED)
            return True

    def _ids(self, name: bytes) -> list[str]:
        if self._given is None and not (self.folder / _MASTER).exists() and not self._has_keys():
            return []
        try:
            found = orjson.loads(self._subject_path(name).read_bytes())
            ids: list[str] = found["ids"]
        except FileNotFoundError:
            return []
        except (ValueError, LookupError, TypeError) as error:
            raise KeyStoreError(
                f"{self._subject_path(name)} can't be read: {error}; restore it from a backup"
            ) from error
        return ids

    def _read(self, key_id: str) -> bytes:
        # Ids come from events, and name a file here.
        if not KEY_ID.fullmatch(key_id):
            raise LookupError(f"{key_id[:60]!r} is no key id")
        try:
            return self._key_path(key_id).read_bytes()
        except FileNotFoundError:
            raise LookupError(f"{self.folder} has no key {key_id}") from None

    def _key_path(self, key_id: str) -> Path:
        return self.folder / "keys" / key_id

    def _subject_path(self, name: bytes) -> Path:
        _, hashing = self._keys(make=True)
        return self.folder / "subjects" / hmac.digest(hashing, name, sha256).hex()

    def _has_keys(self) -> bool:
        return any((self.folder / "keys").glob("*"))

    def _keys(self, *, make: bool) -> tuple[AESSIV, bytes]:
        """What wraps keys, and what hashes names."""
        if self._derived is None:
            master = self._given or self._master(make=make)

            def derived(use: bytes, size: int) -> bytes:
                return HKDF(SHA256(), size, salt=None, info=b"magnatronic key store 1 " + use).derive(master)

            self._derived = AESSIV(derived(b"wrap", 64)), derived(b"names", 32)
        return self._derived

    def _master(self, *, make: bool) -> bytes:
        path = self.folder / _MASTER
        try:
            master = path.read_bytes()
        except FileNotFoundError:
            if not make or self._has_keys():
                raise KeyStoreError(
                    f"{path} is gone, and with it every key; restore it from its backup, or set "
                    "MAGNATRONIC_KEY_ENCRYPTION_KEY"
                ) from None
            master = secrets.token_bytes(KEY_BYTES)
            self._write(path, master)
        if len(master) != KEY_BYTES:
            raise KeyStoreError(f"{path} has {len(master)} bytes instead of {KEY_BYTES}; restore it from its backup")
        return master

    def _write(self, path: Path, content: bytes) -> None:
        """Put ``content`` there, whole or not at all, and on the disk before this returns."""
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=self.folder, prefix=".new-")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """One thread of one process makes or destroys keys at a time."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with self._threads, (self.folder / "lock").open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """What the system refuses, as errors of ours."""
        try:
            if self.folder.exists():
                seen = self.folder.stat()
                if seen.st_uid != os.getuid() or stat.S_IMODE(seen.st_mode) & 0o077:
                    raise KeyStoreError(f"others can read {self.folder}; make it this user's alone: chmod 700")
            yield
        except OSError as error:
            raise KeyStoreError(f"the key store {self.folder}: {error.strerror or error}") from error
