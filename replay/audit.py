"""The audit: every step of a stretch of the log decided again, and held against the record byte for byte.

In: a log (Kafka's or an archive's), the agents with their topics, what they had finished, and what is meant. Out: an
:class:`~replay.report.AuditReport`. The records are spooled to disk by their group and decided part by part, so memory
does not grow with the log. :func:`verify` reads what a report names again, and says what of it agrees.
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

from replay.checks import output_difference
from replay.code_version import code_version
from replay.decide import Deciding
from replay.findings import Finding, FindingKind
from replay.finished import Finished
from replay.log import Log
from replay.parts import Part, decide_parts
from replay.report import AuditReport, Counts
from replay.selection import Place, Selection, Span
from replay.spool import Spool, group_hash, read_part
from replay.steps import Station
from replay.stretch import Progress, Scope, read_stretch
from schemas.codec import Codec, Encoded
from schemas.record import Record

__all__ = ["Agreement", "audit", "verify"]

_ALL: Final = Selection()


def audit(
    log: Log,
    *,
    stations: tuple[Station, ...],
    codec: Codec,
    finished: Mapping[str, Finished] | None = None,
    selection: Selection = _ALL,
    spans: Mapping[Place, Span] | None = None,
    source: str = "",
    folder: Path | None = None,
    jobs: int = 1,
    on_progress: Progress | None = None,
) -> AuditReport:
    """Audit the steps whose inputs ``selection`` takes (its ``agents`` are those who decided).

    ``finished`` is what each agent had finished before the log's ends were asked for: an agent without an entry is
    judged by what it left. ``spans`` is what to read, by default all that the log holds of the topics concerned.
    ``folder`` is where records are spooled, about as many bytes as are read. ``jobs`` processes decide side by side.

    Raises:
        LogReadError: the log can't be read.
    """
    started, clock = datetime.now(UTC), time.monotonic()
    tell: Progress = on_progress or (lambda what, done, total: None)
    scope = Scope(selection, stations)
    if spans is None:
        spans = log.spans(sorted(scope.topics()))
    finished = dict(finished or {})
    deciding = Deciding(stations, codec, finished)
    total = Part()
    digest, decided_digest = sha256(), sha256()
    with Spool(sum(end - start for start, end in spans.values()), folder=folder) as spool:
        hashes = read_stretch(log, spans, scope, codec, spool, tell)
        read = time.monotonic()
        with Spool(spool.items // 100, folder=folder) as loose:
            done = 0

            def decided(events: int) -> None:
                nonlocal done
                done += events
                tell("deciding", done, spool.items)

            for part in decide_parts(spool.parts(), deciding, scope, decided, jobs=jobs):
                digest.update(part.digests)
                decided_digest.update(part.decided_digests)
                _add(total, part)
                for event_id, item in part.loose:
                    loose.add(group_hash(event_id), item)
            for path in loose.parts():
                _reconcile(path, codec, total)
    return AuditReport(
        started=started,
        seconds=time.monotonic() - clock,
        reading_s=read - clock,
        source=source,
        selection=selection,
        code=code_version(station.agent for station in stations),
        spans=hashes,
        finished=finished,
        events=total.events,
        groups=total.groups,
        counts=total.counts,
        digest=digest.hexdigest(),
        decided_digest=decided_digest.hexdigest(),
        findings=total.findings,
        found=dict(total.found),
        others=dict(sorted(total.others.items())),
    )


def _add(total: Part, part: Part) -> None:
    total.events += part.events
    total.groups += part.groups
    total.others += part.others
    for agent, counts in part.counts.items():
        total.counts.setdefault(agent, Counts()).add(counts)
    kept = total.found.copy()
    total.note(part.findings)
    total.found = kept + part.found


def _reconcile(path: Path, codec: Codec, total: Part) -> None:
    """Bring together outputs whose records lie in other groups than their causes."""
    for _, items in read_part(path):
        sent = [item for item in items if item[0] == "sent"]
        strays = [item for item in items if item[0] == "stray"]
        for one, other in zip(sent, strays, strict=False):
            record, encoded = Record(*other[2:9]), Encoded(*one[3:5])
            found = output_difference(codec, one[2], encoded, record)
            if found is not None:
                finding = _finding(one[1])
                total.note([_as_difference(finding, record, *found)])
        for one in sent[len(strays) :]:
            total.note([_finding(one[1])])
        for other in strays[len(sent) :]:
            total.note([_finding(other[1])])


def _finding(flat: tuple[Any, ...]) -> Finding:
    return Finding(FindingKind(flat[0]), *flat[1:])


def _as_difference(missing: Finding, record: Record, field: str, diff: str) -> Finding:
    where = f"{record.topic}[{record.partition}]@{record.offset}"
    return Finding(
        FindingKind.OUTPUT_DIFFERS,
        missing.agent,
        missing.event_id,
        missing.event_type,
        missing.topic,
        missing.partition,
        missing.offset,
        field,
        f"the output at {where} is recorded with another {field}",
        diff,
    )


@dataclass(frozen=True, slots=True)
class Agreement:
    """What of a report another audit of the same stretch confirms. ``disagrees`` says in words what it does not."""

    report: AuditReport
    again: AuditReport
    disagrees: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether all agrees."""
        return not self.disagrees


