"""Audits of the running system's log, or of an archive: what the commands and the demo run.

In: an open :class:`~magnatronic.histories.History`, and what is meant. Out: the report. What the agents have finished
is asked for first, and then the log is given time to show all that was written by then: a transaction that is open
beside a finished step's holds back the end of what can be read.
"""

import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Final

from confluent_kafka import IsolationLevel, TopicPartition
from confluent_kafka.admin import AdminClient, OffsetSpec

from magnatronic.errors import ClusterError
from magnatronic.finished import finished_offsets
from magnatronic.histories import History
from magnatronic.stations import stations
from replay.archive import ArchiveLog
from replay.audit import Agreement, audit, verify
from replay.log import Log
from replay.report import AuditReport
from replay.selection import Place, Selection, Span
from replay.stretch import Progress, Scope

__all__ = ["audit_history", "settled_spans", "verify_report"]

_TIMEOUT_S: Final = 10.0
_SETTLE_S: Final = 30.0
_POLL_S: Final = 0.1


def audit_history(
    history: History,
    selection: Selection,
    *,
    folder: Path | None = None,
    jobs: int = 1,
    on_progress: Progress | None = None,
) -> AuditReport:
    """Audit what ``selection`` means of ``history``; ``folder`` is where records are spooled, and
    ``jobs`` processes decide.

    Raises:
        LogReadError: the log can't be read.
        ClusterError: the cluster does not answer.
    """
    deciding = stations(history.settings)
    topics = Scope(selection, deciding).topics()
    if history.system is None:
        assert isinstance(history.log, ArchiveLog)
        finished, spans, source = history.log.handled(), history.log.spans(sorted(topics)), "an archive"
    else:
        kafka = history.system.kafka
        finished = finished_offsets(kafka, [station.agent.name for station in deciding])
        spans, source = settled_spans(history.log, kafka, topics), str(kafka.get("bootstrap.servers", ""))
    return audit(
        history.log,
        stations=deciding,
        codec=history.codec,
        finished=finished,
        selection=selection,
        spans=spans,
        source=source,
        folder=folder,
        jobs=jobs,
        on_progress=on_progress,
    )


def verify_report(
    history: History,
    report: AuditReport,
    *,
    folder: Path | None = None,
    jobs: int = 1,
    on_progress: Progress | None = None,
) -> Agreement:
    """Read again what ``report`` names, and say what of it agrees.

    Raises:
        LogReadError: the log can't be read, or no longer holds all of it.
    """
    return verify(
        report,
        history.log,
        stations=stations(history.settings),
        codec=history.codec,
        folder=folder,
        jobs=jobs,
        on_progress=on_progress,
    )


def settled_spans(log: Log, kafka: Mapping[str, Any], topics: Collection[str]) -> dict[Place, Span]:
    """The spans of ``topics``, once they hold all that was written when this is called.

    Raises:
        ClusterError: a transaction stays open.
    """
    spans = log.spans(sorted(topics))
    admin = AdminClient({"log_level": 2, **kafka})  # held, as what it was asked is answered only while it lives
    asked = admin.list_offsets(
        {TopicPartition(*place): OffsetSpec.latest() for place in spans},
        isolation_level=IsolationLevel.READ_UNCOMMITTED,
        request_timeout=_TIMEOUT_S,
    )
    written = {(each.topic, each.partition): future.result().offset for each, future in asked.items()}
    deadline = time.monotonic() + _SETTLE_S
    while behind := [place for place, (_, end) in spans.items() if end < written[place]]:
        if time.monotonic() > deadline:
            topic, partition = behind[0]
            raise ClusterError(
                f"{topic}[{partition}] has had an open transaction for {_SETTLE_S:g} s; its end can't be read yet. "
                "Try again when whoever holds it has ended, or audit up to an earlier time with --until"
            )
        time.sleep(_POLL_S)
        spans = log.spans(sorted(topics))
    return spans
