from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.record import Header, Record
from streams.changelog import (
    OWNER_KEY,
    STATE_PREFIX,
    Parked,
    Restored,
    Timer,
    effect_key,
    owner_value,
    parked_key,
    parked_message,
    run_key,
    run_value,
    state_key,
    timer_key,
    timer_value,
)
from streams.errors import StateError

TOPIC = "tasks.normal"
CHANGELOG = "g.tasks.normal.changelog"
TIMER = Timer("l", "n", datetime(2026, 3, 4, tzinfo=UTC), "s", "c", "e", "")

awkward = st.text(st.sampled_from("ab/\x1e\x1fef\0ä"), max_size=8)
"""Of the characters that keys are made with, so that two are seldom far apart."""
texts = awkward | st.text(max_size=20)
offsets = st.integers(0, 2**63 - 1)
counts = st.integers(0, 10**6)
contents = st.none() | st.binary(max_size=10)
names = texts | st.sampled_from(["parked-attempt", "parked-due", "parked-timestamp", "parked-key"])
headers = st.lists(st.tuples(names, contents), max_size=6).map(tuple)
times = st.datetimes(datetime(1, 1, 1), datetime(9999, 12, 31)).map(lambda at: at.replace(tzinfo=UTC))
timers = st.builds(
    Timer, lane=texts, name=texts, due=times, subject=texts, correlation=texts, cause=texts, traceparent=texts
)


@st.composite
def parked_events(draw: st.DrawFn) -> Parked:
    record = Record(TOPIC, 3, draw(offsets), draw(offsets), draw(contents), draw(st.binary(max_size=30)), draw(headers))
    return Parked(record, draw(counts), draw(offsets))


def lying(key: bytes, value: bytes | None, headers: tuple[Header, ...] = (), offset: int = 0) -> Record:
    return Record(CHANGELOG, 3, offset, 1_700_000_000_000, key, value, headers)


def parked_as_it_lies(parked: Parked) -> Record:
    topic, key, value, written, partition = parked_message(CHANGELOG, parked)
    assert (topic, partition) == (CHANGELOG, parked.record.partition)
    assert key is not None
    assert written is not None
    return lying(key, value, tuple(written))


def restored(*records: Record) -> Restored:
    return Restored.of({}, records, TOPIC)


@given(timers)
def test_a_timer_comes_back(timer: Timer) -> None:
    assert restored(lying(timer_key(timer.lane, timer.name), timer_value(timer))).timers == [timer]


@given(texts, texts, texts, texts)
def test_two_timers_never_share_a_key(lane: str, name: str, other_lane: str, other_name: str) -> None:
    same = timer_key(lane, name) == timer_key(other_lane, other_name)
    assert same == ((lane, name) == (other_lane, other_name))


def test_the_key_of_a_usual_timer_is_its_lane_and_name() -> None:
    assert timer_key("task-1", "deadline") == b"timer/task-1\x1fdeadline"
    assert timer_key("a\x1fb", "c") != timer_key("a", "b\x1fc")


@given(parked_events())
def test_a_parked_event_comes_back_as_it_was(parked: Parked) -> None:
    assert restored(parked_as_it_lies(parked)).parked == [parked]


def test_an_event_whose_headers_look_like_ours_is_not_mistaken() -> None:
    record = Record(TOPIC, 3, 7, 5, None, b"v", (("parked-key", b"hostile"), ("parked-attempt", b"9")))
    (parked,) = restored(parked_as_it_lies(Parked(record, 2, 1000))).parked
    assert parked == Parked(record, 2, 1000)
    assert parked.record.key is None


def test_parked_events_come_in_the_order_of_their_offsets() -> None:
    events = [Parked(Record(TOPIC, 3, offset, 0, b"k", b"v", ()), 1, 0) for offset in (100, 9, 21)]
    found = restored(*map(parked_as_it_lies, events)).parked
    assert [each.record.offset for each in found] == [9, 21, 100]


