"""One self-contained HTML page: what reports of audits, traces and what-ifs are made of.

In: text and data. Out: a whole document as text, with its style inside and nothing else: no script, no image, no font,
no address that a browser would ask for (a Content-Security-Policy says so too). It follows the reader's light or dark
scheme and prints with all that is folded in view. Everything that is not :class:`Html` is escaped, and characters that
could hide or reorder what is shown are made visible, so that recorded text of any origin can be put in. The same input
gives the same bytes.

>>> html = page(
...     "Audit of task t1",
...     figures([("steps", 12), ("differences", 1)]),
...     section(
...         "Steps",
...         table(["agent", "tokens", "verdict"], [["researcher", 1234, badge("same", "good")]]),
...         fold(inline("researcher", badge("differs", "bad")), diff("a b", "a c", names=("recorded", "decided now"))),
...     ),
...     subtitle="magnatronic replay audit --task t1",
... )
>>> html.startswith("<!doctype html>"), "<script" in html
(True, False)
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from hashlib import sha256
from html import escape
from importlib.resources import files
from typing import Any, Final, Literal

from replay.diff import Change, Piece, side_by_side, unified_diff

__all__ = [
    "Bar",
    "Html",
    "Node",
    "Part",
    "Tone",
    "badge",
    "code",
    "columns",
    "diff",
    "facts",
    "figures",
    "fold",
    "inline",
    "link",
    "muted",
    "page",
    "paragraph",
    "section",
    "shown",
    "strong",
    "table",
    "timeline",
    "tree",
    "unified",
    "visible",
]

Tone = Literal["plain", "good", "warn", "bad", "info"]
"""What a badge, a figure or a bar tells at a glance."""

_HIDDEN: Final = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]"
)
"""Control characters, directions, invisible characters, lone surrogates."""


class Html(str):
    """Markup that is escaped already; only this module makes it."""

    __slots__ = ()


Part = Html | str | int | float | bool | datetime | None
"""What can be put on a page; all but :class:`Html` is text, escaped."""


@dataclass(frozen=True, slots=True)
class Node:
    """One place in a tree: what its line says, what opens below the line, and its children."""

    summary: Part
    body: Sequence[Part] = ()
    children: "Sequence[Node]" = ()
    open: bool = True


@dataclass(frozen=True, slots=True)
class Bar:
    """One line of a timeline: from ``start`` to ``end``, in any unit; ``note`` stands behind it."""

    label: Part
    start: float
    end: float
    note: str = ""
    tone: Tone = "info"


def page(title: str, *parts: Part, subtitle: Part = "", footer: Part = "") -> str:
    """The whole document, UTF-8; write it to a file that ends in .html."""
    under = f'<p class="sub">{_html(subtitle)}</p>' if subtitle else ""
    last = f"<footer>{_html(footer)}</footer>" if footer else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" '
        f'content="light dark"><title>{_text(title)}</title><style>\n{_style()}</style></head>\n'
        f'<body><header><p class="mark">Magnatronic</p><h1>{_text(title)}</h1>{under}</header>\n'
        f"<main>{_blocks(parts)}</main>{last}</body></html>\n"
    )


def section(title: Part, *parts: Part, anchor: str = "") -> Html:
    """A heading and what belongs to it; ``anchor`` is any text that :func:`link` can lead to."""
    return Html(f"<section{_id(anchor)}><h2>{_html(title)}</h2>{_blocks(parts)}</section>\n")


def link(text: Part, anchor: str) -> Html:
    """A link to the section or fold of this page that has ``anchor``."""
    return Html(f'<a href="#{_anchor(anchor)}">{_html(text)}</a>')


def paragraph(*parts: Part) -> Html:
    """A paragraph, its parts with a space between them; line breaks in text are kept."""
    return Html(f'<p class="text">{_words(parts)}</p>')


def inline(*parts: Part) -> Html:
    """Parts on one line, with a space between them."""
    return Html(_words(parts))


def muted(*parts: Part) -> Html:
    """Parts on one line that matter less."""
    return Html(f'<span class="muted">{_words(parts)}</span>')


def strong(*parts: Part) -> Html:
    """Parts on one line that matter more."""
    return Html(f"<strong>{_words(parts)}</strong>")


def badge(text: Part, tone: Tone = "plain") -> Html:
    """A short word in a coloured field, such as a verdict."""
    return Html(f'<span class="badge {tone}">{_html(text)}</span>')


def facts(pairs: Mapping[str, Part]) -> Html:
    """Names and their values, a line each; empty text and None are left out."""
    rows = "".join(
        f"<dt>{_text(name)}</dt><dd>{_html(value)}</dd>" for name, value in pairs.items() if value not in ("", None)
    )
    return Html(f'<dl class="facts">{rows}</dl>' if rows else "")


def figures(pairs: Iterable[tuple[Part, Part] | tuple[Part, Part, Tone]]) -> Html:
    """A row of figures, large, each with its name below and, if it is to stand out, a tone."""
    cards = []
    for name, value, *tone in pairs:
        kind = f" {tone[0]}" if tone else ""
        cards.append(f'<div class="figure{kind}"><b>{_html(value)}</b><span>{_html(name)}</span></div>')
    return Html(f'<div class="figures">{"".join(cards)}</div>')


def table(
    names: Sequence[Part], rows: Iterable[Sequence[Part]], *, caption: Part = "", right: Iterable[Part] = ()
) -> Html:
    """A table; numbers stand to the right, and so do the columns named in ``right``."""
    to_right = {index for index, name in enumerate(names) if name in set(right)}
    filled = [list(row) for row in rows]
    for index in range(len(names)):
        values = [row[index] for row in filled if row[index] not in ("", None)]
        if values and all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
            to_right.add(index)

    def cell(tag: str, index: int, value: Part) -> str:
        return f"<{tag}{' class=num' if index in to_right else ''}>{_html(value)}</{tag}>"

    head = "".join(cell("th", index, name) for index, name in enumerate(names))
    body = "".join(
        f"<tr>{''.join(cell('td', index, value) for index, value in enumerate(row))}</tr>\n" for row in filled
    )
    title = f"<caption>{_html(caption)}</caption>" if caption else ""
    return Html(
        f'<div class="scroll"><table>{title}<thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>\n'
    )


def fold(summary: Part, *parts: Part, open: bool = False, anchor: str = "") -> Html:
    """A line that opens to show its parts."""
    state = " open" if open else ""
    return Html(
        f"<details{_id(anchor)}{state}><summary>{_html(summary)}</summary>"
        f'<div class="inside">{_blocks(parts)}</div></details>\n'
    )


def tree(nodes: Iterable[Node]) -> Html:
    """Nested lines; a node with a body or children can be folded."""
    return Html(f'<div class="tree">{_nodes(nodes)}</div>\n')


def code(text: str, *, wrap: bool = True) -> Html:
    """Text as it is, in a fixed width; long lines wrap, or scroll where ``wrap`` is false."""
    return Html(f"<pre{'' if wrap else ' class=nowrap'}><code>{_text(text)}</code></pre>")


def columns(*parts: Part, titles: Sequence[Part] = ()) -> Html:
    """Parts side by side, of equal width, below each other where the window is narrow."""
    heads = [f"<h3>{_html(title)}</h3>" for title in titles] or [""] * len(parts)
    cells = (f"<div>{head}{_blocks([part])}</div>" for head, part in zip(heads, parts, strict=True))
    return Html(f'<div class="columns">{"".join(cells)}</div>')


def diff(before: str, after: str, *, names: tuple[str, str] = ("before", "after"), context: int | None = 3) -> Html:
    """Two texts side by side, line by line, what differs marked; ``context`` equal lines around it, None: all."""
    rows = side_by_side(before, after, context=context)
    if not any(row.change not in (Change.SAME, Change.GAP) for row in rows):
        return Html(f'<p class="muted">{_text(names[0])} and {_text(names[1])} are equal</p>')
    lines = []
    for row in rows:
        if row.change is Change.GAP:
            lines.append(f'<tr class="gap"><td colspan="4">{row.skipped:,} equal lines</td></tr>')
            continue
        left = "" if row.change is not Change.CHANGED and row.change is not Change.REMOVED else " class=del"
        right = "" if row.change is not Change.CHANGED and row.change is not Change.ADDED else " class=ins"
        lines.append(
            f"<tr><th>{row.before_number or ''}</th><td{left}>{_pieces(row.before, 'del')}</td>"
            f"<th>{row.after_number or ''}</th><td{right}>{_pieces(row.after, 'ins')}</td></tr>"
        )
    head = f'<th></th><th class="side">{_text(names[0])}</th><th></th><th class="side">{_text(names[1])}</th>'
    body = "\n".join(lines)
    return Html(f'<div class="scroll"><table class="diff"><thead><tr>{head}</tr></thead>\n{body}</table></div>\n')


def unified(before: str, after: str, *, names: tuple[str, str] = ("before", "after"), context: int = 3) -> Html:
    """Two texts as a unified diff, coloured."""
    kinds = {"+": "ins", "-": "del", "@": "hunk"}
    lines = [
        f'<span class="{"hunk" if number < 2 else kinds.get(line[:1], "")}">{_text(line) or " "}</span>'
        for number, line in enumerate(unified_diff(before, after, names=names, context=context).split("\n"))
    ]
    return Html(f'<pre class="unified"><code>{"".join(lines)}</code></pre>')


def timeline(bars: Iterable[Bar], *, unit: str = "s") -> Html:
    """Bars on one axis, in the order given: what ran when, and for how long."""
    drawn = list(bars)
    if not drawn:
        return Html("")
    first, last = min(bar.start for bar in drawn), max(bar.end for bar in drawn)
    scale = 100 / ((last - first) or 1.0)
    rows = []
    for bar in drawn:
        left, width = (bar.start - first) * scale, (bar.end - bar.start) * scale
        rows.append(
            f'<div class="label">{_html(bar.label)}</div><div class="track"><i class="{bar.tone}" '
            f'style="left:{left:.2f}%;width:{width:.2f}%"></i></div><div class="note">{_text(bar.note)}</div>'
        )
    axis = (
        f'<div></div><div class="axis"><span>0</span><span>{shown((last - first) / 2)}</span>'
        f"<span>{shown(last - first)} {_text(unit)}</span></div><div></div>"
    )
    return Html(f'<div class="timeline">{"".join(rows)}{axis}</div>\n')


def shown(value: Part) -> str:
    """A value as text for people: grouped digits, at most four that count behind the point; empty for None."""
    match value:
        case None:
            return ""
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}"
        case float():
            return f"{value:,.0f}" if abs(value) >= 1000 or value == 0 else f"{value:.4g}"
        case datetime():
            return value.isoformat(sep=" ", timespec="milliseconds")
        case _:
            return value


def _html(part: Part) -> str:
    return part if isinstance(part, Html) else _text(shown(part))


def visible(text: str) -> str:
    """``text`` with every character shown that would hide, reorder or control what is shown; for terminals too."""
    return _HIDDEN.sub(_visible, text)


def _text(text: str) -> str:
    return escape(visible(text), quote=True)


def _visible(match: re.Match[str]) -> str:
    code_point = ord(match[0])
    return chr(0x2400 + code_point) if code_point < 0x20 else f"⟨U+{code_point:04X}⟩"


def _words(parts: Iterable[Part]) -> str:
    return " ".join(text for text in map(_html, parts) if text)


def _blocks(parts: Iterable[Part]) -> str:
    return "".join(
        part if isinstance(part, Html) else f'<p class="text">{_html(part)}</p>'
        for part in parts
        if part not in ("", None)
    )


def _nodes(nodes: Iterable[Node]) -> str:
    lines = []
    for node in nodes:
        inside = _blocks(node.body)
        below = _nodes(node.children)
        if not inside and not below:
            lines.append(f"<li><div class=leaf>{_html(node.summary)}</div></li>\n")
            continue
        body = f'<div class="inside">{inside}</div>' if inside else ""
        state = " open" if node.open else ""
        lines.append(f"<li><details{state}><summary>{_html(node.summary)}</summary>{body}{below}</details></li>\n")
    return f"<ul>{''.join(lines)}</ul>" if lines else ""


def _pieces(pieces: Sequence[Piece], tag: str) -> str:
    return "".join(f"<{tag}>{_text(piece.text)}</{tag}>" if piece.changed else _text(piece.text) for piece in pieces)


def _anchor(name: str) -> str:
    return "a" + sha256(name.encode(errors="replace")).hexdigest()[:16]


def _id(anchor: str) -> str:
    return f' id="{_anchor(anchor)}"' if anchor else ""


@cache
def _style() -> Any:
    return files("replay").joinpath("page.css").read_text(encoding="utf-8")
