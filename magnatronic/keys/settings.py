"""The settings of the key store, and the store that they name.

In: ``MAGNATRONIC_KEY_STORE`` and what belongs to it. Out: :class:`KeySettings`, a part of the system's settings, and
:func:`open_keys`. Beside an embedded broker a folder in the data folder is the key store; on a cluster, whose processes
are on many machines, there is none unless it is named.
"""

import base64
import binascii
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from magnatronic.keys.file import FileKeys
from magnatronic.keys.store import SubjectKeys
from magnatronic.keys.vault import VaultKeys
from schemas.encryption import KEY_BYTES
from streams.settings import ENV_PREFIX, variable

__all__ = ["KeySettings", "open_keys"]

_OFF = "off"


class KeySettings(BaseSettings):
    """Where the keys of data subjects are."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, env_ignore_empty=True, extra="forbid", frozen=True)

    key_store: str | None = Field(
        None,
        description="Key store of data subjects: a folder, the URL of a Vault, or `off`; unset: `keys` in `data_dir` "
        "beside an embedded broker, `off` on a cluster",
    )
    key_encryption_key: SecretStr | None = Field(
        None, description="What a folder's keys are wrapped by, 32 bytes in base64; unset: a file beside them"
    )
    key_cache_s: Annotated[float, Field(gt=0)] = Field(
        60.0, description="Seconds for which a process remembers a data subject's key, a forgotten one's too"
    )
    vault_token: SecretStr | None = Field(None, description="Token for the Vault")
    vault_namespace: str = Field("", description="Namespace in the Vault, where it has some")
    vault_transit_mount: str = Field("transit", description="Mount of the Vault's transit engine")
    vault_transit_key: str = Field("magnatronic", description="Its key that wraps the data keys")
    vault_kv_mount: str = Field("secret", description="Mount of the Vault's KV engine, version 2")
    vault_kv_path: str = Field("magnatronic", description="Folder in it")

    @field_validator("key_encryption_key")
    @classmethod
    def _is_a_key(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            try:
                size = len(base64.b64decode(value.get_secret_value(), validate=True))
            except (binascii.Error, ValueError):
                size = 0
            if size != KEY_BYTES:
                raise ValueError(f"must be {KEY_BYTES} bytes in base64 (head -c {KEY_BYTES} /dev/urandom | base64)")
        return value

    @model_validator(mode="after")
    def _vault_has_its_token(self) -> Self:
        if self.has_vault and self.vault_token is None:
            raise ValueError(f"{variable('key_store')} is a Vault, and needs {variable('vault_token')}")
        return self

    @property
    def has_vault(self) -> bool:
        """Whether the key store is a Vault."""
        return (self.key_store or "").startswith(("http://", "https://"))


def open_keys(settings: KeySettings, default: Path | None) -> SubjectKeys | None:
    """The key store that ``settings`` name, by default the folder ``default``; None where it is off."""
    where = settings.key_store
    if where is None:
        if default is None:
            return None
        where = str(default)
    if where.lower() == _OFF:
        return None
    if settings.has_vault:
        assert settings.vault_token is not None
        return VaultKeys(
            where,
            settings.vault_token.get_secret_value(),
            transit_mount=settings.vault_transit_mount,
            transit_key=settings.vault_transit_key,
            kv_mount=settings.vault_kv_mount,
            path=settings.vault_kv_path,
            namespace=settings.vault_namespace,
        )
    given = settings.key_encryption_key
    return FileKeys(
        Path(where.removeprefix("file://")).expanduser(),
        master=None if given is None else base64.b64decode(given.get_secret_value()),
    )
