"""Finds the system that a command or client is to talk to.

In: settings, and a data folder. Out: :class:`FoundSystem`: a cluster's client settings where the settings name one,
else those of the broker that the system on the data folder runs, asked over its socket.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from magnatronic.control import call
from magnatronic.settings import Settings
from schemas.codec import Codec
from schemas.encryption import Cipher, NoKeys, SubjectCipher
from streams.access import check_login

__all__ = ["FoundSystem", "find_system", "make_codec"]


@dataclass(frozen=True, slots=True)
class FoundSystem:
    """Where to talk to. ``kafka`` holds librdkafka settings."""

    settings: Settings
    kafka: dict[str, Any]

    def codec(self) -> Codec:
        """The codec with the ids that the system uses."""
        return make_codec(self.settings)


def find_system(data_dir: str | Path | None = None, *, ask: bool = True) -> FoundSystem:
    """The system of this process's environment, or on ``data_dir``. With ``ask``, a cluster was asked whether it lets
    us in.

    Raises:
        AccessError: the cluster refuses the login; the message says what to set.
        ClusterError: the cluster does not answer.
        NotRunningError: the settings name no cluster, and nothing runs on the data folder.
        SettingsError: a setting is wrong.
    """
    settings = Settings.load(**({} if data_dir is None else {"data_dir": Path(data_dir)}))
    if not settings.embedded_kafka:
        kafka = settings.kafka_client_config()
        if ask:
            check_login(kafka)
        return FoundSystem(settings, kafka)
    status = call(settings.data_dir, "status")
    return FoundSystem(settings, settings.kafka_client_config(status["bootstrap_servers"]))


def make_codec(settings: Settings, *, deciding: bool = False) -> Codec:
    """The codec whose schema ids come from the registry, where the settings name one, else from the manifest, and whose
    keys of data subjects come from their key store. Without one, events about data subjects are read blank, or are
    refused where they are to be decided on (``deciding``).
    """
    keys = settings.keys()
    cipher: Cipher | None = NoKeys() if deciding else None
    if keys is not None:
        cipher = SubjectCipher(keys, ttl_s=settings.key_cache_s)
    if settings.schema_registry_url is None:
        return Codec(cipher=cipher)
    from schemas.registry import RegistryIds

    return Codec(RegistryIds(settings.schema_registry_url), cipher=cipher)
