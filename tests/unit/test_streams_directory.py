"""The directory as a projection: who speaks, who is silent, and whose word counts."""

from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.codec import Codec
from schemas.events import AgentHeartbeat, AgentRegistered, AlertCleared, AlertRaised, Event, Health, Severity
from schemas.metadata import Envelope, Metadata
from streams.directory import (
    FORGOTTEN_AFTER_MS,
    MONITOR_SOURCE,
    SILENT_AFTER_MS,
    VERDICT_MS,
    AgentDirectory,
    Presence,
    health_at,
    presence_after,
)
from streams.open_alerts import OpenAlerts

OWN = "/processors/magnatronic.retriever-a"
NOW_MS = 1_767_225_600_000


def registered(version: str = "1", instance: str = "a", agent: str = "retriever") -> AgentRegistered:
    return AgentRegistered(name=agent, instance=instance, version=version, capabilities=("retrieve",))


def beat(health: Health, in_flight: int = 0, instance: str = "a", agent: str = "retriever") -> AgentHeartbeat:
    return AgentHeartbeat(name=agent, instance=instance, health=health, in_flight=in_flight)


def after(*told: tuple[Event, str, int]) -> Presence:
    known = None
    for event, source, at_ms in told:
        known = presence_after(known, event, source=source, at_ms=at_ms)
    assert known is not None
    return known


def test_an_instance_is_what_it_says() -> None:
    known = after((registered(), OWN, 1), (beat(Health.BUSY, 7), OWN, 2))
    assert (known.version, known.capabilities, known.in_flight) == ("1", ("retrieve",), 7)
    assert health_at(known, 3) is Health.BUSY
    known = after((beat(Health.READY), OWN, 1), (registered("2"), OWN, 2))
    assert (known.version, health_at(known, 3)) == ("2", Health.READY)


def test_silence_is_being_gone_until_it_speaks_again() -> None:
    known = after((beat(Health.READY), OWN, 1000))
    assert health_at(known, 1000 + SILENT_AFTER_MS) is Health.READY
    assert health_at(known, 1001 + SILENT_AFTER_MS) is Health.GONE
    back = presence_after(known, beat(Health.READY), source=OWN, at_ms=90_000)
    assert back is not None
    assert health_at(back, 90_001) is Health.READY


def test_who_stopped_is_gone_at_once_and_starting_when_it_registers() -> None:
    known = after((beat(Health.READY), OWN, 1), (beat(Health.GONE), OWN, 2))
    assert health_at(known, 3) is Health.GONE
    assert health_at(after((beat(Health.GONE), OWN, 2), (registered(), OWN, 3)), 4) is Health.STARTING


def test_a_verdict_counts_only_where_it_is_asked_for_and_not_for_ever() -> None:
    known = after(
        (beat(Health.READY), OWN, 1000),
        (beat(Health.DEGRADED), MONITOR_SOURCE, 2000),
        (beat(Health.READY), OWN, 2000 + VERDICT_MS),
    )
    assert health_at(known, 2000 + VERDICT_MS) is Health.READY
    assert health_at(known, 2000 + VERDICT_MS, verdicts=True) is Health.DEGRADED
    assert health_at(known, 2001 + VERDICT_MS, verdicts=True) is Health.READY


def test_who_speaks_is_not_gone_whatever_was_said_of_it() -> None:
    known = after((beat(Health.READY), OWN, 1000), (beat(Health.GONE), MONITOR_SOURCE, 2000))
    assert health_at(known, 2500, verdicts=True) is Health.GONE
    assert health_at(known, 2500) is Health.READY
    known = after(
        (beat(Health.READY), OWN, 1000), (beat(Health.GONE), MONITOR_SOURCE, 2000), (beat(Health.READY), OWN, 3000)
    )
    assert health_at(known, 3000, verdicts=True) is Health.READY


def test_a_verdict_makes_nobody() -> None:
    assert presence_after(None, beat(Health.GONE), source=MONITOR_SOURCE, at_ms=1) is None


TOLD = st.tuples(
    st.one_of(st.sampled_from(Health).map(beat), st.sampled_from(["1", "2"]).map(registered)),
    st.sampled_from([OWN, MONITOR_SOURCE]),
)


