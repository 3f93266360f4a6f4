"""What counts as a difference between a changelog and the log, and what a lost changelog is written with."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from agents.step import LaneState
from magnatronic.state_comparison import StateComparison, whole_changelog
from replay.lane_states import LaneTimer, PartitionState, Waiting
from schemas.record import Record
from sinks.comparison import Comparison
from streams.changelog import (
    REBUILD_KEY,
    Restored,
    Timer,
    effect_key,
    parked_key,
    state_key,
    timer_key,
    timer_value,
)
from streams.state import StateCodec
from tests.support.steps import Total

GROUP, PLACE = "magnatronic.adder", ("work.normal", 2)
CODEC = StateCodec(Total)
AT = datetime(2026, 3, 1, 12, tzinfo=UTC)
AT_MS = int(AT.timestamp() * 1000)


def state(total: int, *, expires_s: int | None = None) -> bytes:
    expires_at = None if expires_s is None else AT + timedelta(seconds=expires_s)
    return CODEC.dump(LaneState(Total(sum=total, count=1), AT - timedelta(hours=1), expires_at))


def timer(lane: str, due_s: int = 60) -> LaneTimer:
    return LaneTimer(lane, "alarm", AT + timedelta(seconds=due_s), "task", "corr", "cause", "00-one", ())


def stored_timer(given: LaneTimer, **other: Any) -> Timer:
    told = given.subject, given.correlation, given.cause, "00-another", given.data_subjects
    return replace(Timer(given.lane, given.name, given.due, *told), **other)


def compared(stored: Restored, rebuilt: PartitionState) -> tuple[Comparison, Comparison, list[Any]]:
    comparison = StateComparison(GROUP, CODEC)
    comparison.compare(PLACE, stored, rebuilt)
    states, timers = comparison.compared
    return states, timers, comparison.mending.get(PLACE, [])


def test_canonical_bytes_are_compared_and_trace_contexts_are_not() -> None:
    older = b'{"v":1, "now":%d, "expires":null, "value":{"sum":3}}' % (
        int((AT - timedelta(hours=1)).timestamp()) * 10**6
    )
    stored = Restored({"same": state(1), "older": older}, timers=[stored_timer(timer("same"))])
    wanted = CODEC.dump(CODEC.load(older))
    states, timers, mending = compared(
        stored, PartitionState({"same": state(1), "older": wanted}, {("same", "alarm"): timer("same")})
    )
    assert states.equal
    assert timers.equal
    assert (states.stored_rows, timers.stored_rows) == (2, 1)
    assert mending == []


def test_what_differs_is_counted_and_mended() -> None:
    stored = Restored(
        {"changed": state(1), "invented": b"no state", "kept": state(9)},
        timers=[stored_timer(timer("moved", 60)), stored_timer(timer("stray"))],
    )
    rebuilt = PartitionState(
        {"changed": state(2), "lost": state(3), "kept": state(9)}, {("moved", "alarm"): timer("moved", 90)}
    )
    states, timers, mending = compared(stored, rebuilt)
    assert (states.missing, states.surplus, states.changed) == (1, 1, 1)
    assert (timers.missing, timers.surplus, timers.changed) == (0, 1, 1)
    assert not states.equal
    assert {key: value for _, key, value, _, _ in mending} == {
        state_key("changed"): state(2),
        state_key("lost"): state(3),
        state_key("invented"): None,
        timer_key("moved", "alarm"): timer_value(stored_timer(timer("moved", 90), traceparent="00-one")),
        timer_key("stray", "alarm"): None,
    }
    assert {(topic, number) for topic, _, _, _, number in mending} == {("magnatronic.adder.work.normal.changelog", 2)}
    assert str(states.examples[0]).startswith("states of adder work.normal[2] changed: it is ")


def test_what_nobody_sees_any_more_may_be_there_or_not() -> None:
    stored = Restored({"past": state(1, expires_s=-1), "ahead": state(1, expires_s=1)})
    states, _, mending = compared(stored, PartitionState({"gone": state(2, expires_s=0)}, latest_ms=AT_MS))
    assert (states.missing, states.surplus) == (0, 1)
    assert [key for _, key, *_ in mending] == [state_key("ahead")]


def test_what_cannot_be_decided_again_stays() -> None:
    stored = Restored({"erased": state(1)}, timers=[stored_timer(timer("erased"))])
    states, timers, mending = compared(stored, PartitionState(unknown={"erased": "a data subject was forgotten"}))
    assert states.equal
    assert timers.equal
    assert mending == []


def test_a_lost_changelog_is_written_whole_between_two_markers() -> None:
    parked = Record("work.normal", 2, 17, AT_MS, b"key", b"value", (("ce_id", b"x"),))
    effect = Record("effects", 0, 5, AT_MS, b"key", b"effect", (("ce_id", b"y"),))
    rebuilt = PartitionState(
        {"lane": state(1)}, {("lane", "alarm"): timer("lane")}, [Waiting(parked, 2)], {("event", 0): effect}
    )
    left_over = Restored({"lane": state(1), "other": state(5)}, timers=[stored_timer(timer("other"))])
    messages = whole_changelog(GROUP, PLACE, left_over, rebuilt)
    keys = [key for _, key, *_ in messages]
    assert keys[0] == keys[-1] == REBUILD_KEY
    assert messages[0][2] is not None
    assert messages[-1][2] is None
    content = {key: value for _, key, value, _, _ in messages[1:-1]}
    assert content == {
        state_key("lane"): state(1),
        timer_key("lane", "alarm"): timer_value(stored_timer(timer("lane"), traceparent="00-one")),
        parked_key(17): b"value",
        effect_key("event", 0): b"effect",
        state_key("other"): None,
        timer_key("other", "alarm"): None,
    }
    (headers,) = [headers for _, key, _, headers, _ in messages if key == parked_key(17)]
    assert headers is not None
    assert headers[0] == ("parked-attempt", b"2")
