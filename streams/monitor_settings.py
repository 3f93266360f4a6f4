"""The Monitor's settings. No Faust in it.

In: the environment (``MAGNATRONIC_...``). Out: :class:`MonitorSettings`, or a sentence for people that says what is
wrong with them.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Self

from pydantic import ValidationError

from schemas.codec import Codec
from schemas.registry import RegistryIds
from streams.monitor_login import Login, login_of
from streams.rules import Thresholds
from streams.settings import AlertSettings, ClusterSettings, variable

__all__ = ["MonitorSettings"]

_INSTANCE_VARIABLE: Final = variable("monitor_instance")


@dataclass(frozen=True, slots=True)
class MonitorSettings:
    """``kafka`` holds librdkafka settings, ``login`` is what Faust's client makes of them.

    ``instance`` names this worker to Kafka; the same name after a restart takes over at once. Faust's own membership
    where it is empty.
    """

    kafka: Mapping[str, Any]
    login: Login
    replication_factor: int
    thresholds: Thresholds
    codec: Codec
    instance: str

    @property
    def servers(self) -> list[str]:
        """The brokers to ask first, each a host:port."""
        return [server.strip() for server in str(self.kafka["bootstrap.servers"]).split(",")]

    @classmethod
    def from_environment(cls) -> Self:
        """What the environment says.

        Raises:
            ValueError: something is wrong, or missing.
        """
        try:
            cluster, alerts = ClusterSettings(), AlertSettings()
        except ValidationError as error:
            said = "; ".join(each["msg"] for each in error.errors(include_input=False, include_url=False))
            raise ValueError(f"a setting is wrong: {said}") from error
        if cluster.kafka_bootstrap_servers is None:
            name = variable("kafka_bootstrap_servers")
            raise ValueError(f"which Kafka? Set {name}, to what `magnatronic status` says")
        kafka = cluster.librdkafka_config(cluster.kafka_bootstrap_servers)
        try:
            login = login_of(kafka)
        except OSError as error:
            raise ValueError(str(error)) from error
        url = cluster.schema_registry_url
        return cls(
            kafka,
            login,
            cluster.replication_factor,
            alerts.thresholds,
            Codec() if url is None else Codec(RegistryIds(url)),
            os.environ.get(_INSTANCE_VARIABLE, ""),
        )
