"""A key store in memory, and key ids that tests name people by."""

import hashlib

from schemas.errors import KeyStoreError

ADA, BOB, EVE = (f"ds-{number:032x}" for number in (1, 2, 3))


class MemoryKeys:
    """Has keys for ADA, BOB and EVE. ``asked`` counts questions; while ``away`` it answers none."""

    def __init__(self) -> None:
        self.keys: dict[str, bytes | None] = {name: hashlib.sha256(name.encode()).digest() for name in (ADA, BOB, EVE)}
        self.asked = 0
        self.away = False

    def data_key(self, key_id: str) -> bytes | None:
        self.asked += 1
        if self.away:
            raise KeyStoreError("the key store is away", retryable=True)
        if key_id not in self.keys:
            raise LookupError(f"there is no key {key_id}")
        return self.keys[key_id]

    def forget(self, key_id: str) -> None:
        self.keys[key_id] = None
