"""The extractive provider: a language model's port served without a language model.

In: the same requests that the vendors' adapters take. Out: answers that consist of sentences taken word for word from
the passages, each cited; plans cut by rules of English; syntheses that put answers side by side. Deterministic, free,
offline, well under a millisecond. It cannot reason: what no sentence of the corpus says, it does not find.

Sentences are ranked by the question's words they hold, weighted by rarity among the passages (the idf of Robertson and
Zaragoza, "The Probabilistic Relevance Framework", 2009) and chosen greedily for what they add (Carbonell and
Goldstein's maximal marginal relevance, 1998).
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import orjson

from agents.context import LlmRequest, LlmResponse, Passage, Purpose
from agents.prompts import NOT_FOUND_WORD
from agents.providers.questions import Named, compared, named_in, parts_of, verb_of
from agents.text import content_words, is_not_found, markers_inside, markers_of, overlap, sentences, split_sentences

__all__ = ["ExtractiveModel"]

_MODEL: Final = "extractive-1"
_MAX_SENTENCES: Final = 4
_REDUNDANT: Final = 0.6
"""Word overlap (Jaccard) from which two sentences say the same."""

_DEFINES: Final = 3.0
"""A sentence that begins with the thing and goes on "is a" counts this much more when it is asked what the thing is."""

_LEAD: Final = 1.2
_INTRODUCTION: Final = 1.8
"""So does one of the first two of its passage, more so at the document's top, where it says what it is about."""

_FOLLOWS: Final = 2.0
"""And so does the sentence right after a chosen one: after what a thing is comes what it does."""

_ELSEWHERE: Final = 0.6
"""Where the question names a document, sentences of other documents count this much less."""

_DANGLING: Final = 0.75
"""A sentence that begins by pointing back ("However, it ...") counts this much less: it says less on its own."""

_ASIDE: Final = 0.4
"""A sentence about the project rather than the thing (licence, changelog, community) counts this much less."""

_RANK_DECAY: Final = 0.95
"""Each place down the recall's order counts this much less: recall knows similarity that words don't show."""

_WORTH: Final = 0.45
"""A further sentence must add at least this share of the first one's score."""

_FOUND_PASSAGE: Final = 0.5
_FOUND_SENTENCE: Final = 0.2
"""The shares of the question's weight that one passage, and the best sentence with its title, must hold to count as an
answer at all. A passage with the capital letters but not the France of a question about France's capital has less."""

_FOUND_ASKED: Final = 0.55
"""And the share of what is asked of a named thing that the leading sentence, with its headings, must speak of."""

_DEFINITION = re.compile(
    r"\b(?:what(?:'s|\s+is|\s+are)|who\s+is|tell me about|describe|explain|what\s+does\s+\S+\s+do)\b", re.IGNORECASE
)
_IS_A = re.compile(
    r"^(?:the |python |apache )?(?P<name>[\w.-]+)(?:™|®| (?:library|package|module|project|sdk|framework|client))?"
    r"(?:,[^,]{1,40},| \([^)]{1,40}\))?"
    r"(?: (?:(?:is|are)(?! (?:also|currently|not|now|still|in|on|supported|available|licensed|maintained|offered|"
    r"distributed|released|derived)\b)|provides?|implements?|allows?|lets|offers|makes|aims|helps|was written|"
    r"can be used)\b| ?[-–—:] )",
    re.IGNORECASE,
)
_VERSION = re.compile(r"\bv?\d+\.\d|\b[A-Z]\w+ [23]\b")
_VERSION_WORD: Final = frozenset(content_words("version"))
"""Who asks for a version is answered by "requires Python 3.8", which has not the word."""

_POINTS_BACK = re.compile(
    r"^(?:it|its|this|that|these|those|they|he|she|which|however|also|moreover|furthermore|in addition|additionally|"
    r"or|and|but|so|then|thus|therefore|otherwise|instead|specifically|for example|for instance|in this|in that|"
    r"because of this|by comparison|similarly|likewise|as well as|here|there|see|note that|finally|both|such)\b",
    re.IGNORECASE,
)
_ABOUT_PROJECT = re.compile(
    r"\b(?:badge|licen[sc]ed?|copyright|sponsor|donat\w*|contribut\w*|changelog|pull requests?|code of conduct|"
    r"mailing list|stack overflow|discord|slack|github issues|bug reports?|release notes|readthedocs|"
    r"(?:alpha|beta) release|documentation (?:is|can be|for)|official documentation|"
    r"for more|for details|see the|see our|pre-release|thanks to|tidelift|github actions)\b|#\d+",
    re.IGNORECASE,
)
_TASK_WORDS: Final = frozenset(
    content_words(
        "compare comparison contrast difference different differ versus vs better pros cons advantage purpose"
    )
)
"""Words that say what is to be done with the answer, not what it is about."""

