"""Events about data subjects: sealed under all their subjects' keys, alike each time, unreadable when one is gone."""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.avro_generation import parsed_schema
from schemas.codec import Codec, Encoded
from schemas.encryption import MAX_SUBJECTS, NoKeys, SubjectCipher, union
from schemas.errors import (
    DecodeError,
    EncodeError,
    EventTooLargeError,
    KeyStoreError,
    MalformedError,
    SubjectForgottenError,
    TooLargeError,
)
from schemas.events import (
    Citation,
    Claim,
    DeadLettered,
    DocumentSubmitted,
    Event,
    Evidence,
    MemoryRecalled,
    Personal,
    StepCompleted,
    SubjectForgotten,
    TaskSubmitted,
)
from schemas.metadata import Envelope, Metadata
from schemas.personal import blank
from schemas.record import Header, Record
from schemas.registry import Manifest
from schemas.topics import MAX_MESSAGE_BYTES
from schemas.upcasters import Upcasters
from tests.support.keys import ADA, BOB, MemoryKeys

AT = datetime(2026, 1, 1, tzinfo=UTC)


def meta(*subjects: str, event_id: str = "e1") -> Metadata:
    return Metadata(event_id, "/clients/test", "t1", AT, "cause", "t1", data_subjects=subjects)


def record(encoded: Encoded, **changed: bytes | None) -> Record:
    headers: list[Header] = [(name, changed.get(name, text)) for name, text in encoded.headers]
    headers += [(name, text) for name, text in changed.items() if name not in dict(encoded.headers)]
    return Record("tasks.normal", 2, 77, 0, b"t1", encoded.value, [each for each in headers if each[1] is not None])


def raw(encoded: Encoded) -> bytes:
    return encoded.value + b"\n".join(name.encode() + text for name, text in encoded.headers)


WORDS = st.text(st.characters(codec="utf-8"), max_size=40)
SECRETS = st.text("ABCDEFGHIJKLMNOPQRSTUVWXYZ", min_size=12, max_size=200)


@st.composite
def events(draw: st.DrawFn) -> tuple[Event, str]:
    """An event and a text that stands in it."""
    secret = draw(SECRETS)
    evidence = tuple(
        Evidence(chunk_id=f"c{n}", document_id="d", title=draw(WORDS), text=secret, score=draw(st.floats(0, 1)))
        for n in range(draw(st.integers(1, 3)))
    )
    effect: dict[str, Any] = {"task_id": "t1", "agent": "a", "event_id": "e", "started_at": AT, "latency_ms": 1.5}
    return (
        draw(
            st.sampled_from(
                (
                    TaskSubmitted(task_id="t1", objective=secret, parameters={draw(WORDS): secret}),
                    DocumentSubmitted(document_id="t1", title=secret, text=draw(WORDS)),
                    StepCompleted(
                        task_id="t1",
                        step_id="t1/1",
                        attempt=draw(st.integers(1, 9)),
                        capability="research",
                        objective=draw(WORDS),
                        answer=draw(WORDS),
                        claims=(Claim(text=draw(WORDS), chunk_ids=("c0",)),),
                        citations=(Citation(marker=1, chunk_id="c0", document_id="d", title="", quote=secret),),
                        evidence=evidence,
                    ),
                    MemoryRecalled(**effect, request_hash="h", request=secret, model="m", hits=evidence),
                )
            )
        ),
        secret,
    )


@settings(deadline=None)
@given(events(), st.sampled_from(((ADA,), (BOB,), (ADA, BOB))))
def test_what_is_sealed_opens_whole_and_only_with_all_keys(made: tuple[Event, str], subjects: tuple[str, ...]) -> None:
    event, secret = made
    keys = MemoryKeys()
    codec = Codec(cipher=SubjectCipher(keys))
    metadata = meta(*subjects)
    encoded = codec.encode(event, metadata)
    assert encoded == Codec(cipher=SubjectCipher(MemoryKeys())).encode(event, metadata), (
        "another process gives other bytes"
    )
    assert secret.encode() not in raw(encoded)
    assert codec.decode(record(encoded)) == Envelope(event, metadata)

    bare = Envelope(blank(event), metadata, erased=True)
    assert Codec().decode(record(encoded)) == bare
    keys.keys[subjects[-1]] = None
    assert Codec(cipher=SubjectCipher(keys)).decode(record(encoded)) == bare
    with pytest.raises(SubjectForgottenError, match=subjects[-1]):
        Codec(cipher=SubjectCipher(keys)).encode(event, metadata)


def test_events_about_nobody_are_as_they_were() -> None:
    event = TaskSubmitted(task_id="t1", objective="o")
    assert Codec(cipher=SubjectCipher(MemoryKeys())).encode(event, meta()) == Codec().encode(event, meta())
    # One that holds nothing personal needs no key, and is no less readable without one.
    gone = SubjectForgotten(key_id=ADA, requested_by="cli")
    encoded = Codec().encode(gone, meta(ADA))
    assert Codec().decode(record(encoded)) == Envelope(gone, meta(ADA))


