"""``magnatronic rebuild``: makes a projection again from the log and switches over, in the process that owns the store.

In: settings, the log and, where it is older than the log, an archive. Out: the report of :mod:`sinks.rebuild` as JSON
can hold it. An embedded store is rebuilt by the process of ``magnatronic up``, which is asked over its socket and can
hold its own sink for the moment of the switch; a server's is rebuilt by the command itself, beside the sinks that feed
it.
"""

import fcntl
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from magnatronic.errors import AlreadyRunningError, WrongInputError
from replay.archive import ArchiveLog
from replay.joined import JoinedLog
from replay.kafka_log import KafkaLog
from replay.log import Batch, Log
from replay.selection import Place, Selection, Span
from schemas.codec import Codec
from sinks.clickhouse import ClickHouse, ClickHouseProjection
from sinks.milvus.shadow import MilvusProjection
from sinks.milvus.store import MilvusStore
from sinks.rebuild import Progress, Rebuild

__all__ = ["STORES", "Options", "Stretches", "discard_store", "only_one", "opened_log", "rebuild_store"]

STORES: Final = ("clickhouse", "milvus")
"""The projections that are stores of their own."""

STATE: Final = "state"
"""What agents keep between events: no store, but changelogs (:mod:`magnatronic.state_rebuild`)."""

Hold = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line asks for: see ``magnatronic rebuild --help``."""

    accept: bool = False
    carry: bool = False
    keep: bool = False
    archive: Path | None = None

    @classmethod
    def of(cls, request: Mapping[str, Any]) -> Self:
        """From a request over the socket."""
        archive = request.get("archive")
        return cls(
            **{name: bool(request.get(name)) for name in ("accept", "carry", "keep")},
            archive=None if archive is None else Path(str(archive)),
        )

    def as_dict(self) -> dict[str, Any]:
        """For a request over the socket."""
        archive = None if self.archive is None else str(self.archive.absolute())
        return {"accept": self.accept, "carry": self.carry, "keep": self.keep, "archive": archive}


class Stretches:
    """A :class:`sinks.rebuild.History` made of a log."""

    def __init__(self, log: Log) -> None:
        self._log = log

    def spans(self, topics: Sequence[str]) -> dict[Place, Span]:
        """What it holds now."""
        return self._log.spans(topics)

    def read(self, spans: Mapping[Place, Span]) -> Iterator[Batch]:
        """Its records."""
        return self._log.read(Selection(spans=spans))


@contextmanager
def opened_log(kafka: Mapping[str, Any], archive: Path | None) -> Iterator[Log]:
    """The log, and before it the archive where one is given.

    Raises:
        ArchiveError: there is no archive, or it is damaged.
    """
    with KafkaLog(kafka) as log:
        yield log if archive is None else JoinedLog(ArchiveLog(archive), log)


Store = ClickHouse | MilvusStore
Opened = ClickHouseProjection | MilvusProjection


def rebuild_store(
    store: Store,
    options: Options,
    *,
    kafka: Mapping[str, Any],
    codec: Codec,
    lock_folder: Path,
    hold: Hold = nullcontext,
    on_progress: Progress = lambda *_: None,
    stopping: threading.Event | None = None,
) -> dict[str, Any]:
    """Rebuild the projection in ``store``; the report as JSON can hold it. ``hold`` holds its sink, where that is here.

    Raises:
        AlreadyRunningError: another process on this machine does so.
        SinkError, LogReadError: it could not be done; run again, it goes on.
    """
    with _projection(store, lock_folder) as projection, opened_log(kafka, options.archive) as log:
        rebuild = Rebuild(
            projection,
            Stretches(log),
            codec,
            hold=hold,
            accept=options.accept,
            carry=options.carry,
            keep=options.keep,
            on_progress=on_progress,
            stopping=stopping,
        )
        return rebuild.run().as_dict()


def discard_store(store: Store, *, lock_folder: Path) -> dict[str, Any]:
    """Drop what an earlier rebuild of ``store`` left unfinished."""
    with _projection(store, lock_folder) as projection:
        projection.discard()
        return {"projection": projection.name, "discarded": True}


@contextmanager
def _projection(store: Store, lock_folder: Path) -> Iterator[Opened]:
    kind = ClickHouseProjection if isinstance(store, ClickHouse) else MilvusProjection
    with only_one(lock_folder, kind.name):
        projection = ClickHouseProjection(store) if isinstance(store, ClickHouse) else MilvusProjection(store)
        try:
            yield projection
        finally:
            projection.close()


@contextmanager
def only_one(folder: Path, name: str) -> Iterator[None]:
    """Hold the lock of rebuilds of ``name``; the kernel frees it when the process ends.

    Raises:
        AlreadyRunningError: another process has it.
        WrongInputError: the folder can't be written.
    """
    path = folder / f"rebuild-{name}.lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise WrongInputError(f"the data folder {folder} can't be used: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise AlreadyRunningError(f"a rebuild of {name} is running already; {path} is held") from None
    try:
        yield
    finally:
        os.close(descriptor)
