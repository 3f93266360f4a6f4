"""A Kafka that lets nobody in without a password or a certificate, and lets nobody do what was not granted.

In: a folder. Out: :class:`SecuredKafka`: one node with SASL, SASL over TLS and mutual TLS, whose authorizer knows no
right but those that were granted. Its plain listener is the superuser's, for what an operator does.
"""

import itertools
import os
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple, Self

from confluent_kafka import KafkaError, KafkaException, TopicCollection
from confluent_kafka.admin import (
    AclBinding,
    AclBindingFilter,
    AclOperation,
    AclPermissionType,
    AdminClient,
    NewTopic,
    ResourcePatternType,
    ResourceType,
    ScramCredentialInfo,
    ScramMechanism,
    UserScramCredentialDeletion,
    UserScramCredentialUpsertion,
)

from magnatronic.broker.java import find_java
from magnatronic.broker.node import KAFKA_JARS, NodeFiles, new_cluster_id, server_properties
from magnatronic.broker.process import LOCALHOST, JavaProcess, free_ports
from streams.settings import SECURITY_FIELDS, variable

__all__ = ["PASSWORD", "PLAIN_USER", "Right", "SecuredKafka", "User", "environment_of", "wait_until"]

PLAIN_USER: Final = "plain-user"
PASSWORD: Final = 'geheim, "with" quotes\' & $igns'
"""Such as people have: it has to come through settings, environments and JAAS unharmed."""

_PROPERTIES: Final = """\
listeners=CLIENT://{host}:{plain},SASL://{host}:{sasl},TLS://{host}:{tls},MUTUAL://{host}:{mutual},\
CONTROLLER://{host}:{controller}
advertised.listeners=CLIENT://{host}:{plain},SASL://{host}:{sasl},TLS://{host}:{tls},MUTUAL://{host}:{mutual}
listener.security.protocol.map=CLIENT:PLAINTEXT,SASL:SASL_PLAINTEXT,TLS:SASL_SSL,MUTUAL:SSL,CONTROLLER:PLAINTEXT
authorizer.class.name=org.apache.kafka.metadata.authorizer.StandardAuthorizer
super.users=User:ANONYMOUS
listener.name.sasl.sasl.enabled.mechanisms=PLAIN,SCRAM-SHA-256
listener.name.sasl.plain.sasl.jaas.config=org.apache.kafka.common.security.plain.PlainLoginModule required \
user_{plain_user}="{password}";
listener.name.sasl.scram-sha-256.sasl.jaas.config=\
org.apache.kafka.common.security.scram.ScramLoginModule required;
listener.name.tls.sasl.enabled.mechanisms=SCRAM-SHA-256
listener.name.tls.scram-sha-256.sasl.jaas.config=\
org.apache.kafka.common.security.scram.ScramLoginModule required;
listener.name.mutual.ssl.client.auth=required
ssl.keystore.type=PEM
ssl.keystore.location={folder}/server.pem
ssl.truststore.type=PEM
ssl.truststore.location={folder}/ca.crt
"""


class Right(NamedTuple):
    """A right: what may be done to which resource. ``name`` ends with ``*`` where it is a prefix."""

    kind: str
    name: str
    operation: str


def environment_of(config: Mapping[str, Any]) -> dict[str, str]:
    """The variables that a user sets for these librdkafka settings."""
    fields = {name: field for field, name in SECURITY_FIELDS.items()} | {"bootstrap.servers": "kafka_bootstrap_servers"}
    return {variable(fields[name]): value for name, value in config.items()}


