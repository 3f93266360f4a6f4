"""The manifest only grows, and the registry client says what went wrong."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest

from schemas.avro_schema import RecordType, canonical, fingerprint, parse
from schemas.codec import Codec
from schemas.errors import GenerationError, RegistryError, UnknownSchemaError, UnsafeSchemaError
from schemas.record import Record
from schemas.registry import MANIFEST_PATH, Manifest, ManifestIds, RegistryIds, check_append_only


def schema(*fields: str, name: str = "magnatronic.examples.Greeted") -> RecordType:
    listed = [{"name": field, "type": "string", "default": ""} for field in fields]
    made = parse({"type": "record", "name": name, "fields": listed})
    assert isinstance(made, RecordType)
    return made


def test_ids_and_versions_count_up() -> None:
    manifest = Manifest(())
    for grown in (schema("a"), schema("a", name="magnatronic.examples.Other"), schema("a", "b")):
        manifest = manifest.with_schema(grown).with_schema(grown)
    assert [(version.id, version.version) for version in manifest.versions] == [(1, 1), (2, 1), (3, 2)]
    last = manifest.by_id(3)
    assert last is not None
    assert last.parsed == schema("a", "b")
    assert manifest.find(last.name, last.fingerprint) is last
    assert manifest.by_id(4) is None
    assert manifest.find(last.name, "00") is None
    with pytest.raises(GenerationError, match="can't return"):
        manifest.with_schema(schema("a"))


def test_the_committed_manifest_reads_back_as_it_is() -> None:
    manifest = Manifest.load()
    assert manifest.text() == MANIFEST_PATH.read_text()
    assert len(manifest.versions) >= 36


def test_append_only() -> None:
    old = Manifest(()).with_schema(schema("a")).with_schema(schema("a", "b"))
    assert check_append_only(old, old.with_schema(schema("a", "b", "c"))) == []
    changed = Manifest(()).with_schema(schema("a")).with_schema(schema("a", "x"))
    assert check_append_only(old, changed) == ["id 2 (magnatronic.examples.Greeted version 2) was changed"]
    shorter = Manifest(old.versions[:1])
    assert check_append_only(old, shorter) == ["id 2 (magnatronic.examples.Greeted version 2) was removed"]


def _with(change: Callable[[dict[str, Any]], object]) -> str:
    manifest = Manifest(()).with_schema(schema("a")).with_schema(schema("a", "b"))
    rows = json.loads(manifest.text())
    change(rows)
    return json.dumps(rows)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no schema manifest"),
        ("[]", "no schema manifest"),
        ('{"schemas": [{}]}', "no schema manifest"),
        (_with(lambda rows: rows["schemas"].pop(0)), "entry 1 has id 2"),
        (_with(lambda rows: rows["schemas"][1].update(version=3)), "no successor"),
        (_with(lambda rows: rows["schemas"][0]["schema"]["fields"].pop()), "changed in place"),
        (_with(lambda rows: rows["schemas"][0].update(schema={"type": "huh"})), "no schema manifest"),
        (_with(lambda rows: rows["schemas"][0].update(schema={"type": "string"})), "is no record"),
    ],
)
def test_a_spoilt_manifest_is_refused(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "registry.json"
    path.write_text(text)
    with pytest.raises(RegistryError, match=said):
        Manifest.load(path)


class Server:
    """A registry that answers as a test says, and notes what it was asked."""

    def __init__(self, *answers: httpx.Response | Exception) -> None:
        self.asked: list[httpx.Request] = []
        self._answers = list(answers)

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.asked.append(request)
        answer = self._answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def ids(self, url: str = "http://registry:8081/apis/ccompat/v7/", **options: Any) -> RegistryIds:
        return RegistryIds(url, transport=httpx.MockTransport(self), **options)


def test_a_schema_is_registered_once_under_its_full_name() -> None:
    server = Server(httpx.Response(200, json={"id": 77}))
    ids = server.ids()
    assert [ids.id_of(schema("a")), ids.id_of(schema("a"))] == [77, 77]
    (request,) = server.asked
    assert request.method == "POST"
    assert str(request.url) == "http://registry:8081/apis/ccompat/v7/subjects/magnatronic.examples.Greeted/versions"
    assert orjson.loads(request.content) == {"schemaType": "AVRO", "schema": canonical(schema("a"))}
    ids.close()


def test_a_known_id_is_asked_for_once_and_an_unknown_one_not_again_for_a_while() -> None:
    now = [100.0]
    found = httpx.Response(200, json={"schema": canonical(schema("a"))})
    server = Server(found, httpx.Response(404, json={"error_code": 40403}), httpx.Response(404), found)
    ids = server.ids(unknown_for_s=30, clock=lambda: now[0])
    assert ids.schema_of(1) == ids.schema_of(1) == schema("a")
    assert [ids.schema_of(2), ids.schema_of(2)] == [None, None]
    assert len(server.asked) == 2
    now[0] += 31
    assert ids.schema_of(2) is None
    now[0] += 31
    assert ids.schema_of(2) == schema("a")
    assert len(server.asked) == 4


def test_a_flood_of_invented_ids_does_not_fill_the_memory() -> None:
    server = Server(*[httpx.Response(404)] * 5000)
    ids = server.ids()
    for schema_id in range(5000):
        assert ids.schema_of(schema_id) is None
    assert len(ids._unknown) <= 4096


def test_the_password_is_used_and_not_told() -> None:
    server = Server(httpx.Response(401, text="who are you"))
    ids = server.ids("https://ada:secret@registry/root")
    with pytest.raises(RegistryError, match="check its user and password") as caught:
        ids.schema_of(1)
    assert server.asked[0].headers["authorization"] == "Basic YWRhOnNlY3JldA=="
    assert "secret" not in str(caught.value)
    assert not caught.value.retryable


@pytest.mark.parametrize(
    ("answer", "said", "retryable"),
    [
        (httpx.ConnectError("refused"), "did not answer .*MAGNATRONIC_SCHEMA_REGISTRY_URL", True),
        (httpx.ReadTimeout("slow"), "did not answer .*ReadTimeout", True),
        (httpx.Response(503, text="down"), "with 503: down", True),
        (httpx.Response(429), "with 429", True),
        (httpx.Response(409, text="no"), "finds the schema incompatible", False),
        (httpx.Response(404, text="no"), "with 404", False),
        (httpx.Response(200, text="<html>"), "no JSON", False),
        (httpx.Response(200, json=[1]), "an object was due", False),
        (httpx.Response(200, json={"id": "x"}), "gave no id", False),
    ],
)
def test_what_the_registry_refuses_is_told(answer: httpx.Response | Exception, said: str, retryable: bool) -> None:
    with pytest.raises(RegistryError, match=said) as caught:
        Server(answer).ids().id_of(schema("a"))
    assert caught.value.retryable is retryable


@pytest.mark.parametrize(
    "answer",
    [
        {"schema": '{"type": "array", "items": "null"}'},
        {"schema": "syntax", "schemaType": "PROTOBUF"},
        {"schema": '"string"', "references": [{"name": "x", "subject": "x", "version": 1}]},
        {},
    ],
)
def test_a_schema_that_must_not_be_read_with_is_refused_each_time(answer: dict[str, Any]) -> None:
    server = Server(httpx.Response(200, json=answer))
    ids = server.ids()
    for _ in range(2):
        with pytest.raises(UnsafeSchemaError, match="schema id 5 at http://registry"):
            ids.schema_of(5)
    with pytest.raises(UnknownSchemaError, match="schema id 5"):
        Codec(ids).decode(Record("t", 0, 0, 0, None, b"\0\0\0\0\5"))
    assert len(server.asked) == 1


def test_a_newer_releases_schema_is_found_by_id_when_its_fingerprint_is_the_named_one() -> None:
    newer = schema("task_id", "objective", "mood", name="magnatronic.tasks.TaskSubmitted")
    value, name = b"\0\0\0\0\5\4t1\6ask\4ok", f"{newer.name}/{fingerprint(newer)}".encode()
    server = Server(httpx.Response(200, json={"schema": canonical(newer)}))
    event = Codec(server.ids()).decode(Record("t", 0, 0, 0, None, value, [("ce_dataschema", name)])).event
    assert event.model_dump(include={"task_id", "objective"}) == {"task_id": "t1", "objective": "ask"}
    server = Server(httpx.Response(200, json={"schema": canonical(schema("task_id"))}))
    with pytest.raises(UnknownSchemaError, match="is another schema"):
        Codec(server.ids()).decode(Record("t", 0, 0, 0, None, value, [("ce_dataschema", name)]))


def test_a_registry_that_is_away_is_no_fault_of_the_record() -> None:
    server = Server(httpx.ConnectError("refused"))
    with pytest.raises(RegistryError) as caught:
        Codec(server.ids()).decode(Record("t", 0, 0, 0, None, b"\0\0\0\0\5"))
    assert caught.value.retryable


def test_manifest_ids_of_what_was_never_committed() -> None:
    ids = ManifestIds(Manifest(()).with_schema(schema("a")))
    assert ids.id_of(schema("a")) == 1
    with pytest.raises(RegistryError, match="run `python -m"):
        ids.id_of(schema("b"))
    assert ids.schema_of(2) is None
