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
from typing import Final

import orjson

from agents.answering import NOT_FOUND_WORD
from agents.context import LlmRequest, LlmResponse, Passage, Purpose
from agents.text import content_words, is_not_found, markers_inside, overlap, sentences, split_sentences

__all__ = ["ExtractiveModel"]

_MODEL: Final = "extractive-1"
_MAX_SENTENCES: Final = 4
_REDUNDANT: Final = 0.6
"""Word overlap (Jaccard) from which two sentences say the same."""

_LEAD: Final = 1.35
"""A README says in its first two sentences what the thing is; they count this much more when that is asked."""

_RANK_DECAY: Final = 0.94
"""Each place down the recall's order counts this much less: recall knows similarity that words don't show."""

_WORTH: Final = 0.42
"""A further sentence must add at least this share of the first one's score."""

_FOUND: Final = 0.3
"""The share of the question's weight that the best sentence and its title must hold to count as an answer at all."""

_DEFINITION = re.compile(
    r"\b(?:what(?:'s|\s+is|\s+are|\s+does)|who\s+is|tell me about|describe|explain)\b", re.IGNORECASE
)
_IS_A = re.compile(
    r"^[\w .`'()-]{1,50}?\b(?:is|are|provides?|implements?|allows?|lets|offers|makes|contains)\b", re.IGNORECASE
)
_ABOUT_PROJECT = re.compile(
    r"\b(?:badge|licen[sc]ed?|copyright|sponsor|donat|contribut|changelog|pull requests?|code of conduct|mailing list|"
    r"stack overflow|discord|slack|github issues|bug reports?|release notes|readthedocs)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class _Candidate:
    passage: int
    place: int
    text: str
    words: frozenset[str]
    title: frozenset[str]


class ExtractiveModel:
    """Serves :class:`~agents.context.LanguageModel` by extraction. Counts words as tokens; costs nothing."""

    name = "extractive"

    async def complete(self, request: LlmRequest) -> LlmResponse:
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
    asked = dict.fromkeys(content_words(question))
    candidates = [item for item in _candidates(passages) if not refused or item.text[:200] not in refused]
    if not asked or not candidates:
        return NOT_FOUND_WORD
    weights = _weights(asked, candidates)
    chosen = _chosen(candidates, weights, question)
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
        for place, text in enumerate(sentences(passage.text)):
            if text not in seen and not text.endswith("?"):
                seen.add(text)
                found.append(_Candidate(number, place, text, frozenset(content_words(text)), title))
    return found


def _weights(asked: dict[str, None], candidates: Sequence[_Candidate]) -> dict[str, float]:
    """The idf of each asked word among the candidate sentences; unseen words weigh as the rarest."""
    counts = Counter(word for item in candidates for word in (item.words | item.title) if word in asked)
    total = len(candidates)
    return {word: math.log(1 + (total - counts[word] + 0.5) / (counts[word] + 0.5)) for word in asked}


def _chosen(candidates: Sequence[_Candidate], weights: dict[str, float], question: str) -> list[_Candidate]:
    defines = bool(_DEFINITION.search(question))
    total = sum(weights.values())
    base = [_score(item, weights, defines) for item in candidates]
    chosen: list[_Candidate] = []
    covered: set[str] = set()
    first = 0.0
    left = set(range(len(candidates)))
    while left and len(chosen) < _MAX_SENTENCES:
        gains = {
            index: base[index] * (1.0 if not chosen else _news(candidates[index], weights, covered)) for index in left
        }
        best = min(left, key=lambda index: (-gains[index], index))
        item = candidates[best]
        left.discard(best)
        if not chosen:
            held = sum(weight for word, weight in weights.items() if word in item.words or word in item.title)
            if held < _FOUND * total or not base[best]:
                return []
            first = gains[best]
        elif gains[best] < _WORTH * first:
            break
        elif any(overlap(item.words, other.words) >= _REDUNDANT for other in chosen):
            continue
        chosen.append(item)
        covered |= item.words & weights.keys()
    return chosen


def _score(item: _Candidate, weights: dict[str, float], defines: bool) -> float:
    held = sum(weight for word, weight in weights.items() if word in item.words)
    # What the title says, the sentence is about without saying it again.
    held += 0.5 * sum(weight for word, weight in weights.items() if word in item.title and word not in item.words)
    if not held:
        return 0.0
    score = held / (1 + 0.02 * max(0, len(item.words) - 20)) * _RANK_DECAY**item.passage
    if defines and item.title & weights.keys():
        if item.place < 2:
            score *= _LEAD
        if _IS_A.match(item.text):
            score *= _LEAD
    if _ABOUT_PROJECT.search(item.text):
        score *= 0.5
    return score * (0.7 if len(item.words) < 4 else 1.0)


def _news(item: _Candidate, weights: dict[str, float], covered: set[str]) -> float:
    """How much of what the sentence holds is not covered yet, in [0.4, 1]: more on the same subject is worth a bit."""
    held = [weight for word, weight in weights.items() if word in item.words]
    new = [weight for word, weight in weights.items() if word in item.words and word not in covered]
    return 0.4 + 0.6 * sum(new) / sum(held) if held else 0.4


def _ended(text: str) -> str:
    return text if text[-1] in ".!?" or text.endswith((".)", '."')) else f"{text}."


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
    r"^\s*(?:what(?:'s|\s+is|\s+are|\s+does|\s+do)|who\s+is|tell me about|describe|explain"
    r"|how\s+do\s+i\s+\w+|how\s+to\s+\w+)"
    r"\s+(?:the\s+|a\s+|an\s+)?(?P<subject>[\w.\-]+)",
    re.IGNORECASE,
)
_PRONOUN = re.compile(r"\b(?:it|its|they|them|their|this|that)\b", re.IGNORECASE)


def plan(question: str) -> str:
    """A plan (JSON of :class:`agents.planning.Plan`) for ``question``: one step, or one for each of its parts."""
    question = " ".join(question.split())
    compared = _compared(question)
    if compared:
        parts = [f"What is {name}?" if not aspect else f"{name}: {aspect}" for name, aspect in compared]
        steps = [_step(number, "retrieve", part) for number, part in enumerate(parts, start=1)]
        steps.append(_step(len(steps) + 1, "research", question, [str(number + 1) for number in range(len(parts))]))
        return _json(steps, "a comparison: each side is looked up, then they are held against each other")
    parts = _parts(question)[:12]
    steps = [_step(number, "retrieve", part) for number, part in enumerate(parts, start=1)]
    return _json(steps, "a simple question" if len(parts) == 1 else f"{len(parts)} questions, each answered on its own")


def _compared(question: str) -> list[tuple[str, str]]:
    match = _COMPARE.match(question) or _DIFFERENCE.match(question) or _VERSUS.match(question)
    if match is None:
        return []
    groups = match.groupdict()
    sides = [groups.get(name) for name in ("a", "b", "c", "d") if groups.get(name)]
    names = [part for side in sides for part in re.split(r",\s*(?:and\s+)?", side or "") if part]
    return [(name.strip(), (groups.get("by") or "").strip()) for name in names]


def _parts(question: str) -> list[str]:
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


def _step(number: int, capability: str, objective: str, depends_on: Sequence[str] = ()) -> dict[str, object]:
    return {"id": str(number), "capability": capability, "objective": objective, "depends_on": list(depends_on)}


def _json(steps: list[dict[str, object]], rationale: str) -> str:
    return orjson.dumps({"steps": steps, "rationale": rationale}).decode()