class SecuredKafka:
    """The node. ``config`` are the superuser's settings; :meth:`user` makes those of somebody else."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._ports = dict(zip(("plain", "sasl", "tls", "mutual", "controller"), free_ports(5), strict=True))
        self.config: dict[str, Any] = {"bootstrap.servers": self.at("plain")}
        self._process: JavaProcess | None = None
        self._admin: AdminClient | None = None
        self._numbers = itertools.count(1)

    @property
    def admin(self) -> AdminClient:
        """The superuser's."""
        if self._admin is None:
            self._admin = AdminClient(dict(self.config))
        return self._admin

    def __enter__(self) -> Self:
        make_certificates(self.folder)
        java, jars = find_java(), KAFKA_JARS.fetch() / "*"
        files = NodeFiles(self.folder)
        more = _PROPERTIES.format(
            host=LOCALHOST,
            folder=self.folder,
            plain_user=PLAIN_USER,
            password=PASSWORD.replace('"', r"\\\""),
            **self._ports,
        )
        properties = server_properties(
            node_id=1,
            port=self._ports["plain"],
            controller_port=self._ports["controller"],
            voters=f"1@{self.at('controller')}",
            log_dir=files.log_dir,
            more=dict(line.split("=", 1) for line in more.splitlines()),
        )
        path = files.write("server.properties", properties)
        files.format_once(java, jars, path, cluster_id=new_cluster_id())
        self._process = JavaProcess(
            "secured Kafka",
            files.command(java, jars, "-Xmx320m", "kafka.Kafka", str(path)),
            output_path=self.folder / "kafka.out",
            ready=self._answers,
            log_paths=[files.log_path],
            cwd=self.folder,
            start_timeout_s=90.0,
        ).start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None and self._process.running:
            self._process.kill()

    def _answers(self) -> bool:
        try:
            return bool(AdminClient({**self.config, "log_level": 0}).list_topics(timeout=1).brokers)
        except KafkaException:
            return False

    def unique(self, prefix: str) -> str:
        """A name that nobody else here uses."""
        return f"{prefix}-{next(self._numbers)}"

    def create_topics(
        self, names: str | Iterable[str], partitions: int = 1, config: Mapping[str, str] | None = None
    ) -> None:
        """Create topics and wait until they are seen."""
        wanted = [names] if isinstance(names, str) else list(names)
        topics = [NewTopic(name, partitions, 1, config=dict(config or {})) for name in wanted]
        for created in self.admin.create_topics(topics, operation_timeout=30).values():
            created.result(30)
        wait_until(lambda: set(wanted) <= self.admin.list_topics(timeout=20).topics.keys())

    def user(self, rights: Iterable[Right] = (), *, listener: str = "sasl", mechanism: str = "SCRAM-SHA-256") -> "User":
        """A new user, by SCRAM-SHA-256, who has ``rights``. On listener ``mutual`` it is a certificate's."""
        if listener == "mutual":
            name = self.unique("client")
            certificate(self.folder, name)
            config = {
                "security.protocol": "SSL",
                "ssl.certificate.location": str(self.folder / f"{name}.crt"),
                "ssl.key.location": str(self.folder / f"{name}.key"),
            }
            principal = f"User:CN={name}"
        else:
            name = PLAIN_USER if mechanism == "PLAIN" else self.unique("user")
            config = {
                "security.protocol": "SASL_PLAINTEXT" if listener == "sasl" else "SASL_SSL",
                "sasl.mechanism": mechanism,
                "sasl.username": name,
                "sasl.password": PASSWORD,
            }
            principal = f"User:{name}"
            if mechanism != "PLAIN":
                self.let_in(name)
        if listener != "sasl":
            config["ssl.ca.location"] = str(self.folder / "ca.crt")
        user = User(self, principal, {"bootstrap.servers": self.at(listener), **config})
        user.grant(rights)
        return user

    def let_in(self, name: str) -> None:
        """Give a user a password."""
        info = ScramCredentialInfo(ScramMechanism.SCRAM_SHA_256, 4096)
        made = UserScramCredentialUpsertion(name, info, PASSWORD.encode())
        self.admin.alter_user_scram_credentials([made])[name].result(20)

    def shut_out(self, name: str) -> None:
        """Take a user's password away; connections that are open stay open."""
        gone = UserScramCredentialDeletion(name, ScramMechanism.SCRAM_SHA_256)
        self.admin.alter_user_scram_credentials([gone])[name].result(20)

    def at(self, listener: str) -> str:
        """The address of a listener: plain, sasl, tls, mutual."""
        return f"{LOCALHOST}:{self._ports[listener]}"


