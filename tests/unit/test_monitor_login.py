"""The Monitor's login follows from librdkafka's settings, or it says what it can't do."""

import ssl
from pathlib import Path
from typing import Any

import pytest

from streams.monitor_login import Login, login_of
from tests.support.secured import certificate, make_certificates

BASE: dict[str, Any] = {"bootstrap.servers": "k:9092", "client.id": "x"}
SCRAM = {
    **BASE,
    "security.protocol": "SASL_PLAINTEXT",
    "sasl.mechanism": "SCRAM-SHA-512",
    "sasl.username": "u",
    "sasl.password": "p",
}


def test_no_login_where_none_is_asked_for() -> None:
    assert login_of(BASE) == Login()
    assert login_of({**BASE, "security.protocol": "plaintext"}) == Login()


def test_sasl() -> None:
    assert login_of(SCRAM) == Login(None, "SCRAM-SHA-512", "u", "p")
    assert login_of({**SCRAM, "sasl.mechanism": "plain"}).mechanism == "PLAIN"
    assert "p'" not in repr(login_of({**SCRAM, "sasl.password": "secret-p"}))
    context = login_of({**SCRAM, "security.protocol": "SASL_SSL"}).context
    assert context is not None
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert context.check_hostname


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            {"sasl.mechanism": "OAUTHBEARER"},
            "can't log in by OAUTHBEARER.*PLAIN, SCRAM-SHA-256, .*MONITOR=false",
        ),
        ({"sasl.mechanism": "GSSAPI", "sasl.kerberos.keytab": "/k"}, r"does not know sasl\.kerberos\.keytab"),
        ({"ssl.keystore.location": "/k"}, r"does not know ssl\.keystore\.location"),
        ({"sasl.password": None}, r"needs sasl\.username and sasl\.password"),
        ({"sasl.username": ""}, r"needs sasl\.username and sasl\.password"),
    ],
)
def test_what_it_can_not_do_is_said(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        login_of({**SCRAM, **changed})


def test_certificates(tmp_path: Path) -> None:
    make_certificates(tmp_path)
    certificate(tmp_path, "client")
    tls = {
        **BASE,
        "security.protocol": "SSL",
        "ssl.ca.location": str(tmp_path / "ca.crt"),
        "ssl.certificate.location": str(tmp_path / "client.crt"),
        "ssl.key.location": str(tmp_path / "client.key"),
    }
    login = login_of(tls)
    assert login.context is not None
    assert not login.mechanism
    assert [dict(each)["subject"] for each in login.context.get_ca_certs()] == [((("commonName", "test CA"),),)]
    loose = login_of({**tls, "ssl.endpoint.identification.algorithm": "none"}).context
    assert loose is not None
    assert not loose.check_hostname
    blind = login_of({**tls, "enable.ssl.certificate.verification": "false"}).context
    assert blind is not None
    assert blind.verify_mode is ssl.CERT_NONE
    with pytest.raises(OSError, match=r"TLS can't be set up with .*missing\.crt"):
        login_of({**tls, "ssl.ca.location": str(tmp_path / "missing.crt")})
