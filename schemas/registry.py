"""Schema ids: from the committed, append-only manifest, or from a Confluent-compatible registry.

In: a schema to be framed, or an id found in a frame. Out: its id, or the schema. :class:`Manifest` is
``schemas/registry.json``: every version of every event type that was ever committed, with its id, fingerprint and
whole text. :class:`ManifestIds` takes the ids from it; :class:`RegistryIds` registers the same schemas with a registry
(subject = record's full name, RecordNameStrategy) and takes the ids that it gives.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Protocol
from urllib.parse import quote

import httpx
import orjson

from schemas.avro_schema import RecordType, Schema, canonical, fingerprint, parse
from schemas.errors import GenerationError, RegistryError, UnsafeSchemaError

__all__ = [
    "MANIFEST_PATH",
    "Manifest",
    "ManifestIds",
    "RegistryIds",
    "SchemaIds",
    "SchemaVersion",
    "check_append_only",
]

MANIFEST_PATH: Final = Path(__file__).with_name("registry.json")
_CONTENT_TYPE: Final = "application/vnd.schemaregistry.v1+json"
_MAX_REMEMBERED: Final = 4096


@dataclass(frozen=True)
class SchemaVersion:
    """One committed version of an event type's schema. ``schema`` is its canonical JSON text."""

    id: int
    name: str
    version: int
    fingerprint: str
    schema: str

    @cached_property
    def parsed(self) -> RecordType:
        """The schema as a tree."""
        schema = parse(self.schema)
        if not isinstance(schema, RecordType):
            raise UnsafeSchemaError(f"{self.name} version {self.version} is no record")
        return schema


class Manifest:
    """Every committed schema version, in order of id. Immutable: :meth:`with_schema` gives a longer one."""

    def __init__(self, versions: tuple[SchemaVersion, ...]) -> None:
        self.versions = versions
        self._by_id = {version.id: version for version in versions}
        self._by_fingerprint = {(version.name, version.fingerprint): version for version in versions}

    @classmethod
    def load(cls, path: Path = MANIFEST_PATH) -> "Manifest":
        """The manifest in a file.

        Raises:
            RegistryError: the file is missing or no manifest, its ids are not 1, 2, 3, ..., or a fingerprint is not
                the one of its schema.
        """
        try:
            versions = tuple(map(cls._version, orjson.loads(path.read_bytes())["schemas"]))
        except (OSError, orjson.JSONDecodeError, KeyError, TypeError, UnsafeSchemaError) as error:
            raise RegistryError(
                f"{path} is no schema manifest ({type(error).__name__}: {error}); restore the committed file"
            ) from error
        latest: dict[str, int] = {}
        for position, version in enumerate(versions, 1):
            if version.id != position:
                raise RegistryError(f"{path}: entry {position} has id {version.id}; ids must be 1, 2, 3, ...")
            if version.version != latest.get(version.name, 0) + 1:
                raise RegistryError(f"{path}: id {version.id} is no successor of {version.name}'s last version")
            if version.fingerprint != fingerprint(version.parsed):
                raise RegistryError(f"{path}: the schema of id {version.id} ({version.name}) was changed in place")
            latest[version.name] = version.version
        return cls(versions)

    @staticmethod
    def _version(row: dict[str, Any]) -> SchemaVersion:
        schema = canonical(parse(row["schema"]))
        version = SchemaVersion(row["id"], row["name"], row["version"], row["fingerprint"], schema)
        if version.parsed.name != version.name:
            raise UnsafeSchemaError(f"id {version.id} is named {version.name}, but its schema {version.parsed.name}")
        return version

    def text(self) -> str:
        """The manifest as the JSON that :meth:`load` reads."""
        rows = [
            {
                "id": version.id,
                "name": version.name,
                "version": version.version,
                "fingerprint": version.fingerprint,
                "schema": orjson.loads(version.schema),
            }
            for version in self.versions
        ]
        lines = ",\n".join("    " + orjson.dumps(row).decode() for row in rows)
        return '{\n  "about": "append-only; written by python -m schemas.avro_generation",\n  "schemas": [\n' + (
            lines + "\n  ]\n}\n"
        )

    def with_schema(self, schema: RecordType) -> "Manifest":
        """This manifest, and ``schema`` as the newest version of its type unless the newest is just that.

        Raises:
            GenerationError: the type had this very schema before its newest version; ids can't go back.
        """
        print_ = fingerprint(schema)
        history = self.history(schema.name)
        if history and history[-1].fingerprint == print_:
            return self
        if self.find(schema.name, print_) is not None:
            raise GenerationError(
                f"{schema.name} is again as it was before version {history[-1].version}; "
                "a version can't return: keep the newer fields, unused, or give the type a new name"
            )
        added = SchemaVersion(len(self.versions) + 1, schema.name, len(history) + 1, print_, canonical(schema))
        return Manifest((*self.versions, added))

    def find(self, name: str, print_: str) -> SchemaVersion | None:
        """The version with this full name and fingerprint, if it was ever committed."""
        return self._by_fingerprint.get((name, print_))

    def by_id(self, schema_id: int) -> SchemaVersion | None:
        """The version with this id, if there is one."""
        return self._by_id.get(schema_id)

    def history(self, name: str) -> list[SchemaVersion]:
        """All versions of a type, oldest first."""
        return [version for version in self.versions if version.name == name]


