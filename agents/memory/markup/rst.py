"""reStructuredText into blocks, as far as it matters to what is read."""

import re
from typing import Final

from agents.memory.markup.base import EMPHASIS, ESCAPE, Block, Builder, Kind, dedent

__all__ = ["Rst"]

_RST_UNDERLINE: Final = re.compile(r"^([!-/:-@\[-`{-~])\1{1,}\s*$")
_RST_DIRECTIVE: Final = re.compile(r"^\s*\.\.\s+(?:\|[^|]{1,200}\|\s+)?([A-Za-z][\w:.+-]*?)\s*::(?:\s+(.*))?$")
_RST_ITEM: Final = re.compile(r"^(\s*)(?:[-*+•]|\(?(?:\d{1,4}|#|[a-zA-Z])[.)])\s+(.*)$")
_RST_FIELD: Final = re.compile(r"^\s*:[^:\s][^:]{0,100}:(?:\s|$)")
_RST_ROLE: Final = re.compile(r":[A-Za-z][\w.+:-]{0,60}:`([^`]{1,1000})`")
_RST_LITERAL: Final = re.compile(r"``([^`]+(?:`[^`]+)*?)``")
_RST_LINK: Final = re.compile(r"`([^`<]{1,1000}?)\s*<[^`<>]{0,2000}>`__?")
_RST_REFERENCE: Final = re.compile(r"`([^`]{1,1000})`__?(?!\w)")
_RST_WORD_REFERENCE: Final = re.compile(r"(?<![\w`])([A-Za-z0-9][\w.+-]{0,100}?)__?(?=[\s.,;:!?)\]'\"]|$)")
_RST_SUBSTITUTION: Final = re.compile(r"\|[^|\s][^|\n]{0,100}\|(?:__?)?")
_RST_TABLE_RULE: Final = re.compile(r"^\s*(?:\+[-=+]+\+|=+(?:\s+=+)+)\s*$")
_CODE_DIRECTIVES: Final = frozenset(
    {
        "code",
        "code-block",
        "sourcecode",
        "highlight",
        "parsed-literal",
        "literalinclude",
        "testcode",
        "doctest",
        "prompt",
        "console",
        "ipython",
        "jupyter-execute",
        "math",
    }
)
_DROPPED_DIRECTIVES: Final = frozenset(
    {
        "image",
        "figure",
        "contents",
        "toctree",
        "raw",
        "meta",
        "include",
        "target-notes",
        "sectnum",
        "highlight",
        "role",
        "default-role",
        "unicode",
        "replace",
        "date",
        "index",
        "only",
        "tags",
    }
)


def _clean_rst(text: str) -> str:
    spans: list[str] = []

    def keep(match: re.Match[str]) -> str:
        spans.append(f"`{match[1].strip()}`")
        return f"\x00{len(spans) - 1}\x00"

    text = _RST_LITERAL.sub(keep, text)
    text = _RST_ROLE.sub(lambda match: match[1].partition(" <")[0].lstrip("~!"), text)
    text = _RST_LINK.sub(r"\1", text)
    text = _RST_REFERENCE.sub(r"\1", text)
    text = _RST_SUBSTITUTION.sub("", text)
    text = _RST_WORD_REFERENCE.sub(r"\1", text)
    text = EMPHASIS.sub(lambda match: match[2] or match[0], text)
    text = ESCAPE.sub(r"\1", text)
    return re.sub(r"\x00(\d+)\x00", lambda match: spans[int(match[1])] if int(match[1]) < len(spans) else "", text)


