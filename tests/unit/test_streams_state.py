from datetime import UTC, datetime, timedelta

import pytest
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
    data = StateCodec(Model).dump(LaneState(Model(text="x"), NOW)).replace(b'"v":1', b'"v":2')
    with pytest.raises(StateError, match="upgrade"):
        StateCodec(Model).load(data)


def milliseconds(at: datetime) -> int:
    return int(at.timestamp() * 1000)


def test_expiry_goes_by_the_time_of_records() -> None:
    state = LaneState(Model(text="x"), NOW, NOW + timedelta(seconds=10))
    store = StateStore({"lane": state, "other": LaneState(Model(text="y"), NOW)})
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
    store = StateStore()
    store.set("lane", LaneState(Model(text="x"), NOW, NOW + timedelta(seconds=1)))
    store.set("lane", LaneState(Model(text="x"), NOW, NOW + timedelta(seconds=20)))
    assert store.expire(milliseconds(NOW + timedelta(seconds=5)), busy=()) == []
    assert store.expire(milliseconds(NOW + timedelta(seconds=25)), busy=()) == ["lane"]
    store.set("lane", LaneState(Model(text="x"), NOW, NOW + timedelta(seconds=30)))
    store.set("lane", None)
    assert store.expire(milliseconds(NOW + timedelta(seconds=40)), busy=()) == []


def test_the_changelog_lies_beside_its_input() -> None:
    assert changelog_topic("g", "tasks.normal") == "g.tasks.normal.changelog"
