"""What all readers of markup share: the blocks they give, and the builder that collects them under headings."""

import re
from dataclasses import dataclass
from enum import Enum
from typing import Final

__all__ = ["EMPHASIS", "ESCAPE", "WORD", "Block", "Builder", "Kind", "dedent"]

WORD: Final = re.compile(r"\w")
EMPHASIS: Final = re.compile(
    r"(?<![\w*])(\*\*\*|\*\*|\*)(?=\S)([^*\n]{1,500}?)(?<=\S)\1(?!\w)|(?<!\w)(__|_)(?=\S)([^_\n]{1,500}?)(?<=\S)\3(?!\w)"
)
ESCAPE: Final = re.compile(r"\\([!-/:-@\[-`{-~])")


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


class Builder:
    """Collects blocks under headings. ``joiner`` stands between the pieces of a paragraph."""

    joiner = "\n"

    def __init__(self) -> None:
        self.blocks: list[Block] = []
        self._path: list[tuple[int, str]] = []
        self._names: tuple[str, ...] = ()
        self._paragraph: list[str] = []

    def heading(self, level: int, title: str) -> None:
        """Open a section; it ends those of its level and deeper."""
        self.end_paragraph()
        while self._path and self._path[-1][0] >= level:
            self._path.pop()
        title = " ".join(title.split())
        if title:
            self._path.append((level, title))
        self._names = tuple(name for _, name in self._path)

    def add(self, kind: Kind, text: str) -> None:
        """A block that is done; blank ones are left out."""
        self.end_paragraph()
        text = text.strip("\n")
        if text.strip():
            self.blocks.append(Block(self._names, kind, text))

    def line(self, line: str) -> None:
        """A piece of the paragraph that is being read."""
        self._paragraph.append(line)

    def end_paragraph(self) -> None:
        """Turn what was read of a paragraph into a block, if it has a word in it."""
        if self._paragraph:
            lines, self._paragraph = self._paragraph, []
            # Before too: patterns with white space in them take quadratic time over long runs of it.
            text = " ".join(self.joiner.join(lines).split())
            text = " ".join(self.clean(text).split())
            if WORD.search(text):
                self.blocks.append(Block(self._names, Kind.PROSE, text))

    def in_paragraph(self) -> bool:
        """Whether a paragraph is being read."""
        return bool(self._paragraph)

    def clean(self, text: str) -> str:
        """A paragraph's text without inline markup."""
        return text


def dedent(lines: list[str]) -> str:
    """The lines as one text, without the margin that they share and blank lines around them."""
    margin = min((len(line) - len(line.lstrip()) for line in lines if line.strip()), default=0)
    return "\n".join(line[margin:].rstrip() for line in lines).strip("\n")
