"""The guard: each way out of a handler is found and named, what is clean passes, and all is put back at the end."""

import asyncio
import builtins
import ctypes
import datetime as datetime_module
import logging
import os
import random
import secrets
import socket
import sqlite3
import subprocess
import tempfile
import threading
import time
import urllib.request
import uuid
from collections.abc import Callable
from datetime import UTC, date, datetime
from pathlib import Path
from random import choice
from time import time as bound_time
from typing import Any
from uuid import uuid4

import numpy as np
import pytest

from agents.agent import Agent
from agents.context import Context
from agents.errors import NondeterminismError
from replay.decide import Decided, FindingKind, Station, redecide
from replay.guard import Guard
from schemas.codec import Codec
from schemas.events import PlanProposed, TaskSubmitted
from schemas.metadata import Envelope, Metadata
from schemas.record import Record

CODEC = Codec()
AT = datetime(2026, 1, 1, tzinfo=UTC)


def imports_datetime() -> str:
    from datetime import datetime as imported

    return imported.now(UTC).isoformat()


def reads(path: str = "/etc/hostname") -> str:
    with open(path) as file:
        return file.read()


def connects() -> str:
    with socket.create_connection(("127.0.0.1", 9), timeout=0.1):
        return "connected"


def catches() -> str:
    try:
        return connects()
    except NondeterminismError:
        return "not connected"


class Curious(Agent[Any]):
    """Says what its ``look`` gives it."""

    name, version = "curious", "1"
    consumes = (TaskSubmitted,)
    emits = (PlanProposed,)

    def __init__(self, look: Callable[[], Any]) -> None:
        self.look = look

    async def handle(self, event: TaskSubmitted, ctx: Context[Any]) -> None:
        ctx.emit(PlanProposed(task_id=event.task_id, objective="why", steps=(), rationale=str(self.look())))


class Concurrent(Curious):
    """Looks in a task of its own."""

    async def handle(self, event: TaskSubmitted, ctx: Context[Any]) -> None:
        async def look() -> str:
            await asyncio.sleep(1)
            return str(self.look())

        said, _ = await asyncio.gather(look(), asyncio.sleep(2))
        ctx.emit(PlanProposed(task_id=event.task_id, objective="why", steps=(), rationale=said))


async def decide(agent: Agent[Any]) -> Decided:
    metadata = Metadata("submission", "/clients/test", "t1", AT, correlation_id="t1")
    envelope = Envelope(TaskSubmitted(task_id="t1", objective="why"), metadata)
    value, headers = CODEC.encode(envelope.event, metadata)
    record = Record("tasks.normal", 2, 7, 1_767_225_600_000, b"t1", value, headers)
    return await redecide([(record, envelope)], stations=[Station(agent, frozenset({record.topic}))], codec=CODEC)


CLOCKS: list[Callable[[], Any]] = [
    lambda: time.time(),
    lambda: time.time_ns(),
    lambda: time.monotonic(),
    lambda: time.perf_counter_ns(),
    lambda: time.localtime(),
    lambda: time.ctime(),
    lambda: time.strftime("%Y-%m-%d %H:%M"),
    lambda: bound_time(),
    lambda: time.time(),
    lambda: datetime.now(UTC),
    lambda: datetime.now(),
    lambda: datetime.utcnow(),
    lambda: datetime_module.datetime.now(),
    lambda: date.today(),
    imports_datetime,
    lambda: time.clock_gettime(time.CLOCK_REALTIME),
]
RANDOM: list[Callable[[], Any]] = [
    lambda: random.random(),
    lambda: choice(range(10**9)),
    lambda: random.Random().random(),
    lambda: random.SystemRandom().random(),
    lambda: secrets.token_hex(),
    lambda: secrets.randbelow(10**9),
    lambda: os.urandom(8).hex(),
    lambda: uuid4(),
    lambda: uuid.uuid1(),
    lambda: np.random.rand(),
    lambda: np.random.default_rng().random(),
]


@pytest.mark.parametrize("look", CLOCKS)
async def test_a_handler_that_reads_a_clock_is_named_with_the_field_that_the_time_reaches(
    look: Callable[[], Any],
) -> None:
    decided = await decide(Curious(lambda: look()))
    named = [finding for finding in decided.findings if finding.kind is FindingKind.CLOCK]
    assert named
    assert {finding.field for finding in named} == {"rationale"}
    assert (named[0].agent, named[0].event_id, named[0].place) == ("curious", "submission", "tasks.normal[2]@7")
    assert "test_replay_guard" in named[0].message
    assert named[0].diff.startswith("rationale:\n")


@pytest.mark.parametrize("look", RANDOM)
async def test_a_handler_that_draws_random_numbers_is_named(look: Callable[[], Any]) -> None:
    decided = await decide(Curious(look))
    named = [finding for finding in decided.findings if finding.kind is FindingKind.RANDOMNESS]
    assert named
    assert {finding.field for finding in named} == {"rationale"}


