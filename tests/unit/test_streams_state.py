from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from pydantic import BaseModel, ConfigDict

from agents.step import LaneState, live_state
from streams.errors import StateError
from streams.state import StateCodec, StateStore, changelog_topic

NOW = datetime(2026, 3, 4, 5, 6, 7, 891_234, tzinfo=UTC)


class Inner(BaseModel):
    at: datetime


class Model(BaseModel):
    model_config = ConfigDict(frozen=True, ser_json_bytes="base64", val_json_bytes="base64")

    text: str
    raw: bytes = b""
    inner: tuple[Inner, ...] = ()


class Grown(Model):
    later: int = 7


def test_state_survives_the_changelog() -> None:
    codec = StateCodec(Model)
    state = LaneState(Model(text='ä"\n', raw=b"\xff\x00", inner=(Inner(at=NOW),)), NOW, NOW + timedelta(microseconds=1))
    assert codec.load(codec.dump(state)) == state
    assert codec.load(codec.dump(LaneState(Model(text=""), NOW))).expires_at is None


def test_a_model_may_gain_fields() -> None:
    old = StateCodec(Model).dump(LaneState(Model(text="x"), NOW))
    assert StateCodec(Grown).load(old).value == Grown(text="x", later=7)


@pytest.mark.parametrize(
    "data", [b"", b"{}", b"\xff", b'{"v":1,"now":1,"value":{"text":5}}', b'{"v":1,"now":"x","value":{}}']
)
def test_what_is_no_state_is_refused(data: bytes) -> None:
    with pytest.raises(StateError, match="can't be read"):
        StateCodec(Model).load(data)


def test_a_later_version_asks_for_an_upgrade() -> None:
    data = StateCodec(Model).dump(LaneState(Model(text="x"), NOW)).replace(b'"v":1', b'"v":3')
    with pytest.raises(StateError, match="upgrade"):
        StateCodec(Model).load(data)


def milliseconds(at: datetime) -> int:
    return int(at.timestamp() * 1000)


CODEC = StateCodec(Model)


def state_of(text: str, lives: timedelta | None = None, now: datetime = NOW) -> LaneState:
    return LaneState(Model(text=text), now, None if lives is None else now + lives)


def put(store: StateStore, lane: str, state: LaneState) -> None:
    store.set(lane, state, CODEC.dump(state))


def test_expiry_goes_by_the_time_of_records() -> None:
    state = state_of("x", timedelta(seconds=10))
    store = StateStore(CODEC, {"lane": CODEC.dump(state), "other": CODEC.dump(state_of("y"))})
    early, late = milliseconds(NOW), milliseconds(NOW + timedelta(seconds=11))
    assert store.get("lane") == state
    assert live_state(state, early) == state
    assert live_state(state, late) is None
    assert store.expire(early, busy=()) == []
    assert store.expire(late, busy={"lane"}) == []
    assert store.expire(late, busy=()) == ["lane"]
    assert len(store) == 1
    assert store.get("lane") is None
    assert store.get("other") is not None


def test_a_renewed_state_outlives_its_first_expiry() -> None:
    store = StateStore(CODEC)
    put(store, "lane", state_of("x", timedelta(seconds=1)))
    put(store, "lane", state_of("x", timedelta(seconds=20)))
    assert store.expire(milliseconds(NOW + timedelta(seconds=5)), busy=()) == []
    assert store.expire(milliseconds(NOW + timedelta(seconds=25)), busy=()) == ["lane"]
    put(store, "lane", state_of("x", timedelta(seconds=30)))
    store.set("lane", None)
    assert store.expire(milliseconds(NOW + timedelta(seconds=40)), busy=()) == []


def test_a_state_given_less_time_goes_then() -> None:
    store = StateStore(CODEC)
    put(store, "lane", state_of("x", timedelta(days=30)))
    put(store, "lane", state_of("x", timedelta(seconds=20)))
    put(store, "kept", state_of("x", timedelta(seconds=20)))
    put(store, "kept", state_of("x"))
    assert store.expire(milliseconds(NOW + timedelta(seconds=22)), busy=()) == ["lane"]
    assert store.expire(milliseconds(NOW + timedelta(days=31)), busy=()) == []
    assert len(store) == 1


def test_a_flood_of_expiries_comes_in_parts() -> None:
    lanes = {f"lane-{number}": CODEC.dump(state_of("x", timedelta(seconds=5))) for number in range(12_000)}
    store = StateStore(CODEC, lanes)
    late = milliseconds(NOW + timedelta(seconds=7))
    parts = [store.expire(late, busy=()) for _ in range(4)]
    assert [len(part) for part in parts] == [5_000, 5_000, 2_000, 0]
    assert len({lane for part in parts for lane in part}) == 12_000
    assert len(store) == 0


def test_states_are_parsed_when_they_are_asked_for() -> None:
    store = StateStore(CODEC, {"good": CODEC.dump(state_of("x")), "bad": b'{"v":1,"now":1,"expires":null,"value":5}'})
    assert store.get("good") == state_of("x")
    assert store.get("none") is None
    with pytest.raises(StateError, match=r"lane 'bad': .*can't be read"):
        store.get("bad")


