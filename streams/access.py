"""What Kafka refuses: a login, a right. Each refusal becomes an error that says who lacks what, and what to do.

In: librdkafka settings; a client's error, or what is going to be done. Out: :class:`~streams.errors.AccessError`.
librdkafka would try for ever and only log it. Logins are looked at when a process starts, never later: a cluster that
is in trouble refuses logins too, and clients get over that.
"""

import time
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import wait
from typing import Any, Final

from confluent_kafka import KafkaError, KafkaException, TopicCollection
from confluent_kafka.admin import AclOperation, AdminClient

from streams.errors import AccessError, ClusterError
from streams.settings import variable

__all__ = ["check_login", "denied", "lacking", "refusal"]

_LOGIN_S: Final = 12.0
_SURE_S: Final = 1.5
"""A refusal counts when no broker has let us in for so long since: one of several may be set up wrongly."""
_POLL_S: Final = 0.05
_RIGHTS_S: Final = 5.0
_DESCRIBE: Final = AclOperation.DESCRIBE
_OF_PRODUCERS: Final = ("transactional.id", "transaction.timeout.ms", "enable.idempotence")
_REFUSALS: Final = {
    KafkaError.TOPIC_AUTHORIZATION_FAILED: "topic",
    KafkaError.GROUP_AUTHORIZATION_FAILED: "group",
    KafkaError.TRANSACTIONAL_ID_AUTHORIZATION_FAILED: "transactional id",
    KafkaError.CLUSTER_AUTHORIZATION_FAILED: "cluster",
}
_PROTOCOL: Final = variable("kafka_security_protocol")
_HINTS: Final = (
    (
        "Request not valid in current SASL state",
        f"that port asks for no login: set {_PROTOCOL} to PLAINTEXT or SSL, or name the port that does",
    ),
    ("mechanism handshake failed", f"set {variable('kafka_sasl_mechanism')} to one that the broker supports"),
    (
        "PLAINTEXT broker listener",
        f"that port speaks no TLS: set {_PROTOCOL} to SASL_PLAINTEXT or PLAINTEXT, or name the port that does",
    ),
    (
        "certificate verify failed",
        f"set {variable('kafka_ssl_ca_location')} to the file with the CA that signed the broker's certificate",
    ),
    (
        "certificate required",
        f"set {variable('kafka_ssl_certificate_location')} and {variable('kafka_ssl_key_location')}: that port asks "
        "for a client certificate",
    ),
    ("certificate unknown", "the broker does not trust the client certificate; have it signed by a CA that it trusts"),
    ("unknown ca", "the broker does not trust the client certificate; have it signed by a CA that it trusts"),
)
_LOGIN_HINT: Final = f"check {variable('kafka_sasl_username')} and {variable('kafka_sasl_password')}"
_SILENT: Final = (
    "every connection was closed without a word. Does that port ask for TLS or a login? "
    f"Set {_PROTOCOL}, it is {{}} now"
)


def check_login(kafka: Mapping[str, Any], *, timeout_s: float = _LOGIN_S) -> None:
    """See to it that the cluster answers and lets this process in. Blocks.

    Raises:
        AccessError: it refuses the login or the TLS handshake; the message says what to set.
        ClusterError: no answer within ``timeout_s`` seconds.
    """
    said: list[KafkaError] = []
    servers = kafka.get("bootstrap.servers", "")
    admin = AdminClient({**kafka, "error_cb": said.append, "log_level": 0})
    # Longer than it is waited for: what is to be told then are the causes, not that this timed out.
    answer = admin.describe_cluster(request_timeout=timeout_s + _RIGHTS_S)
    deadline = time.monotonic() + timeout_s
    while not wait([answer], _POLL_S).done:
        admin.poll(0)
        now = time.monotonic()
        refusal = next((error for error in reversed(said) if _is_refusal(error)), None)
        if refusal is not None:
            deadline = min(deadline, now + _SURE_S)
        if now < deadline:
            continue
        if refusal is not None:
            raise AccessError(f"Kafka at {servers} does not let {_principal(kafka)} in: {_explained(refusal)}")
        # "All brokers are down" follows the cause, if there is one to tell.
        causes = [error.str() for error in said if error.code() != KafkaError._ALL_BROKERS_DOWN]
        if causes or not said:
            raise ClusterError(f"no Kafka answers at {servers}: {causes[-1] if causes else f'{timeout_s:g} s passed'}")
        protocol = kafka.get("security.protocol", "PLAINTEXT")
        raise AccessError(f"no Kafka answers at {servers}: {_SILENT.format(protocol)}")


