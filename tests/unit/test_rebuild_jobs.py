"""Jobs of a running system: begun once, asked about until they are over."""

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest

from magnatronic.jobs import Jobs, JobState, Tell


def wait_for(condition: Callable[[], bool]) -> None:
    for _ in range(500):
        if condition():
            return
        threading.Event().wait(0.01)
    raise AssertionError("it did not come")


def test_a_job_tells_how_far_it_is_and_what_came_of_it() -> None:
    jobs, go = Jobs(), threading.Event()

    def work(tell: Tell, _: threading.Event) -> dict[str, Any]:
        tell("reading", 3, 10)
        assert go.wait(5)
        return {"rows": 10}

    job = jobs.begin("rebuild x", {"accept": True}, work)
    assert jobs.begin("rebuild x", {}, work) is job, "one of a name at a time"
    wait_for(lambda: job.as_dict()["done"] == 3)
    assert jobs.running() == [job]
    assert job.as_dict() | {"seconds": 0} == {
        **{"job": "rebuild x", "number": 1, "arguments": {"accept": True}, "state": "running", "phase": "reading"},
        **{"done": 3, "of": 10, "seconds": 0, "result": None, "error": ""},
    }
    go.set()
    wait_for(lambda: job.state is JobState.DONE)
    assert job.as_dict()["result"] == {"rows": 10}
    assert jobs.running() == []
    assert jobs.begin("rebuild x", {}, work) is not job
    assert jobs.get("another") is None


def test_a_job_that_fails_says_why(caplog: pytest.LogCaptureFixture) -> None:
    def work(_: Tell, __: threading.Event) -> dict[str, Any]:
        raise ValueError("the store is away")

    jobs = Jobs()
    job = jobs.begin("x", {}, work)
    wait_for(lambda: job.state is JobState.FAILED)
    assert job.as_dict()["error"] == "the store is away"


def test_stopping_ends_what_runs() -> None:
    def work(_: Tell, stopping: threading.Event) -> dict[str, Any]:
        assert stopping.wait(5)
        return {}

    jobs = Jobs()
    job = jobs.begin("x", {}, work)
    asyncio.run(jobs.stop())
    assert job.state is JobState.DONE