def test_a_seal_is_bound_to_its_record() -> None:
    codec = Codec(cipher=SubjectCipher(MemoryKeys()))
    task = TaskSubmitted(task_id="t1", objective="what does Ada earn")
    one, other = codec.encode(task, meta(ADA)), codec.encode(task, meta(ADA, event_id="e2"))
    high = codec.encode(task.model_copy(update={"submitted_by": "x"}), meta(ADA))
    sealed = dict(one.headers)["ce_sealed"]
    assert sealed != dict(other.headers)["ce_sealed"], "that two events say the same must not show"
    swapped: list[Record] = [
        record(other, ce_sealed=sealed),
        record(high, ce_sealed=sealed),
        record(one, ce_id=b"e2"),
        record(one, ce_datasubjects=BOB.encode()),
        record(one, ce_datasubjects=f"{ADA},{BOB}".encode()),
        record(one, ce_datasubjects=None),
        record(one, ce_id=None),
        record(one, ce_dataschema=None),
        record(one, ce_sealed=b""),
        record(one, ce_sealed=b"\1"),
        record(one, ce_sealed=b"\2" + sealed[1:]),
        record(one, ce_sealed=sealed[:-1]),
        record(one, ce_sealed=sealed + b"\0"),
    ]
    for each in swapped:
        with pytest.raises(MalformedError):
            codec.decode(each)
    completed = codec.encode(
        StepCompleted(task_id="t1", step_id="t1/1", attempt=1, capability="c", objective="o", answer="a"), meta(ADA)
    )
    with pytest.raises(MalformedError):
        codec.decode(record(completed, ce_sealed=sealed))


@settings(deadline=None)
@given(st.binary(max_size=80), st.binary(max_size=120))
def test_hostile_headers_are_decode_errors(sealed: bytes, subjects: bytes) -> None:
    codec = Codec(cipher=SubjectCipher(MemoryKeys()))
    one = codec.encode(TaskSubmitted(task_id="t1", objective="o"), meta(ADA))
    for changed in ({"ce_sealed": sealed}, {"ce_datasubjects": subjects}):
        with pytest.raises(DecodeError):
            codec.decode(record(one, **changed))


@pytest.mark.parametrize(
    "plain",
    [
        b"",
        b"\n",
        b"objective",
        b"nothing\n\x02o",
        b"objective\n",
        b"objective\n\x04o",
        b"objective\n\x02oo",
        b"\xff,\n",
    ],
)
def test_a_seal_that_holds_no_fields_is_refused(plain: bytes) -> None:
    """Whoever has the keys may still have made it wrong."""
    cipher = SubjectCipher(MemoryKeys())
    codec = Codec(cipher=cipher)
    one = codec.encode(TaskSubmitted(task_id="t1", objective="o"), meta(ADA))
    headers = dict(one.headers)
    bound = headers["ce_dataschema"], headers["ce_id"], headers["ce_datasubjects"], one.value
    with pytest.raises(DecodeError):
        codec.decode(record(one, ce_sealed=cipher.seal((ADA,), bound, plain)))


def test_keys_that_nobody_made_and_processes_without_any() -> None:
    keys = MemoryKeys()
    one = Codec(cipher=SubjectCipher(keys)).encode(TaskSubmitted(task_id="t1", objective="o"), meta(ADA))
    del keys.keys[ADA]
    with pytest.raises(MalformedError, match="another key store"):
        Codec(cipher=SubjectCipher(keys)).decode(record(one))
    with pytest.raises(KeyStoreError, match="key store that made it"):
        Codec(cipher=SubjectCipher(keys)).encode(TaskSubmitted(task_id="t1", objective="o"), meta(ADA))
    with pytest.raises(MalformedError, match="MAGNATRONIC_KEY_STORE"):
        Codec(cipher=NoKeys()).decode(record(one))
    for codec in (Codec(), Codec(cipher=NoKeys())):
        with pytest.raises((EncodeError, KeyStoreError), match="MAGNATRONIC_KEY_STORE"):
            codec.encode(TaskSubmitted(task_id="t1", objective="o"), meta(ADA))


def test_subjects_are_sorted_key_ids() -> None:
    codec = Codec(cipher=SubjectCipher(MemoryKeys()))
    for wrong in (("customer-42",), (BOB, ADA), (ADA, ADA), ("../kek",)):
        with pytest.raises(EncodeError, match="sorted key ids"):
            codec.encode(TaskSubmitted(task_id="t1", objective="o"), meta(*wrong))
    many = tuple(f"ds-{n:032x}" for n in range(MAX_SUBJECTS + 1))
    with pytest.raises(EncodeError, match="data subjects can't be recorded"):
        codec.encode(TaskSubmitted(task_id="t1", objective="o"), meta(*many))
    assert union((BOB,), (), (ADA, BOB)) == (ADA, BOB)


