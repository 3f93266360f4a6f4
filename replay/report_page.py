"""An audit's report as one self-contained HTML page.

In: an :class:`~replay.report.AuditReport`. Out: the page's text: what was audited and by which code, counts by agent,
each finding with its diff, and the hashes that another person recomputes.
"""

from collections.abc import Iterator, Mapping
from typing import Final

from replay.findings import Finding, Verdict
from replay.page import (
    Html,
    Part,
    Tone,
    badge,
    code,
    facts,
    figures,
    fold,
    inline,
    muted,
    page,
    paragraph,
    section,
    table,
)
from replay.report import AuditReport, selection_as_json

__all__ = ["report_page"]

_TONES: Final[dict[Verdict, Tone]] = {Verdict.DIFFERS: "bad", Verdict.OPEN: "warn", Verdict.ERASED: "info"}


def report_page(report: AuditReport) -> str:
    """The whole document."""
    verdicts = report.verdicts()
    return page(
        "Audit: " + ("no divergence" if report.ok else f"{sum(report.found.values()):,} findings"),
        figures(
            [
                ("steps decided again", report.steps),
                ("outputs compared", report.outputs),
                ("findings", sum(report.found.values()), "good" if report.ok else "bad"),
                *(_figure(name, count) for name, count in verdicts.items()),
            ]
        ),
        section("Findings", *_findings(report)),
        section("Agents", _agents(report)),
        section("What was audited", _facts(report)),
        section(
            "How to verify it",
            paragraph(
                "Save the report as JSON (--report FILE) and run: magnatronic replay verify FILE. It reads the spans "
                "below again, recomputes their hashes and the digests, decides every step anew, and says what agrees."
            ),
            fold("Hashes of what was read", _spans(report)),
        ),
        subtitle=inline("audited", report.started.isoformat(timespec="seconds"), f"from {report.source or 'a log'}"),
        footer=muted("Recorded text is shown as it was recorded. All of it is escaped."),
    )


def _figure(verdict: str, count: int) -> tuple[Part, Part, Tone]:
    return f"steps {verdict}", count, _TONES.get(Verdict(verdict), "plain")


def _by_count(found: Mapping[str, int]) -> list[list[Part]]:
    return [[kind, count] for kind, count in sorted(found.items(), key=lambda item: -item[1])]


def _findings(report: AuditReport) -> Iterator[Part]:
    if report.ok:
        yield paragraph("Every step decides as recorded, twice, by nothing but its event, state and effects.")
        return
    yield table(["what is wrong", "how often"], _by_count(report.found))
    for finding in report.findings:
        yield fold(_line(finding), *_details(finding), open=len(report.findings) == 1)
    if (more := sum(report.found.values()) - len(report.findings)) > 0:
        yield paragraph(f"and {more:,} more")


def _line(finding: Finding) -> Html:
    return inline(badge(finding.kind.value, "bad"), finding.agent, finding.event_type, finding.place, finding.field)


def _details(finding: Finding) -> Iterator[Html]:
    yield facts(
        {
            "agent": finding.agent,
            "event": f"{finding.event_type} {finding.event_id}",
            "place": finding.place,
            "field": finding.field,
            "what": finding.message,
        }
    )
    if finding.diff:
        yield code(finding.diff)


def _agents(report: AuditReport) -> Html:
    names = [verdict for verdict in Verdict if verdict.value in report.verdicts()]
    rows: list[list[Part]] = [
        [
            agent,
            report.code.agents.get(agent, ""),
            counts.total,
            *(counts.steps.get(verdict.value, 0) for verdict in names),
            counts.outputs,
            counts.effects,
        ]
        for agent, counts in sorted(report.counts.items())
    ]
    return table(["agent", "version here", "steps", *(verdict.value for verdict in names), "outputs", "effects"], rows)


def _facts(report: AuditReport) -> Html:
    selected = ", ".join(f"{name}: {value}" for name, value in selection_as_json(report.selection).items())
    return facts(
        {
            "selected": selected or "all steps",
            "not known here, not audited": ", ".join(f"{agent} ({count:,})" for agent, count in report.others.items()),
            "records read": f"{report.events:,} in {report.groups:,} groups",
            "took": f"{report.seconds:.1f} s, of which reading {report.reading_s:.1f} s",
            "digest of recorded outputs": report.digest,
            "digest of outputs decided again": report.decided_digest,
            "Magnatronic": report.code.package,
            "git commit": report.code.commit,
            "SHA-256 of the agents' sources": report.code.sources,
        }
    )


def _spans(report: AuditReport) -> Html:
    return table(
        ["topic", "partition", "from", "to", "records", "SHA-256 over them"],
        [
            [span.topic, span.partition, span.start, span.end, span.records, span.sha256]
            for span in report.spans
            if span.end > span.start
        ],
    )
