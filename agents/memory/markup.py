"""Documents into blocks: what a reader sees of Markdown, reStructuredText, HTML or plain text, section by section.

In: a document's text and media type. Out: blocks in order, each with the path of headings above it, its kind, and its
text without markup. Badges, images, comments, link targets, tables of contents and scripts are left out: they are
noise to a search. Line by line and in linear time, whatever the input: a document is hostile until it is read.
"""

import re
from dataclasses import dataclass
from enum import Enum
from html import unescape
from html.parser import HTMLParser
from typing import Final

__all__ = ["Block", "Kind", "blocks"]


class Kind(Enum):
    """How a block may be cut: prose at sentences, code and tables at lines."""

    PROSE = "prose"
    CODE = "code"
    TABLE = "table"


@dataclass(frozen=True, slots=True)
class Block:
    """A paragraph, list item, piece of code or table. ``path`` holds the headings above it, outermost first."""

    path: tuple[str, ...]
    kind: Kind
    text: str


def blocks(text: str, media_type: str) -> list[Block]:
    """The blocks of a document. A media type that is not known is read as plain text; parameters are ignored.

    >>> [(b.path, b.text) for b in blocks("# Use\\n\\n**Fast** and [safe](x).", "text/markdown")]
    [(('Use',), 'Fast and safe.')]
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\x00", "")
    kind = media_type.partition(";")[0].strip().lower()
    if kind == "text/markdown":
        return _Markdown(text).read()
    if kind in ("text/x-rst", "text/prs.fallenstein.rst"):
        return _Rst(text).read()
    if kind in ("text/html", "application/xhtml+xml"):
        return _html(text)
    return _plain(text)


class _Builder:
    """Collects blocks under headings. ``joiner`` stands between the pieces of a paragraph."""

    joiner = "\n"

    def __init__(self) -> None:
        self.blocks: list[Block] = []
        self._path: list[tuple[int, str]] = []
        self._names: tuple[str, ...] = ()
        self._paragraph: list[str] = []

    def heading(self, level: int, title: str) -> None:
        self.end_paragraph()
        while self._path and self._path[-1][0] >= level:
            self._path.pop()
        title = " ".join(title.split())
        if title:
            self._path.append((level, title))
        self._names = tuple(name for _, name in self._path)

    def add(self, kind: Kind, text: str) -> None:
        self.end_paragraph()
        text = text.strip("\n")
        if text.strip():
            self.blocks.append(Block(self._names, kind, text))

    def line(self, line: str) -> None:
        self._paragraph.append(line)

    def end_paragraph(self) -> None:
        if self._paragraph:
            lines, self._paragraph = self._paragraph, []
            # Before too: patterns with white space in them take quadratic time over long runs of it.
            text = " ".join(self.joiner.join(lines).split())
            text = " ".join(self.clean(text).split())
            if _WORD.search(text):
                self.blocks.append(Block(self._names, Kind.PROSE, text))

    def in_paragraph(self) -> bool:
        return bool(self._paragraph)

    def clean(self, text: str) -> str:
        return text


_WORD: Final = re.compile(r"\w")


def _plain(text: str) -> list[Block]:
    builder = _Builder()
    for line in text.split("\n"):
        if line.strip():
            builder.line(line)
        else:
            builder.end_paragraph()
    builder.end_paragraph()
    return builder.blocks


def _dedent(lines: list[str]) -> str:
    margin = min((len(line) - len(line.lstrip()) for line in lines if line.strip()), default=0)
    return "\n".join(line[margin:].rstrip() for line in lines).strip("\n")


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
_EMPHASIS: Final = re.compile(
    r"(?<![\w*])(\*\*\*|\*\*|\*)(?=\S)([^*\n]{1,500}?)(?<=\S)\1(?!\w)|(?<!\w)(__|_)(?=\S)([^_\n]{1,500}?)(?<=\S)\3(?!\w)"
)
_ESCAPE: Final = re.compile(r"\\([!-/:-@\[-`{-~])")


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
    text = _EMPHASIS.sub(lambda match: match[2] or match[4], text)
    text = unescape(_ESCAPE.sub(r"\1", text))
    return re.sub(r"\x00(\d+)\x00", lambda match: spans[int(match[1])] if int(match[1]) < len(spans) else "", text)


_FENCE: Final = re.compile(r"^\s{0,12}(?:[-*+]\s+)?(`{3,}|~{3,})([^`]*)$")
_ATX: Final = re.compile(r"^ {0,3}(#{1,6})(?:\s+(.*?))?(?:\s+#+)?\s*$")
_SETEXT: Final = re.compile(r"^ {0,3}(=+|-+)\s*$")
_RULE: Final = re.compile(r"^ {0,3}(?:(?:\*\s*){3,}|(?:-\s*){3,}|(?:_\s*){3,})$")
_ITEM: Final = re.compile(r"^(\s*)(?:[-*+]|\d{1,9}[.)])\s+(.*)$")
_QUOTE: Final = re.compile(r"^ {0,3}>\s?")
_HTML_HEADING: Final = re.compile(r"^\s*<h([1-6])\b[^<>]{0,500}>(.{0,1000}?)</h\1\s*>\s*$", re.IGNORECASE)
_TABLE_RULE: Final = re.compile(r"^\s*\|?\s*:?-{2,}:?\s*(?:\|\s*:?-*:?\s*)*$")


class _Markdown(_Builder):
    """CommonMark and GitHub's tables, as far as it matters to what is read."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self._lines = text.split("\n")
        self._in_list = False

    def clean(self, text: str) -> str:
        return _clean_markdown(text)

    def read(self) -> list[Block]:
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
        self.add(Kind.CODE, _dedent(code))
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
        self.add(Kind.CODE, _dedent(code))
        return at

    def _table(self, at: int) -> int:
        rows: list[str] = []
        while at < len(self._lines) and "|" in self._lines[at]:
            line = self._lines[at]
            if not _TABLE_RULE.match(line):
                cells = [" ".join(_clean_markdown(cell).split()) for cell in line.strip().strip("|").split("|")]
                if any(_WORD.search(cell) for cell in cells):
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
    text = _EMPHASIS.sub(lambda match: match[2] or match[0], text)
    text = _ESCAPE.sub(r"\1", text)
    return re.sub(r"\x00(\d+)\x00", lambda match: spans[int(match[1])] if int(match[1]) < len(spans) else "", text)