_RELATIONS: Final = content_words("support require need provide offer release come")
"""Verbs that say little of what is asked: "needs Python 3.8" tells which Python it supports."""


@dataclass(frozen=True, slots=True)
class _Traits:
    """What a sentence is like, whatever is asked: ``weight`` for all that makes it worth less, ``defines`` the words
    of the thing that it says something of in the way of "X is a ...", ``aside`` whether it is about the project,
    ``shows`` whether it shows a command, ``cites`` whether it holds what would read as a citation of ours.
    """

    words: frozenset[str]
    weight: float
    defines: frozenset[str]
    aside: bool
    shows: bool
    cites: bool


@lru_cache(maxsize=32_768)
def _traits(text: str) -> _Traits:
    words = frozenset(content_words(text))
    if _VERSION.search(text):
        words |= _VERSION_WORD
    weight = 1 / (1 + 0.02 * max(0, len(words) - 20))
    if _POINTS_BACK.match(text):
        weight *= _DANGLING
    if len(words) < 4 or (": " in text and text.count(", ") >= 3):  # a fragment, or a list of things
        weight *= 0.7
    match = _IS_A.match(text)
    defines = frozenset(content_words(match["name"])) if match else frozenset()
    return _Traits(
        words,
        weight,
        defines,
        aside=bool(_ABOUT_PROJECT.search(text)),
        shows=text.rstrip(".")[-1:] == "`",
        cites=bool(markers_of(text)),
    )


@dataclass(frozen=True, slots=True)
class _Candidate:
    passage: int
    place: int
    text: str
    traits: "_Traits"
    words: frozenset[str]
    title: frozenset[str]
    name: frozenset[str]


class ExtractiveModel:
    """Serves :class:`~agents.context.LanguageModel` by extraction. Counts words as tokens; costs nothing."""

    name = "extractive"

    async def complete(self, request: LlmRequest, *, idempotency_key: str) -> LlmResponse:
        """Answer ``request``; never fails."""
        question = request.messages[0].content
        if request.purpose is Purpose.PLAN:
            text = plan(question)
        elif request.purpose is Purpose.SYNTHESISE:
            text = synthesise(request.passages)
        else:
            refused = " ".join(message.content for message in request.messages[1:])
            text = answer(question, request.passages, refused=refused)
        return LlmResponse(
            text=text,
            provider=self.name,
            model=_MODEL,
            prompt_tokens=sum(len(message.content.split()) for message in request.messages)
            + sum(len(passage.text.split()) for passage in request.passages),
            completion_tokens=len(text.split()),
        )


def answer(question: str, passages: Sequence[Passage], *, refused: str = "") -> str:
    """The sentences of ``passages`` that answer ``question`` best, each with its marker, or NOT_FOUND_WORD.

    Sentences that ``refused`` (a reviewer's finding) quotes are left out.
    """
    words = dict.fromkeys(content_words(question))
    asked = [word for word in words if word not in _TASK_WORDS] or list(words)
    candidates = [item for item in _candidates(passages) if not refused or item.text[:200] not in refused]
    candidates, about = _on_subject(candidates, frozenset(asked), named_in(question))
    if not asked or not candidates:
        return NOT_FOUND_WORD
    chosen = _chosen(candidates, _weights(asked, candidates), about, question)
    if not chosen:
        return NOT_FOUND_WORD
    lead = chosen[0]
    order = sorted(chosen, key=lambda item: (item.passage != lead.passage, item.passage, item.place))
    return " ".join(markers_inside(f"{_ended(item.text)} [{passages[item.passage].marker}]") for item in order)


def _candidates(passages: Sequence[Passage]) -> list[_Candidate]:
    found: list[_Candidate] = []
    seen: set[str] = set()
    for number, passage in enumerate(passages):
        title = frozenset(content_words(passage.title))
        name = frozenset(content_words(passage.title.partition(" > ")[0]))
        for place, text in enumerate(sentences(passage.text)):
            if text not in seen and not text.endswith("?"):
                seen.add(text)
                traits = _traits(text)
                if traits.cites:
                    continue
                found.append(_Candidate(number, place, text, traits, traits.words, title, name))
    return found


