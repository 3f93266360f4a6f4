"""Plain text out of marked-up prose, and how alike two pieces of it are.

In: passages of READMEs and other documents (Markdown, reStructuredText, some HTML), questions, answers. Out: sentences
without markup, stemmed content words, containment and overlap in [0, 1], citation markers. Shared by the workers, the
Overseer and the extractive provider, so that all of them mean the same by "a sentence" and "the same words".
"""

import html
import re
from collections.abc import Collection, Sequence
from functools import lru_cache
from itertools import takewhile
from typing import Final

__all__ = [
    "bare",
    "best_sentences",
    "containment",
    "content_words",
    "is_not_found",
    "markers_inside",
    "markers_of",
    "not_found",
    "overlap",
    "renumber",
    "sentences",
    "split_sentences",
    "stem",
    "tokens",
    "without_markers",
]

_FENCE = re.compile(r"^[ \t]*(```|~~~).*?(^[ \t]*\1[ \t]*$|\Z)", re.MULTILINE | re.DOTALL)
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_ADMONITION = re.compile(r"\[!(?:NOTE|TIP|IMPORTANT|WARNING|CAUTION)\]\s*", re.IGNORECASE)
_CODE_HTML = re.compile(r"<(pre|script|style|svg)\b.*?</\1>", re.DOTALL | re.IGNORECASE)
_INLINE_TAG = re.compile(
    r"</?(?:a|abbr|b|code|em|font|i|img|kbd|s|small|span|strong|sub|sup|u)\b[^<>]*>", re.IGNORECASE
)
_TAG = re.compile(r"</?[A-Za-z][^<>]*>")
_IMAGE = re.compile(r"!\[[^\]]*\](\([^()]*(?:\([^()]*\)[^()]*)*\)|\[[^\]]*\])")
_EMPTY_LINK = re.compile(r"\[\s*\](\([^()]*\)|\[[^\]]*\])")
_LINK = re.compile(r"\[([^\]\[]+)\](?:\([^()\s]*(?:\([^()]*\)[^()]*)*(?:\s+\"[^\"]*\")?\)|\[[^\]\[]*\])")
_FOOTNOTE = re.compile(r"\[\^[^\]]+\]")
_LINK_TARGET = re.compile(r"^\s*(\[[^\]]+\]:\s|\.\.\s+_[^:]+:).*$", re.MULTILINE)
_RST_DIRECTIVE = re.compile(r"^([ \t]*)\.\.(?:[ \t]+\S.*)?(?:\n(?:\1[ \t]+\S.*|[ \t]*$))*", re.MULTILINE)
_RST_ROLE = re.compile(r":[a-zA-Z:+.-]+:`([^`<]+?)\s*(?:<[^`>]*>)?`")
_RST_LINK = re.compile(r"`([^`<]+?)\s*<[^`>]+>`_{1,2}")
_RST_SUBSTITUTION = re.compile(r"\|[\w .-]+\|_{0,2}")
_EMPHASIS = re.compile(r"(\*{1,3}|(?<!\w)_{1,3})(?=\S)(.{1,200}?)(?<=\S)(\1)(?!\w)")
_URL = re.compile(r"<?\bhttps?://[^\s<>)\]]+>?")
_TICKS = re.compile(r"`+([^`]*)`+_{0,2}")
_RULE = re.compile(r"^\s*([-=~^\"'`#*+:._]\s?)\1{2,}\s*$")
_BULLET = re.compile(r"^\s*(?:[-*+•]|\d{1,2}[.)]|#\.)\s+(?:\[[ xX]\]\s+)?")
_HEADING = re.compile(r"^\s{0,3}#{1,6}\s")
_CODE_LINE = re.compile(
    r"^\s*(?:>>>|\.\.\. |\$ |% |import \w|from [\w.]+ import |def |class \w+[(:]|@\w|async (?:def|with|for) |await |"
    r"return |print\(|[\w.\[\]\"']+\s*=\s*\S|[\w.]+\([^)]*\)\s*$|[{}\[\]();]+\s*$)"
)
_COMMAND = re.compile(
    r"^\s*(?:[$%] )?(?:(?:sudo |uv )?(?:pip3?|pipx|conda|mamba|brew|snap|apt|apt-get|npm|cargo|pre-commit) "
    r"(?:install|config|create|build|add)\b|"
    r"python3? -m |poetry add |uv (?:add|sync|run|tool|pip) |git (?:clone|add|commit|checkout|push) |source \S+/|"
    r"docker (?:run|pull|build|compose) |export \w+=)"
)
_CODE_HEAD = re.compile(r"^\s*(?:with|for|while|if|elif|else|try|except|finally|match|case)\b.*:\s*(?:#.*)?$")
_CODE_SIGN = re.compile(r"(?:^|\s)(?:#|&&|>>>)\s|\s--\s--\s")
_END = re.compile(
    r"(?<=[.!?])[\"')\]*_]*\s+(?!\[\d)"
    r"(?=[\"'(\[*_`]*[A-Z0-9`]|[a-z][\w-]* (?:is|are|can|has|will|does|supports|provides|requires|needs|offers|"
    r"implements|uses|makes|lets)\b)"
    r"|(?<=[.!?]\])\s+(?=[A-Z0-9`])"
    r"|(?<=\d\][.!?])\s+"  # a cited sentence ends whatever comes next: names and commands begin in small letters
)
_ABBREVIATION = re.compile(
    r"(?:\b(?:e\.g|i\.e|etc|vs|cf|Dr|Mr|Mrs|Ms|St|Fig|Inc|Ltd|approx|incl|resp|al|ver|v)|\b[A-Z])\.$"
)
_TOKEN = re.compile(r"\w+(?:[./]\w+)*[+#]*")
_CUT_OFF = re.compile(r"\b(?:at|on|see|the|a|an|to|in|from|of|via|by|with|for|and|or|is|are)[.:]?$", re.IGNORECASE)
_MARKER = re.compile(r"\s?\[(\d{1,4}(?:\s*,\s*\d{1,4})*)\]")
_TRAILING_MARKERS = re.compile(r"([.!?])([\"')*_]*)((?:\s?\[\d{1,4}(?:\s*,\s*\d{1,4})*\])+)")
_SPACE = re.compile(r"\s+")

