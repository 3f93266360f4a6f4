"""The report of a what-if as one HTML page: sums, every task in a line, and side by side what differs in each.

In: a :class:`~replay.whatif.run.Report`. Out: a document. Differences are shown of the first so many tasks that have
some; the JSON beside the page has them all.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Final

from replay.page import (
    Html,
    Part,
    Tone,
    badge,
    code,
    columns,
    diff,
    facts,
    figures,
    fold,
    inline,
    link,
    muted,
    page,
    paragraph,
    section,
    table,
)
from replay.whatif.result import Divergence, Side, Status, TaskResult, Totals
from replay.whatif.run import Report

__all__ = ["report_page"]

_SHOWN: Final = 200
"""Tasks shown in full: a browser takes some ten megabytes in its stride, not hundreds."""
_LISTED: Final = 5000
_EACH: Final = 8
"""Differences shown of one task."""
_TONES: Final[Mapping[Status, Tone]] = {
    Status.SAME: "good",
    Status.DIVERGED: "info",
    Status.STOPPED: "warn",
    Status.BUDGET: "warn",
    Status.UNFINISHED: "bad",
    Status.RUNAWAY: "bad",
    Status.LEFT_OUT: "plain",
}


def report_page(report: Report) -> str:
    """The page, UTF-8."""
    told = [result for result in report.results if result.divergences or result.would]
    told.sort(key=lambda result: not result.ended_otherwise)
    parts: list[Part] = [_figures(report.totals), facts(_about(report)), _sums(report.totals), _tasks(report.results)]
    if told:
        parts.append(section("What differs", *(_task(result) for result in told[:_SHOWN])))
    if len(told) > _SHOWN:
        parts.append(paragraph(muted(f"{len(told) - _SHOWN:,} more tasks differ; report.json has them all")))
    return page("What if", *parts, subtitle=", ".join(report.manifest["told"]) or "nothing changed")


def _figures(sums: Totals) -> Html:
    same = sums.by_status.get(Status.SAME, 0)
    return figures(
        [
            ("tasks", sums.tasks),
            ("as recorded", same, "good"),
            ("decided otherwise", sums.decisions_differ, "info" if sums.decisions_differ else "plain"),
            ("ended otherwise", sums.outcomes_differ, "warn" if sums.outcomes_differ else "plain"),
            ("calls made", sums.made),
            ("spent, US$", round(sums.spent_usd, 4)),
        ]
    )


def _about(report: Report) -> dict[str, Part]:
    manifest = report.manifest
    return {
        "id": manifest["id"],
        "asked": manifest["changes"]["ask"] or "nobody",
        "ended early": report.exhausted,
        "left out: not over yet": manifest["open"] or None,
        "calls that would be made": ", ".join(f"{count:,} {name}" for name, count in report.totals.would.items()),
        "calls answered by the record": f"{report.totals.reused:,}, and {report.totals.elsewhere:,} from another place",
    }


def _sums(sums: Totals) -> Html:
    names = {"tokens": "tokens", "cost_usd": "cost, US$", "calls": "model calls", "groundedness": "groundedness, mean"}
    names["latency_ms"] = "submission to outcome, mean ms"
    rows: list[tuple[Part, Part, Part]] = [("completed", sums.completed[0], sums.completed[1])]
    rows += [(shown, sums.before.get(name), sums.after.get(name)) for name, shown in names.items()]
    caption = "Over the tasks that were carried through"
    return table(["", "before", "after"], rows, caption=caption, right=["before", "after"])


def _tasks(results: tuple[TaskResult, ...]) -> Html:
    rows: list[tuple[Part, ...]] = []
    for result in results[:_LISTED]:
        first = result.first
        differs = "" if first is None else f"{first.agent}: {first.kind} ({first.what}{_dotted(first.field)})"
        linked = bool(result.divergences or result.would)
        rows.append(
            (
                link(result.task_id, result.task_id) if linked else result.task_id,
                badge(result.status, _TONES[result.status]),
                differs or result.why,
                result.before.outcome,
                result.after.outcome,
                result.before.groundedness,
                result.after.groundedness,
                result.made,
            )
        )
    names = ["task", "", "first difference", "outcome before", "after", "groundedness before", "after ", "calls made"]
    more = paragraph(muted(f"{len(results) - _LISTED:,} more are in report.json")) if len(results) > _LISTED else ""
    return section("Tasks", table(names, rows), more)


def _task(result: TaskResult) -> Html:
    summary = inline(
        badge(result.status, _TONES[result.status]), result.task_id, muted(result.objective[:120] or result.why)
    )
    return fold(summary, *_told(result), anchor=result.task_id)


def _told(result: TaskResult) -> Iterator[Part]:
    yield columns(_side(result.before), _side(result.after), titles=("before", "after"))
    if result.before.answer != result.after.answer and result.after.outcome:
        yield diff(result.before.answer, result.after.answer)
    for divergence in result.divergences[:_EACH]:
        yield _divergence(divergence)
    if len(result.divergences) > _EACH:
        yield muted(f"{len(result.divergences) - _EACH} more differences are in report.json")
    for would in result.would:
        yield fold(inline(badge(would["would"], "warn"), would["agent"], muted(would["why"])), code(would["request"]))


def _side(side: Side) -> Html:
    about: dict[str, Any] = {
        "outcome": side.outcome,
        "groundedness": side.groundedness,
        "tokens": side.tokens,
        "cost, US$": side.cost_usd,
        "model calls": side.calls,
        "ms": side.latency_ms,
    }
    return facts(about)


def _divergence(found: Divergence) -> Html:
    where = f"{found.agent} on {found.event_type}: {found.kind} ({found.what}{_dotted(found.field)})"
    return fold(where, diff(found.before, found.after), open=True)


def _dotted(field: str) -> str:
    return f".{field}" if field else ""
