"""What stood at a moment, in a form that a terminal, a page and a program can show alike.

In: facts, tables and texts. Out: :class:`Sheet`, its JSON, and its sections on an HTML page.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from replay.details import Cell
from replay.page import Html, Part, code, facts, fold, page, section, table

__all__ = ["Sheet", "SheetTable", "sheet_as_dict", "sheet_page", "sheet_section"]


@dataclass(frozen=True, slots=True)
class SheetTable:
    """A table with its title; shown even when it is empty, where that tells something."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class Sheet:
    """``facts`` are shown where they are not empty; ``texts`` are long ones by their names; ``notes`` are sentences."""

    title: str
    facts: Mapping[str, Cell]
    tables: Sequence[SheetTable] = ()
    texts: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()


def sheet_as_dict(sheet: Sheet) -> dict[str, Any]:
    """The sheet as JSON can hold it: tables by their titles, a dict a row."""
    return {
        "title": sheet.title,
        **{name: _plain(value) for name, value in sheet.facts.items()},
        **{
            each.title: [dict(zip(each.columns, map(_plain, row), strict=True)) for row in each.rows]
            for each in sheet.tables
        },
        **sheet.texts,
        "notes": list(sheet.notes),
    }


def sheet_section(sheet: Sheet) -> Html:
    """The sheet as one section of a page."""
    return section(sheet.title, *_parts(sheet))


def sheet_page(sheet: Sheet, *, subtitle: str = "") -> str:
    """A page of its own."""
    return page(sheet.title, *_parts(sheet), subtitle=subtitle)


def _parts(sheet: Sheet) -> list[Part]:
    tables = [
        table(each.columns, each.rows, caption=each.title) if each.rows else facts({each.title: "none"})
        for each in sheet.tables
    ]
    texts = [fold(name, code(text), open=len(sheet.texts) < 3) for name, text in sheet.texts.items()]
    return [facts(dict(sheet.facts)), *tables, *texts, *sheet.notes]


def _plain(value: Cell) -> Cell:
    return value.isoformat() if isinstance(value, datetime) else value