@given(told=st.lists(TOLD, min_size=1, max_size=20), back=st.integers(0, 19))
def test_repeats_and_late_events_change_nothing(told: list[tuple[Event, str]], back: int) -> None:
    """The last record again; and an older one, once the instance has spoken after it."""
    history = [(event, source, number * 10) for number, (event, source) in enumerate(told, start=1)]
    known = None
    for event, source, at_ms in history:
        known = presence_after(known, event, source=source, at_ms=at_ms)
    event, source, at_ms = history[-1]
    assert presence_after(known, event, source=source, at_ms=at_ms) == known
    event, source, at_ms = history[back % len(history)]
    if known is not None and at_ms < known.seen_ms:
        assert presence_after(known, event, source=source, at_ms=at_ms) == known


class Clock:
    def __init__(self) -> None:
        self.ms = NOW_MS

    def __call__(self) -> float:
        return self.ms / 1000


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def directory(clock: Clock) -> AgentDirectory:
    """One that nothing is read for: the tests say what it hears."""
    return AgentDirectory({"bootstrap.servers": "127.0.0.1:1"}, Codec(), clock=clock)


def hear(directory: Any, event: Event, at_ms: int = NOW_MS, source: str = OWN) -> None:
    metadata = Metadata("id", source, "key", datetime.fromtimestamp(at_ms / 1000, UTC))
    directory.hear(Envelope(event, metadata), at_ms)


async def test_a_lookup_gives_the_healthiest_first_and_no_verdicts(
    directory: AgentDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streams.directory._CAUGHT_UP_S", 0.0)
    assert await directory.lookup("retrieve") == ()
    for number in range(12):
        hear(directory, registered(instance=f"i{number:02}"))
        hear(directory, beat(Health.READY if number == 7 else Health.BUSY, number, f"i{number:02}"))
    hear(directory, beat(Health.READY, agent="coordinator"), source="/processors/magnatronic.coordinator-a")
    hear(directory, beat(Health.DEGRADED, instance="i07"), NOW_MS + 1, MONITOR_SOURCE)
    found = await directory.lookup("retrieve")
    assert [each.instance for each in found] == ["i07", "i00", "i01", "i02", "i03", "i04", "i05", "i06"]
    assert found[0].health is Health.READY
    assert await directory.lookup("") == found
    assert await directory.lookup("juggle") == ()
    assert {each.health for each in directory.entries() if each.instance == "i07"} == {Health.DEGRADED}


async def test_all_are_gone_when_the_first_is(
    directory: AgentDirectory, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streams.directory._CAUGHT_UP_S", 0.0)
    hear(directory, registered())
    hear(directory, registered(instance="b"))
    clock.ms += SILENT_AFTER_MS + 1
    assert [each.health for each in await directory.lookup("retrieve")] == [Health.GONE, Health.GONE]
    hear(directory, beat(Health.BUSY, instance="b"), clock.ms)
    assert [each.health for each in await directory.lookup("retrieve")] == [Health.BUSY, Health.GONE]
    hear(directory, registered(agent="other"), clock.ms + FORGOTTEN_AFTER_MS + 1)
    assert [each.agent for each in await directory.lookup("")] == ["other"]


def test_an_alert_is_open_from_its_first_raising_to_its_clearing() -> None:
    alerts = OpenAlerts({"bootstrap.servers": "127.0.0.1:1"}, Codec())

    def raised(alert_id: str, source: str) -> AlertRaised:
        return AlertRaised(
            source=source,
            alert_id=alert_id,
            rule="stall",
            severity=Severity.CRITICAL,
            message="m",
            value=1,
            threshold=1,
        )

    for event in (raised("2", "b"), raised("1", "a"), raised("2", "b")):
        hear(alerts, event)
    assert [each.source for each in alerts.entries()] == ["a", "b"]
    hear(alerts, AlertCleared(source="b", alert_id="2", rule="stall"))
    hear(alerts, raised("2", "b"))
    assert [each.source for each in alerts.entries()] == ["a"]