def _on_subject(
    candidates: list[_Candidate], asked: frozenset[str], named: Named
) -> tuple[list[_Candidate], frozenset[str]]:
    """The candidates that are about what the question names, and the words of its name.

    Where documents have that name, those are their sentences, and others that name it too. Else a sentence must name it
    or follow one that does. Of a thing that no passage names, nothing is said at all.
    """
    titled = {item.name for item in candidates if item.name and item.name <= asked}
    if titled:
        about = frozenset().union(*titled)
        return [item for item in candidates if item.name in titled or about <= item.words], about
    about = frozenset().union(*named.subjects)
    for subject in named.subjects:
        names = [subject <= item.title or subject <= item.words for item in candidates]
        candidates = [
            item
            for index, item in enumerate(candidates)
            if names[index] or (index and names[index - 1] and candidates[index - 1].passage == item.passage)
        ]
    for mention in named.mentions:
        places = {item.passage for item in candidates if mention <= item.title or mention <= item.words}
        candidates = [item for item in candidates if item.passage in places]
    return candidates, about


def _weights(asked: Sequence[str], candidates: Sequence[_Candidate]) -> dict[str, float]:
    """The idf of each asked word among the candidate sentences; unseen words weigh as the rarest."""
    counts = Counter(word for item in candidates for word in asked if word in item.words or word in item.title)
    total = len(candidates)
    return {word: math.log(1 + (total - counts[word] + 0.5) / (counts[word] + 0.5)) for word in asked}


def _chosen(
    candidates: Sequence[_Candidate], weights: dict[str, float], about: frozenset[str], question: str
) -> list[_Candidate]:
    total = sum(weights.values())
    named = any(_is_named(item, weights) for item in candidates)
    if not named and not _any_passage_covers(candidates, weights):
        return []
    compares = not _TASK_WORDS.isdisjoint(content_words(question))
    told = {} if compares or not about else _told_of(about, weights, question)
    defines = compares or (not told and bool(_DEFINITION.search(question)))
    project = bool(_ABOUT_PROJECT.search(question))
    base = [_score(item, weights, defines=defines, named=named, project=project) for item in candidates]
    # What is asked of the thing, the answer must speak of: that numpy is a package does not make it thread safe.
    enough = _FOUND_ASKED * sum(told.values())
    leads = {index for index, item in enumerate(candidates) if _told(item, told) >= enough}
    if not leads:
        return []
    speaks = {index for index, item in enumerate(candidates) if not told or not told.keys().isdisjoint(item.words)}
    # A comparison owes something to each side before it says more of any.
    owed = {item.name for item in candidates if compares and _is_named(item, weights)}
    chosen: list[_Candidate] = []
    covered: set[str] = set()
    followers: set[int] = set()
    first = 0.0
    left = set(range(len(candidates)))
    while left and len(chosen) < _MAX_SENTENCES:
        pool = {index for index in left if candidates[index].name in owed} or (left & speaks if chosen else leads)
        if not pool:
            break
        gains = {index: base[index] * (_news(candidates[index], weights, covered) if chosen else 1.0) for index in pool}
        if defines:
            for index in pool & followers:
                gains[index] *= _FOLLOWS
        best = min(pool, key=lambda index: (-gains[index], index))
        item = candidates[best]
        left.discard(best)
        if not chosen:
            if not owed and _share(item, weights) < _FOUND_SENTENCE * total:
                return []
            first = gains[best]
        elif item.name not in owed and gains[best] < _WORTH * first:
            break
        elif any(overlap(item.words, other.words) >= _REDUNDANT for other in chosen):
            continue
        chosen.append(item)
        owed.discard(item.name)
        if best + 1 < len(candidates) and candidates[best + 1].passage == item.passage:
            followers.add(best + 1)
        covered |= item.words & weights.keys()
    return chosen


def _is_named(item: _Candidate, weights: dict[str, float]) -> bool:
    """Whether the question has the whole name of the document that the sentence is from."""
    return bool(item.name) and item.name <= weights.keys()


