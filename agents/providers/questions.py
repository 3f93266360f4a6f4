"""What a question asks, by rules of English: the things it names, the sides it compares, the questions it holds.

In: a question. Out: names and parts of it as text. No dictionary and no model: where the rules see nothing, the
question is taken whole, and about nothing in particular.
"""

import re
from dataclasses import dataclass
from functools import lru_cache

from agents.text import content_words

__all__ = ["Named", "compared", "named_in", "parts_of", "verb_of"]

_COMPARE = re.compile(
    r"^\s*(?:please\s+)?(?:compare|contrast)\s+(?P<a>.+?)\s+(?:and|with|to|against|vs\.?|versus)\s+(?P<b>.+?)"
    r"(?:\s+(?:in terms of|with regard to|with respect to|regarding|for|by|on)\s+(?P<by>.+?))?\s*[.?!]*\s*$",
    re.IGNORECASE,
)
_DIFFERENCE = re.compile(
    r"^\s*(?:what(?:'s|\s+is|\s+are)\s+the\s+|explain\s+the\s+)?differences?\s+between\s+(?P<a>.+?)\s+and\s+(?P<b>.+?)\s*[.?!]*\s*$"
    r"|^\s*(?:how\s+(?:does|do)\s+)(?P<c>.+?)\s+(?:compare|differ)\s+(?:to|with|from)\s+(?P<d>.+?)\s*[.?!]*\s*$",
    re.IGNORECASE,
)
_VERSUS = re.compile(
    r"^\s*(?P<a>[\w.\- ]{1,60}?)\s+(?:vs\.?|versus)\s+(?P<b>[\w.\- ]{1,60}?)\s*[.?!]*\s*$", re.IGNORECASE
)
_ASKS = (
    r"(?:what|how|why|when|where|who|which|does|do|is|are|can|could|should|will|explain|describe|tell me|list|compare)"
)
_JOIN = re.compile(
    rf"\s*[,;]?\s+(?:and|and then|then|but|also|and also)\s+(?={_ASKS}\b)|\s*[;,]\s+(?={_ASKS}\b)", re.IGNORECASE
)
_SUBJECT = re.compile(
    r"^\s*(?:what(?:'s|\s+is|\s+are|\s+does|\s+do)|who\s+is|tell me about|describe|explain|"
    r"how\s+(?:do|can|should)\s+(?:i|you|we|one)\s+\w+|how\s+to\s+\w+|"
    r"(?:how|why|when|where)\s+(?:does|do|is|are|can|should)|does|do|is|are|can)"
    r"\s+(?:the\s+|a\s+|an\s+)?(?P<subject>[\w.\-]+)",
    re.IGNORECASE,
)
_PRONOUN = re.compile(r"\b(?:it|its|they|them|their|this|that)\b", re.IGNORECASE)
_WORD = r"[\w][\w.+#\-]*"
_WHAT_IS = re.compile(
    rf"^\W*(?:what|who)(?:'s|\s+is|\s+are|\s+was|\s+were)\s+(?P<thing>{_WORD}(?:\s+{_WORD}){{0,2}})\W*$", re.IGNORECASE
)
_ASKED_OF = re.compile(
    rf"(?<!what\s)(?<!who\s)\b(?:is|are|was|does|do|did|can|has|will)\s+(?P<thing>{_WORD})\s+\w"
    rf"|\bof\s+(?P<owner>{_WORD})\W*$"
    rf"|\b(?:how\s+(?:do|can|should)\s+(?:i|you|we|one)|how\s+to)\s+\w+\s+(?P<object>{_WORD})\W*$",
    re.IGNORECASE,
)
_HOW_TO = re.compile(r"\bhow\s+(?:(?:do|can|could|should|would)\s+(?:i|you|we|one)|to)\s+(?P<verb>\w+)", re.IGNORECASE)
_NAME = re.compile(r"(?<=\s)(?:[A-Z][\w.+#-]*|\w*[a-z]\w*(?:[A-Z_]|\d)\w*|\w+\.\w[\w.]*)")


@dataclass(frozen=True, slots=True)
class Named:
    """The stemmed words of the things that a question is about: each of ``subjects`` is what it asks something of;
    ``mentions`` are other names in it.
    """

    subjects: tuple[frozenset[str], ...]
    mentions: tuple[frozenset[str], ...]


@lru_cache(maxsize=4096)
def named_in(question: str) -> Named:
    """What ``question`` names by its place ("is X thread safe?", "the licence of X") or by its looks (X, x_y, x2).

    >>> named_in("Is numpy thread safe on Windows?")
    Named(subjects=(frozenset({'numpy'}),), mentions=(frozenset({'window'}),))
    """
    found: list[str] = []
    what = _WHAT_IS.match(question)
    if what and len(content_words(what["thing"])) == len(what["thing"].split()):
        found.append(what["thing"])
    for match in _ASKED_OF.finditer(question):
        found += [thing for thing in match.groups() if thing]
    subjects = _distinct(found)
    known = frozenset().union(*subjects)
    mentions = [words for words in _distinct(_NAME.findall(question)) if not words <= known]
    return Named(tuple(subjects), tuple(mentions))


def verb_of(question: str) -> str:
    """The stemmed verb of "how do I <verb> ..."; empty where there is none."""
    match = _HOW_TO.search(question)
    words = content_words(match["verb"]) if match else ()
    return words[0] if words else ""


def _distinct(names: list[str]) -> list[frozenset[str]]:
    return [words for words in dict.fromkeys(frozenset(content_words(name)) for name in names) if words]


def compared(question: str) -> list[tuple[str, str]]:
    """The sides that ``question`` compares, each with what it compares them by ("" for anything)."""
    match = _COMPARE.match(question) or _DIFFERENCE.match(question) or _VERSUS.match(question)
    if match is None:
        return []
    groups = match.groupdict()
    sides = [groups.get(name) for name in ("a", "b", "c", "d") if groups.get(name)]
    names = [part for side in sides for part in re.split(r",\s*(?:and\s+)?", side or "") if part]
    return [(name.strip(), (groups.get("by") or "").strip()) for name in names]


def parts_of(question: str) -> list[str]:
    """The self-contained questions in ``question``; a pronoun is replaced by the first question's subject."""
    whole = [part for sentence in re.split(r"(?<=[?!])\s+", question) for part in _JOIN.split(sentence) if part.strip()]
    if len(whole) < 2 or any(len(part.split()) < 2 for part in whole):
        return [question]
    found = _SUBJECT.match(whole[0])
    parts: list[str] = []
    for number, part in enumerate(whole):
        part = part.strip(" ,;.?!")
        if number and found and _PRONOUN.search(part):
            subject = found["subject"]
            part = _PRONOUN.sub(
                lambda match, name=subject: f"{name}'s" if match[0].lower() in ("its", "their") else name, part, count=1
            )
        parts.append(f"{part[0].upper()}{part[1:]}?")
    return parts
