"""Settings: defaults need nothing, wrong values are told in one line, secrets stay secret."""

from pathlib import Path
from typing import Any

import pytest

from magnatronic.errors import WrongInputError
from magnatronic.settings import Settings, SettingsError

CLUSTER = {
    "MAGNATRONIC_KAFKA_BOOTSTRAP_SERVERS": "one:9093,two:9093",
    "MAGNATRONIC_KAFKA_SECURITY_PROTOCOL": "SASL_SSL",
    "MAGNATRONIC_KAFKA_SASL_MECHANISM": "SCRAM-SHA-512",
    "MAGNATRONIC_KAFKA_SASL_USERNAME": "agent",
    "MAGNATRONIC_KAFKA_SASL_PASSWORD": "hush-hush",
    "MAGNATRONIC_KAFKA_SSL_CA_LOCATION": "ca.pem",
    "MAGNATRONIC_KAFKA_CONFIG": '{"linger.ms": 5, "client.rack": "a"}',
}


def _load(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> Settings:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return Settings.load()


def test_nothing_set_means_embedded_parts_without_a_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    settings = Settings.load()
    assert settings.data_dir == tmp_path / "magnatronic"
    assert settings.embedded_kafka
    assert settings.replication_factor == 1
    assert settings.llm_provider == "extractive"
    assert settings.llm_api_key is None
    assert settings.clickhouse_url is None
    assert settings.milvus_uri is None
    assert settings.kafka_client_config("127.0.0.1:1") == {"bootstrap.servers": "127.0.0.1:1"}


def test_data_dir_is_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert _load(monkeypatch, {"MAGNATRONIC_DATA_DIR": "here"}).data_dir == tmp_path / "here"


def test_cluster_settings_reach_librdkafka(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = _load(monkeypatch, CLUSTER)
    assert settings.kafka_client_config() == {
        "bootstrap.servers": "one:9093,two:9093",
        "security.protocol": "SASL_SSL",
        "sasl.mechanism": "SCRAM-SHA-512",
        "sasl.username": "agent",
        "sasl.password": "hush-hush",
        "ssl.ca.location": "ca.pem",
        "linger.ms": 5,
        "client.rack": "a",
    }
    assert not settings.embedded_kafka
    assert settings.replication_factor == -1


def test_secrets_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = _load(
        monkeypatch,
        {**CLUSTER, "OPENAI_API_KEY": "sk-hush", "MAGNATRONIC_CLICKHOUSE_URL": "http://u:hush-hush@h:8123/d"},
    )
    assert "hush" not in repr(settings)


@pytest.mark.parametrize(
    ("variable", "provider"),
    [
        ("OPENAI_API_KEY", "openai"),
        ("ANTHROPIC_API_KEY", "anthropic"),
        ("GEMINI_API_KEY", "google"),
        ("GOOGLE_API_KEY", "google"),
        ("MAGNATRONIC_ANTHROPIC_API_KEY", "anthropic"),
    ],
)
def test_a_key_picks_its_provider(monkeypatch: pytest.MonkeyPatch, variable: str, provider: str) -> None:
    settings = _load(monkeypatch, {variable: "k"})
    assert settings.llm_provider == provider
    assert settings.llm_api_key is not None
    assert settings.llm_api_key.get_secret_value() == "k"


def test_our_name_wins_over_the_vendors(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = _load(monkeypatch, {"OPENAI_API_KEY": "theirs", "MAGNATRONIC_OPENAI_API_KEY": "ours"})
    assert settings.llm_api_key is not None
    assert settings.llm_api_key.get_secret_value() == "ours"


def test_a_named_provider_wins_over_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = _load(monkeypatch, {"OPENAI_API_KEY": "k", "MAGNATRONIC_LLM_PROVIDER": "extractive"})
    assert settings.llm_provider == "extractive"


def test_a_compatible_server_needs_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = _load(
        monkeypatch, {"MAGNATRONIC_LLM_PROVIDER": "openai", "MAGNATRONIC_OPENAI_BASE_URL": "http://localhost:1/v1"}
    )
    assert settings.llm_provider == "openai"


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"MAGNATRONIC_KAFKA_BOOTSTRAP": "x"}, "did you mean MAGNATRONIC_KAFKA_BOOTSTRAP_SERVERS?"),
        ({"MAGNATRONIC_PARTITIONS": "0"}, "MAGNATRONIC_PARTITIONS: input should be greater than or equal to 1"),
        ({"MAGNATRONIC_REPLICATION_FACTOR": "0"}, "MAGNATRONIC_REPLICATION_FACTOR: must be at least 1, or -1"),
        ({"MAGNATRONIC_LOG_LEVEL": "loud"}, "MAGNATRONIC_LOG_LEVEL: input should be 'DEBUG'"),
        ({"MAGNATRONIC_KAFKA_CONFIG": "{"}, "MAGNATRONIC_KAFKA_CONFIG must be a JSON object"),
        ({"MAGNATRONIC_KAFKA_CONFIG": '{"group.id": "g"}'}, "must not set group.id: Magnatronic does"),
        ({"MAGNATRONIC_KAFKA_SASL_USERNAME": "u"}, "needs MAGNATRONIC_KAFKA_BOOTSTRAP_SERVERS"),
        (
            {"MAGNATRONIC_KAFKA_BOOTSTRAP_SERVERS": "h:1", "MAGNATRONIC_KAFKA_SASL_USERNAME": "u"},
            "MAGNATRONIC_KAFKA_SASL_USERNAME needs MAGNATRONIC_KAFKA_SECURITY_PROTOCOL SASL_SSL",
        ),
        (
            {"MAGNATRONIC_KAFKA_BOOTSTRAP_SERVERS": "h:1", "MAGNATRONIC_KAFKA_SSL_CA_LOCATION": "ca.pem"},
            "MAGNATRONIC_KAFKA_SSL_CA_LOCATION needs MAGNATRONIC_KAFKA_SECURITY_PROTOCOL SSL",
        ),
        (
            {
                "MAGNATRONIC_KAFKA_BOOTSTRAP_SERVERS": "h:1",
                "MAGNATRONIC_KAFKA_SECURITY_PROTOCOL": "SASL_SSL",
                "MAGNATRONIC_KAFKA_SASL_MECHANISM": "SCRAM-SHA-256",
            },
            "SCRAM-SHA-256 needs MAGNATRONIC_KAFKA_SASL_USERNAME and MAGNATRONIC_KAFKA_SASL_PASSWORD",
        ),
        ({"MAGNATRONIC_LLM_PROVIDER": "google"}, "google needs MAGNATRONIC_GOOGLE_API_KEY"),
    ],
)
def test_wrong_settings_are_told_in_one_line(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], says: str
) -> None:
    with pytest.raises(SettingsError) as caught:
        _load(monkeypatch, environment)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, WrongInputError)


def test_an_error_repeats_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError) as caught:
        _load(monkeypatch, {**CLUSTER, "MAGNATRONIC_PARTITIONS": "many"})
    assert "hush" not in str(caught.value)


def test_several_wrong_settings_are_all_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError) as caught:
        _load(monkeypatch, {"MAGNATRONIC_PARTITIONS": "many", "MAGNATRONIC_LOG_LEVEL": "loud"})
    assert "MAGNATRONIC_PARTITIONS" in str(caught.value)
    assert "MAGNATRONIC_LOG_LEVEL" in str(caught.value)
    assert "factory" not in str(caught.value)


def test_overrides_win_and_settings_are_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAGNATRONIC_PARTITIONS", "2")
    settings: Any = Settings.load(partitions=7)
    assert settings.partitions == 7
    with pytest.raises(ValueError, match="frozen"):
        settings.partitions = 8


def test_no_kafka_at_all_is_told() -> None:
    with pytest.raises(SettingsError, match="start the embedded broker, or set MAGNATRONIC_KAFKA_BOOTSTRAP_SERVERS"):
        Settings.load().kafka_client_config()


def test_every_setting_is_described() -> None:
    assert not [name for name, field in Settings.model_fields.items() if not field.description]
