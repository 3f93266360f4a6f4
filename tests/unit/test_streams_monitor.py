"""The Monitor's parts without Faust: what they decide, what they write and when, and that no crash loses any of it."""

import asyncio
import random
from collections.abc import Awaitable, Collection
from datetime import UTC, datetime
from typing import Any, Generic, TypeVar

import pytest

from schemas.events import (
    AgentHeartbeat,
    AgentRegistered,
    AlertCleared,
    AlertRaised,
    Event,
    Health,
    TaskCancelled,
    TaskCompleted,
)
from schemas.metadata import Envelope, Metadata
from streams.alerting import SILENT_MS, Spending, Watch
from streams.directory import SILENT_AFTER_MS, Presence
from streams.figures import STEP_MS, Figures, Sample
from streams.monitor_acks import Acks
from streams.monitor_judge import Judge, Place
from streams.monitor_outcomes import Outcome, Outcomes
from streams.monitor_presences import Presences
from streams.rules import Thresholds
from tests.unit.alert_log import START_MS, minutes, placed, taken

FINE: dict[str, Any] = {"events_in": 10, "events_out": 10, "p50_ms": 10.0, "p99_ms": 40.0, "cost_usd": 0.01}
FAILING: dict[str, Any] = {"events_in": 5, "failures": 5}
STALLED: dict[str, Any] = {"in_flight": 3, "lag": 3, "stalled": "it waits"}
NOW = datetime(2026, 1, 1, tzinfo=UTC)
K = TypeVar("K")
V = TypeVar("V")


class CrashError(Exception):
    """The process ends here."""


class Log:
    """What outlives a process: the tables' changelogs, and what was emitted. It can end the process at its n-th use."""

    def __init__(self) -> None:
        self.changelogs: dict[str, dict[Any, Any]] = {}
        self.emitted: dict[str, Event] = {}
        self.writes = 0
        self.left: int | None = None

    def use(self) -> None:
        if self.left == 0:
            raise CrashError
        self.left = None if self.left is None else self.left - 1

    async def emit(self, event: Event, event_id: str, at: datetime) -> None:
        self.use()
        assert self.emitted.setdefault(event_id, event) == event

    def alerts(self) -> set[str]:
        return {key for key, event in self.emitted.items() if isinstance(event, AlertRaised | AlertCleared)}


class Memory(Generic[K, V]):
    """A table as a process has it: read back from its changelog, which a write reaches at once or ``later``."""

    def __init__(self, log: Log, name: str, *, later: bool = False) -> None:
        self._log = log
        self._changelog = log.changelogs.setdefault(name, {})
        self._values: dict[K, V] = dict(self._changelog)
        self.answers: list[asyncio.Future[None]] = []
        self._later = later

    def get(self, key: K) -> V | None:
        return self._values.get(key)

    def items(self) -> Collection[tuple[K, V]]:
        return list(self._values.items())

    def hold(self, key: K, value: V) -> None:
        self._values[key] = value

    def drop(self, key: K) -> None:
        self._values.pop(key, None)

    async def write(self, key: K, partition: int = 0) -> Awaitable[Any]:
        self._log.use()
        self._log.writes += 1
        if key in self._values:
            self._changelog[key] = self._values[key]
        else:
            self._changelog.pop(key, None)
        answer = asyncio.get_running_loop().create_future()
        if not self._later:
            answer.set_result(None)
        self.answers.append(answer)
        return answer


class Record:
    """An event of a stream: whether it is acknowledged."""

    def __init__(self, number: int, acknowledged: list[int]) -> None:
        self._number = number
        self._acknowledged = acknowledged

    def ack(self) -> bool:
        self._acknowledged.append(self._number)
        return True


async def judged(log: Log, samples: list[Sample], begin: int, crash_after: int | None) -> int:
    """Take samples from ``begin`` on in a new process until it crashes or all are taken; where the next begins."""
    windows: Memory[Place, Figures] = Memory(log, "windows")
    watches: Memory[str, Watch] = Memory(log, "watches")
    spending: Memory[str, Spending] = Memory(log, "spending")
    judge = Judge(windows, watches, spending, log.emit, Thresholds(cost_usd_per_hour=1.0))
    acknowledged: list[int] = []
    acks = Acks(pytest.fail)  # type: ignore[arg-type]
    log.left = crash_after
    try:
        for number in range(begin, len(samples)):
            acks.add(0, Record(number, acknowledged), await judge.take(samples[number]))
            await asyncio.sleep(0)
    except CrashError:
        await asyncio.sleep(0)
    assert acknowledged == list(range(begin, begin + len(acknowledged)))
    return begin + len(acknowledged) if log.left == 0 else len(samples)


def samples_of_two_agents() -> list[Sample]:
    first = minutes("retriever", "a", FINE, FAILING, FAILING, FINE, FINE, FAILING, FINE, FINE)
    second = minutes("retriever", "b", FINE, FINE, FINE, STALLED, STALLED, FINE, FINE, FINE)
    third = minutes("researcher", "c", FINE, FINE, STALLED, STALLED, FINE, FINE, FINE, STALLED)
    return placed(sorted([*first, *second, *third], key=lambda each: each.at_ms))


@pytest.mark.parametrize("seed", range(8))
async def test_whenever_it_crashes_it_raises_what_one_that_never_did_raises(seed: int) -> None:
    samples = samples_of_two_agents()
    expected = {alert.id for alert in taken(samples, Thresholds(cost_usd_per_hour=1.0)).alerts}
    assert len(expected) >= 8
    drawn = random.Random(seed)
    log, begin, lives = Log(), 0, 0
    while begin < len(samples):
        begin = await judged(log, samples, begin, drawn.randrange(5, 150))
        lives += 1
    assert lives > 4
    assert log.alerts() == expected


