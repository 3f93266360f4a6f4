"""Opens history for the commands that read it: the log of the running system, or an archive of it.

In: a data folder, and the folder of an archive where one is given. Out: :class:`History`: a log, and the codec that its
records are read with.
"""

import logging
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from magnatronic.discovery import FoundSystem, find_system, make_codec
from magnatronic.settings import Settings
from replay.archive import ArchiveLog
from replay.kafka_log import KafkaLog
from replay.log import Log
from schemas.codec import Codec
from streams.interpreter import collecting_seldom

__all__ = ["History", "open_history"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class History:
    """An open log and how to read it. ``system`` is the running system that it belongs to, None for an archive: that
    needs none. A context manager that closes the log, and meanwhile has the process collect garbage seldom.
    """

    log: Log
    codec: Codec
    settings: Settings
    system: FoundSystem | None
    _closing: ExitStack = field(default_factory=ExitStack, init=False, repr=False)

    def __enter__(self) -> Self:
        # A record is dozens of objects, which die by themselves. To look for cycles among them takes longer than to
        # read them: 110,000 records/s with the default thresholds, 320,000 with these (docs/benchmarks.md).
        self._closing.enter_context(collecting_seldom())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.close()
        self.log.close()


def open_history(data_dir: Path | None, archive: Path | None = None) -> History:
    """The history in ``archive``, or that of the system which the settings name or which runs on ``data_dir``.

    Raises:
        ArchiveError: there is no archive, or it is damaged.
        NotRunningError: no archive is given, and no system runs there.
        AccessError, ClusterError, SettingsError: as :func:`magnatronic.discovery.find_system`.
    """
    if archive is None:
        found = find_system(data_dir)
        return History(KafkaLog(found.kafka), found.codec(), found.settings, found)
    settings = Settings.load(**({} if data_dir is None else {"data_dir": data_dir}))
    log = ArchiveLog(archive)
    for gap in log.gaps:
        _log.warning(
            "the archive in %s lacks offsets %d to %d of %s/%d: retention had deleted them before they were archived",
            *(archive, gap.start, gap.end, gap.topic, gap.partition),
        )
    return History(log, make_codec(settings), settings, None)