class Rst(Builder):
    """reStructuredText, as far as it matters to what is read."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self._lines = [line.expandtabs(4) for line in text.split("\n")]
        self._levels: list[tuple[str, bool]] = []

    def clean(self, text: str) -> str:
        """See :meth:`Builder.clean`."""
        return _clean_rst(text)

    def read(self) -> list[Block]:
        """The document's blocks."""
        at = 0
        while at < len(self._lines):
            at = self._line(at)
        self.end_paragraph()
        return self.blocks

    def _line(self, at: int) -> int:
        """Read one line, or the block it starts; the next line's number."""
        line = self._lines[at]
        if not line.strip():
            self.end_paragraph()
            return at + 1
        if (after := self._title(at)) is not None:
            return after
        if not self.in_paragraph():
            stripped = line.lstrip()
            if stripped.startswith("..") and (len(stripped) == 2 or stripped[2] == " "):
                return self._directive(at)
            if stripped.startswith(">>>"):
                return self._doctest(at)
            if _RST_TABLE_RULE.match(line):
                return self._table(at)
            if _RST_UNDERLINE.match(line):  # a transition
                return at + 1
        if item := _RST_ITEM.match(line):
            self.end_paragraph()
            self.line(item[2])
            line = item[2]
        elif _RST_FIELD.match(line) and not self.in_paragraph():
            self.line(line.strip().lstrip(":"))
        else:
            self.line(line)
        if line.rstrip().endswith("::"):
            return self._literal(at)
        return at + 1

    def _title(self, at: int) -> int | None:
        """Past the section title that starts here, or None."""
        lines = self._lines
        line = lines[at]
        if self.in_paragraph():
            return None
        if (over := _RST_UNDERLINE.match(line)) and at + 2 < len(lines):
            title, under = lines[at + 1].strip(), _RST_UNDERLINE.match(lines[at + 2])
            if title and under and under[1] == over[1] and len(line.rstrip()) >= len(title):
                self._section(over[1], True, title)
                return at + 3
        if at + 1 < len(lines) and not line.startswith(" ") and not over:
            under = _RST_UNDERLINE.match(lines[at + 1])
            if under and len(lines[at + 1].rstrip()) >= min(len(line.rstrip()), 4):
                self._section(under[1], False, line)
                return at + 2
        return None

    def _section(self, mark: str, overlined: bool, title: str) -> None:
        style = (mark, overlined)
        if style not in self._levels:
            self._levels.append(style)
        self.heading(self._levels.index(style) + 1, _clean_rst(title))

    def _body(self, at: int, margin: int) -> tuple[list[str], int]:
        """The lines from ``at`` that are indented deeper than ``margin``, and the number of the first that is not."""
        body: list[str] = []
        while at < len(self._lines):
            line = self._lines[at]
            if line.strip() and len(line) - len(line.lstrip()) <= margin:
                break
            body.append(line)
            at += 1
        return body, at

    def _directive(self, at: int) -> int:
        line = self._lines[at]
        margin = len(line) - len(line.lstrip())
        found = _RST_DIRECTIVE.match(line)
        name = found[1].lower() if found else ""
        if found and name not in _DROPPED_DIRECTIVES and name not in _CODE_DIRECTIVES:
            # An admonition or a directive of some extension: its words are read, its options are not.
            if found[2]:
                self.line(found[2])
            at += 1
            while at < len(self._lines) and _RST_FIELD.match(self._lines[at]):
                at += 1
            return at
        body, after = self._body(at + 1, margin)
        if name in _CODE_DIRECTIVES:
            while body and (not body[0].strip() or _RST_FIELD.match(body[0])):
                body.pop(0)
            self.add(Kind.CODE, dedent(body))
        return after

    def _literal(self, at: int) -> int:
        """A paragraph that ends with ``::`` and the code block after it."""
        last = self._paragraph[-1].rstrip()
        self._paragraph[-1] = "" if last == "::" else last[:-1]
        margin = len(self._lines[at]) - len(self._lines[at].lstrip())
        self.end_paragraph()
        body, after = self._body(at + 1, margin)
        if body and body[0].strip():  # no blank line between: not a literal block
            return at + 1
        self.add(Kind.CODE, dedent(body))
        return after

    def _doctest(self, at: int) -> int:
        code: list[str] = []
        while at < len(self._lines) and self._lines[at].strip():
            code.append(self._lines[at])
            at += 1
        self.add(Kind.CODE, dedent(code))
        return at

    def _table(self, at: int) -> int:
        rows: list[str] = []
        while at < len(self._lines) and self._lines[at].strip():
            line = self._lines[at]
            if not _RST_TABLE_RULE.match(line):
                cells = re.split(r"\s*\|\s*|\s{2,}", line.strip().strip("|").strip())
                rows.append(" | ".join(_clean_rst(cell) for cell in cells if cell))
            at += 1
        self.add(Kind.TABLE, "\n".join(rows))
        return at