def test_keys_are_remembered_for_a_while_only() -> None:
    keys, now = MemoryKeys(), [0.0]
    cipher = SubjectCipher(keys, ttl_s=60, most=2, clock=lambda: now[0])
    sealed = cipher.seal((ADA,), (), b"x")
    assert cipher.open((ADA,), (), sealed) == b"x"
    assert keys.asked == 1
    keys.keys[ADA] = None
    assert cipher.open((ADA,), (), sealed) == b"x"
    now[0] = 61
    assert cipher.open((ADA,), (), sealed) is None
    now[0] = 62
    assert cipher.open((ADA,), (), sealed) is None
    assert keys.asked == 2, "a destroyed key does not come back"
    # What was dropped is asked for at once, by itself and in company.
    keys.keys[ADA] = b"2" * 32
    other = SubjectCipher(keys, ttl_s=60, clock=lambda: now[0])
    both = other.seal((ADA, BOB), (), b"y")
    other.drop(ADA)
    keys.keys[ADA] = None
    assert other.open((ADA, BOB), (), both) is None


def test_a_store_that_is_away_stops_nobody_at_once() -> None:
    keys, now = MemoryKeys(), [0.0]
    cipher = SubjectCipher(keys, ttl_s=60, clock=lambda: now[0])
    sealed = cipher.seal((ADA,), (), b"x")
    keys.away = True
    now[0] = 300
    assert cipher.open((ADA,), (), sealed) == b"x"
    now[0] = 700
    with pytest.raises(KeyStoreError):
        cipher.open((ADA,), (), sealed)
    with pytest.raises(KeyStoreError):
        cipher.seal((BOB,), (), b"x")


def test_the_cache_has_a_bound() -> None:
    keys = MemoryKeys()
    cipher = SubjectCipher(keys, most=2)
    for subjects in ((ADA,), (BOB,), (ADA, BOB), (ADA,)):
        cipher.seal(subjects, (), b"x")
    assert keys.asked == 5, "the oldest went for the third"


def test_size_caps_hold() -> None:
    codec = Codec(cipher=SubjectCipher(MemoryKeys()))
    half = TaskSubmitted(task_id="t1", objective="x" * (MAX_MESSAGE_BYTES - 20_000))
    assert codec.decode(record(codec.encode(half, meta(ADA)))).event == half
    with pytest.raises(EventTooLargeError):
        codec.encode(TaskSubmitted(task_id="t1", objective="x" * MAX_MESSAGE_BYTES), meta(ADA))
    many = {str(number): "" for number in range(40_000)}
    with pytest.raises(EventTooLargeError):
        codec.encode(TaskSubmitted(task_id="t1", objective="o", parameters=many), meta(ADA))
    one = codec.encode(TaskSubmitted(task_id="t1", objective="o"), meta(ADA))
    with pytest.raises(TooLargeError):
        codec.decode(record(one, ce_sealed=b"\1" * MAX_MESSAGE_BYTES))


def test_a_dead_letter_seals_its_error_alone() -> None:
    """Its raw bytes are sealed already where they are about somebody, and would not fit twice."""
    letter = DeadLettered(
        source_topic="tasks.normal",
        source_partition=0,
        source_offset=1,
        source_timestamp=AT,
        value=b"v" * 100_000,
        agent="a",
        error_type="E",
        error="Ada is unknown",
    )
    encoded = Codec(cipher=SubjectCipher(MemoryKeys())).encode(letter, meta(ADA))
    assert len(raw(encoded)) < 101_000
    assert b"Ada" not in raw(encoded)


@settings(max_examples=20, deadline=None)
@given(st.booleans())
def test_sealed_events_of_older_schemas(rename: bool) -> None:
    """Fields that came later have their defaults, upcasters see what was sealed, and marks may change."""

    class Visited(Event, family="examples"):
        """Was somewhere."""

        place: Annotated[str, Personal]
        room: str = ""

    before = parsed_schema(Visited)
    keys = MemoryKeys()
    manifest = Manifest(()).with_schema(before)
    encoded = Codec(manifest=manifest, cipher=SubjectCipher(keys)).encode(Visited(place="home", room="7"), meta(ADA))

    class Renamed(Event, family="examples"):
        """Was somewhere."""

        place: str
        room: Annotated[str, Personal] = ""
        floor: Annotated[str, Personal] = "ground"

    Renamed.full_name = Visited.full_name
    from schemas.events.base import EVENT_TYPES

    EVENT_TYPES.pop("magnatronic.examples.Renamed")
    EVENT_TYPES[Visited.full_name] = Renamed
    parsed_schema.cache_clear()

    def louder(fields: Mapping[str, Any]) -> dict[str, Any]:
        return {**fields, "place": fields["place"].upper()}

    upcasters = Upcasters()
    if rename:
        upcasters.upcaster(Visited.full_name, 1)(louder)
    manifest = manifest.with_schema(parsed_schema(Renamed))
    try:
        found = Codec(manifest=manifest, cipher=SubjectCipher(keys), upcasters=upcasters).decode(record(encoded)).event
    finally:
        EVENT_TYPES.pop(Visited.full_name)
    assert found == Renamed(place="HOME" if rename else "home", room="7", floor="ground")