def _is_refusal(error: KafkaError) -> bool:
    said = error.str()
    return error.code() in (KafkaError._AUTHENTICATION, KafkaError._SSL) or any(text in said for text, _ in _HINTS)


def _explained(error: KafkaError) -> str:
    said = error.str()
    hint = next((hint for text, hint in _HINTS if text in said), "")
    if not hint and error.code() == KafkaError._AUTHENTICATION:
        hint = _LOGIN_HINT
    return f"{said}; {hint}" if hint else said


def denied(
    name: str, kafka: Mapping[str, Any], error: KafkaError, *, topic: str = "", group: str = "", to: str = ""
) -> AccessError | None:
    """The error for a right that is missing, where that is what ``error`` says. ``to`` names the operation."""
    kind = _REFUSALS.get(error.code())
    if kind is None:
        return None
    match kind:
        case "topic":
            lacks = f"{to or 'READ or WRITE'} on topic {topic}" if topic else "a right on a topic"
        case "group":
            lacks = f"READ on group {group or kafka.get('group.id', '')}".rstrip()
        case "transactional id":
            lacks = f"WRITE on transactional id {kafka.get('transactional.id', '')}".rstrip()
        case _:
            lacks = f"{to or 'a right'} on the cluster"
    return refusal(name, kafka, [lacks], error.str())


def refusal(name: str, kafka: Mapping[str, Any], lacks: Iterable[str], said: str = "") -> AccessError:
    """The error for a user who ``lacks`` these rights; ``said`` is what Kafka did."""
    found = f" ({said})" if said else ""
    return AccessError(
        f"{name}: {_principal(kafka)} lacks {', '.join(lacks)}{found}; grant it (docs/security.md has what each role "
        "needs), then start again; nothing is lost"
    )


def _principal(kafka: Mapping[str, Any]) -> str:
    if user := kafka.get("sasl.username"):
        return f"User:{user}"
    if certificate := kafka.get("ssl.certificate.location"):
        return f"the subject of {certificate}"
    return "User:ANONYMOUS"


def lacking(kafka: Mapping[str, Any], wanted: Mapping[str, Collection[AclOperation]]) -> dict[str, str]:
    """The topics of ``wanted`` on which this user has fewer rights than that, and which are missing, in words.

    ``kafka`` may be a producer's settings. What does not exist, or the cluster does not tell, is passed over. Blocks
    for 5 s at most.
    """
    settings = {key: value for key, value in kafka.items() if key not in _OF_PRODUCERS}
    # Bound: a client that is collected takes its unanswered requests along.
    admin = AdminClient({"log_level": 5, **settings})
    asked = admin.describe_topics(
        TopicCollection(sorted(wanted)), include_authorized_operations=True, request_timeout=_RIGHTS_S
    )
    lacks = {}
    wait(asked.values(), _RIGHTS_S + 1)
    for topic in wanted:
        if not asked[topic].done():
            continue
        try:
            has = asked[topic].result().authorized_operations or ()
        except KafkaException as error:
            if error.args[0].code() != KafkaError.TOPIC_AUTHORIZATION_FAILED:
                continue
            has = (_DESCRIBE,)
        # Who may not describe it is not told at all; without that right in an answer, this broker tells none.
        if _DESCRIBE in has and (short := sorted(each.name for each in wanted[topic] if each not in has)):
            lacks[topic] = f"{' and '.join(short)} on topic {topic}"
    return lacks