class _Rst(_Builder):
    """reStructuredText, as far as it matters to what is read."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self._lines = [line.expandtabs(4) for line in text.split("\n")]
        self._levels: list[tuple[str, bool]] = []

    def clean(self, text: str) -> str:
        return _clean_rst(text)

    def read(self) -> list[Block]:
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
            self.add(Kind.CODE, _dedent(body))
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
        self.add(Kind.CODE, _dedent(body))
        return after

    def _doctest(self, at: int) -> int:
        code: list[str] = []
        while at < len(self._lines) and self._lines[at].strip():
            code.append(self._lines[at])
            at += 1
        self.add(Kind.CODE, _dedent(code))
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


_HTML_DROPPED: Final = frozenset({"script", "style", "head", "template", "noscript", "svg", "nav", "iframe", "object"})
_HTML_BLOCKS: Final = frozenset(
    {
        "address",
        "article",
        "aside",
        "blockquote",
        "body",
        "br",
        "caption",
        "dd",
        "details",
        "dialog",
        "div",
        "dl",
        "dt",
        "fieldset",
        "figcaption",
        "figure",
        "footer",
        "form",
        "header",
        "hr",
        "html",
        "legend",
        "li",
        "main",
        "ol",
        "p",
        "section",
        "summary",
        "table",
        "tbody",
        "td",
        "tfoot",
        "th",
        "thead",
        "tr",
        "ul",
    }
)
_HTML_HEADINGS: Final = {f"h{level}": level for level in range(1, 7)}


class _HtmlBuilder(_Builder):
    joiner = ""


class _Html(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.builder = _HtmlBuilder()
        self._dropped = 0
        self._code: list[str] | None = None
        self._heading: list[str] | None = None
        self._row: list[str] | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _HTML_DROPPED:
            self._dropped += 1
        elif tag == "body":
            self._dropped = 0  # a head needs no end tag
        elif tag == "pre":
            self.builder.end_paragraph()
            self._code = []
        elif tag in _HTML_HEADINGS:
            self.builder.end_paragraph()
            self._heading = []
        elif tag == "tr":
            self.builder.end_paragraph()
            self._row = []
        elif tag in ("td", "th") and self._row is not None:
            self._row.append("")
        elif tag == "br" and self._code is not None:
            self._code.append("\n")
        elif tag in _HTML_BLOCKS and self._row is None and self._code is None:
            self.builder.end_paragraph()

    def handle_endtag(self, tag: str) -> None:
        if tag in _HTML_DROPPED:
            self._dropped = max(0, self._dropped - 1)
        elif tag == "pre" and self._code is not None:
            code, self._code = self._code, None
            self.builder.add(Kind.CODE, _dedent("".join(code).split("\n")))
        elif tag in _HTML_HEADINGS and self._heading is not None:
            title, self._heading = self._heading, None
            self.builder.heading(_HTML_HEADINGS[tag], "".join(title))
        elif tag == "tr" and self._row is not None:
            row, self._row = self._row, None
            cells = [" ".join(cell.split()) for cell in row]
            if any(cells):
                self.builder.add(Kind.TABLE, " | ".join(cells))
        elif tag in _HTML_BLOCKS and self._row is None and self._code is None:
            self.builder.end_paragraph()

    def handle_data(self, data: str) -> None:
        if self._dropped:
            return
        if self._heading is not None:
            self._heading.append(data)
        elif self._code is not None:
            self._code.append(data)
        elif self._row is not None:
            if self._row:
                self._row[-1] += data
        else:
            self.builder.line(data)

    def finish(self) -> list[Block]:
        self.close()
        for tag in ("pre", "h1", "tr"):  # what was left open
            self.handle_endtag(tag)
        self.builder.end_paragraph()
        return self.builder.blocks


def _html(text: str) -> list[Block]:
    parser = _Html()
    # The standard parser takes quadratic time over tags that never end.
    whole, end, rest = text.rpartition(">")
    parser.feed(whole + end + rest.replace("<", "&lt;"))
    return parser.finish()
