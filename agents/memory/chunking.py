"""Documents into chunks: what is embedded, searched and cited.

In: a document's text, media type and title. Out: chunks of whole sentences within a token budget, in order, each under
one path of headings. A chunk is embedded together with its title and headings, which say what its words are about.
Pure: the same document gives the same chunks, and every sentence of it is in at least one of them.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Final

from agents.memory.markup import Block, Kind, blocks
from agents.memory.sentences import sentences

__all__ = ["CHUNKING_VERSION", "Chunk", "Chunker"]

CHUNKING_VERSION: Final = "1"
"""Changes when the same document would give other chunks."""

_SPECIAL_TOKENS: Final = 2
"""The start and end that the model puts around a text."""

_CONTEXT_TOKENS: Final = 40
"""At most this many go to title and headings."""

_OVERLAP_TOKENS: Final = 40
"""The longest sentence that is repeated at the start of the next chunk."""

_CHARACTERS_A_TOKEN: Final = 16
"""The model knows no word of over 100 letters: a megabyte of base64 is one token to it, but is no chunk."""

_SEPARATOR: Final = " > "

CountTokens = Callable[[Sequence[str]], list[int]]
"""The number of tokens of each text; counts of texts joined by white space add up."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a document. ``tokens`` counts all that the model sees: context, text and its own marks.

    ``heading`` is the path of headings, as in ``Usage > Async``; ``context`` what is embedded before the text.
    """

    ordinal: int
    heading: str
    text: str
    context: str
    tokens: int

    @property
    def embedded(self) -> str:
        """What the model is given."""
        return f"{self.context}\n{self.text}" if self.context else self.text


@dataclass(frozen=True, slots=True)
class _Unit:
    """What is not cut any more: a sentence, a piece of code, a row. ``before`` joins it to the unit before it."""

    text: str
    tokens: int
    before: str
    repeatable: bool = False


class Chunker:
    """Cuts documents into chunks of about ``target`` tokens, ``limit`` at most, both with context and marks.

    Raises:
        ValueError: the budget leaves no room for text.
    """

    def __init__(self, count: CountTokens, *, target: int = 200, limit: int = 256) -> None:
        if not _CONTEXT_TOKENS * 2 <= target <= limit:
            raise ValueError(f"need {_CONTEXT_TOKENS * 2} <= target <= limit, not {target} and {limit}")
        self._tokens = count
        self._target = target
        self._limit = limit

    def __call__(self, text: str, media_type: str = "text/plain", title: str = "") -> list[Chunk]:
        """The chunks of a document, in order; none if it has no text."""
        chunks: list[Chunk] = []
        for path, section in groupby(blocks(text, media_type), key=lambda block: block.path):
            context, context_tokens = self._context(title, path)
            overhead = context_tokens + _SPECIAL_TOKENS
            for units in self._packed(self._units(section, self._limit - overhead), overhead):
                joined = units[0].text + "".join(unit.before + unit.text for unit in units[1:])
                tokens = overhead + sum(unit.tokens for unit in units)
                chunks.append(Chunk(len(chunks), _SEPARATOR.join(path), joined, context, tokens))
        return chunks

    def _count(self, texts: Sequence[str]) -> list[int]:
        counts = self._tokens(texts) if texts else []
        return [max(tokens, len(text) // _CHARACTERS_A_TOKEN) for text, tokens in zip(texts, counts, strict=True)]

    def _context(self, title: str, path: tuple[str, ...]) -> tuple[str, int]:
        """Title and headings in one line, the outermost cut first, and its tokens."""
        names = [" ".join(name.split()) for name in (title, *path)]
        names = [name for place, name in enumerate(names) if name and name not in names[:place]]
        counts = self._count([f"{name} >" for name in names])
        while names and sum(counts) > _CONTEXT_TOKENS:
            # The innermost heading says most of the chunk, the title what it belongs to: cut between them.
            victim = 1 if len(names) > 2 else 0
            del names[victim], counts[victim]
        context = _SEPARATOR.join(names)
        return context, (self._count([context])[0] if context else 0)

    def _units(self, section: Iterator[Block], room: int) -> list[_Unit]:
        """The section's sentences, code and rows, none of more than ``room`` tokens."""
        pieces: list[tuple[str, str, Kind]] = []
        for block in section:
            if block.kind is Kind.PROSE:
                parts, joiner = sentences(block.text), " "
            elif block.kind is Kind.TABLE:
                parts, joiner = block.text.split("\n"), "\n"
            else:
                parts, joiner = [block.text], "\n"
            pieces += [(part, joiner if n else "\n\n", block.kind) for n, part in enumerate(parts)]
        units: list[_Unit] = []
        for (text, before, kind), tokens in zip(pieces, self._count([text for text, _, _ in pieces]), strict=True):
            if tokens <= room:
                units.append(_Unit(text, tokens, before, repeatable=kind is Kind.PROSE))
            else:
                units += self._cut(text, room, before, lines=kind is Kind.CODE)
        return units

    def _cut(self, text: str, room: int, before: str, *, lines: bool) -> Iterator[_Unit]:
        """Pieces of at most ``room`` tokens of something too large: by lines, else by words, else by characters."""
        joiner = "\n" if lines else " "
        parts = [part for part in text.split(joiner) if part.strip()]
        if len(parts) == 1 and not lines:
            size = max(1, room // 4)  # a character is at most four tokens: UTF-8 has no longer ones
            parts, joiner = [text[at : at + size] for at in range(0, len(text), size)], ""
        held: list[str] = []
        held_tokens = 0
        for part, tokens in zip(parts, self._count(parts), strict=True):
            if held and held_tokens + tokens > room:
                yield _Unit(joiner.join(held), held_tokens, before)
                held, held_tokens, before = [], 0, joiner or " "
            if tokens > room:
                for unit in self._cut(part.strip(), room, before, lines=False):
                    yield unit
                    before = " "
                before = joiner
            else:
                held.append(part)
                held_tokens += tokens
        if held:
            yield _Unit(joiner.join(held), held_tokens, before)

    def _packed(self, units: list[_Unit], overhead: int) -> Iterator[list[_Unit]]:
        """Units in order, as many to a chunk as the target allows; a lone large one may go up to the limit."""
        held: list[_Unit] = []
        tokens = overhead
        for unit in units:
            if held and tokens + unit.tokens > self._target:
                yield held
                last = held[-1]
                held, tokens = [], overhead
                # Where a paragraph is cut, or code is parted from what leads up to it, the sentence before helps.
                leads = unit.before == " " or not unit.repeatable
                helps = leads and last.repeatable and last.tokens <= _OVERLAP_TOKENS
                if helps and tokens + last.tokens + unit.tokens <= self._limit:
                    held, tokens = [last], tokens + last.tokens
            held.append(unit)
            tokens += unit.tokens
        if held:
            yield held
