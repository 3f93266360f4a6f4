"""Why a processor is not ready: the cause by name, and nothing said where nothing is wrong."""

import asyncio
import math
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import pytest

from agents.agent import Agent
from schemas.events import TaskSubmitted
from schemas.metadata import Envelope, Metadata
from schemas.record import Record
from streams.binding import Binding
from streams.changelog import Restored
from streams.dispatch import Dispatcher, Lane, Worker
from streams.offsets import OffsetTracker
from streams.partition import Partition, Work
from streams.readiness import Cause, Kind, Readiness, stall_bound_s
from streams.state import StateStore

BOUND_S = 10.0


class Sleeper(Agent[Any]):
    name, version = "sleeper", "1"
    consumes, emits = (TaskSubmitted,), ()

    async def handle(self, event: Any, ctx: Any) -> None:
        pass


@dataclass
class Shown:
    """What a processor shows of itself."""

    name: str = "magnatronic.sleeper-host-0"
    binding: Binding = field(default_factory=lambda: Binding(Sleeper(), ("tasks.normal",), concurrency=4))
    joined: bool = True
    restoring: list[tuple[str, int]] = field(default_factory=list)
    trouble: str = ""
    partitions: list[Partition] = field(default_factory=list)
    workers: list[Worker[Work]] = field(default_factory=list)


def partition(number: int = 0) -> Partition:
    return Partition("tasks.normal", number, OffsetTracker(5), StateStore(None, {}), "changelog", Restored())


def work(owner: Partition, offset: int, lane: str) -> Work:
    """A fetched event, in its lane."""
    assert owner.tracker.begin(offset)
    record = Record(owner.topic, owner.number, offset, 0, lane.encode(), b"", ())
    made = Work(owner, record, 0.0)
    event = TaskSubmitted(task_id=lane, objective="sleep")
    made.envelope, made.lane = (
        Envelope(event, Metadata(f"id-{offset}", "/clients/x", lane, datetime(2030, 1, 1, tzinfo=UTC))),
        lane,
    )
    owner.lanes.setdefault(lane, Lane(lane)).items.append(made)
    return made


def run(shown: Shown, made: Work, since: float = 0.0) -> None:
    """A handler takes the event up."""
    made.partition.lanes[made.lane].items.remove(made)
    worker: Worker[Work] = Worker()
    worker.item, worker.since = made, since
    shown.workers.append(worker)


@pytest.fixture
def shown() -> Shown:
    return Shown(partitions=[partition()])


def stalled(shown: Shown, after_s: float = 95.0) -> Cause:
    """The one cause that is found after ``after_s`` seconds in which nothing moved."""
    readiness = Readiness(shown, stalled_after_s=BOUND_S)
    assert readiness.check(0.0) == ()
    assert readiness.check(BOUND_S - 0.1) == ()
    [cause] = readiness.check(after_s)
    assert readiness.causes == (cause,)
    assert readiness.stalled == cause.message
    return cause


def test_who_has_joined_and_waits_for_nothing_is_ready(shown: Shown) -> None:
    readiness = Readiness(shown, stalled_after_s=BOUND_S)
    for now in (0.0, 1_000.0):
        assert readiness.check(now) == ()
    assert readiness.stalled == ""
    assert readiness.progress[0] == ("tasks.normal", 0, 5, 0, 0.0)


def test_who_has_not_joined_is_not_ready(shown: Shown) -> None:
    shown.joined = False
    readiness = Readiness(shown)
    readiness.check(0.0)
    [cause] = readiness.check(7.0)
    assert cause.kind is Kind.NOT_JOINED
    assert cause.message == "magnatronic.sleeper-host-0 is not in its group magnatronic.sleeper, for 7 s"
    shown.trouble = "the registry is away"
    [cause] = readiness.check(8.0)
    assert cause.message.endswith("for 8 s: the registry is away")
    shown.trouble = ""
    shown.joined = True
    assert readiness.check(8.0) == ()


def test_who_restores_says_which_partitions(shown: Shown) -> None:
    shown.joined = False
    shown.restoring = [("tasks.normal", 3), ("tasks.high", 1)]
    readiness = Readiness(shown)
    readiness.check(0.0)
    causes = readiness.check(2.0)
    assert [(cause.kind, cause.topic, cause.partition, cause.since_s) for cause in causes] == [
        (Kind.RESTORING, "tasks.high", 1, 2.0),
        (Kind.RESTORING, "tasks.normal", 3, 2.0),
    ]


def test_an_aborted_transaction_or_two_do_no_harm_but_many_do(shown: Shown) -> None:
    readiness = Readiness(shown)
    shown.trouble = "1 transactions in a row were aborted: fenced"
    assert readiness.check(0.0) == ()
    shown.trouble = ""
    assert readiness.check(1.0) == ()
    shown.trouble = "40 transactions in a row were aborted: fenced"
    assert readiness.check(2.0) == ()
    [cause] = readiness.check(9.0)
    assert cause.kind is Kind.NOT_COMMITTING
    assert "committed nothing for 7 s: 40 transactions in a row" in cause.message


