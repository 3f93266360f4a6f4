"""The settings that streams need by themselves: where Kafka is, and when alerts are raised.

In: ``MAGNATRONIC_*`` environment variables. Out: :class:`ClusterSettings` and :class:`AlertSettings`, which the whole
system's settings are made of, and which the Faust app reads alone when it is started as any Faust app is.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal, Self

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from streams.rules import Thresholds

__all__ = ["ENV_PREFIX", "SECURITY_FIELDS", "AlertSettings", "ClusterSettings", "variable"]

ENV_PREFIX: Final = "MAGNATRONIC_"

_OWN_KAFKA_SETTINGS: Final = frozenset(
    {
        "bootstrap.servers",
        "enable.auto.commit",
        "enable.auto.offset.store",
        "enable.idempotence",
        "group.id",
        "group.instance.id",
        "isolation.level",
        "transactional.id",
    }
)
"""What exactly-once rests on; setting them from outside would break it silently."""

SECURITY_FIELDS: Final = {
    "kafka_security_protocol": "security.protocol",
    "kafka_sasl_mechanism": "sasl.mechanism",
    "kafka_sasl_username": "sasl.username",
    "kafka_sasl_password": "sasl.password",
    "kafka_ssl_ca_location": "ssl.ca.location",
    "kafka_ssl_certificate_location": "ssl.certificate.location",
    "kafka_ssl_key_location": "ssl.key.location",
    "kafka_ssl_key_password": "ssl.key.password",
}


def variable(field: str) -> str:
    """The environment variable of a setting."""
    return f"{ENV_PREFIX}{field.upper()}"


def _default_replication_factor(data: Mapping[str, Any]) -> int:
    return -1 if data.get("kafka_bootstrap_servers") else 1


class ClusterSettings(BaseSettings):
    """Where Kafka and the schema registry are, and how to talk to them."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, env_ignore_empty=True, extra="forbid", frozen=True)

    kafka_bootstrap_servers: str | None = Field(
        None, description="Kafka cluster to use, `host:port,...`; unset: an embedded broker in `data_dir`"
    )
    kafka_security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] | None = Field(
        None, description="How to talk to the cluster; unset: `PLAINTEXT`"
    )
    kafka_sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "GSSAPI", "OAUTHBEARER"] | None = Field(
        None, description="SASL mechanism"
    )
    kafka_sasl_username: str | None = Field(None, description="SASL user")
    kafka_sasl_password: SecretStr | None = Field(None, description="SASL password")
    kafka_ssl_ca_location: Path | None = Field(None, description="File with the CA certificates to trust")
    kafka_ssl_certificate_location: Path | None = Field(None, description="File with the client's certificate")
    kafka_ssl_key_location: Path | None = Field(None, description="File with the client's private key")
    kafka_ssl_key_password: SecretStr | None = Field(None, description="Password of the private key")
    kafka_config: dict[str, str | int | float | bool] = Field(
        default_factory=dict, repr=False, description="More librdkafka settings for every client, as a JSON object"
    )
    replication_factor: int = Field(
        default_factory=_default_replication_factor,
        description="Replicas of a new topic; by default 1 on the embedded broker and the cluster's own default "
        "(-1) elsewhere",
    )
    schema_registry_url: str | None = Field(
        None, description="Confluent-compatible schema registry to take ids from; unset: the ids in the repository"
    )

    @field_validator("replication_factor")
    @classmethod
    def _replicas(cls, value: int) -> int:
        if value < 1 and value != -1:
            raise ValueError("must be at least 1, or -1 for the cluster's default")
        return value

    @field_validator("kafka_config")
    @classmethod
    def _no_own_settings(cls, value: dict[str, Any]) -> dict[str, Any]:
        taken = sorted(value.keys() & _OWN_KAFKA_SETTINGS)
        if taken:
            raise ValueError(f"must not set {', '.join(taken)}: Magnatronic does")
        return value

    @model_validator(mode="after")
    def _security_fits_together(self) -> Self:
        given = [name for name in SECURITY_FIELDS if getattr(self, name) is not None]
        if given and self.kafka_bootstrap_servers is None:
            raise ValueError(f"{variable(given[0])} needs {variable('kafka_bootstrap_servers')}")
        protocol = self.kafka_security_protocol or "PLAINTEXT"
        sasl = [name for name in given if "_sasl_" in name]
        if sasl and not protocol.startswith("SASL_"):
            raise ValueError(
                f"{variable(sasl[0])} needs {variable('kafka_security_protocol')} SASL_SSL (or _PLAINTEXT)"
            )
        ssl = [name for name in given if "_ssl_" in name]
        if ssl and not protocol.endswith("SSL"):
            raise ValueError(f"{variable(ssl[0])} needs {variable('kafka_security_protocol')} SSL or SASL_SSL")
        by_password = (self.kafka_sasl_mechanism or "").startswith(("PLAIN", "SCRAM"))
        if by_password and (self.kafka_sasl_username is None or self.kafka_sasl_password is None):
            raise ValueError(
                f"{variable('kafka_sasl_mechanism')} {self.kafka_sasl_mechanism} needs "
                f"{variable('kafka_sasl_username')} and {variable('kafka_sasl_password')}"
            )
        return self

    def librdkafka_config(self, servers: str) -> dict[str, Any]:
        """librdkafka settings that reach the cluster at ``servers``."""
        config: dict[str, Any] = {"bootstrap.servers": servers}
        for field, name in SECURITY_FIELDS.items():
            value = getattr(self, field)
            if value is not None:
                config[name] = value.get_secret_value() if isinstance(value, SecretStr) else str(value)
        return config | self.kafka_config


class AlertSettings(BaseSettings):
    """When rules raise alerts (:data:`streams.rules.RULES`)."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, env_ignore_empty=True, extra="forbid", frozen=True)

    alert_error_rate: float = Field(
        0.2, ge=0, le=1, description="Alert when this share of an agent's attempts fails in a minute; 0: never"
    )
    alert_lag_growth: int = Field(
        1000, ge=0, description="Alert when an agent's waiting events grow by so many in a minute; 0: never"
    )
    alert_stall_s: float = Field(
        45.0, ge=0, le=60, description="Alert when a processor is held up for so many seconds of a minute; 0: never"
    )
    alert_p99_ms: float = Field(
        60_000.0, ge=0, description="Alert when an agent's p99 from fetched to committed is so high; 0: never"
    )
    alert_cost_usd_per_hour: float = Field(
        50.0, ge=0, description="Budget: alert when all agents together spend so much in an hour; 0: never"
    )
    alert_tokens_per_hour: int = Field(
        20_000_000, ge=0, description="Budget: alert when all agents together use so many tokens in an hour; 0: never"
    )

    @property
    def thresholds(self) -> Thresholds:
        """The settings as the rules take them."""
        return Thresholds(
            error_rate=self.alert_error_rate or None,
            lag_growth=self.alert_lag_growth or None,
            stall_s=self.alert_stall_s or None,
            p99_ms=self.alert_p99_ms or None,
            cost_usd_per_hour=self.alert_cost_usd_per_hour or None,
            tokens_per_hour=self.alert_tokens_per_hour or None,
        )
