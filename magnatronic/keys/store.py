"""The contract of a key store that can also make and destroy keys.

In: a data subject's name, as the application knows it. Out: an opaque key id, by which alone events name the subject,
and the key. The store keeps no name, only a keyed hash of it. A subject who was forgotten and comes back gets another
id: what was destroyed is never made again, and the store remembers for ever which ids those are.
"""

import secrets
from typing import Final, Protocol

from magnatronic.errors import WrongInputError
from schemas.encryption import KeyStore

__all__ = ["MAX_NAME", "SubjectKeys", "checked_name", "new_key_id"]

MAX_NAME: Final = 500
"""The longest name of a data subject."""


class SubjectKeys(KeyStore, Protocol):
    """A key store. Safe to share between threads and, on the same place, between processes."""

    place: str
    """Where it is, for people."""

    def key_for(self, subject: str) -> str:
        """The key id of the data subject; its key is made when there is none, or the last one was destroyed.

        Raises:
            WrongInputError: the name is empty or too long.
            KeyStoreError: the store did not answer, or is broken.
        """

    def ids_of(self, subject: str) -> tuple[str, ...]:
        """Every key id that the subject has had, those that were destroyed too, the oldest first; none if the subject
        was never heard of.

        Raises:
            KeyStoreError: the store did not answer, or is broken.
        """

    def destroy(self, key_id: str) -> bool:
        """Destroy the key for ever; whether it was still there. Can be repeated.

        Raises:
            LookupError: there never was a key of this id.
            KeyStoreError: the store did not answer, or is broken; the key may be there still.
        """


def new_key_id() -> str:
    """An id that nothing can be read from."""
    return f"ds-{secrets.token_hex(16)}"


def checked_name(subject: str) -> bytes:
    """The name's bytes.

    Raises:
        WrongInputError: it is empty or too long.
    """
    name = subject.strip().encode()
    if not name or len(name) > MAX_NAME:
        raise WrongInputError(f"a data subject's name has 1 to {MAX_NAME} bytes, not {len(name)}")
    return name