class User:
    """Somebody who can log in. ``config`` are librdkafka settings, ``environment`` the same as Magnatronic's."""

    def __init__(self, kafka: SecuredKafka, principal: str, config: dict[str, Any]) -> None:
        self._kafka = kafka
        self.principal = principal
        self.config = config

    @property
    def environment(self) -> dict[str, str]:
        return environment_of(self.config)

    def grant(self, rights: Iterable[Right]) -> None:
        """Give rights, and wait until the broker knows them."""
        bindings = [self._binding(right) for right in rights]
        if bindings:
            for made in self._kafka.admin.create_acls(bindings).values():
                made.result(20)
            self._wait_for_broker()

    def revoke(self, right: Right) -> None:
        """Take a right away."""
        chosen = _just(self._binding(right))
        for gone in self._kafka.admin.delete_acls([chosen]).values():
            assert gone.result(20), right
        self._wait_for_broker()

    def _wait_for_broker(self) -> None:
        """The controller has it; the broker learns of changes in their order, so it has to know a later one."""
        marker = self._kafka.unique("marker")
        for made in self._kafka.admin.create_acls([self._binding(Right("TOPIC", marker, "DESCRIBE"))]).values():
            made.result(20)
        admin = AdminClient({**self.config, "log_level": 0})

        def known() -> bool:
            error = admin.describe_topics(TopicCollection([marker]))[marker].exception(20)
            assert isinstance(error, KafkaException)
            return bool(error.args[0].code() != KafkaError.TOPIC_AUTHORIZATION_FAILED)

        wait_until(known)

    def _binding(self, right: Right) -> AclBinding:
        prefix = right.name.endswith("*")
        return AclBinding(
            ResourceType[right.kind],
            right.name.removesuffix("*"),
            ResourcePatternType.PREFIXED if prefix else ResourcePatternType.LITERAL,
            self.principal,
            "*",
            AclOperation[right.operation],
            AclPermissionType.ALLOW,
        )


def _just(binding: AclBinding) -> AclBindingFilter:
    """What finds this one alone."""
    return AclBindingFilter(
        binding.restype,
        binding.name,
        binding.resource_pattern_type,
        binding.principal,
        binding.host,
        binding.operation,
        binding.permission_type,
    )


def wait_until(done: Callable[[], object], timeout_s: float = 20.0) -> None:
    """Wait for something that sets no event."""
    deadline = time.monotonic() + timeout_s
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def make_certificates(folder: Path) -> None:
    """A certificate authority of our own (``ca.crt``), and the server's key and certificate (``server.pem``)."""
    _openssl(
        folder,
        *("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "30"),
        *("-subj", "/CN=test CA", "-keyout", "ca.key", "-out", "ca.crt"),
    )
    certificate(folder, "server")
    (folder / "server.pem").write_text((folder / "server.key").read_text() + (folder / "server.crt").read_text())


def certificate(folder: Path, name: str) -> None:
    """A key ``name.key`` and its certificate ``name.crt`` for 127.0.0.1, signed by the authority in ``folder``."""
    _openssl(
        folder,
        *("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "30"),
        *("-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1", "-addext", "basicConstraints=CA:FALSE"),
        *("-CA", "ca.crt", "-CAkey", "ca.key", "-keyout", f"{name}.key", "-out", f"{name}.crt"),
    )


def _openssl(folder: Path, *arguments: str) -> None:
    done = subprocess.run(
        ["openssl", *arguments], cwd=folder, capture_output=True, text=True, check=False, env={**os.environ}
    )
    assert done.returncode == 0, done.stderr