def verify(
    report: AuditReport,
    log: Log,
    *,
    stations: tuple[Station, ...],
    codec: Codec,
    folder: Path | None = None,
    jobs: int = 1,
    on_progress: Progress | None = None,
) -> Agreement:
    """Read again what ``report`` names, recompute its hashes and digests, and decide anew.

    Raises:
        LogReadError: the log can't be read, or no longer holds all of it.
    """
    again = audit(
        log,
        stations=stations,
        codec=codec,
        finished=report.finished,
        selection=report.selection,
        spans={(span.topic, span.partition): (span.start, span.end) for span in report.spans},
        source=report.source,
        folder=folder,
        jobs=jobs,
        on_progress=on_progress,
    )
    return Agreement(report, again, tuple(_disagreements(report, again)))


def _disagreements(report: AuditReport, again: AuditReport) -> Iterator[str]:
    mine = {(span.topic, span.partition): span for span in again.spans}
    for span in report.spans:
        found = mine[span.topic, span.partition]
        if (found.records, found.sha256) != (span.records, span.sha256):
            yield (
                f"{span.topic}[{span.partition}] from {span.start} to {span.end}: the report has {span.records} "
                f"records with SHA-256 {span.sha256}, the log {found.records} with {found.sha256}"
            )
    for name, what in (("digest", "recorded outputs"), ("decided_digest", "outputs decided again")):
        old, new = getattr(report, name), getattr(again, name)
        if old != new:
            yield f"the digest of {what} is {old} in the report, and {new} now"
    old_counts = {agent: counts.steps for agent, counts in report.counts.items()}
    new_counts = {agent: counts.steps for agent, counts in again.counts.items()}
    for agent in sorted(old_counts.keys() | new_counts.keys()):
        before, now = old_counts.get(agent, {}), new_counts.get(agent, {})
        if _without_erased(before, now) != _without_erased(now, before):
            yield f"{agent}: the report counts {_told(before)}, and this audit {_told(now)}"
    if report.found != again.found and not any(counts.get("erased") for counts in new_counts.values()):
        yield f"the report has findings {_told(report.found)}, and this audit {_told(again.found)}"


def _without_erased(counts: Mapping[str, int], other: Mapping[str, int]) -> Mapping[str, int]:
    """What was erased since then can't be decided again: only the sum has to be the same."""
    if counts.get("erased") == other.get("erased"):
        return counts
    return {"all": sum(counts.values())}


def _told(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items())) or "none"
