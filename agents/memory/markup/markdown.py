"""Markdown into blocks: CommonMark and GitHub's tables, as far as it matters to what is read."""

import re
from html import unescape
from typing import Final

from agents.memory.markup.base import EMPHASIS, ESCAPE, WORD, Block, Builder, Kind, dedent

__all__ = ["Markdown"]

_CODE_SPAN: Final = re.compile(r"(`{1,3})([^`\n]+(?:\n[^`\n]+)?)\1")
_MD_IMAGE: Final = re.compile(
    r"!\[[^\[\]]{0,500}\](?:\([^()\s]{0,2000}(?:\s+\"[^\"]{0,300}\")?\s*\)|\[[^\[\]]{0,200}\])?"
)
_MD_LINK: Final = re.compile(
    r"\[([^\[\]]{0,1000})\](?:\(<?[^()\s]{0,2000}(?:\([^()\s]{0,500}\)[^()\s]{0,500})?>?"
    r"(?:\s+(?:\"[^\"]{0,300}\"|'[^']{0,300}'))?\s*\)|\[[^\[\]]{0,200}\])"
)
_MD_DEFINITION: Final = re.compile(r"^ {0,3}\[[^\]]{1,200}\]:\s*\S")
_TAG: Final = re.compile(r"</?[A-Za-z][A-Za-z0-9-]{0,20}(?:\s[^<>]{0,2000})?/?>")
_AUTOLINK: Final = re.compile(r"<((?:https?|mailto):[^<>\s]{1,2000})>")


def _clean_markdown(text: str) -> str:
    """Inline Markdown to what is read. Code spans keep their backquotes and their content."""
    spans: list[str] = []

    def keep(match: re.Match[str]) -> str:
        spans.append(f"`{match[2].strip()}`")
        return f"\x00{len(spans) - 1}\x00"

    text = _CODE_SPAN.sub(keep, text)
    text = _MD_IMAGE.sub("", text)
    for _ in range(2):  # a badge is an image in a link: a link of nothing is left
        text = _MD_LINK.sub(r"\1", text)
    text = _AUTOLINK.sub(r"\1", text)
    text = _TAG.sub(" ", text)
    text = EMPHASIS.sub(lambda match: match[2] or match[4], text)
    text = unescape(ESCAPE.sub(r"\1", text))
    return re.sub(r"\x00(\d+)\x00", lambda match: spans[int(match[1])] if int(match[1]) < len(spans) else "", text)


_FENCE: Final = re.compile(r"^\s{0,12}(?:[-*+]\s+)?(`{3,}|~{3,})([^`]*)$")
_ATX: Final = re.compile(r"^ {0,3}(#{1,6})(?:\s+(.*?))?(?:\s+#+)?\s*$")
_SETEXT: Final = re.compile(r"^ {0,3}(=+|-+)\s*$")
_RULE: Final = re.compile(r"^ {0,3}(?:(?:\*\s*){3,}|(?:-\s*){3,}|(?:_\s*){3,})$")
_ITEM: Final = re.compile(r"^(\s*)(?:[-*+]|\d{1,9}[.)])\s+(.*)$")
_QUOTE: Final = re.compile(r"^ {0,3}>\s?")
_HTML_HEADING: Final = re.compile(r"^\s*<h([1-6])\b[^<>]{0,500}>(.{0,1000}?)</h\1\s*>\s*$", re.IGNORECASE)
_TABLE_RULE: Final = re.compile(r"^\s*\|?\s*:?-{2,}:?\s*(?:\|\s*:?-*:?\s*)*$")


class Markdown(Builder):
    """CommonMark and GitHub's tables, as far as it matters to what is read."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self._lines = text.split("\n")
        self._in_list = False

    def clean(self, text: str) -> str:
        """See :meth:`Builder.clean`."""
        return _clean_markdown(text)

    def read(self) -> list[Block]:
        """The document's blocks."""
        lines, at = self._lines, 0
        if lines and lines[0].strip() == "---":  # front matter
            end = next((n for n in range(1, min(len(lines), 200)) if lines[n].strip() in ("---", "...")), 0)
            at = end + 1 if end else 0
        in_comment = False
        while at < len(lines):
            line = lines[at]
            if not in_comment and (fence := _FENCE.match(line)):
                at = self._fenced(at, fence[1])
                continue
            line, in_comment = _without_comments(line, in_comment)
            at = self._line(at, line)
        self.end_paragraph()
        return self.blocks

    def _fenced(self, at: int, fence: str) -> int:
        code: list[str] = []
        at += 1
        closing = re.compile(rf"^\s*{re.escape(fence[0])}{{{len(fence)},}}\s*$")
        while at < len(self._lines) and not closing.match(self._lines[at]):
            code.append(self._lines[at])
            at += 1
        self.add(Kind.CODE, dedent(code))
        return at + 1

    def _line(self, at: int, line: str) -> int:
        """Read one line, or the block it starts; the next line's number."""
        line = _QUOTE.sub("", line)
        if not line.strip():
            self.end_paragraph()
            return at + 1
        if heading := _ATX.match(line):
            self._in_list = False
            self.heading(len(heading[1]), _clean_markdown(heading[2] or ""))
            return at + 1
        if heading := _HTML_HEADING.match(line):
            self._in_list = False
            self.heading(int(heading[1]), _clean_markdown(heading[2]))
            return at + 1
        if self.in_paragraph() and (under := _SETEXT.match(line)):
            *rest, title = self._paragraph
            self._paragraph = rest
            self._in_list = False
            self.heading(1 if under[1][0] == "=" else 2, _clean_markdown(title))
            return at + 1
        if _RULE.match(line):
            self.end_paragraph()
            return at + 1
        if _MD_DEFINITION.match(line) and not self.in_paragraph():
            return at + 1
        if "|" in line and at + 1 < len(self._lines) and _TABLE_RULE.match(self._lines[at + 1]):
            self._in_list = False
            return self._table(at)
        if item := _ITEM.match(line):
            self.end_paragraph()
            self._in_list = True
            self.line(item[2])
            return at + 1
        if not self.in_paragraph():
            if line.startswith(("    ", "\t")) and not self._in_list:
                return self._indented(at)
            if not line.startswith(" "):
                self._in_list = False
        self.line(line)
        return at + 1

    def _indented(self, at: int) -> int:
        code: list[str] = []
        while at < len(self._lines):
            line = self._lines[at]
            if line.strip() and not line.startswith(("    ", "\t")):
                break
            code.append(line.expandtabs(4))
            at += 1
        self.add(Kind.CODE, dedent(code))
        return at

    def _table(self, at: int) -> int:
        rows: list[str] = []
        while at < len(self._lines) and "|" in self._lines[at]:
            line = self._lines[at]
            if not _TABLE_RULE.match(line):
                cells = [" ".join(_clean_markdown(cell).split()) for cell in line.strip().strip("|").split("|")]
                if any(WORD.search(cell) for cell in cells):
                    rows.append(" | ".join(cells))
            at += 1
        self.add(Kind.TABLE, "\n".join(rows))
        return at


def _without_comments(line: str, inside: bool) -> tuple[str, bool]:
    """The line without what lies in ``<!-- -->``, and whether its end lies in one."""
    kept: list[str] = []
    while True:
        if inside:
            _, closed, line = line.partition("-->")
            if not closed:
                return "".join(kept), True
            inside = False
        before, opened, line = line.partition("<!--")
        kept.append(before)
        if not opened:
            return "".join(kept), False
        inside = True
