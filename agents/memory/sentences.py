"""Prose into sentences, by punctuation alone.

In: text of one paragraph. Out: its sentences in order, each stripped; joined by spaces they are the paragraph with its
white space made single. No language model: the same text gives the same sentences on every machine.
"""

import re
from typing import Final

__all__ = ["sentences"]

_BOUNDARY: Final = re.compile(
    r"(?<=[.!?])[)\]\"'”’»*_`]{0,3}\s+(?=[\"'“‘«(\[*_`]{0,3}[A-Z0-9À-ÖØ-Þ`<])|(?<=[。！？])\s*(?=\S)"
)
"""The end of a sentence: its mark, closing marks, white space, and a start that is no small letter."""

_ABBREVIATION: Final = re.compile(
    r"(?:^|[\s(\[])(?:[A-Za-z]|[ei]\.[eg]|vs|cf|etc|approx|resp|incl|no|nos|vol|fig|figs|eq|sec|ch|ed|eds|pp|al|ca|mr|mrs|ms|dr|"
    r"prof|st|jr|sr|inc|ltd|corp|co|dept|est|jan|feb|mar|apr|jun|jul|aug|sep|sept|oct|nov|dec|u\.s|a\.m|p\.m)\.$",
    re.IGNORECASE,
)
_LIST_NUMBER: Final = re.compile(r"^\s*\d{1,3}\.$")


def sentences(text: str) -> list[str]:
    """The sentences of ``text``.

    >>> sentences("Use an adapter, e.g. Foo. It helps! See version 2.0 (new). Done")
    ['Use an adapter, e.g. Foo.', 'It helps!', 'See version 2.0 (new).', 'Done']
    """
    text = " ".join(text.split())
    found: list[str] = []
    start = 0
    for boundary in _BOUNDARY.finditer(text):
        end = boundary.end()
        piece = text[start:end].rstrip()
        tail = piece[-12:]
        if _ABBREVIATION.search(tail) or _LIST_NUMBER.match(piece):
            continue
        if piece:
            found.append(piece)
        start = end
    rest = text[start:].strip()
    if rest:
        found.append(rest)
    return found