def check_append_only(old: Manifest, new: Manifest) -> list[str]:
    """What ``new`` changed of ``old`` instead of only adding to it; empty when it only added."""
    kept = {version.id: version for version in new.versions}
    return [
        f"id {version.id} ({version.name} version {version.version}) was "
        + ("removed" if version.id not in kept else "changed")
        for version in old.versions
        if kept.get(version.id) != version
    ]


class SchemaIds(Protocol):
    """Where the ids in Confluent frames come from, and what they mean."""

    def id_of(self, schema: RecordType) -> int:
        """The id for ``schema``, an event type's current one.

        Raises:
            RegistryError: there is none, or it can't be had now.
        """

    def schema_of(self, schema_id: int) -> Schema | None:
        """The writer schema that an id stands for; None when nobody knows the id.

        Raises:
            RegistryError: it can't be had now.
            UnsafeSchemaError: it is one that must not be read with.
        """


class ManifestIds:
    """Ids from the manifest: no network, the same for every process of one release."""

    def __init__(self, manifest: Manifest | None = None) -> None:
        self._manifest = Manifest.load() if manifest is None else manifest

    def id_of(self, schema: RecordType) -> int:
        """The manifest's id; see :meth:`SchemaIds.id_of`."""
        version = self._manifest.find(schema.name, fingerprint(schema))
        if version is None:
            raise RegistryError(
                f"{schema.name} is not in the schema manifest as it now is; run `python -m schemas.avro_generation`"
            )
        return version.id

    def schema_of(self, schema_id: int) -> Schema | None:
        """The manifest's schema; see :meth:`SchemaIds.schema_of`."""
        version = self._manifest.by_id(schema_id)
        return None if version is None else version.parsed


