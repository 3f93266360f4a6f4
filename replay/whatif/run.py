"""Runs a what-if: many tasks side by side, each simulated once, whatever happens in between.

In: a folder, tasks with their records, a fleet, who answers calls. Out: a :class:`Report` over all tasks. A task whose
result is in the folder is not simulated again, a call that is in its journal not made again: a run that was killed goes
on where it was, and ends with what it would have ended with.
"""

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agents.ports import Ports
from replay.errors import UndecidedError
from replay.whatif.answers import Answers
from replay.whatif.budget import Budget, Estimate
from replay.whatif.calls import CallLog
from replay.whatif.changes import Changes
from replay.whatif.fleet import Fleet, Post
from replay.whatif.folder import Folder
from replay.whatif.past import Past
from replay.whatif.result import Status, TaskResult, Totals, totals
from replay.whatif.simulation import Simulation
from schemas.codec import Codec
from schemas.errors import SchemaError
from schemas.events import LlmCalled
from schemas.record import Record

__all__ = ["Report", "Setup", "run"]

_ABREAST = 4
"""Tasks under way for each call that may be: most of a task is not waiting for its own call."""


@dataclass(frozen=True, slots=True)
class Setup:
    """All that a run needs beside the tasks. ``at_once`` bounds the calls under way."""

    changes: Changes
    fleet: Fleet
    posts: Mapping[str, Post]
    ports: Ports
    codec: Codec
    budget: Budget
    estimate: Estimate
    at_once: int = 8


@dataclass(frozen=True, slots=True)
class Report:
    """What came of a what-if. ``manifest`` says what it was; ``results`` are in the tasks' order; ``exhausted`` tells
    which limit of the budget ended it, if one did.
    """

    manifest: Mapping[str, Any]
    results: tuple[TaskResult, ...]
    totals: Totals
    exhausted: str = ""

    @property
    def complete(self) -> bool:
        """Whether every task was carried as far as it goes."""
        return not any(result.status is Status.BUDGET for result in self.results)

    def as_dict(self) -> dict[str, Any]:
        """All of it as JSON can hold it."""
        return {
            "manifest": dict(self.manifest),
            "complete": self.complete,
            "exhausted": self.exhausted,
            "totals": self.totals.as_dict(),
            "tasks": [result.as_dict() for result in self.results],
        }


async def run(
    folder: Folder,
    manifest: Mapping[str, Any],
    tasks: Sequence[str],
    records: Callable[[Sequence[str]], Iterable[tuple[str, list[Record]]]],
    setup: Setup,
    *,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Simulate ``tasks``; ``records`` reads those that are still to be done.

    Raises:
        WhatIfError: the folder can't be used any more.
        LogReadError: the log could not be read.
    """
    found = {task: result for task in tasks if (result := folder.result(task)) is not None}
    left = [task for task in tasks if task not in found]
    on_progress(len(found), len(tasks))
    calls = CallLog(folder.calls, setup.codec)
    try:
        _count(setup.budget, calls)
        answers = Answers(
            setup.changes,
            setup.ports,
            calls,
            setup.budget,
            estimate=setup.estimate,
            run_id=folder.path.name,
            at_once=setup.at_once,
        )
        work = _Work(folder, setup, answers)
        under_way: set[asyncio.Task[TaskResult]] = set()

        async def collect(most: int) -> None:
            while len(under_way) > most:
                done, _ = await asyncio.wait(under_way, return_when=asyncio.FIRST_COMPLETED)
                under_way.difference_update(done)
                for task in done:
                    result = task.result()
                    found[result.task_id] = result
                on_progress(len(found), len(tasks))

        try:
            reading = iter(records(left) if left else ())
            # Calls that are under way are not to wait for the log.
            while (read := await asyncio.to_thread(next, reading, None)) is not None:
                task_id, history = read
                under_way.add(asyncio.create_task(work.task(task_id, history)))
                await collect(setup.at_once * _ABREAST)
            await collect(0)
        finally:
            for task in under_way:
                task.cancel()
            await asyncio.gather(*under_way, return_exceptions=True)
    finally:
        calls.close()
    results = tuple(found[task] for task in tasks)
    return Report(manifest, results, totals(results), setup.budget.exhausted)


def _count(budget: Budget, calls: CallLog) -> None:
    """What earlier runs spent counts."""
    for effect in calls.effects():
        if isinstance(effect, LlmCalled):
            budget.tokens += effect.prompt_tokens + effect.completion_tokens
            budget.usd += effect.cost_usd


class _Work:
    """Simulates one task after another."""

    def __init__(self, folder: Folder, setup: Setup, answers: Answers) -> None:
        self._folder, self._setup, self._answers = folder, setup, answers

    async def task(self, task_id: str, records: Sequence[Record]) -> TaskResult:
        result = await self._simulated(task_id, records)
        if result.status is not Status.BUDGET:
            self._folder.keep(result)
        return result

    async def _simulated(self, task_id: str, records: Sequence[Record]) -> TaskResult:
        setup = self._setup
        try:
            history = [(record, setup.codec.decode(record)) for record in records]
        except SchemaError as error:
            return TaskResult(task_id, Status.LEFT_OUT, why=f"a record of it can't be read: {error}")
        past = Past(task_id, history, setup.fleet.names())
        if why := self._unfit(past):
            return TaskResult(task_id, Status.LEFT_OUT, why=why, digest=past.digest())
        try:
            return await Simulation(past, setup.fleet, setup.posts, self._answers, setup.codec).run()
        except UndecidedError as error:
            return TaskResult(task_id, Status.LEFT_OUT, why=str(error), digest=past.digest())

    def _unfit(self, past: Past) -> str:
        if past.submitted is None:
            return "the log does not hold its submission"
        if past.outcome is None:
            return "it has no outcome yet"
        if past.erased:
            return "personal data in it was erased: what was decided on it can't be decided again"
        if not self._setup.fleet.local and past.personal:
            return "personal data in it is sealed, and its keys are not given to other code"
        return ""
