"""Where the keys of data subjects are kept: a folder of this machine, or a Vault that all machines ask."""

from magnatronic.keys.file import FileKeys
from magnatronic.keys.store import SubjectKeys, new_key_id
from magnatronic.keys.vault import VaultKeys

__all__ = ["FileKeys", "SubjectKeys", "VaultKeys", "new_key_id"]
