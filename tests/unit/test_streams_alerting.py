"""Rules over windows: what is raised and cleared, and that repeats, late records and idle stretches change nothing."""

import random
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.events import AlertCleared, AlertRaised, Severity
from streams.alerting import EVERYBODY, GRACE_MS, SILENT_MS, Spending, Watch, conflict_of, judge_spending
from streams.figures import STEP_MS, WINDOW_MS, Figures, Sample
from streams.rules import RULES, Alert, Scope, Thresholds
from tests.unit.alert_log import START_MS, AlertLog, minutes, placed, second, taken

FINE: dict[str, Any] = {"events_in": 10, "events_out": 10, "p50_ms": 10.0, "p99_ms": 40.0}
FAILING: dict[str, Any] = {"events_in": 5, "failures": 5}
STALLED: dict[str, Any] = {"in_flight": 3, "lag": 3, "stalled": "work.retrieve.normal[0]@17 waits for StepAssigned"}


def merged(*streams: Any) -> list[Sample]:
    return sorted((sample for stream in streams for sample in stream), key=lambda each: each.at_ms)


def said(alerts: list[Alert]) -> list[tuple[str, str, str]]:
    return [(type(each.event).__name__, each.event.rule, each.event.source) for each in alerts]


def test_all_is_well() -> None:
    assert taken(minutes("retriever", "a", *[FINE] * 10)).alerts == []


def test_an_error_rate_is_raised_once_and_cleared_once() -> None:
    log = taken(minutes("retriever", "a", FINE, FAILING, FAILING, FINE, FINE, FINE))
    assert said(log.alerts) == [
        ("AlertRaised", "error-rate", "retriever"),
        ("AlertCleared", "error-rate", "retriever"),
    ]
    raised, cleared = log.alerts
    assert isinstance(raised.event, AlertRaised)
    assert raised.event.alert_id == cleared.event.alert_id
    assert raised.id != cleared.id
    assert (raised.event.severity, raised.event.threshold) == (Severity.WARNING, 0.2)
    assert raised.event.value >= 0.2
    assert "attempts failed" in raised.event.message
    # Raised within a step of the threshold's being passed, at the end of a window, by the log's time.
    assert raised.at == datetime.fromtimestamp((START_MS + 60_000 + 2 * STEP_MS) / 1000, UTC)


def test_few_failures_are_no_rate() -> None:
    rare = {"failures": 0}
    samples = [*minutes("retriever", "a", rare, rare), second("retriever", "a", START_MS + 120_500, failures=9)]
    assert taken([*samples, *minutes("retriever", "a", rare, start_ms=START_MS + 121_000)]).alerts == []


def test_a_value_between_the_thresholds_neither_raises_nor_clears() -> None:
    between = {"events_in": 17, "failures": 3}
    log = taken(minutes("retriever", "a", between, between, FAILING, between, between, between))
    assert said(log.alerts) == [("AlertRaised", "error-rate", "retriever")]


def test_a_stall_names_its_cause_and_its_instance() -> None:
    log = taken(merged(minutes("retriever", "a", *[FINE] * 4), minutes("retriever", "b", FINE, STALLED, STALLED, FINE)))
    assert said(log.alerts)[0] == ("AlertRaised", "stall", "retriever/b")
    raised = log.alerts[0].event
    assert isinstance(raised, AlertRaised)
    assert STALLED["stalled"] in raised.message
    assert raised.severity is Severity.CRITICAL


def test_slow_calls_in_hand_are_no_stall_but_waiting_events_that_nobody_takes_are() -> None:
    slow = {"in_flight": 5, "lag": 5}
    assert taken(minutes("researcher", "a", *[slow] * 3)).alerts == []
    waiting = {"in_flight": 0, "lag": 5}
    assert said(taken(minutes("researcher", "a", *[waiting] * 3)).alerts) == [("AlertRaised", "stall", "researcher/a")]