_OUTER: Final = " .!?,;:\"'`()*_"

_SHORT_ITEM: Final = 8
_LIST_ITEMS: Final = 16
"""Words in a list's items and items in a list that a sentence can take in and still be read."""

_CODE_LINES: Final = 2
_CODE_CHARS: Final = 160
"""More code than this is there to be read where it stands."""

_PROMPT: Final = re.compile(r"^[$%] ")

_STOP_TEXT: Final = (
    "a about above after again all also am an and any are as at be because been before being below "
    "between both but by can could did do does doing down during each few for from further had has have "
    "having he her here hers him his how i if in into is it its itself just let many me more most much my of off on "
    "once only or other our ours out over own please s same she should so some such t tell than that the "
    "their theirs them then there these they this those through to too under until up us use used uses "
    "using very via was we were what when where which while who whom why will with would you your yours "
    "explain describe give show work works"
)
_STOP_WORDS: Final = frozenset(_STOP_TEXT.split())

_SPELLINGS: Final = {
    "licence": "license",
    "licences": "license",
    "licenced": "license",
    "asynchronous": "async",
    "asynchronously": "async",
}
"""Words that endings don't show to be one."""

_NOT_FOUND: Final = "The corpus holds nothing that answers"


def tokens(text: str) -> list[str]:
    """The words of ``text`` in lower case, in order; ``HTTP/2``, ``3.11`` and ``C++`` are one word each."""
    return [word.replace("'", "") for word in _TOKEN.findall(text.lower())]


@lru_cache(maxsize=65_536)
def stem(word: str) -> str:
    """``word`` (lower case) without its commonest English endings, so that configure, configured and configuration
    are one. Words that hold anything but letters (versions, identifiers) stay as they are.
    """
    word = _SPELLINGS.get(word, word)
    if len(word) < 4 or not word.isalpha():
        return word
    for ending in ("ations", "ation"):
        if word.endswith(ending) and len(word) - len(ending) >= 4:
            return word[: -len(ending)]
    if word.endswith("ies") and len(word) > 4:
        word = word[:-3] + "y"
    elif word.endswith(("xes", "ches", "shes", "sses")):
        word = word[:-2]
    elif word.endswith("s") and not word.endswith(("ss", "us", "is")):
        word = word[:-1]
    if word.endswith(("sion", "tion")) and len(word) > 6:
        word = word[:-3]
    elif word.endswith("ing") and len(word) > 5:
        word = _undouble(word[:-3])
    elif word.endswith("ed") and len(word) > 4:
        word = _undouble(word[:-2])
    if word.endswith("e") and len(word) > 4:
        word = word[:-1]
    return word


def _undouble(word: str) -> str:
    return word[:-1] if len(word) > 3 and word[-1] == word[-2] and word[-1] not in "lsz" else word


@lru_cache(maxsize=16_384)
def content_words(text: str) -> tuple[str, ...]:
    """The stemmed words of ``text`` that carry meaning, in order, with repeats."""
    return tuple(stem(word) for word in tokens(text) if word not in _STOP_WORDS)


def containment(claim: Collection[str], evidence: Collection[str]) -> float:
    """The share of the distinct words of ``claim`` that ``evidence`` holds, in [0, 1]; 0 for an empty claim."""
    wanted = set(claim)
    return len(wanted.intersection(evidence)) / len(wanted) if wanted else 0.0