def test_a_handler_that_runs_for_too_long_is_named(shown: Shown) -> None:
    made = work(shown.partitions[0], 7, "task-a")
    run(shown, made, since=0.5)
    cause = stalled(shown)
    assert (cause.kind, cause.topic, cause.partition, cause.offset) == (Kind.STALLED, "tasks.normal", 0, 7)
    assert (cause.event_type, cause.lane, cause.since_s) == ("TaskSubmitted", "task-a", 95.0)
    assert cause.message == (
        "magnatronic.sleeper-host-0 has not come past tasks.normal[0]@7 (TaskSubmitted, lane task-a) for 95 s: "
        "it runs for 94 s in attempt 1"
    )
    assert cause.as_dict()["offset"] == 7


def test_the_attempt_is_told(shown: Shown) -> None:
    made = work(shown.partitions[0], 7, "task-a")
    made.tried().attempt = 3
    run(shown, made)
    assert stalled(shown).message.endswith("it runs for 95 s in attempt 3")


def test_a_suspect_that_waits_for_its_turn_says_so(shown: Shown) -> None:
    made = work(shown.partitions[0], 7, "task-a")
    run(shown, made)
    made.tried().began = math.inf
    assert "it waits for its turn to run alone" in stalled(shown).message
    made.tried().began = 40.0
    assert stalled(shown).message.endswith("it runs for 55 s in attempt 1")


def test_an_event_behind_another_of_its_lane_names_that_one(shown: Shown) -> None:
    # A parked event's offset is finished, so that it is a later one of its lane that holds the partition.
    owner = shown.partitions[0]
    parked = work(owner, 7, "task-a")
    work(owner, 8, "task-a")
    owner.tracker.checkpoint([7])
    run(shown, parked)
    cause = stalled(shown)
    assert cause.offset == 8
    assert "waits for offset 7 of its lane, which runs for 95 s in attempt 1" in cause.message


async def test_an_event_that_waits_for_its_next_attempt_says_so(shown: Shown) -> None:
    owner = shown.partitions[0]
    first = work(owner, 7, "task-a")
    lane = owner.lanes["task-a"]
    lane.items.clear()
    work(owner, 8, "task-a")
    first.tried().attempt = 2
    first.tried().due = datetime(2030, 1, 1, 12, 30, 5, tzinfo=UTC).timestamp()
    dispatcher: Dispatcher[Work] = Dispatcher(
        lambda _: asyncio.sleep(0), concurrency=4, idle=lambda *_: None, failed=lambda _: None
    )
    dispatcher.hold(lane, first)
    assert stalled(shown).message.endswith("it waits for attempt 2, due at 12:30:05 UTC")
    owner.tracker.checkpoint([7])
    assert "waits for offset 7 of its lane, which waits for attempt 2" in stalled(shown).message


def test_an_event_that_no_handler_is_free_for_says_so(shown: Shown) -> None:
    work(shown.partitions[0], 7, "task-a")
    assert stalled(shown).message.endswith("it waits for one of 4 handlers to be free")


def test_an_event_that_can_t_be_committed_says_why(shown: Shown) -> None:
    owner = shown.partitions[0]
    made = work(owner, 7, "task-a")
    owner.lanes.clear()
    assert made.offset == 7
    owner.uncommitted = 1
    assert stalled(shown).message.endswith("it is finished and waits for its commit")


def test_an_offset_without_an_event_is_no_stall(shown: Shown) -> None:
    # The map of an earlier owner may name offsets that hold a transaction's marker, or nothing any more.
    work(shown.partitions[0], 7, "task-a")
    shown.partitions[0].lanes.clear()
    readiness = Readiness(shown, stalled_after_s=BOUND_S)
    readiness.check(0.0)
    assert readiness.check(95.0) == ()
    assert readiness.progress[0].since_s == 95.0


def test_a_partition_that_moves_is_no_stall_however_long_it_has_work(shown: Shown) -> None:
    owner = shown.partitions[0]
    readiness = Readiness(shown, stalled_after_s=BOUND_S)
    for step in range(50):
        work(owner, 5 + step, f"task-{step}")
        assert readiness.check(step * (BOUND_S - 1)) == ()
        owner.tracker.checkpoint([5 + step])
        owner.lanes.clear()


def test_a_stall_ends_when_the_event_is_done(shown: Shown) -> None:
    owner = shown.partitions[0]
    made = work(owner, 7, "task-a")
    run(shown, made)
    readiness = Readiness(shown, stalled_after_s=BOUND_S)
    readiness.check(0.0)
    assert readiness.check(20.0)
    shown.workers.clear()
    owner.tracker.checkpoint([7])
    assert readiness.check(21.0) == ()
    # Another one is measured from when it came.
    work(owner, 8, "task-a")
    assert readiness.check(22.0) == ()
    assert readiness.check(31.0) == ()
    assert readiness.check(32.5)


def test_each_partition_has_its_own_cause_but_not_hundreds_are_listed() -> None:
    shown = Shown(partitions=[partition(number) for number in range(40)])
    for each in shown.partitions:
        run(shown, work(each, 7, f"task-{each.number}"))
    readiness = Readiness(shown, stalled_after_s=BOUND_S)
    readiness.check(0.0)
    causes = readiness.check(95.0)
    assert [cause.partition for cause in causes] == list(range(8))
    assert len(readiness.progress) == 40


def test_the_bound_grows_with_the_time_limit_of_an_attempt() -> None:
    bound = stall_bound_s(Binding(Sleeper(), ("tasks.normal",), timeout_s=60.0))
    assert bound == 90.0
    assert stall_bound_s(Binding(Sleeper(), ("tasks.normal",), timeout_s=None)) > 60.0