async def test_a_sample_costs_far_less_than_a_write() -> None:
    samples = samples_of_two_agents()
    log = Log()
    await judged(log, samples, 0, None)
    assert log.writes < len(samples) / 2


async def test_a_silent_agent_holds_up_nobody_s_offsets_and_is_forgotten() -> None:
    log = Log()
    quiet = list(minutes("quiet", "a", STALLED))
    busy = list(minutes("busy", "b", *[FINE] * 12, start_ms=START_MS + 60_000))
    assert busy[-1].at_ms - quiet[-1].at_ms > SILENT_MS
    acknowledged: list[int] = []
    windows: Memory[Place, Figures] = Memory(log, "windows")
    judge = Judge(windows, Memory(log, "watches"), Memory(log, "spending"), log.emit, Thresholds())
    acks = Acks(pytest.fail)  # type: ignore[arg-type]
    samples = placed([*quiet, *busy])
    for number, sample in enumerate(samples):
        acks.add(0, Record(number, acknowledged), await judge.take(sample))
        await asyncio.sleep(0)
        if sample.at_ms > quiet[-1].at_ms + 4 * STEP_MS:
            assert len(acknowledged) > len(quiet)
    assert set(log.changelogs["watches"]) == {"busy"}
    assert {source for source, _ in log.changelogs["windows"]} == {"busy/b"}
    raised = [event for event in log.emitted.values() if isinstance(event, AlertRaised)]
    cleared = [event for event in log.emitted.values() if isinstance(event, AlertCleared)]
    assert [each.alert_id for each in raised] == [each.alert_id for each in cleared] != []


async def test_records_are_acknowledged_in_their_order_when_what_they_changed_is_written() -> None:
    acknowledged: list[int] = []
    failures: list[BaseException] = []
    acks = Acks(failures.append)
    first, second = (asyncio.get_running_loop().create_future() for _ in range(2))
    for number, done in enumerate((None, first, None, second)):
        acks.add(0, Record(number, acknowledged), done)
    acks.add(1, Record(10, acknowledged), None)
    assert acknowledged == [0, 10]
    second.set_result(None)
    await asyncio.sleep(0)
    assert acknowledged == [0, 10]
    first.set_result(None)
    await asyncio.sleep(0)
    assert acknowledged == [0, 10, 1, 2, 3]


async def test_what_can_t_be_written_is_said_and_what_comes_again_is_not_acknowledged() -> None:
    acknowledged: list[int] = []
    failures: list[BaseException] = []
    acks = Acks(failures.append)
    broken, forgotten = (asyncio.get_running_loop().create_future() for _ in range(2))
    acks.add(0, Record(0, acknowledged), broken)
    acks.add(0, Record(1, acknowledged), None)
    acks.add(1, Record(2, acknowledged), forgotten)
    broken.set_exception(CrashError())
    await asyncio.sleep(0)
    assert [type(failure) for failure in failures] == [CrashError]
    acks.forget()
    forgotten.set_result(None)
    await asyncio.sleep(0)
    assert acknowledged == []


def outcome(task: str, event_id: str, *, cancelled: bool = False) -> Envelope:
    event: Event = TaskCompleted(task_id=task, objective="x", answer="y", groundedness=1.0, steps=1)
    if cancelled:
        event = TaskCancelled(task_id=task, objective="x", requested_by="ada")
    return Envelope(event, Metadata(event_id, "/agents/coordinator@2", task, NOW))


async def test_outcomes_don_t_wait_for_each_other_and_the_oldest_are_forgotten() -> None:
    log = Log()
    ended: Memory[str, Outcome] = Memory(log, "ended", later=True)
    outcomes = Outcomes(ended, log.emit, remembered=2)
    done = [await outcomes.take(outcome(task, f"done-{task}"), 0, place, START_MS) for place, task in enumerate("abc")]
    assert all(isinstance(each, asyncio.Future) and not each.done() for each in done)
    assert set(log.changelogs["ended"]) == {"b", "c"}
    again = Outcomes(Memory(log, "ended"), log.emit, remembered=2)
    assert await again.take(outcome("b", "done-b"), 0, 1, START_MS) is None
    assert log.emitted == {}
    await again.take(outcome("b", "cancelled-b", cancelled=True), 0, 3, START_MS)
    (raised,) = log.emitted.values()
    assert isinstance(raised, AlertRaised)
    assert (raised.rule, raised.source) == ("conflict", "b")
    await again.take(outcome("d", "done-d"), 0, 4, START_MS)
    assert set(log.changelogs["ended"]) == {"c", "d"}


async def test_the_silent_are_said_to_be_gone_once_whatever_crashes() -> None:
    log = Log()
    told: list[tuple[Event, int]] = [(AgentRegistered(name="s", instance="a", version="1"), START_MS)]
    told += [(AgentHeartbeat(name="s", instance="a", health=Health.READY), START_MS + 1)]
    later = range(START_MS, START_MS + 3 * SILENT_AFTER_MS, 500)
    told += [(AgentHeartbeat(name="s", instance="b", health=Health.READY), at_ms) for at_ms in later]
    begin = 0
    for crash_after in (60, 0, 1, 2, None):
        presences = Presences(Memory[str, Presence](log, "presences"), log.emit)
        log.left = crash_after
        try:
            for event, at_ms in told[begin:]:
                metadata = Metadata(str(at_ms), "/processors/s", "s", NOW)
                await presences.take(Envelope(event, metadata), at_ms)
                begin += 1
        except CrashError:
            continue
    (verdict,) = log.emitted.values()
    assert isinstance(verdict, AgentHeartbeat)
    assert (verdict.instance, verdict.health) == ("a", Health.GONE)
    assert log.changelogs["presences"]["s/a"].verdict is Health.GONE