def test_values_in_another_form_are_read_all_the_same() -> None:
    by_hand = b'{ "value": {"text": "x"}, "expires": 5000000, "now": 1000000, "v": 1 }'
    store = StateStore(CODEC, {"lane": by_hand})
    assert store.get("lane") == CODEC.load(by_hand)
    assert store.expire(6_000, busy=()) == ["lane"]


@pytest.mark.parametrize("raw", [b"", b"{}", b'{"v":3,"now":1,"expires":null,"value":{"text":"x"}}'])
def test_what_is_no_state_is_refused_before_any_event(raw: bytes) -> None:
    with pytest.raises(StateError, match="lane 'odd'"):
        StateStore(CODEC, {"odd": raw})


def test_a_state_is_dumped_where_nobody_did_it_before() -> None:
    store = StateStore(CODEC)
    store.set("lane", state_of("x"))
    store.set("lane", state_of("y"))
    flood(store)
    assert store.get("lane") == state_of("y")


LARGE = state_of("x" * 1_100_000)


def flood(store: StateStore) -> None:
    """Uses so many other lanes that nothing stays parsed of the ones before."""
    for number in range(3):
        store.set(f"flood-{number}", LARGE, CODEC.dump(LARGE))


def test_an_agent_without_state_has_none() -> None:
    store = StateStore(None, {"left over": b"of an earlier release"})
    assert store.get("left over") is None
    with pytest.raises(StateError, match="state_type"):
        store.set("lane", state_of("x"))


def test_what_is_used_stays_parsed_and_what_is_not_is_forgotten() -> None:
    store = StateStore(CODEC, {f"lane-{number}": CODEC.dump(state_of(str(number))) for number in range(3)})
    first = store.get("lane-0")
    assert store.get("lane-0") is first
    flood(store)
    again = store.get("lane-0")
    assert again == first
    assert again is not first


class Lanes(RuleBasedStateMachine):
    """The store against a dict of states; time goes on, and parsed states are forgotten in between."""

    def __init__(self) -> None:
        super().__init__()
        self.store = StateStore(CODEC)
        self.expected: dict[str, LaneState] = {}
        self.now = NOW
        self.longest: dict[str, timedelta] = {}

    lanes = st.sampled_from("abcd")
    lives = st.none() | st.sampled_from([0.01, 1, 7, 3_000, 40_000, 2_592_000]).map(lambda s: timedelta(seconds=s))

    @rule(lane=lanes, life=lives)
    def assign(self, lane: str, life: timedelta | None) -> None:
        state = state_of(f"{lane} at {self.now}", life, self.now)
        put(self.store, lane, state)
        self.expected[lane] = state
        if life is not None:
            self.longest[lane] = max(life, self.longest.get(lane, life))

    @rule(lane=lanes)
    def delete(self, lane: str) -> None:
        self.store.set(lane, None)
        self.expected.pop(lane, None)

    @rule(lane=lanes)
    def look(self, lane: str) -> None:
        assert self.store.get(lane) == self.expected.get(lane)

    @rule()
    def restore(self) -> None:
        """The next owner has the same states."""
        self.store = StateStore(CODEC, {lane: CODEC.dump(state) for lane, state in self.expected.items()})

    @rule()
    def forget(self) -> None:
        flood(self.store)
        for number in range(3):
            self.store.set(f"flood-{number}", None)

    @rule(seconds=st.sampled_from([0.5, 1, 20, 3_000, 50_000, 3_000_000]), busy=st.sets(lanes, max_size=2))
    def pass_time(self, seconds: float, busy: set[str]) -> None:
        self.now += timedelta(seconds=seconds)
        expired = self.store.expire(milliseconds(self.now), busy)
        assert len(expired) == len(set(expired))
        assert busy.isdisjoint(expired)
        for lane in expired:
            assert live_state(self.expected.pop(lane), milliseconds(self.now)) is None
        for lane, state in self.expected.items():
            if state.expires_at is not None and lane not in busy:
                late = max(timedelta(seconds=1), self.longest[lane] / 1000)
                assert state.expires_at + late > self.now - timedelta(milliseconds=1)

    @invariant()
    def as_many_as_expected(self) -> None:
        assert len(self.store) == len(self.expected)


TestLanes = Lanes.TestCase
TestLanes.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


def test_a_lane_renewed_for_ever_is_filed_once() -> None:
    store = StateStore(CODEC)
    at = NOW
    for _ in range(5_000):
        put(store, "lane", state_of("x", timedelta(minutes=10), at))
        at += timedelta(seconds=1)
        assert store.expire(milliseconds(at), busy=()) == []
    assert sum(map(len, store._filed.values())) == 1


def test_the_changelog_lies_beside_its_input() -> None:
    assert changelog_topic("g", "tasks.normal") == "g.tasks.normal.changelog"
