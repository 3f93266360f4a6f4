"""Documents into blocks: what a reader sees of Markdown, reStructuredText, HTML or plain text, section by section.

In: a document's text and media type. Out: blocks in order, each with the path of headings above it, its kind, and its
text without markup. Badges, images, comments, link targets, tables of contents and scripts are left out: they are
noise to a search. Line by line and in linear time, whatever the input: a document is hostile until it is read.
"""

from agents.memory.markup.base import Block, Builder, Kind
from agents.memory.markup.html import read_html
from agents.memory.markup.markdown import Markdown
from agents.memory.markup.rst import Rst

__all__ = ["Block", "Kind", "blocks"]


def blocks(text: str, media_type: str) -> list[Block]:
    """The blocks of a document. A media type that is not known is read as plain text; parameters are ignored.

    >>> [(b.path, b.text) for b in blocks("# Use\\n\\n**Fast** and [safe](x).", "text/markdown")]
    [(('Use',), 'Fast and safe.')]
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\x00", "")
    kind = media_type.partition(";")[0].strip().lower()
    if kind == "text/markdown":
        return Markdown(text).read()
    if kind in ("text/x-rst", "text/prs.fallenstein.rst"):
        return Rst(text).read()
    if kind in ("text/html", "application/xhtml+xml"):
        return read_html(text)
    return _plain(text)


def _plain(text: str) -> list[Block]:
    builder = Builder()
    for line in text.split("\n"):
        if line.strip():
            builder.line(line)
        else:
            builder.end_paragraph()
    builder.end_paragraph()
    return builder.blocks
