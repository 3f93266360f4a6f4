"""Every setting of Magnatronic, read from environment variables.

In: ``MAGNATRONIC_*`` variables and the API keys' usual names. Out: :class:`Settings`, checked as a whole; a wrong one
is a :class:`SettingsError` that names the variable. With nothing set, all parts are the embedded ones and no key is
needed.
"""

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import AliasChoices, Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict
from pydantic_settings import SettingsError as SourceError

from magnatronic.errors import WrongInputError

__all__ = ["ENV_PREFIX", "LlmProvider", "Settings", "SettingsError"]

ENV_PREFIX: Final = "MAGNATRONIC_"

LlmProvider = Literal["extractive", "openai", "anthropic", "google"]

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

_SECURITY_FIELDS: Final = {
    "kafka_security_protocol": "security.protocol",
    "kafka_sasl_mechanism": "sasl.mechanism",
    "kafka_sasl_username": "sasl.username",
    "kafka_sasl_password": "sasl.password",
    "kafka_ssl_ca_location": "ssl.ca.location",
    "kafka_ssl_certificate_location": "ssl.certificate.location",
    "kafka_ssl_key_location": "ssl.key.location",
    "kafka_ssl_key_password": "ssl.key.password",
}


class SettingsError(WrongInputError):
    """One or more settings are wrong; the message names each variable, what is wrong with it, and never a secret."""


def _default_data_dir() -> Path:
    root = os.environ.get("XDG_DATA_HOME")
    return (Path(root) if root else Path.home() / ".local" / "share") / "magnatronic"


def _default_replication_factor(data: Mapping[str, Any]) -> int:
    return -1 if data.get("kafka_bootstrap_servers") else 1


def _default_provider(data: Mapping[str, Any]) -> LlmProvider:
    providers: tuple[LlmProvider, ...] = ("openai", "anthropic", "google")
    return next((name for name in providers if data.get(f"{name}_api_key")), "extractive")


def _key(name: str, *usual: str) -> AliasChoices:
    """The variables that may hold a vendor's setting: ours first, then the names that the vendor's SDK reads."""
    return AliasChoices(f"{ENV_PREFIX.lower()}{name}", *usual)