def overlap(one: Collection[str], other: Collection[str]) -> float:
    """The Jaccard index of the two sets of words, in [0, 1]; 0 when both are empty."""
    first, second = set(one), set(other)
    union = len(first | second)
    return len(first & second) / union if union else 0.0


@lru_cache(maxsize=8192)
def sentences(text: str) -> tuple[str, ...]:
    """The full sentences of marked-up ``text``, in order, without markup, code blocks, badges, tables and headings.

    A list item counts as a sentence when it has at least four words. A command or two of code are quoted in backticks
    behind the line that leads up to them ("To install it: `pip install x`."), a command with no such line by itself.
    """
    found: list[str] = []
    for block in _blocks(_unmarked(text), frozenset(line.strip() for line in text.split("\n"))):
        found += [sentence for sentence in split_sentences(block) if _reads_as_sentence(sentence)]
    return tuple(dict.fromkeys(found))


def split_sentences(prose: str) -> list[str]:
    """``prose`` without markup cut at the ends of its sentences; abbreviations and versions don't end one.

    A full stop behind a citation marker always does: sentences that :func:`markers_inside` has cited and a space has
    joined come apart again as they were.
    """
    prose = _SPACE.sub(" ", prose).strip()
    parts: list[str] = []
    start = 0
    for end in _END.finditer(prose):
        part = prose[start : end.end()].rstrip()
        if part and not _ABBREVIATION.search(part):
            parts.append(part)
            start = end.end()
    if start < len(prose):
        parts.append(prose[start:])
    return parts


def _unmarked(text: str) -> str:
    text = text.replace("\r\n", "\n")
    text = _ADMONITION.sub("", _COMMENT.sub(" ", text))
    text = _FENCE.sub("\n", text)
    if "<" in text:
        text = _TAG.sub(" ", _INLINE_TAG.sub("", _CODE_HTML.sub("\n", text)))
    if "![" in text or "[" in text:
        text = _FOOTNOTE.sub("", _LINK_TARGET.sub("", _IMAGE.sub("", text)))
        text = _EMPTY_LINK.sub("", _LINK.sub(r"\1", text))
    if "`" in text:
        text = _TICKS.sub(r"\1", _RST_LINK.sub(r"\1", _RST_ROLE.sub(r"\1", text)))
    if ".. " in text or "::" in text:
        text = _RST_DIRECTIVE.sub("\n", text).replace("::\n", ":\n")
    if "|" in text:
        text = _RST_SUBSTITUTION.sub("", text)
    if "http" in text:
        text = _URL.sub("", text)
    text = _EMPHASIS.sub(r"\2", text)
    return html.unescape(text) if "&" in text else text


def _blocks(text: str, written: Collection[str]) -> list[str]:
    """Paragraphs and list items, each in one line. A paragraph that ends in a colon takes in the short items after it:
    "It supports:", "Linux", "macOS" say something only together. Of code, only such lines are quoted that are
    ``written`` just so: taking the markup off may have changed others.
    """
    blocks: list[str] = []
    current: list[str] = []
    items: list[str] = []
    quoted: list[str] = []
    in_item = introduced = code = doctest = solid = False

    def close() -> None:
        nonlocal in_item, introduced
        block = " ".join(current)
        current.clear()
        # Where a converter has dropped the bullets, short paragraphs after a colon are the items.
        listed = not block.endswith(":") and (in_item or (introduced and len(block.split()) <= _SHORT_ITEM))
        in_item = False
        if not block:
            return
        if listed:
            items.append(block)
        else:
            end_list()
            blocks.append(block)
            introduced = block.endswith(":")

    def end_list() -> None:
        nonlocal introduced
        short = (
            list(takewhile(lambda item: len(item.split()) <= _SHORT_ITEM, items[:_LIST_ITEMS])) if introduced else []
        )
        if short:
            blocks[-1] = f"{blocks[-1]} {', '.join(item.rstrip('.,;') for item in short)}."
        blocks.extend(items[len(short) :])
        items.clear()
        introduced = False

    def end_code() -> None:
        nonlocal introduced
        short = 0 < len(quoted) <= _CODE_LINES and sum(map(len, quoted)) <= _CODE_CHARS
        if short and all(line in written and _is_code(line, "") for line in quoted):
            code = ", ".join(f"`{_PROMPT.sub('', line)}`" for line in quoted)
            if introduced and not items:
                blocks[-1] = f"{blocks[-1]} {code}."
                introduced = False
            elif all(_COMMAND.match(line) for line in quoted):
                end_list()
                blocks.append(code)
        if quoted:
            end_list()
        quoted.clear()

    lines = text.split("\n")
    for number, line in enumerate(lines):
        stripped = line.strip()
        following = lines[number + 1] if number + 1 < len(lines) else ""
        indented = line.startswith(("    ", "\t"))
        if not stripped or _is_layout(line, following):
            end_code()
            close()
            if stripped:
                end_list()
            code, doctest, solid = code and not stripped and not doctest, False, False
            continue
        bullet = _BULLET.match(line)
        if solid and not bullet:
            quoted.append(stripped)
            continue
        if (indented and not current and not bullet) or (
            _is_code(line, following) and (not current or code or indented)
        ):
            solid = not current  # what begins as code is code up to the blank line
            close()
            if solid:
                quoted.append(stripped)
            else:
                end_list()
            code = True
            doctest = stripped.startswith(">>>")
            continue
        if code and not bullet and (indented or doctest):
            continue
        code = False
        end_code()
        if bullet:
            close()
            in_item = True
            current.append(line[bullet.end() :].strip())
        else:
            current.append(stripped.lstrip("> "))
    end_code()
    close()
    end_list()
    return blocks


