from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from streams.changelog import Timer
from streams.timers import Timers

START = datetime(2026, 1, 1, tzinfo=UTC)


def timer(lane: str, name: str, second: int) -> Timer:
    return Timer(lane, name, START + timedelta(seconds=second), "t", "t", "cause", "")


def test_a_timer_is_due_once() -> None:
    timers = Timers([timer("a", "x", 5)])
    assert timers.pop_due(START + timedelta(seconds=4)) == []
    assert timers.pop_due(START + timedelta(seconds=5)) == [timer("a", "x", 5)]
    assert timers.pop_due(START + timedelta(seconds=9)) == []
    assert timers.next_due is None
    assert len(timers) == 0


def test_setting_again_moves_it_and_cancelling_forgets_it() -> None:
    timers = Timers()
    timers.set(timer("a", "x", 5))
    timers.set(timer("a", "x", 9))
    timers.set(timer("a", "y", 6))
    assert timers.changed
    assert timers.cancel("a", "y")
    assert not timers.cancel("a", "y")
    assert timers.pop_due(START + timedelta(seconds=8)) == []
    assert timers.pop_due(START + timedelta(seconds=9)) == [timer("a", "x", 9)]


KEYS = st.tuples(st.sampled_from("ab"), st.sampled_from("xyz"))


@given(st.lists(st.tuples(KEYS, st.one_of(st.none(), st.integers(0, 20))), max_size=40), st.integers(0, 20))
def test_what_is_due_is_what_was_set_last(steps: list[tuple[tuple[str, str], int | None]], now: int) -> None:
    timers, last = Timers(), dict[tuple[str, str], int]()
    for (lane, name), second in steps:
        if second is None:
            timers.cancel(lane, name)
            last.pop((lane, name), None)
        else:
            timers.set(timer(lane, name, second))
            last[lane, name] = second
    fired = timers.pop_due(START + timedelta(seconds=now))
    assert sorted((each.lane, each.name) for each in fired) == sorted(key for key, due in last.items() if due <= now)
    assert [each.due for each in fired] == sorted(each.due for each in fired)
    left = [due for due in last.values() if due > now]
    assert timers.next_due == (START + timedelta(seconds=min(left)) if left else None)
    assert len(timers) == len(left)
