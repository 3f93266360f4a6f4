"""A trace in the terminal: a tree with an event or decision on each line, then the sums.

In: a :class:`~replay.trace.Trace`. Out: what rich prints. Lines are cut at the terminal's width, and only what tells
most is shown of an event; with ``full`` all of it is, whole.
"""

from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from typing import Final

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text
from rich.tree import Tree

from magnatronic.cli.options import Output
from replay.details import Cell, Detail, call_in_words, details
from replay.history import Entry
from replay.page import shown, visible
from replay.sheet import Sheet
from replay.story import Line, is_unanswered, story
from replay.trace import Decision, Letter, Trace
from replay.trace_page import SUM_COLUMNS, outcome_of, sum_rows, tone_of
from replay.words import duration, error_of, say, shorten
from schemas.events import DeadLetterResolved, Effect

__all__ = ["print_sheet", "print_trace"]

_STYLES: Final = {"good": "green", "warn": "yellow", "bad": "red", "info": "cyan", "plain": "default"}
_ROWS: Final = 3
_CELL: Final = 60
_LINES: Final = 12
_COLUMNS: Final = 4
"""The first ones tell most."""


def print_trace(trace: Trace, out: Output, *, full: bool = False) -> None:
    """The tree, where the time went, and who took what."""
    word, tone = outcome_of(trace)
    out.console.print(
        _said(
            f"{trace.history.kind} {trace.history.id}  ",
            (word, f"bold {_STYLES[tone]}"),
            f" in {duration(trace.wall)}",
            (f"  since {trace.began.astimezone():%Y-%m-%d %H:%M:%S %Z}", "dim"),
        )
    )
    for line in story(trace):
        out.console.print(_tree(trace, line, full))
    if trace.path:
        out.console.print()
        out.table(
            ("the longest way", "from", "to", "waited", "in calls", "handled in"),
            [
                (
                    hop.decision.agent,
                    hop.decision.cause.type,
                    hop.to.type,
                    duration(hop.waited) if hop.waited else "",
                    duration(hop.called) if hop.called else "",
                    duration(hop.other),
                )
                for hop in trace.path
            ],
        )
    out.table(SUM_COLUMNS, sum_rows(trace))


def print_sheet(sheet: Sheet, out: Output, *, full: bool = False) -> None:
    """The facts, the tables and, with ``full`` whole, the texts."""
    out.console.print()
    out.console.print(_said((sheet.title, "bold")))
    for name, value in sheet.facts.items():
        if value not in ("", None):
            out.console.print(_said((f"  {name}: ", "dim"), _cell(value, full)))
    for table in sheet.tables:
        if table.rows:
            rows = [
                [_cell(value, full) if isinstance(value, str | datetime) else value for value in row]
                for row in table.rows
            ]
            out.table(table.columns, rows, title=visible(table.title))
        else:
            out.console.print(_said((f"  {table.title}: ", "dim"), "none"))
    for name, text in sheet.texts.items():
        out.console.print(_said((f"{name}:", "dim")))
        lines = text.splitlines()
        kept = lines if full else lines[:_LINES]
        out.console.print(*(_one_line(_said(f"  {line}")) for line in kept), sep="\n")
        if len(kept) < len(lines):
            out.console.print(_said((f"  and {len(lines) - len(kept)} more lines; --full shows them", "dim")))
    for note in sheet.notes:
        out.console.print(_said((note, "yellow")))


def _cell(value: Cell, full: bool) -> str:
    said = visible(f"{value.astimezone():%Y-%m-%d %H:%M:%S %Z}" if isinstance(value, datetime) else shown(value))
    return said if full else shorten(said, _CELL)


def _tree(trace: Trace, line: Line, full: bool) -> Tree:
    tree = Tree(_label(trace, line, full), guide_style="dim")
    _grow(tree, trace, line.below, full)
    return tree


def _grow(tree: Tree, trace: Trace, lines: Iterable[Line], full: bool) -> None:
    for line in lines:
        _grow(tree.add(_label(trace, line, full)), trace, line.below, full)


def _label(trace: Trace, line: Line, full: bool) -> RenderableType:
    match line.what:
        case Decision() as decision:
            return _one_line(_decision(decision))
        case Letter() as letter:
            return _with_details(_letter(letter), details(letter.letter), full)
        case entry:
            said = _entry(trace, entry)
            return _with_details(said, () if entry.event is None else details(entry.event), full)