def _is_code(line: str, following: str) -> bool:
    """Whether ``line`` is a statement or a command, or the head of an indented block of them."""
    if _CODE_LINE.match(line) or _COMMAND.match(line):
        return True
    return bool(_CODE_HEAD.match(line)) and following.startswith(("  ", "\t"))


def _is_layout(line: str, following: str) -> bool:
    """Whether ``line`` is a heading, a rule or a row of a table."""
    if _HEADING.match(line) or _RULE.match(line) or (line.strip() and _RULE.match(following)):
        return True
    return line.strip().startswith("|") or " | " in line


def _reads_as_sentence(sentence: str) -> bool:
    if sentence[0] == sentence[-1] == "`" and _COMMAND.match(sentence[1:]):
        return True
    words = sentence.split()
    if not 4 <= len(words) <= 80 or sentence.endswith((":", ",", "(", "\\", "...", "…")):
        return False
    if _CUT_OFF.search(sentence) or _CODE_SIGN.search(sentence):  # what was cut off was a link
        return False
    letters = sum(character.isalpha() or character == " " for character in sentence)
    if letters < (0.5 if ": `" in sentence else 0.75) * len(sentence):
        return False
    first = sentence[sentence[0] in "\"'“*`." :]
    return first[:1].isalnum() and not first.startswith("see ")


def bare(sentence: str) -> str:
    """``sentence`` without its outer punctuation and surplus space: equal for two that differ in nothing else.

    >>> bare('It is "fast".') == bare('It is "fast."')
    True
    """
    return _SPACE.sub(" ", sentence).strip(_OUTER)


def markers_of(text: str) -> tuple[int, ...]:
    """The citation markers in ``text``, in order of first appearance: ``[2]`` and ``[1, 3]`` give 2, 1, 3."""
    found = (int(number) for match in _MARKER.finditer(text) for number in match.group(1).split(","))
    return tuple(dict.fromkeys(found))


def markers_inside(text: str) -> str:
    """``text`` with the markers behind a full stop (and closing quotes) put before it, so that each stays with its
    sentence.

    >>> markers_inside("It is fast. [1] It is small. [2]")
    'It is fast [1]. It is small [2].'
    """
    return _TRAILING_MARKERS.sub(lambda match: f"{match[2]} {match[3].strip()}{match[1]}", text)


def without_markers(text: str) -> str:
    """``text`` without its citation markers."""
    return _MARKER.sub("", text).strip()


def renumber(text: str, numbers: dict[int, int]) -> str:
    """``text`` with each citation marker replaced by its entry in ``numbers``; markers without one are dropped."""

    def replace(match: re.Match[str]) -> str:
        kept = dict.fromkeys(numbers[int(old)] for old in match.group(1).split(",") if int(old) in numbers)
        space = " " if match.group(0)[0].isspace() else ""
        return space + "".join(f"[{new}]" for new in kept) if kept else ""

    return _MARKER.sub(replace, text)


def not_found(question: str) -> str:
    """What an honest worker answers when the passages it was given say nothing about ``question``."""
    return f"{_NOT_FOUND}: {_SPACE.sub(' ', question).strip()}"


def is_not_found(answer: str) -> bool:
    """Whether ``answer`` is one that :func:`not_found` made, and says nothing besides."""
    return answer.startswith(_NOT_FOUND) and not markers_of(answer)


def best_sentences(words: Collection[str], candidates: Sequence[str]) -> list[tuple[float, int]]:
    """``candidates`` ranked by how much of ``words`` they hold: (containment, index), best first, ties in order."""
    scored = [(containment(words, content_words(candidate)), index) for index, candidate in enumerate(candidates)]
    return sorted(scored, key=lambda pair: (-pair[0], pair[1]))
