"""The checks of the chaos suite find what they are there to find: each kind of harm, planted by hand."""

from dataclasses import replace

import pytest

from streams.offsets import encode_finished
from tests.chaos.harness.checks import (
    Call,
    ChaosError,
    EffectSeen,
    Fired,
    Input,
    Output,
    Verdict,
    check_effects,
    check_letters,
    check_outputs,
    check_rows,
    check_timers,
)
from tests.chaos.harness.log import Committed
from tests.chaos.harness.plan import Kind, kinds_for, make_plan

INPUTS = [Input(n % 2, n // 2, f"k{n % 2}", f"k{n % 2}/{n}", str(n)) for n in range(8)]
OUTPUTS = [Output(each.key, each.step_id, each.answer) for each in INPUTS]


def broken(outputs: list[Output]) -> dict[str, int]:
    verdict = Verdict()
    check_outputs(verdict, INPUTS, outputs)
    assert bool(verdict.findings) == bool(verdict.bad)
    return verdict.bad


def test_outputs_as_they_must_be_pass_in_any_order_between_keys() -> None:
    assert broken(OUTPUTS) == {}
    assert broken(sorted(OUTPUTS, key=lambda each: each.key)) == {}


@pytest.mark.parametrize(
    ("outputs", "found"),
    [
        (OUTPUTS[1:], {"lost": 1}),
        ([*OUTPUTS, OUTPUTS[3]], {"doubled": 1}),
        ([*OUTPUTS[:-1], replace(OUTPUTS[-1], answer="8")], {"wrong": 1}),
        ([OUTPUTS[2], *OUTPUTS[:2], *OUTPUTS[3:]], {"wrong": 1}),
        ([*OUTPUTS, Output("k9", "k9/9", "9")], {"wrong": 1}),
        ([], {"lost": 8}),
    ],
    ids=["lost", "doubled", "wrong answer", "out of order", "from nowhere", "nothing"],
)
def test_harm_to_outputs_is_found(outputs: list[Output], found: dict[str, int]) -> None:
    assert broken(outputs) == found


TIMERS = {f"k/{n}": 1000 + n for n in range(3)}
FIRED = [Fired(f"id-{n}", f"k/{n}", str((1000 + n) * 1000 + 7), 2000 + n) for n in range(3)]
RUNG = [Output("k", each.step_id, each.due) for each in FIRED]


def broken_timers(fired: list[Fired], answers: list[Output], *pending: str) -> dict[str, int]:
    verdict = Verdict()
    check_timers(verdict, TIMERS, fired, answers, pending=set(pending))
    assert verdict.timers == len(fired)
    return verdict.bad


def test_timers_that_fired_once_pass_and_some_may_be_pending_under_way() -> None:
    assert broken_timers(FIRED, RUNG) == {}
    assert broken_timers(FIRED[:1], RUNG[:1], "k/1", "k/2") == {}
    assert broken_timers([replace(FIRED[0], done=False)], [], "k/1", "k/2") == {}


def test_harm_to_timers_in_the_changelog_is_found() -> None:
    assert broken_timers(FIRED[:2], RUNG[:2]) == {"timers_lost": 1}
    assert broken_timers(FIRED, RUNG, "k/0") == {"timers_doubled": 1}
    assert broken_timers(FIRED, RUNG, "k/9") == {"timers_stray": 1}


@pytest.mark.parametrize(
    ("fired", "answers", "found"),
    [
        (FIRED, RUNG[1:], {"timers_lost": 1}),
        ([*FIRED, replace(FIRED[0], event_id="other")], RUNG, {"timers_doubled": 1}),
        ([*FIRED, FIRED[0]], [*RUNG, RUNG[0]], {"timers_doubled": 3}),
        ([*FIRED[:2], replace(FIRED[2], event_id="id-0")], RUNG, {"timers_doubled": 1}),
        (FIRED, [*RUNG, RUNG[0]], {"timers_doubled": 1}),
        (FIRED, [*RUNG[:2], replace(RUNG[2], answer="1")], {"timers_stray": 1}),
        ([*FIRED, replace(FIRED[0], event_id="id-9", step_id="k/9", done=False)], RUNG, {"timers_stray": 1}),
        ([replace(FIRED[0], done=False), *FIRED[1:]], RUNG, {"timers_stray": 1}),
        ([replace(FIRED[0], appended_ms=999), *FIRED[1:]], RUNG, {"timers_early": 1}),
        (
            [replace(FIRED[0], due="999999"), *FIRED[1:]],
            [replace(RUNG[0], answer="999999"), *RUNG[1:]],
            {"timers_early": 1},
        ),
    ],
    ids=[
        "no answer",
        "fired twice",
        "fired and answered twice",
        "one id for two",
        "answered twice",
        "another's answer",
        "set by nobody",
        "answered too soon",
        "before its time",
        "for too early a time",
    ],
)
def test_harm_to_timers_is_found(fired: list[Fired], answers: list[Output], found: dict[str, int]) -> None:
    assert broken_timers(fired, answers) == found


def effect(question: str, appended_ms: int = 100, *, error: str = "") -> EffectSeen:
    return EffectSeen(("LlmCalled", "", question, 0), question, error, appended_ms)


def call(question: str, at_ms: float, key: str = "") -> Call:
    return Call(at_ms, 7, question, key or f"key-{question}")


@pytest.mark.parametrize(
    ("calls", "effects", "found"),
    [
        ([call("a", 50), call("b", 60)], [effect("a"), effect("b")], {}),
        ([call("a", 40), call("a", 99), call("b", 60)], [effect("a"), effect("b")], {}),
        ([call("a", 50), call("a", 150), call("b", 60)], [effect("a"), effect("b")], {"effects_repeated": 1}),
        (
            [call("a", 50), call("b", 60)],
            [effect("a"), effect("a", 110), effect("b")],
            {"effects_doubled": 1, "effects_invented": 1},
        ),
        ([call("a", 50), call("b", 60)], [effect("a")], {"effects_missing": 1}),
        ([call("a", 50), call("b", 60)], [effect("a"), effect("b", error="Busy")], {"effects_missing": 1}),
        (
            [call("a", 50), call("b", 60)],
            [effect("a"), effect("b"), effect("b", error="Busy")],
            {"effects_invented": 1},
        ),
        ([call("a", 50), call("b", 60)], [effect("a"), effect("b"), effect("b", error="CancelledError")], {}),
        ([call("a", 50)], [effect("a"), effect("b")], {"effects_invented": 1}),
        ([call("a", 50), call("a", 60, "other"), call("b", 60)], [effect("a"), effect("b")], {"keys_unstable": 1}),
        ([call("a", 50, "same"), call("b", 60, "same")], [effect("a"), effect("b")], {"keys_unstable": 1}),
    ],
    ids=[
        "well",
        "again before",
        "again after",
        "two results",
        "no result",
        "only a failure",
        "a failure of no call",
        "given up",
        "a result of no call",
        "two keys",
        "one key",
    ],
)
def test_harm_to_effects_is_found(calls: list[Call], effects: list[EffectSeen], found: dict[str, int]) -> None:
    verdict = Verdict()
    check_effects(verdict, calls, effects, ["a", "b"], stable_keys=True)
    assert verdict.bad == found


def test_an_effect_that_failed_may_be_made_again() -> None:
    verdict = Verdict()
    calls = [call("a", 50), call("a", 150), call("a", 160)]
    check_effects(verdict, calls, [effect("a", 100, error="Busy"), effect("a", 200)], ["a"], stable_keys=True)
    assert verdict.bad == {}
    assert (verdict.effects_failed, verdict.calls_again) == (1, 1)


def test_letters_astray_and_missing_are_found() -> None:
    verdict = Verdict()
    check_letters(verdict, ["a", "b"], [("a", "told to"), ("a", "again"), ("c", "why")])
    assert verdict.bad == {"stray_letters": 2, "missing_letters": 1}


def test_rows_lost_and_doubled_are_found() -> None:
    log = {("t", 0): {0: "a", 1: "b", 3: "c"}}
    well = Verdict()
    check_rows(well, log, log)
    assert (well.bad, well.rows) == ({}, 3)
    verdict = Verdict()
    check_rows(verdict, log, {("t", 0): {0: "a", 2: "a", 3: "x"}})
    assert verdict.bad == {"rows_lost": 2, "rows_doubled": 2}
    with pytest.raises(ChaosError, match="rows_lost"):
        verdict.raise_if_bad()


def test_a_commit_says_which_offsets_are_done() -> None:
    committed = Committed(5, encode_finished(5, [5, 7], 10))
    assert [offset for offset in range(12) if offset in committed] == [0, 1, 2, 3, 4, 6, 8, 9]
    assert committed.count() == 8
    assert [offset for offset in range(3) if offset in Committed(-1001, "")] == []


@pytest.mark.parametrize("brokers", [1, 3])
def test_a_plan_is_the_same_for_its_seed_and_has_every_kind(brokers: int) -> None:
    def plan(seed: int) -> list[object]:
        return list(make_plan(seed, events=10_000, faults=50, brokers=brokers, workers=3))

    assert plan(5) == plan(5) != plan(6)
    faults = make_plan(5, events=10_000, faults=50, brokers=brokers, workers=3)
    assert {fault.kind for fault in faults} == set(kinds_for(brokers))
    assert [fault.at for fault in faults] == sorted(fault.at for fault in faults)
    assert 0 <= faults[0].at < faults[-1].at < 10_000
    assert (Kind.BROKERS_ROLLING in kinds_for(brokers)) == (brokers == 3)
    assert {fault.target for fault in faults if fault.kind is Kind.BROKER_KILL} <= set(range(brokers))
