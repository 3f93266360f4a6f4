"""``magnatronic replay audit`` and ``verify``: prove that the recorded decisions are the ones the code makes.

In: what is meant of the log or an archive, or a report. Out: a summary in the terminal, JSON, and files: the report as
JSON for ``verify``, and as an HTML page. Exit code 0 when all is as recorded, 1 when something is not, 2 for wrong
input.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from magnatronic.cli.history import HistoryOptions, from_option, history_options
from magnatronic.cli.options import Output, common_options
from magnatronic.errors import UnknownTaskError, WrongInputError

if TYPE_CHECKING:
    from replay.audit import Agreement
    from replay.findings import Finding
    from replay.report import AuditReport

__all__ = ["audit", "print_report", "verify"]

_SHOWN: Final = 20
_FILE: Final = click.Path(dir_okay=False, path_type=Path)
_SPOOL_HELP: Final = "Folder for what is read meanwhile, as large as that (default: the system's for temporary files)."
_JOBS: Final = click.option(
    "--jobs", type=click.IntRange(1, 64), default=1, show_default=True, help="Processes that decide side by side."
)


@click.command()
@history_options
@click.option("--report", type=_FILE, help="Write the report as JSON to this file.")
@click.option("--html", type=_FILE, help="Write the report as an HTML page to this file.")
@click.option("--spool", type=click.Path(file_okay=False, exists=True, path_type=Path), help=_SPOOL_HELP)
@_JOBS
@common_options
def audit(
    *,
    history: HistoryOptions,
    report: Path | None,
    html: Path | None,
    spool: Path | None,
    jobs: int,
    data_dir: Path | None,
    out: Output,
) -> int:
    """Decide recorded steps again with the recorded effects, twice, and compare every output byte for byte.

    The options say which steps, by the events that they handled; --agent by whose they are. Without any, all of the log
    is audited. Ends with 0 when every step decides as recorded, with 1 when one does not.
    """
    from magnatronic.audits import audit_history
    from magnatronic.histories import open_history

    with open_history(data_dir, history.archive) as opened, _stages(out) as progress:
        found = audit_history(opened, history.selection, folder=spool, jobs=jobs, on_progress=progress)
    if history.selection.tasks and not found.events:
        named = ", ".join(repr(task) for task in sorted(history.selection.tasks))
        raise UnknownTaskError(f'the log holds no task {named}; `magnatronic query "select * from tasks"` lists them')
    _write(found, report, html)
    if out.as_json:
        out.json(found.as_json())
    else:
        print_report(found, out)
    return 0 if found.ok else 1


@click.command()
@click.argument("report", type=click.Path(dir_okay=False, path_type=Path))
@from_option
@click.option("--spool", type=click.Path(file_okay=False, exists=True, path_type=Path), help=_SPOOL_HELP)
@_JOBS
@common_options
def verify(
    *, report: Path, archive: Path | None, spool: Path | None, jobs: int, data_dir: Path | None, out: Output
) -> int:
    """Read again what REPORT (JSON) names, recompute its hashes and digests, decide anew, and say what agrees.

    Ends with 0 when all agrees, with 1 when something does not. A finding that the report names too agrees.
    """
    from magnatronic.audits import verify_report
    from magnatronic.histories import open_history
    from replay.errors import ReportError
    from replay.report import AuditReport

    try:
        claimed = AuditReport.from_bytes(report.read_bytes())
    except (OSError, ReportError) as error:
        raise WrongInputError(f"{report}: {error}") from None
    with open_history(data_dir, archive) as opened, _stages(out) as progress:
        agreement = verify_report(opened, claimed, folder=spool, jobs=jobs, on_progress=progress)
    if out.as_json:
        again = agreement.again
        out.json({"ok": agreement.ok, "disagrees": agreement.disagrees, "again": again.as_json()})
    else:
        _print_agreement(agreement, out)
    return 0 if agreement.ok else 1


def _nothing(done: int, total: int) -> None:
    """Before the first stage."""


@contextlib.contextmanager
def _stages(out: Output) -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar for each stage, one after another."""
    from magnatronic.cli.progress import show_reading

    with contextlib.ExitStack() as stack:
        stage = ""
        shown: Callable[[int, int], None] = _nothing

        def update(what: str, done: int, total: int) -> None:
            nonlocal stage, shown
            if what != stage:
                stack.close()
                stage, shown = what, stack.enter_context(show_reading(out, what))
            shown(done, total)

        yield update


def _write(found: "AuditReport", report: Path | None, html: Path | None) -> None:
    if report is not None:
        report.write_bytes(found.to_bytes())
    if html is not None:
        from replay.report_page import report_page

        html.write_text(report_page(found), encoding="utf-8")


def print_report(report: "AuditReport", out: Output) -> None:
    """Counts by agent, findings with their diffs, and the digest."""
    verdicts = list(report.verdicts())
    out.table(
        ("agent", "steps", *verdicts, "outputs", "effects"),
        [
            (agent, counts.total, *(counts.steps.get(name, 0) for name in verdicts), counts.outputs, counts.effects)
            for agent, counts in sorted(report.counts.items())
        ],
    )
    for agent, count in report.others.items():
        out.console.print(f"{agent} is not known here: {count:,} of its outputs and effects are not audited")
    for finding in report.findings[:_SHOWN]:
        _print_finding(finding, out)
    if (more := sum(report.found.values()) - min(len(report.findings), _SHOWN)) > 0:
        out.console.print(f"and {more:,} more findings; --report or --html has the first thousand")
    verdict = "every step decides as recorded" if report.ok else "NOT as recorded"
    rate = report.events / report.seconds if report.seconds else 0.0
    out.console.print(
        f"{report.steps:,} steps, {report.outputs:,} outputs: {verdict}. "
        f"{report.events:,} records in {report.seconds:.1f} s ({rate:,.0f} a second)."
    )
    out.console.print(f"Digest {report.digest}", soft_wrap=True)


def _print_finding(finding: "Finding", out: Output) -> None:
    out.console.print(str(finding), markup=False, soft_wrap=True)
    for line in finding.diff.splitlines():
        out.console.print(f"    {line}", markup=False, soft_wrap=True)


def _print_agreement(agreement: "Agreement", out: Output) -> None:
    report, again = agreement.report, agreement.again
    same = sum(
        (mine.records, mine.sha256) == (other.records, other.sha256)
        for mine, other in zip(report.spans, again.spans, strict=True)
    )
    out.console.print(f"hashes of what was read: {same} of {len(report.spans)} partitions agree")
    for name, what in (("digest", "recorded outputs"), ("decided_digest", "outputs decided again")):
        agrees = "agrees" if getattr(report, name) == getattr(again, name) else "DIFFERS"
        out.console.print(f"digest of {what}: {agrees}, {getattr(again, name)}", soft_wrap=True)
    erased = sum(counts.steps.get("erased", 0) for counts in again.counts.values())
    if erased:
        out.console.print(f"{erased:,} steps: erased, hash verified, not re-decided")
    if report.code.sources != again.code.sources:
        out.console.print(f"decided by other sources than the report: {again.code.sources} ({again.code.commit})")
    for line in agreement.disagrees:
        out.console.print(line, markup=False, soft_wrap=True)
    out.console.print("the report is confirmed" if agreement.ok else "the report is NOT confirmed")
