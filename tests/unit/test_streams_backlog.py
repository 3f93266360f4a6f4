import random
from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streams.backlog import Backlog
from streams.dispatch import HIGH, LOW, NORMAL, RANKS, shares

TOPICS = {"t.high": HIGH, "t.normal": NORMAL, "t.low": LOW}
NAMES = list(TOPICS)


class Message:
    def __init__(self, topic: str, partition: int, offset: int, size: int = 10) -> None:
        self._topic, self._partition, self.offset, self._size = topic, partition, offset, size

    def __len__(self) -> int:
        return self._size

    def topic(self) -> str:
        return self._topic

    def partition(self) -> int:
        return self._partition

    @property
    def rank(self) -> int:
        return TOPICS[self._topic]


def messages(topic: str, count: int, size: int = 10) -> list[Message]:
    return [Message(topic, 0, offset, size) for offset in range(count)]


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32), most=st.integers(1, 40), names=st.sets(st.sampled_from(NAMES), min_size=1))
def test_all_comes_out_in_order_within_the_budgets(seed: int, most: int, names: set[str]) -> None:
    rng = random.Random(seed)
    backlog = Backlog(most, {name: TOPICS[name] for name in names})
    limits = shares(most, {TOPICS[name] for name in names})
    added: dict[tuple[str, int], list[int]] = defaultdict(list)
    taken: dict[tuple[str, int], list[int]] = defaultdict(list)
    flying: list[int] = []
    for _ in range(60):
        batch = []
        for _ in range(rng.randrange(20)):
            place = rng.choice(sorted(names)), rng.randrange(2)
            batch.append(Message(*place, len(added[place])))
            added[place].append(len(added[place]))
        backlog.add(batch)
        for message in backlog.take(rng.randrange(1, 30)):
            taken[message.topic(), message.partition()].append(message.offset)
            flying.append(message.rank)
        assert backlog.in_flight == len(flying) <= limits[0]
        assert sum(rank != HIGH for rank in flying) <= limits[1]
        assert flying.count(LOW) <= limits[2]
        rng.shuffle(flying)
        while flying and rng.random() < 0.7:
            backlog.settle(1, flying.pop())
    while len(backlog) or flying:
        while flying:
            backlog.settle(1, flying.pop())
        for message in backlog.take(7):
            taken[message.topic(), message.partition()].append(message.offset)
            flying.append(message.rank)
    assert taken == {place: offsets for place, offsets in added.items() if offsets}
    assert not any(backlog.full(rank) for rank in RANKS)


def test_high_comes_out_first_and_low_is_not_forgotten() -> None:
    backlog = Backlog(10_000, TOPICS)
    for name in reversed(NAMES):
        backlog.add(messages(name, 2000))
    ranks = [message.rank for message in backlog.take(2100)]
    assert ranks[:4] == [HIGH] * 4
    assert [ranks.count(rank) for rank in RANKS] == pytest.approx([1600, 400, 100], rel=0.02)


def test_high_passes_low_that_has_used_up_its_budget() -> None:
    backlog = Backlog(400, TOPICS)
    backlog.add(messages("t.low", 1000))
    assert len(backlog.take(1000)) == 300
    assert backlog.take(1000) == []
    backlog.add(messages("t.high", 1000))
    assert {message.rank for message in backlog.take(1000)} == {HIGH}
    assert backlog.in_flight == 400
    backlog.settle(300, LOW)
    assert {HIGH, LOW} == {message.rank for message in backlog.take(1000)}


def test_a_full_rank_stays_full_until_half_is_gone() -> None:
    backlog = Backlog(100, TOPICS)
    backlog.add(messages("t.low", 100))
    assert [backlog.full(rank) for rank in RANKS] == [False, False, True]
    backlog.take(40)
    assert backlog.full(LOW)
    backlog.take(11)
    assert not backlog.full(LOW)
    backlog.add(messages("t.low", 50))
    assert not backlog.full(LOW)


def test_large_messages_fill_it_by_their_bytes() -> None:
    backlog = Backlog(4096, TOPICS)
    backlog.add(messages("t.normal", 4, size=1024 * 1024))
    assert backlog.full(NORMAL)
    backlog.take(3)
    assert not backlog.full(NORMAL)


def test_what_was_given_up_is_forgotten_and_the_rest_keeps_its_order() -> None:
    backlog = Backlog(100, TOPICS)
    for offset in range(30):
        backlog.add([Message("t.low", partition, offset, 1024 * 1024) for partition in (0, 1)])
    assert backlog.full(LOW)
    backlog.discard({("t.low", 1), ("t.high", 0)})
    backlog.take(29)
    assert not backlog.full(LOW)
    (last,) = backlog.take(10)
    assert (last.partition(), last.offset) == (0, 29)