def test_a_record_without_value_cannot_be_parked() -> None:
    with pytest.raises(ValueError, match=r"tasks\.normal\[3\]@7 has no value"):
        parked_message(CHANGELOG, Parked(Record(TOPIC, 3, 7, 0, b"k", None, ()), 1, 0))


@given(st.dictionaries(texts, st.sets(st.integers(0, 10**4), min_size=1, max_size=5), max_size=5))
def test_effects_come_by_event_in_the_order_of_completion(made: dict[str, set[int]]) -> None:
    records = [
        lying(effect_key(event_id, sequence), b"%d" % sequence, (("ce_id", b"x"),))
        for event_id, sequences in made.items()
        for sequence in sequences
    ]
    found = restored(*reversed(records)).effects
    assert {event_id: [each.value for each in effects] for event_id, effects in found.items()} == {
        event_id: [b"%d" % sequence for sequence in sorted(sequences)] for event_id, sequences in made.items()
    }
    assert all(each in records for effects in found.values() for each in effects)


@given(offsets, counts, counts)
def test_counts_come_back(offset: int, starts: int, deaths: int) -> None:
    found = restored(lying(run_key(offset), run_value(starts)), lying(OWNER_KEY, owner_value(deaths, "a1")))
    assert (found.runs, found.deaths, found.life) == ({offset: starts}, deaths, "a1")


@given(texts)
def test_a_states_key_is_its_lane_after_the_kind(lane: str) -> None:
    key = state_key(lane)
    assert key.startswith(STATE_PREFIX)
    assert key[len(STATE_PREFIX) :].decode() == lane


def test_keys_say_their_kind() -> None:
    assert [state_key("a/b"), effect_key("e/1", 2), parked_key(3), run_key(4), OWNER_KEY] == [
        b"state/a/b",
        b"effect/e/1/2",
        b"parked/3",
        b"run/4",
        b"owner/",
    ]


def test_nothing_there_is_empty_and_anything_is_not() -> None:
    event = Parked(Record(TOPIC, 3, 1, 0, b"k", b"v", ()), 1, 0)
    assert restored().empty
    assert not Restored.of({"lane": b"{}"}, (), TOPIC).empty
    for record in (
        lying(effect_key("e", 1), b"v"),
        lying(timer_key("l", "n"), timer_value(TIMER)),
        parked_as_it_lies(event),
        lying(run_key(1), run_value(0)),
        lying(OWNER_KEY, owner_value(0)),
    ):
        assert not restored(record).empty


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (b"task-1", b"{}"),
        (b"window/task-1", b"{}"),
        (b"owner/else", owner_value(1)),
        (b"\xff/x", b""),
        (b"", b""),
        (b"run/x", b"1"),
        (b"run/1", b""),
        (b"run/1", b"1.5"),
        (b"run/01", b"1"),
        (b"run/1", b"1_0"),
        (b"effect/e", b"v"),
        (b"effect/e/first", b"v"),
        (b"parked/1", b"v"),
        (b"timer/l", timer_value(TIMER)),
        (b"timer/l\x1fn", b"{}"),
        (b"timer/l\x1fn", b'{"due":"now","subject":"","correlation":"","cause":"","traceparent":""}'),
        (b"timer/l\x1fn", b'{"due":%d,"subject":"","correlation":"","cause":"","traceparent":""}' % 10**20),
        (OWNER_KEY, b'{"deaths":"2"}'),
    ],
)
def test_what_is_of_no_known_kind_is_refused_with_its_place(key: bytes, value: bytes) -> None:
    with pytest.raises(StateError, match=r"g\.tasks\.normal\.changelog\[3\]@42.*can't be read.*later release"):
        restored(lying(key, value, offset=42))


def test_a_parked_event_needs_its_headers_in_order() -> None:
    good = parked_as_it_lies(Parked(Record(TOPIC, 3, 1, 0, b"k", b"v", ()), 1, 0))
    with pytest.raises(StateError, match="headers begin with"):
        restored(lying(parked_key(1), b"v", tuple(reversed(good.headers))))
