"""HTML into blocks, with the standard library's parser, which takes whatever comes."""

from html.parser import HTMLParser
from typing import Final

from agents.memory.markup.base import Block, Builder, Kind, dedent

__all__ = ["read_html"]

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


class _HtmlBuilder(Builder):
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
            self.builder.add(Kind.CODE, dedent("".join(code).split("\n")))
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


def read_html(text: str) -> list[Block]:
    """The blocks of an HTML document or a piece of one."""
    parser = _Html()
    # The standard parser takes quadratic time over tags that never end.
    whole, end, rest = text.rpartition(">")
    parser.feed(whole + end + rest.replace("<", "&lt;"))
    return parser.finish()
