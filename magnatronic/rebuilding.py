"""Rebuilds within a running system: what the control socket's ``rebuild`` and ``job`` operations do.

In: requests, the process's stores and its live sinks. Out: jobs (:mod:`magnatronic.jobs`), one for each projection.
"""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from magnatronic.errors import WrongInputError
from magnatronic.jobs import Jobs, Tell, Work
from magnatronic.rebuild import STATE, STORES, Options, Store, discard_store, rebuild_store
from magnatronic.roles import AGENT_ROLES, Workbench
from magnatronic.settings import Settings
from magnatronic.state_rebuild import StateRebuild
from schemas.codec import Codec
from sinks.runner import SinkRunner
from streams.runner import Runner

__all__ = ["Rebuilds", "rebuild_state"]


class Rebuilds:
    """Rebuilds what ``workbench`` has made and ``sinks``, by role, feed, and the state of ``agents``, who hold
    ``slot``.
    """

    def __init__(
        self,
        workbench: Workbench,
        sinks: Mapping[str, SinkRunner],
        kafka: Callable[[], Mapping[str, Any]],
        codec: Codec,
        agents: Runner,
        slot: str,
    ) -> None:
        self.jobs = Jobs()
        self._workbench = workbench
        self._sinks = sinks
        self._kafka = kafka
        self._codec = codec
        self._agents = agents
        self._slot = slot

    def operations(self) -> dict[str, Callable[[Mapping[str, Any]], Awaitable[Any]]]:
        """For the control server: ``rebuild`` begins one or joins the one that runs, ``job`` tells how it stands."""
        return {"rebuild": self._begin, "job": self._job}

    async def _begin(self, request: Mapping[str, Any]) -> dict[str, Any]:
        projection = str(request.get("projection"))
        options = Options.of(request)
        if projection == STATE:
            work = self._state(_agents_named(request.get("agents")), options)
        elif projection not in STORES:
            raise WrongInputError(
                f"there is no projection {projection!r}; choose one of: {', '.join((*STORES, STATE))}"
            )
        else:
            work = self._discard(projection) if request.get("discard") else self._rebuild(projection, options)
        arguments = {**options.as_dict(), "agents": list(request.get("agents") or ())}
        return self.jobs.begin(f"rebuild {projection}", arguments, work).as_dict()

    async def _job(self, request: Mapping[str, Any]) -> dict[str, Any]:
        job = self.jobs.get(str(request.get("job")))
        if job is None:
            raise WrongInputError(f"there is no job {request.get('job')!r}; was the system started again since?")
        return job.as_dict()

    def _store(self, projection: str) -> Store:
        return self._workbench.clickhouse() if projection == "clickhouse" else self._workbench.milvus()

    def _rebuild(self, projection: str, options: Options) -> Work:
        def work(tell: Tell, stopping: threading.Event) -> dict[str, Any]:
            return rebuild_store(
                self._store(projection),
                options,
                kafka=self._kafka(),
                codec=self._codec,
                lock_folder=self._workbench.settings.data_dir,
                hold=self._sinks[f"sink-{projection}"].between_batches,
                on_progress=tell,
                stopping=stopping,
            )

        return work

    def _discard(self, projection: str) -> Work:
        def work(_: Tell, __: threading.Event) -> dict[str, Any]:
            return discard_store(self._store(projection), lock_folder=self._workbench.settings.data_dir)

        return work

    def _state(self, agents: Sequence[str], options: Options) -> Work:
        loop = asyncio.get_running_loop()

        @contextmanager
        def rest(agent: str) -> Iterator[None]:
            resting = self._agents.resting(agent)
            asyncio.run_coroutine_threadsafe(resting.__aenter__(), loop).result()
            try:
                yield
            finally:
                asyncio.run_coroutine_threadsafe(resting.__aexit__(None, None, None), loop).result()

        def work(tell: Tell, stopping: threading.Event) -> dict[str, Any]:
            reports = [
                StateRebuild(
                    binding,
                    options,
                    kafka=self._kafka(),
                    codec=self._codec,
                    lock_folder=self._workbench.settings.data_dir,
                    slot=self._slot,
                    rest=partial(rest, binding.agent.name),
                    on_progress=tell,
                    stopping=stopping,
                ).run()
                for binding in self._workbench.bindings(agents)
            ]
            return _state_report(reports)

        return work


def _agents_named(asked: Any) -> tuple[str, ...]:
    """The agents of a request; all where it names none.

    Raises:
        WrongInputError: there is no such agent.
    """
    names = tuple(map(str, asked or AGENT_ROLES))
    for name in names:
        if name not in AGENT_ROLES:
            raise WrongInputError(f"there is no agent {name!r}; choose of: {', '.join(AGENT_ROLES)}")
    return names


def rebuild_state(
    request: Mapping[str, Any], settings: Settings, kafka: Mapping[str, Any], codec: Codec, tell: Tell
) -> dict[str, Any]:
    """Rebuild the state of the agents of ``request`` here, while none of their processors runs anywhere."""
    workbench = Workbench(settings)
    try:
        bindings = workbench.bindings(_agents_named(request.get("agents")))
        options = Options.of(request)
        return _state_report(
            [
                StateRebuild(
                    binding, options, kafka=kafka, codec=codec, lock_folder=settings.data_dir, on_progress=tell
                ).run()
                for binding in bindings
            ]
        )
    finally:
        workbench.close()


def _state_report(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The reports of all agents as one."""
    return {
        "projection": STATE,
        "switched": all(report["switched"] for report in reports),
        "equal": all(report["equal"] for report in reports),
        "agents": list(reports),
    }