def test_growing_lag_of_all_instances_together() -> None:
    def growing(instance: str) -> list[Sample]:
        return [
            second("creator", instance, START_MS + n * 1000, events_in=1, in_flight=9, lag=10 * n) for n in range(240)
        ]

    def shrinking(instance: str) -> list[Sample]:
        at = START_MS + 240_000
        return [second("creator", instance, at + n * 1000, events_in=1, lag=2400 - 10 * n) for n in range(120)]

    log = taken(merged(growing("a"), growing("b"), shrinking("a"), shrinking("b")))
    assert said(log.alerts) == [
        ("AlertRaised", "lag-growth", "creator"),
        ("AlertCleared", "lag-growth", "creator"),
    ]
    assert taken(growing("a")).alerts == []


def test_latency_is_weighed_by_events() -> None:
    slow, once = {"events_in": 1, "p99_ms": 90_000.0}, {"events_in": 1000, "p99_ms": 10.0}
    assert said(taken(minutes("overseer", "a", FINE, slow, slow, slow, once, once, once)).alerts) == [
        ("AlertRaised", "latency", "overseer"),
        ("AlertCleared", "latency", "overseer"),
    ]
    assert taken(merged(minutes("overseer", "a", *[once] * 4), minutes("overseer", "b", *[slow] * 4))).alerts == []


def test_an_hour_s_budget_is_everybody_s() -> None:
    spending = {**FINE, "cost_usd": 0.01, "tokens": 100}
    hour = merged(minutes("retriever", "a", *[spending] * 50), minutes("researcher", "a", *[spending] * 130))
    log = taken(hour, Thresholds(cost_usd_per_hour=50.0, tokens_per_hour=300_000))
    assert said(log.alerts) == [
        ("AlertRaised", "tokens", EVERYBODY),
        ("AlertRaised", "cost", EVERYBODY),
        ("AlertCleared", "cost", EVERYBODY),
    ]
    cost = log.alerts[1].event
    assert isinstance(cost, AlertRaised)
    # 1.20 dollars a minute of both: 50 are passed in the 42nd.
    assert log.alerts[1].at == datetime.fromtimestamp(START_MS / 1000 + 42 * 60, UTC)
    assert cost.value == pytest.approx(42 * 1.2, rel=0.02)


def test_a_repeated_judgement_spends_nothing_twice() -> None:
    at = Thresholds(cost_usd_per_hour=1.0)
    known = Spending()
    for _ in range(5):
        known, alerts = judge_spending(known, "a", START_MS, [Figures(cost_usd=0.9)], at)
        assert alerts == []
    known, alerts = judge_spending(known, "a", START_MS + 60_000, [Figures()], at)
    assert alerts == []
    assert sum(cost for by_agent in known.minutes.values() for cost, _ in by_agent.values()) == 0.9


def test_a_rule_without_threshold_is_off_and_lets_go_of_its_alerts() -> None:
    assert taken(minutes("a", "a", *[FAILING] * 5), Thresholds(error_rate=None)).alerts == []
    log = taken(minutes("a", "a", *[FAILING] * 3))
    log.thresholds = Thresholds(error_rate=None)
    for sample in placed(minutes("a", "a", *[FAILING] * 5))[180:]:
        log.take(sample)
    assert said(log.alerts)[-1] == ("AlertCleared", "error-rate", "a")


def test_the_alerts_of_a_silent_agent_are_cleared_by_others_time() -> None:
    log = taken(merged(minutes("gone", "a", FAILING, FAILING), minutes("here", "a", *[FINE] * 14)))
    assert said(log.alerts) == [
        ("AlertRaised", "error-rate", "gone"),
        ("AlertCleared", "error-rate", "gone"),
    ]
    assert (log.alerts[1].at.timestamp() * 1000 - START_MS) >= SILENT_MS
    assert "gone" not in log.watches
    assert {key[0] for key in log.windows} == {"here"}


def test_after_a_long_silence_judging_goes_on_where_the_log_is() -> None:
    first, later = minutes("a", "a", FAILING, FAILING), START_MS + 86_400_000
    log = taken([*first, *minutes("a", "a", FAILING, FAILING, FINE, FINE, FINE, start_ms=later)])
    assert said(log.alerts).count(("AlertRaised", "error-rate", "a")) in (1, 2)
    assert log.open_alerts() == set()
    assert len(log.windows) <= 4