class RegistryIds:
    """Ids from a Confluent-compatible schema registry, by its REST interface; every answer is remembered.

    ``url`` may carry ``user:password@`` for basic authentication, and a path (Apicurio: ``/apis/ccompat/v7``).
    ``unknown_for_s`` is how long an id that the registry does not know is not asked for again: without it, a flood of
    records with an invented id would be a flood of requests.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float = 5.0,
        unknown_for_s: float = 30.0,
        transport: httpx.BaseTransport | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._url = httpx.URL(url).copy_with(userinfo=b"")
        self._client = httpx.Client(
            base_url=url.rstrip("/") + "/",
            timeout=timeout_s,
            transport=transport,
            headers={"Accept": _CONTENT_TYPE, "Content-Type": _CONTENT_TYPE},
        )
        self._unknown_for_s = unknown_for_s
        self._clock = clock
        self._lock = threading.Lock()
        self._ids: dict[tuple[str, str], int] = {}
        self._schemas: dict[int, Schema | UnsafeSchemaError] = {}
        self._unknown: dict[int, float] = {}

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def id_of(self, schema: RecordType) -> int:
        """The id that the registry gives the schema, registered at need; see :meth:`SchemaIds.id_of`."""
        key = (schema.name, fingerprint(schema))
        with self._lock:
            if key not in self._ids:
                answer = self._ask(
                    "POST",
                    f"subjects/{quote(schema.name, safe='')}/versions",
                    {"schemaType": "AVRO", "schema": canonical(schema)},
                )
                if answer is None or not isinstance(answer.get("id"), int):
                    raise RegistryError(f"the schema registry at {self._url} gave no id for {schema.name}: {answer}")
                self._ids[key] = answer["id"]
            return self._ids[key]

    def schema_of(self, schema_id: int) -> Schema | None:
        """The registry's schema; see :meth:`SchemaIds.schema_of`."""
        known = self._schemas.get(schema_id)
        if known is None:
            with self._lock:
                known = self._fetch(schema_id)
        if isinstance(known, UnsafeSchemaError):
            raise known
        return known

    def _fetch(self, schema_id: int) -> Schema | UnsafeSchemaError | None:
        if schema_id in self._schemas:
            return self._schemas[schema_id]
        if self._clock() < self._unknown.get(schema_id, 0.0):
            return None
        answer = self._ask("GET", f"schemas/ids/{schema_id}")
        if answer is None:
            _bound(self._unknown)
            self._unknown[schema_id] = self._clock() + self._unknown_for_s
            return None
        _bound(self._schemas)
        try:
            if answer.get("schemaType", "AVRO") != "AVRO" or answer.get("references"):
                raise UnsafeSchemaError("it is no Avro schema, or one with references to others, which are not read")
            self._schemas[schema_id] = parse(str(answer.get("schema")))
        except UnsafeSchemaError as error:
            self._schemas[schema_id] = UnsafeSchemaError(f"schema id {schema_id} at {self._url}: {error}")
        return self._schemas[schema_id]

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any] | None:
        """The registry's JSON answer; None for 404."""
        try:
            answer = self._client.request(method, path, content=None if body is None else orjson.dumps(body))
        except httpx.HTTPError as error:
            raise RegistryError(
                f"the schema registry at {self._url} did not answer {method} {path} ({type(error).__name__}: {error}); "
                "check MAGNATRONIC_SCHEMA_REGISTRY_URL",
                retryable=True,
            ) from error
        if answer.status_code == httpx.codes.NOT_FOUND and method == "GET":
            return None
        if not answer.is_success:
            hint = {401: "check its user and password", 409: "the registry finds the schema incompatible"}
            raise RegistryError(
                f"the schema registry at {self._url} answered {method} {path} with {answer.status_code}: "
                f"{answer.text[:300]}; {hint.get(answer.status_code, 'see its log')}",
                retryable=answer.status_code >= 500 or answer.status_code == 429,
            )
        try:
            loaded = orjson.loads(answer.content)
        except orjson.JSONDecodeError as error:
            raise RegistryError(
                f"{self._url} answered {method} {path} with something that is no JSON; "
                "MAGNATRONIC_SCHEMA_REGISTRY_URL must be the Confluent-compatible root, such as .../apis/ccompat/v7"
            ) from error
        if not isinstance(loaded, dict):
            raise RegistryError(f"{self._url} answered {method} {path} with {loaded!r:.100} where an object was due")
        return loaded


def _bound(remembered: dict[int, Any]) -> None:
    """Forget the oldest, so that a flood of ids can't fill the memory."""
    while len(remembered) >= _MAX_REMEMBERED:
        del remembered[next(iter(remembered))]