@pytest.mark.parametrize(
    ("look", "kind", "what"),
    [
        (connects, FindingKind.NETWORK, "socket."),
        (lambda: urllib.request.urlopen("http://127.0.0.1:9/"), FindingKind.NETWORK, "urllib.Request"),
        (lambda: socket.gethostbyname("localhost"), FindingKind.NETWORK, "socket.gethostbyname"),
        (reads, FindingKind.FILE, "open"),
        (lambda: Path("/etc/hostname").read_text(), FindingKind.FILE, "open"),
        (lambda: os.listdir("/"), FindingKind.FILE, "os.listdir"),
        (lambda: sqlite3.connect(":memory:"), FindingKind.FILE, "sqlite3.connect"),
        (lambda: subprocess.run(["true"], check=True), FindingKind.PROCESS, "subprocess.Popen"),
        (lambda: os.system("true"), FindingKind.PROCESS, "os.system"),
        (lambda: os.fork(), FindingKind.PROCESS, "os.fork"),
        (lambda: ctypes.CDLL(None), FindingKind.PROCESS, "ctypes.dlopen"),
        (lambda: time.sleep(0.001), FindingKind.CLOCK, "time.sleep"),
        (lambda: threading.Thread(target=print).start(), FindingKind.THREAD, "start_new_thread"),
    ],
)
async def test_a_handler_that_reaches_outside_is_stopped_and_named(
    look: Callable[[], Any], kind: FindingKind, what: str
) -> None:
    decided = await decide(Curious(look))
    (finding,) = decided.findings
    assert finding.kind is kind
    assert what in finding.message
    assert "test_replay_guard" in finding.message
    assert decided.steps[0].result is None


async def test_a_handler_that_catches_what_stops_it_is_named_all_the_same() -> None:
    decided = await decide(Curious(catches))
    assert {finding.kind for finding in decided.findings} == {FindingKind.NETWORK}


async def test_temporary_files_are_randomness_and_files() -> None:
    decided = await decide(Curious(lambda: tempfile.mkdtemp()))
    assert FindingKind.FILE in {finding.kind for finding in decided.findings}


async def test_what_a_handlers_own_tasks_use_is_found() -> None:
    decided = await decide(Concurrent(lambda: time.time()))
    assert FindingKind.CLOCK in {finding.kind for finding in decided.findings}
    assert FindingKind.NETWORK in {finding.kind for finding in (await decide(Concurrent(connects))).findings}


def harmless() -> str:
    """What a handler may do: log, compute with times and seeded numbers, import what was not loaded."""
    import colorsys

    logging.getLogger("curious").warning("looked at %s", colorsys.__name__)
    later = datetime.fromisoformat("2026-01-02T03:04:05+00:00")
    assert isinstance(later, datetime)
    assert isinstance(later.date(), date)
    assert datetime(2026, 1, 1) < datetime(2026, 1, 2)
    drawn = random.Random("seed").random(), np.random.default_rng(7).random()
    named = uuid.uuid5(uuid.NAMESPACE_DNS, "x")
    return f"{later} {datetime.fromtimestamp(0, UTC)} {time.gmtime(0).tm_year} {drawn} {named}"


@pytest.mark.parametrize("kind", [Curious, Concurrent])
async def test_what_a_handler_may_do_is_no_finding(kind: type[Curious]) -> None:
    import sys

    sys.modules.pop("colorsys", None)
    decided = await decide(kind(harmless))
    assert decided.findings == ()
    assert decided.steps[0].result is None or decided.steps[0].result.outputs


def test_other_threads_and_code_outside_handlers_are_left_alone(tmp_path: Path) -> None:
    guard = Guard([Curious(reads)])
    with guard.installed():
        guard.begin(second=True)
        now = time.time()
        assert abs(datetime.now(UTC).timestamp() - now) < 5
        thread = threading.Thread(target=lambda: (tmp_path / "file").write_text("x"))
        thread.start()
        thread.join()
        assert uuid4() != uuid4()
        assert guard.end() == ()
    assert (tmp_path / "file").read_text() == "x"


def test_all_is_put_back() -> None:
    names = [(time, "time"), (random, "random"), (os, "urandom"), (uuid, "uuid4"), (builtins, "__import__")]
    before = [getattr(target, name) for target, name in names]
    seed, own = random.Random.seed, (datetime, date, bound_time, uuid4, choice, np.random.rand)
    guard = Guard([Curious(reads)])
    with guard.installed(), guard.installed():
        assert datetime is not own[0]
        assert bound_time is not own[2]
    assert [getattr(target, name) for target, name in names] == before
    assert random.Random.seed is seed
    assert (datetime, date, bound_time, uuid4, choice, np.random.rand) == own
