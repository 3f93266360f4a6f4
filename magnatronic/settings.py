"""Every setting of Magnatronic, read from environment variables.

In: ``MAGNATRONIC_*`` variables and the API keys' usual names. Out: :class:`Settings`, checked as a whole; a wrong one
is a :class:`SettingsError` that names the variable. With nothing set, all parts are the embedded ones and no key is
needed.
"""

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AliasChoices, Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import SettingsConfigDict
from pydantic_settings import SettingsError as SourceError

from magnatronic.errors import WrongInputError
from magnatronic.keys.settings import KeySettings, open_keys
from magnatronic.keys.store import SubjectKeys
from streams.settings import ENV_PREFIX, AlertSettings, ClusterSettings, variable

__all__ = ["ENV_PREFIX", "LlmProvider", "Settings", "SettingsError"]

LlmProvider = Literal["extractive", "openai", "anthropic", "google"]


class SettingsError(WrongInputError):
    """One or more settings are wrong; the message names each variable, what is wrong with it, and never a secret."""


def _default_data_dir() -> Path:
    root = os.environ.get("XDG_DATA_HOME")
    return (Path(root) if root else Path.home() / ".local" / "share") / "magnatronic"


def _default_provider(data: Mapping[str, Any]) -> LlmProvider:
    providers: tuple[LlmProvider, ...] = ("openai", "anthropic", "google")
    return next((name for name in providers if data.get(f"{name}_api_key")), "extractive")


def _key(name: str, *usual: str) -> AliasChoices:
    """The variables that may hold a vendor's setting: ours first, then the names that the vendor's SDK reads."""
    return AliasChoices(f"{ENV_PREFIX.lower()}{name}", *usual)


class Settings(AlertSettings, KeySettings, ClusterSettings):
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

    metrics_host: str = Field("127.0.0.1", description="Address to serve `/metrics`, `/live` and `/ready` on")
    metrics_port: Annotated[int, Field(ge=0, le=65535)] | Literal["off"] = Field(
        0, description="Their port; 0: a free one, which `magnatronic status` shows; `off`: they are not served"
    )
    stalled_after_s: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="Seconds after which a partition that does not get past an event makes its process unready; unset: "
        "the time limit of the agent's calls, and half a minute",
    )

    loop_timeout_s: Annotated[float, Field(ge=0)] = Field(
        60.0,
        description="Seconds that the event loop of `up` and `run` may stand still until the process is ended with all "
        "stacks on standard error and exit code 154; 0 for ever",
    )
    memory_limit_mb: Annotated[int, Field(ge=0)] | None = Field(
        None,
        description="Memory that the process of `up` and `run` may hold until it is ended the same way, in MiB; unset: "
        "four fifths of the machine's, or of its control group's; 0: any",
    )

    monitor: bool = Field(
        True, description="Whether `magnatronic up` runs the Monitor beside it; `magnatronic run monitor` runs it alone"
    )
    monitor_instance: str | None = Field(
        None, description="Names a Monitor worker that is started by hand; each needs another name"
    )
    partitions: Annotated[int, Field(ge=1)] = Field(4, description="Partitions of a new topic, where it fixes none")

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

    @model_validator(mode="after")
    def _provider_has_its_key(self) -> Self:
        keyless = self.llm_provider == "extractive" or (self.llm_provider == "openai" and self.openai_base_url)
        if not keyless and self.llm_api_key is None:
            raise ValueError(
                f"{variable('llm_provider')} {self.llm_provider} needs {variable(f'{self.llm_provider}_api_key')}"
            )
        return self

    @property
    def embedded_kafka(self) -> bool:
        """Whether Kafka is the embedded broker."""
        return self.kafka_bootstrap_servers is None

    def keys(self) -> SubjectKeys | None:
        """The key store of data subjects; None where it is off.

        Raises:
            KeyStoreError: the key encryption key is of the wrong size.
        """
        return open_keys(self, self.data_dir / "keys" if self.embedded_kafka else None)

    @property
    def metrics_port_or_none(self) -> int | None:
        """The port to serve metrics on, None where they are off."""
        return None if self.metrics_port == "off" else self.metrics_port

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
            raise SettingsError(f"no Kafka: start the embedded broker, or set {variable('kafka_bootstrap_servers')}")
        return self.librdkafka_config(servers)


def _refuse_unknown(environment: Mapping[str, str]) -> None:
    known = {variable(field) for field in Settings.model_fields}
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
