"""Rebuilds within a running system: what the control socket's ``rebuild`` and ``job`` operations do.

In: requests, the process's stores and its live sinks. Out: jobs (:mod:`magnatronic.jobs`), one for each projection.
"""

import threading
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from magnatronic.errors import WrongInputError
from magnatronic.jobs import Jobs, Tell, Work
from magnatronic.rebuild import STORES, Options, Store, discard_store, rebuild_store
from magnatronic.roles import Workbench
from schemas.codec import Codec
from sinks.runner import SinkRunner

__all__ = ["Rebuilds"]


class Rebuilds:
    """Rebuilds what ``workbench`` has made and ``sinks``, by role, feed."""

    def __init__(
        self,
        workbench: Workbench,
        sinks: Mapping[str, SinkRunner],
        kafka: Callable[[], Mapping[str, Any]],
        codec: Codec,
    ) -> None:
        self.jobs = Jobs()
        self._workbench = workbench
        self._sinks = sinks
        self._kafka = kafka
        self._codec = codec

    def operations(self) -> dict[str, Callable[[Mapping[str, Any]], Awaitable[Any]]]:
        """For the control server: ``rebuild`` begins one or joins the one that runs, ``job`` tells how it stands."""
        return {"rebuild": self._begin, "job": self._job}

    async def _begin(self, request: Mapping[str, Any]) -> dict[str, Any]:
        projection = str(request.get("projection"))
        if projection not in STORES:
            raise WrongInputError(f"there is no projection {projection!r}; choose one of: {', '.join(STORES)}")
        options = Options.of(request)
        work = self._discard(projection) if request.get("discard") else self._rebuild(projection, options)
        return self.jobs.begin(f"rebuild {projection}", options.as_dict(), work).as_dict()

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
