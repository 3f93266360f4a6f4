"""Sealing: what is personal is encrypted under keys of the data subjects it is about, and gone when one is destroyed.

In: the data subjects' key ids, bytes, and a :class:`KeyStore` that has a 256-bit key for each id. Out: ciphertexts that
only these keys open. What is about several subjects is sealed under a key that is derived from all of theirs
(HKDF-SHA512, RFC 5869), so that destroying one of them is enough. Sealing is AES-256-SIV (RFC 5297), deterministic: a
decision that is made again gives the same bytes. Opened keys are remembered for a minute, and no longer.
"""

import re
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Final, Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESSIV
from cryptography.hazmat.primitives.hashes import SHA512
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from schemas.errors import KeyStoreError, SubjectForgottenError

__all__ = ["KEY_BYTES", "KEY_ID", "MAX_SUBJECTS", "Cipher", "KeyStore", "NoKeys", "SubjectCipher", "union"]

KEY_ID: Final = re.compile(r"ds-[0-9a-f]{32}")
"""What a key id looks like. It is random: nothing of the subject's name is in it."""

KEY_BYTES: Final = 32
"""The size of a subject's key."""

MAX_SUBJECTS: Final = 1_000
"""The most data subjects that one event can be about: their ids take 36 kB of its headers then."""

_DERIVED_BYTES: Final = 64
_INFO: Final = b"magnatronic seal 1\x1f"
_VERSION: Final = b"\x01"
_STALE_S: Final = 600.0


class KeyStore(Protocol):
    """Where the keys of data subjects are."""

    def data_key(self, key_id: str) -> bytes | None:
        """The key, :data:`KEY_BYTES` long; None when it was destroyed.

        Raises:
            LookupError: this store never had a key of this id.
            KeyStoreError: the store did not answer, or is broken.
        """


class Cipher(Protocol):
    """What seals and opens for :class:`schemas.codec.Codec` and the state store."""

    def seal(self, subjects: Sequence[str], associated: Sequence[bytes], plain: bytes) -> bytes:
        """``plain`` under the keys of all ``subjects``, bound to ``associated``; the same again for the same input.

        Raises:
            SubjectForgottenError: a subject's key was destroyed.
            KeyStoreError: a key can't be had.
        """

    def open(self, subjects: Sequence[str], associated: Sequence[bytes], sealed: bytes) -> bytes | None:
        """What was sealed; None when a subject's key was destroyed.

        Raises:
            ValueError: it was not sealed under these keys, with this associated data; or there is no such key.
            KeyStoreError: a key can't be had.
        """


def union(*groups: Iterable[str]) -> tuple[str, ...]:
    """The key ids of all ``groups``, each once, in the order that events have them in."""
    return tuple(sorted({key_id for group in groups for key_id in group}))


class SubjectCipher:
    """Seals and opens with the keys of ``keys``. Safe to share between threads.

    A key is asked for again when ``ttl_s`` seconds have passed, so that no process reads a forgotten subject's data for
    longer. While the store does not answer, a key that was had goes on for ten minutes more. ``most`` keys, those of
    groups of subjects included, are remembered at most.
    """

    def __init__(
        self, keys: KeyStore, *, ttl_s: float = 60.0, most: int = 4096, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.keys = keys
        self._ttl_s = ttl_s
        self._most = most
        self._clock = clock
        self._opened: dict[tuple[str, ...], tuple[AESSIV, float]] = {}
        self._destroyed: dict[str, None] = {}

    def seal(self, subjects: Sequence[str], associated: Sequence[bytes], plain: bytes) -> bytes:
        """See :meth:`Cipher.seal`."""
        try:
            key = self._key(tuple(subjects))
        except LookupError as error:
            raise KeyStoreError(f"{error}; let this process use the key store that made it") from None
        if key is None:
            gone = ", ".join(subject for subject in subjects if subject in self._destroyed)
            raise SubjectForgottenError(f"data subject {gone} was forgotten: nothing about it can be recorded any more")
        return _VERSION + key.encrypt(plain, list(associated))

    def open(self, subjects: Sequence[str], associated: Sequence[bytes], sealed: bytes) -> bytes | None:
        """See :meth:`Cipher.open`."""
        if sealed[:1] != _VERSION:
            raise ValueError(
                f"it was sealed in another way (version {sealed[:1].hex() or 'none'}); upgrade this release"
            )
        try:
            key = self._key(tuple(subjects))
        except LookupError as error:
            raise ValueError(f"{error}: it was sealed with another key store, or by nobody") from None
        if key is None:
            return None
        try:
            return key.decrypt(sealed[1:], list(associated))
        except InvalidTag:
            raise ValueError("it was not sealed for this event, or was changed since") from None

    def drop(self, key_id: str) -> None:
        """Forget what is remembered of the key."""
        for subjects in [each for each in list(self._opened) if key_id in each]:
            self._opened.pop(subjects, None)

    def _key(self, subjects: tuple[str, ...]) -> AESSIV | None:
        now = self._clock()
        known = self._opened.get(subjects)
        if known is not None and now < known[1]:
            return known[0]
        if any(subject in self._destroyed for subject in subjects):
            return None
        try:
            made = self._derived(subjects)
        except KeyStoreError as error:
            if known is not None and error.retryable and now < known[1] + _STALE_S:
                return known[0]
            raise
        self._opened.pop(subjects, None)
        if made is not None:
            while len(self._opened) >= self._most:
                self._opened.pop(next(iter(self._opened)), None)
            self._opened[subjects] = made, now + self._ttl_s
        return made

    def _derived(self, subjects: tuple[str, ...]) -> AESSIV | None:
        material = []
        for subject in subjects:
            if not KEY_ID.fullmatch(subject):
                raise LookupError(f"{subject[:60]!r} is no key id")
            key = self.keys.data_key(subject)
            if key is None:
                if len(self._destroyed) >= self._most:
                    self._destroyed.pop(next(iter(self._destroyed)), None)
                self._destroyed[subject] = None
                return None
            material.append(key)
        derive = HKDF(SHA512(), _DERIVED_BYTES, salt=None, info=_INFO + ",".join(subjects).encode())
        return AESSIV(derive.derive(b"".join(material)))


class NoKeys:
    """The cipher of a process that decides and has no key store: it refuses what is sealed, so that nothing is decided
    without its content. Such events go to the dead letters, whole, and can be sent again.
    """

    def seal(self, subjects: Sequence[str], associated: Sequence[bytes], plain: bytes) -> bytes:
        """Never."""
        raise KeyStoreError("this process has no key store; set MAGNATRONIC_KEY_STORE")

    def open(self, subjects: Sequence[str], associated: Sequence[bytes], sealed: bytes) -> bytes | None:
        """Never."""
        raise ValueError("this process has no key store; set MAGNATRONIC_KEY_STORE, then redrive the event")