class Settings(BaseSettings):
    """All settings. Make it with :meth:`load`; fields are documented by their descriptions."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, env_ignore_empty=True, extra="forbid", frozen=True)

    data_dir: Path = Field(
        default_factory=_default_data_dir,
        description="Folder of all embedded parts' data; by default `magnatronic` in `$XDG_DATA_HOME` or "
        "`~/.local/share`",
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field("INFO", description="How much is logged")
    java_home: Path | None = Field(
        None, description="A Java >= 17 for the embedded broker, instead of the one that comes with Magnatronic"
    )
    kafka_heap_mb: Annotated[int, Field(ge=128)] = Field(512, description="Java heap of the embedded broker, in MiB")

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
    partitions: Annotated[int, Field(ge=1)] = Field(4, description="Partitions of a new topic, where it fixes none")
    replication_factor: int = Field(
        default_factory=_default_replication_factor,
        description="Replicas of a new topic; by default 1 on the embedded broker and the cluster's own default "
        "(-1) elsewhere",
    )
    schema_registry_url: str | None = Field(
        None, description="Confluent-compatible schema registry to take ids from; unset: the ids in the repository"
    )

    openai_api_key: SecretStr | None = Field(
        None, validation_alias=_key("openai_api_key", "openai_api_key"), description="or `OPENAI_API_KEY`"
    )
    openai_base_url: str | None = Field(
        None,
        validation_alias=_key("openai_base_url", "openai_base_url"),
        description="An OpenAI-compatible server, or `OPENAI_BASE_URL`",
    )
    anthropic_api_key: SecretStr | None = Field(
        None, validation_alias=_key("anthropic_api_key", "anthropic_api_key"), description="or `ANTHROPIC_API_KEY`"
    )
    google_api_key: SecretStr | None = Field(
        None,
        validation_alias=_key("google_api_key", "google_api_key", "gemini_api_key"),
        description="or `GOOGLE_API_KEY`, `GEMINI_API_KEY`",
    )
    llm_provider: LlmProvider = Field(
        default_factory=_default_provider,
        description="`extractive`, `openai`, `anthropic` or `google`; by default the first of the three with a key, "
        "else `extractive`",
    )
    llm_model: str | None = Field(None, description="The provider's model; unset: the adapter's default")

    clickhouse_url: str | None = Field(
        None, repr=False, description="ClickHouse server, `http://user:password@host:8123/db`; unset: embedded chdb"
    )
    milvus_uri: str | None = Field(None, description="Milvus server; unset: an embedded file")
    milvus_token: SecretStr | None = Field(None, description="Token of the Milvus server")
    embedding_model: str = Field("all-MiniLM-L6-v2", description="Model that turns texts into vectors")

    @classmethod
    def load(cls, **overrides: Any) -> Self:
        """The settings of this process's environment; ``overrides`` by field name win.

        Raises:
            SettingsError: a variable is unknown or has a wrong value, or two don't go together.
        """
        _refuse_unknown(os.environ)
        try:
            return cls(**overrides)
        except ValidationError as error:
            # Only pydantic's own sentences: its full text repeats the input, and that may be a secret.
            details = error.errors(include_input=False, include_url=False)
            wrong = [_sentence(dict(each)) for each in details if each["type"] != "default_factory_not_called"]
            raise SettingsError("; ".join(wrong)) from None
        except SourceError as error:
            raise SettingsError(f"{ENV_PREFIX}KAFKA_CONFIG must be a JSON object ({error})") from None

    @field_validator("log_level", mode="before")
    @classmethod
    def _upper(cls, value: Any) -> Any:
        return value.upper() if isinstance(value, str) else value

    @field_validator("data_dir", "java_home", mode="after")
    @classmethod
    def _absolute(cls, value: Path | None) -> Path | None:
        return value if value is None else value.expanduser().absolute()

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
    def _fit_together(self) -> Self:
        given = [name for name in _SECURITY_FIELDS if getattr(self, name) is not None]
        if given and self.kafka_bootstrap_servers is None:
            raise ValueError(f"{_variable(given[0])} needs {_variable('kafka_bootstrap_servers')}")
        protocol = self.kafka_security_protocol or "PLAINTEXT"
        sasl = [name for name in given if "_sasl_" in name]
        if sasl and not protocol.startswith("SASL_"):
            raise ValueError(
                f"{_variable(sasl[0])} needs {_variable('kafka_security_protocol')} SASL_SSL (or _PLAINTEXT)"
            )
        ssl = [name for name in given if "_ssl_" in name]
        if ssl and not protocol.endswith("SSL"):
            raise ValueError(f"{_variable(ssl[0])} needs {_variable('kafka_security_protocol')} SSL or SASL_SSL")
        by_password = (self.kafka_sasl_mechanism or "").startswith(("PLAIN", "SCRAM"))
        if by_password and (self.kafka_sasl_username is None or self.kafka_sasl_password is None):
            raise ValueError(
                f"{_variable('kafka_sasl_mechanism')} {self.kafka_sasl_mechanism} needs "
                f"{_variable('kafka_sasl_username')} and {_variable('kafka_sasl_password')}"
            )
        keyless = self.llm_provider == "extractive" or (self.llm_provider == "openai" and self.openai_base_url)
        if not keyless and self.llm_api_key is None:
            raise ValueError(
                f"{_variable('llm_provider')} {self.llm_provider} needs {_variable(f'{self.llm_provider}_api_key')}"
            )
        return self

    @property
    def embedded_kafka(self) -> bool:
        """Whether Kafka is the embedded broker."""
        return self.kafka_bootstrap_servers is None

    @property
    def llm_api_key(self) -> SecretStr | None:
        """The key of the chosen provider, if it has one."""
        key: SecretStr | None = getattr(self, f"{self.llm_provider}_api_key", None)
        return key

    def kafka_client_config(self, bootstrap_servers: str | None = None) -> dict[str, Any]:
        """librdkafka settings that reach the cluster; ``bootstrap_servers`` is the embedded broker's address.

        Raises:
            SettingsError: neither is there.
        """
        servers = self.kafka_bootstrap_servers or bootstrap_servers
        if servers is None:
            raise SettingsError(f"no Kafka: start the embedded broker, or set {_variable('kafka_bootstrap_servers')}")
        config: dict[str, Any] = {"bootstrap.servers": servers}
        for field, name in _SECURITY_FIELDS.items():
            value = getattr(self, field)
            if value is not None:
                config[name] = value.get_secret_value() if isinstance(value, SecretStr) else str(value)
        return config | self.kafka_config


def _variable(field: str) -> str:
    return f"{ENV_PREFIX}{field.upper()}"


def _refuse_unknown(environment: Mapping[str, str]) -> None:
    known = {_variable(field) for field in Settings.model_fields}
    for name in environment:
        if name.upper().startswith(ENV_PREFIX) and name.upper() not in known:
            close = difflib.get_close_matches(name.upper(), known, 1, cutoff=0.5)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise SettingsError(f"{name} is no setting of Magnatronic{hint}")


def _sentence(detail: dict[str, Any]) -> str:
    place = detail["loc"][0] if detail["loc"] else ""
    text = str(detail["msg"]).removeprefix("Value error, ")
    text = text[:1].lower() + text[1:] if text.startswith("Input") else text
    if not place:
        return text
    name = str(place).upper().removeprefix(ENV_PREFIX)
    return f"{ENV_PREFIX}{name}: {text}"