def _entry(trace: Trace, entry: Entry) -> Text:
    style = _STYLES[tone_of(entry)]
    if isinstance(entry.event, Effect):
        took = f"  {entry.event.latency_ms:,.0f} ms"
        failed = (f"  failed: {shorten(error_of(entry.event))}", "red") if entry.event.error else ""
        return _said((f"{entry.type} ", style), call_in_words(entry.event), (took, "dim"), failed, _erased(entry))
    said = entry.error if entry.event is None else say(entry.event)
    return _said(
        (f"+{(entry.time - trace.began).total_seconds():.3f} s  ", "dim"),
        (entry.type, f"bold {style}"),
        f"  {said}",
        (f"  sent again for {entry.redriven_for}", "yellow") if entry.redriven_for else "",
        ("  no answer yet", "yellow") if is_unanswered(trace, entry) else "",
        _erased(entry),
    )


def _erased(entry: Entry) -> tuple[str, str]:
    return "  erased" if entry.erased else "", "yellow"


def _decision(decision: Decision) -> Text:
    version = f"@{decision.version}" if decision.version else ""
    figures = []
    if decision.waited is not None:
        figures += [f"waited {duration(decision.waited)}", f"in calls {duration(decision.called)}"]
    if decision.took is not None:
        figures.append(f"took {duration(decision.took)} in all")
    return _said(
        (decision.agent, "bold"),
        (f"{version}  {', '.join(figures)}", "dim"),
        (f"  {decision.attempts} attempts", "yellow") if decision.attempts > 1 else "",
        ("  gave up", "red") if decision.letter is not None else "",
        ("  stopped", "yellow") if decision.cancelled is not None else "",
        ("  not finished", "yellow") if decision.ended is None and not decision.timers else "",
    )


def _letter(letter: Letter) -> Text:
    resolved = [entry.event for entry in letter.resolved if isinstance(entry.event, DeadLetterResolved)]
    became = "".join(f", {each.resolution} by {each.resolved_by}" for each in resolved)
    return _said(("DeadLettered", "bold red"), f"  {say(letter.letter)}", (became, "yellow"))


def _with_details(said: Text, shown_below: Sequence[Detail], full: bool) -> RenderableType:
    chosen = shown_below if full else [detail for detail in shown_below if detail.brief]
    lines = [line for detail in chosen for line in (_whole(detail) if full else _brief(detail))]
    return Group(said if full else _one_line(said), *(Padding(line, (0, 0, 0, 2), expand=False) for line in lines))


def _brief(detail: Detail) -> Iterator[RenderableType]:
    if not detail.columns:
        yield _one_line(_said((f"{detail.name}: ", "dim"), shorten(detail.text, 400)))
        return
    for row in detail.rows[:_ROWS]:
        yield _one_line(_said(("  ".join(_cells(detail.columns, row)), "dim")))
    if len(detail.rows) > _ROWS:
        yield Text(f"and {len(detail.rows) - _ROWS} more", style="dim")


def _cells(names: Sequence[str], row: Sequence[Cell]) -> Iterator[str]:
    for name, value in zip(names[:_COLUMNS], row, strict=False):
        if value not in ("", None):
            said = shorten(shown(value), _CELL)
            yield f"{name} {said}" if isinstance(value, float) else said


def _whole(detail: Detail) -> Iterator[RenderableType]:
    if not detail.columns:
        separator = "\n" if "\n" in detail.text else " "
        yield _said((f"{detail.name}:{separator}", "dim"), detail.text)
        return
    yield Text(f"{detail.name}:", style="dim")
    for row in detail.rows:
        named = (
            (name, shown(value)) for name, value in zip(detail.columns, row, strict=True) if value not in ("", None)
        )
        yield Padding(_said("\n".join(f"{name}: {text}" for name, text in named)), (0, 0, 0, 2), expand=False)


def _one_line(text: Text) -> Text:
    text.no_wrap, text.overflow = True, "ellipsis"
    return text


def _said(*parts: str | tuple[str, str]) -> Text:
    """Parts with their styles. Recorded text does not command the terminal."""
    styled = (part if isinstance(part, tuple) else (part, "") for part in parts)
    return Text.assemble(*((visible(text), style) for text, style in styled))