def _any_passage_covers(candidates: Sequence[_Candidate], weights: dict[str, float]) -> bool:
    """Whether one passage holds enough of the question, by weight or by number of words, to hold the answer."""
    held: dict[int, set[str]] = {}
    for item in candidates:
        held.setdefault(item.passage, set()).update(item.words & weights.keys(), item.title & weights.keys())
    enough = _FOUND_PASSAGE * sum(weights.values())
    return any(
        sum(weights[word] for word in words) >= enough or len(words) > _FOUND_PASSAGE * len(weights)
        for words in held.values()
    )


def _told_of(about: frozenset[str], weights: dict[str, float], question: str) -> dict[str, float]:
    """What is asked of the thing that is named ``about``, by weight. Verbs count only where there is nothing else: the
    answer may have another ("requires" for "support", "write" for "define").
    """
    told = {word: weight for word, weight in weights.items() if word not in about}
    for verb in (verb_of(question), *_RELATIONS):
        if len(told) > 1:
            told.pop(verb, None)
    return told


def _told(item: _Candidate, told: dict[str, float]) -> float:
    """The weight of the asked words in the sentence or in the headings above it."""
    return sum(weight for word, weight in told.items() if word in item.words or word in item.title)


def _share(item: _Candidate, weights: dict[str, float]) -> float:
    """The weight of the asked words in the sentence; what only its title says, it is about, and that counts half."""
    share = 0.0
    for word, weight in weights.items():
        if word in item.words:
            share += weight
        elif word in item.title:
            share += 0.5 * weight
    return share


def _score(item: _Candidate, weights: dict[str, float], *, defines: bool, named: bool, project: bool) -> float:
    score = _share(item, weights)
    if not score:
        return 0.0
    score *= item.traits.weight * _RANK_DECAY**item.passage
    if item.traits.aside and not project:
        score *= _ASIDE
    if item.traits.shows and defines:
        score *= _ASIDE
    if named and not _is_named(item, weights):
        score *= _ELSEWHERE
    if defines:
        if not item.traits.defines.isdisjoint(weights):
            score *= _DEFINES
        if item.place < 2 and not item.title.isdisjoint(weights):
            score *= _INTRODUCTION if item.title == item.name else _LEAD
    return score


def _news(item: _Candidate, weights: dict[str, float], covered: set[str]) -> float:
    """How much of what the sentence holds is not covered yet, in [0.4, 1]: more on the same subject is worth a bit."""
    held = [weight for word, weight in weights.items() if word in item.words]
    new = [weight for word, weight in weights.items() if word in item.words and word not in covered]
    return 0.4 + 0.6 * sum(new) / sum(held) if held else 0.4


def _ended(text: str) -> str:
    return text if text.rstrip("\"')*_")[-1:] in tuple(".!?") else f"{text}."


def synthesise(notes: Sequence[Passage]) -> str:
    """The notes one after another, sentences that were said before left out."""
    said: set[str] = set()
    parts: list[str] = []
    for note in notes:
        if is_not_found(note.text):
            parts.append(_ended(note.text))
            continue
        fresh = [sentence for sentence in split_sentences(note.text) if sentence not in said]
        said.update(fresh)
        if fresh:
            parts.append(" ".join(fresh))
    return "\n\n".join(parts)


def plan(question: str) -> str:
    """A plan (JSON of :class:`agents.planning.Plan`) for ``question``: one step, or one for each of its parts."""
    question = " ".join(question.split())
    sides = compared(question)
    if sides:
        parts = [f"What is {name}?" if not aspect else f"{name}: {aspect}" for name, aspect in sides]
        steps = [_step(number, "retrieve", part) for number, part in enumerate(parts, start=1)]
        steps.append(_step(len(steps) + 1, "research", question, [str(number + 1) for number in range(len(parts))]))
        return _json(steps, "a comparison: each side is looked up, then they are held against each other")
    parts = parts_of(question)[:12]
    steps = [_step(number, "retrieve", part) for number, part in enumerate(parts, start=1)]
    return _json(steps, "a simple question" if len(parts) == 1 else f"{len(parts)} questions, each answered on its own")


def _step(number: int, capability: str, objective: str, depends_on: Sequence[str] = ()) -> dict[str, object]:
    return {"id": str(number), "capability": capability, "objective": objective, "depends_on": list(depends_on)}


def _json(steps: list[dict[str, object]], rationale: str) -> str:
    return orjson.dumps({"steps": steps, "rationale": rationale}).decode()