def test_windows_are_judged_when_a_later_record_is_older_than_their_grace() -> None:
    watch = Watch.beginning(START_MS + 1)
    assert watch.due(START_MS + STEP_MS + GRACE_MS - 1) == []
    assert watch.due(START_MS + STEP_MS + GRACE_MS) == [START_MS + STEP_MS]
    assert watch.reach(START_MS + STEP_MS + GRACE_MS).judged_ms == START_MS + STEP_MS
    assert max(watch.due(START_MS + 10 * 86_400_000)) <= START_MS + WINDOW_MS + 3 * STEP_MS


def test_two_outcomes_of_one_task_conflict_and_one_told_twice_does_not() -> None:
    at = datetime(2026, 1, 1, tzinfo=UTC)
    done, cancelled = ("id-1", "TaskCompleted"), ("id-2", "TaskCancelled")
    assert conflict_of("t", done, done, at) is None
    alert = conflict_of("t", done, cancelled, at)
    again = conflict_of("t", done, ("id-3", "TaskFailed"), at)
    assert alert is not None
    assert again is not None
    assert alert.id == again.id
    assert isinstance(alert.event, AlertRaised)
    assert alert.event.source == "t"
    assert "TaskCompleted" in alert.event.message
    assert "TaskCancelled" in alert.event.message


def test_every_rule_has_a_name_of_its_own_and_clears_below_where_it_raises() -> None:
    assert len({rule.name for rule in RULES}) == len(RULES)
    assert all(0 < rule.clear_at < 1 for rule in RULES)
    assert {rule.scope for rule in RULES} == {Scope.AGENT, Scope.INSTANCE, Scope.EVERYBODY}
    assert all(rule.threshold(Thresholds()) is not None for rule in RULES)


MOODS = st.sampled_from([FINE, FAILING, STALLED, {}, {"events_in": 1, "p99_ms": 100_000.0, "cost_usd": 2.0}])


@settings(max_examples=40, deadline=None)
@given(
    moods=st.lists(st.lists(MOODS, min_size=2, max_size=6), min_size=1, max_size=3),
    seed=st.integers(0, 2**32),
)
def test_repeats_and_late_records_change_nothing(moods: list[list[dict[str, Any]]], seed: int) -> None:
    chance = random.Random(seed)
    log = merged(*(minutes(f"agent{n % 2}", f"i{n}", *each) for n, each in enumerate(moods)))
    troubled: list[Sample] = []
    for sample in log:
        troubled.append(sample)
        while chance.random() < 0.2:
            # Told again: as it was, or appended anew by a client that was not sure.
            old = chance.choice(troubled[-300:])
            troubled.append(chance.choice([old, replace(old, at_ms=sample.at_ms)]))
    clean, other = taken(log, Thresholds(cost_usd_per_hour=60.0)), taken(troubled, Thresholds(cost_usd_per_hour=60.0))
    assert [(each.id, each.at) for each in clean.alerts] == [(each.id, each.at) for each in other.alerts]
    _properly_nested(clean.alerts)


@settings(max_examples=40, deadline=None)
@given(moods=st.lists(MOODS, min_size=2, max_size=6), cut=st.floats(0, 1), back=st.integers(0, 100))
def test_going_back_in_the_log_finds_the_same_alerts(moods: list[dict[str, Any]], cut: float, back: int) -> None:
    """As after a crash: what was found stays known, and some records come again."""
    samples = placed(minutes("agent", "a", *moods))
    place = int(len(samples) * cut)
    log = AlertLog()
    for sample in [*samples[:place], *samples[max(0, place - back) :]]:
        log.take(sample)
    assert [each.id for each in log.alerts] == [each.id for each in taken(samples).alerts]


def _properly_nested(alerts: list[Alert]) -> None:
    """Every alert is raised once, then cleared at most once, and none is raised while one of its kind is open."""
    standing: dict[tuple[str, str], str] = {}
    ids = [each.id for each in alerts]
    assert len(ids) == len(set(ids))
    for alert in alerts:
        kind = alert.event.rule, alert.event.source
        if isinstance(alert.event, AlertCleared):
            assert standing.pop(kind) == alert.event.alert_id
        else:
            assert kind not in standing
            standing[kind] = alert.event.alert_id
