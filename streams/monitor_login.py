"""The Monitor's login, derived from the same librdkafka settings that all else logs in with: Faust's Kafka client is
another one, and knows other names.

In: librdkafka settings. Out: :class:`Login`, or ValueError for what that client can't do, with what to do instead:
to connect with less than was asked for would be worse than not to connect.
"""

import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

__all__ = ["Login", "login_of"]

_MECHANISMS: Final = ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512")
_KNOWN: Final = frozenset(
    {
        "sasl.mechanism",
        "sasl.mechanisms",
        "sasl.username",
        "sasl.password",
        "ssl.ca.location",
        "ssl.certificate.location",
        "ssl.key.location",
        "ssl.key.password",
        "ssl.endpoint.identification.algorithm",
        "enable.ssl.certificate.verification",
    }
)
_SECURITY: Final = ("sasl.", "ssl.", "enable.ssl.", "enable.sasl.")
_INSTEAD: Final = "set MAGNATRONIC_MONITOR=false to run without the Monitor, or give it other settings of its own"


@dataclass(frozen=True, slots=True)
class Login:
    """``mechanism`` and what belongs to it are empty without SASL, ``context`` is None without TLS."""

    context: ssl.SSLContext | None = None
    mechanism: str = ""
    username: str = ""
    password: str = field(default="", repr=False)


def login_of(kafka: Mapping[str, Any]) -> Login:
    """What Faust's client needs to log in as a client with these librdkafka settings does.

    Raises:
        ValueError: it can't do so; the message names the setting.
        OSError: a certificate or key can't be read.
    """
    unknown = sorted(name for name in kafka if name.startswith(_SECURITY) and name not in _KNOWN)
    if unknown:
        raise ValueError(f"the Monitor's Kafka client does not know {', '.join(unknown)}; {_INSTEAD}")
    protocol = str(kafka.get("security.protocol", "PLAINTEXT")).upper()
    context = _context(kafka) if protocol.endswith("SSL") else None
    if not protocol.startswith("SASL"):
        return Login(context)
    # librdkafka's own default is GSSAPI.
    mechanism = str(kafka.get("sasl.mechanism", kafka.get("sasl.mechanisms", "GSSAPI"))).upper()
    if mechanism not in _MECHANISMS:
        raise ValueError(
            f"the Monitor can't log in by {mechanism}; its Kafka client takes {', '.join(_MECHANISMS)}: set "
            f"sasl.mechanism to one of them, or {_INSTEAD}"
        )
    if not kafka.get("sasl.username") or kafka.get("sasl.password") is None:
        raise ValueError(f"{mechanism} needs sasl.username and sasl.password")
    return Login(context, mechanism, str(kafka["sasl.username"]), str(kafka["sasl.password"]))


def _context(kafka: Mapping[str, Any]) -> ssl.SSLContext:
    ca = kafka.get("ssl.ca.location")
    try:
        folder = ca is not None and Path(str(ca)).is_dir()
        context = ssl.create_default_context(cafile=None if folder else ca, capath=ca if folder else None)
        if certificate := kafka.get("ssl.certificate.location"):
            # The password is never asked for on the terminal: that of an unencrypted key is not asked for at all.
            password = str(kafka.get("ssl.key.password", ""))
            context.load_cert_chain(certificate, kafka.get("ssl.key.location"), lambda: password)
    except OSError as error:  # ssl.SSLError is one, and names no file
        names = [str(kafka[name]) for name in sorted(_KNOWN) if name.endswith("location") and name in kafka]
        raise OSError(f"TLS can't be set up with {', '.join(names)}: {error}") from error
    if str(kafka.get("ssl.endpoint.identification.algorithm", "https")).lower() == "none":
        context.check_hostname = False
    if str(kafka.get("enable.ssl.certificate.verification", "true")).lower() == "false":
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context
