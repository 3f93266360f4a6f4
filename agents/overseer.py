"""The Overseer: holds each claim of a result against its evidence.

In: StepCompleted. Out: StepAssessed: accept; revise, once, with a finding that names the claims that nothing supports;
or reject. A claim is judged by the share of its content words that one place of its evidence holds; where that leaves
doubt, by the cosine of embeddings. Either way its numbers and names must be there, and a negation must not have come or
gone: a claim that turns "supports Python 3.8" into 3.9 shares nearly all its words.

The Overseer trusts no worker: the answer's own sentences are its claims when a worker names none. An answer that says
that the corpus does not hold what was asked states nothing that could be ungrounded; it is accepted, groundedness 1.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from pydantic import BaseModel

from agents.agent import Agent, Failure
from agents.context import Context
from agents.text import (
    bare,
    best_sentences,
    containment,
    content_words,
    is_not_found,
    sentences,
    split_sentences,
    tokens,
    without_markers,
)
from schemas.events import AssessedClaim, Assessment, Claim, Evidence, StepAssessed, StepCompleted, StepFailed

__all__ = ["Overseer"]

# Calibrated on 40 claims about 12 installed packages against their READMEs (tests/unit/test_agents_calibration.py has
# them): 17 of 20 paraphrases are accepted, 17 of 20 falsehoods that stay near to the text (another number, name or
# subject, a negation) are caught. The three that pass change one ordinary word ("web interfaces" for "command line
# interfaces", "slow" for "fast"): similarity, of words or of embeddings, does not see that.

LEXICAL_ACCEPT: Final = 0.85
"""Containment from which a claim is grounded without a look at its embedding. Below, a short claim can have its one
telling word swapped ("HTTPX is a fully featured HTTP server": 0.80)."""

LEXICAL_REJECT: Final = 0.15
"""Containment under which no embedding can save a claim: it shares no more than a stray word with its evidence."""

EMBEDDING_ACCEPT: Final = 0.70
"""Cosine (all-MiniLM-L6-v2) from which a claim in between is grounded: the paraphrases score 0.71 to 0.98 but for
three, claims about the same thing that it does not say 0.35 to 0.64."""

_MAX_REVISIONS: Final = 1

_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_WORD = re.compile(r"\w+")
_NAME = re.compile(
    r"\b(?:[A-Z][\w-]*[A-Z0-9_][\w-]*|[a-z]\w*_\w+|[a-z]+[A-Z]\w*|\w+\d\w*)\b|(?<=[a-z,;:] )[A-Z][a-z]+\b"
)
_NEGATIONS: Final = frozenset(
    (
        "not",
        "no",
        "never",
        "without",
        "cannot",
        "cant",
        "dont",
        "doesnt",
        "isnt",
        "arent",
        "wont",
        "nor",
        "neither",
        "none",
    )
)


@dataclass(frozen=True, slots=True)
class _Held:
    """A claim held lexically against its evidence. ``faithful``: numbers, names and negations agree."""

    text: str
    chunk_ids: tuple[str, ...]
    lexical: float
    faithful: bool
    window: str

    @property
    def decisive(self) -> bool:
        return not self.faithful or self.lexical >= LEXICAL_ACCEPT or self.lexical < LEXICAL_REJECT


class Overseer(Agent[BaseModel]):
    """Assesses results claim by claim."""

    name, version = "overseer", "1"
    consumes = (StepCompleted,)
    emits = (StepAssessed, StepFailed)

    def lane(self, event: StepCompleted) -> str:  # type: ignore[override]
        """Steps of one task are assessed side by side."""
        return event.step_id

    async def handle(self, event: StepCompleted, ctx: Context[BaseModel]) -> None:
        """Assess the result.

        Raises:
            EffectFailedError: the embedding model failed.
        """
        claims = () if is_not_found(event.answer) else event.claims or _claims_of(event.answer)
        held = [_hold(claim, _evidence_for(claim, event.evidence)) for claim in claims]
        doubtful = [item for item in held if not item.decisive]
        cosines: dict[str, float] = {}
        if doubtful:
            vectors = await ctx.embed([text for item in doubtful for text in (item.text, item.window)])
            # Sums of float32 can differ between machines in their last digit and so, now and then, in the fourth.
            exact = vectors.astype(np.float64)
            similar = np.einsum("ij,ij->i", exact[0::2], exact[1::2])
            cosines = {
                item.text: round(float(min(max(value, 0.0), 1.0)), 4)
                for item, value in zip(doubtful, similar, strict=True)
            }
        ctx.emit(_assessment(event, [_assessed(item, cosines.get(item.text)) for item in held]))

    async def on_failure(self, event: StepCompleted, failure: Failure, ctx: Context[BaseModel]) -> None:
        """Fail the step: a result that could not be assessed must not pass."""
        ctx.emit(
            StepFailed(
                task_id=event.task_id,
                step_id=event.step_id,
                attempt=event.attempt,
                error_type=failure.error_type,
                message=f"the result could not be assessed: {failure.message}",
                retryable=False,
            )
        )


def _claims_of(answer: str) -> tuple[Claim, ...]:
    """The sentences of an answer whose worker named no claims."""
    return tuple(Claim(text=text) for part in split_sentences(answer) if (text := without_markers(part)))


def _evidence_for(claim: Claim, evidence: Sequence[Evidence]) -> Sequence[Evidence]:
    """The chunks that the claim cites; all of them when it cites none."""
    return [item for item in evidence if item.chunk_id in claim.chunk_ids] if claim.chunk_ids else evidence


def _hold(claim: Claim, evidence: Sequence[Evidence]) -> _Held:
    words = content_words(claim.text)
    said = bare(claim.text)
    best = _Held(claim.text, claim.chunk_ids, 0.0, faithful=False, window="")
    for item in evidence:
        candidates = sentences(item.text) or (item.text,)
        if said and (said in map(bare, candidates) or _stands_in(said, item.text)):
            return _Held(claim.text, claim.chunk_ids, 1.0, faithful=True, window=claim.text)
        score, place = best_sentences(words, candidates)[0]
        window = candidates[place]
        around = " ".join((item.title, item.heading, *candidates[max(0, place - 1) : place + 2]))
        if not words:
            continue
        # The neighbours complete a claim that draws two sentences together, but count less than one sentence alone.
        lexical = max(score, 0.9 * containment(words, content_words(around)))
        faithful = _faithful(claim.text, window, around, f"{item.title} {item.heading} {item.text}")
        if (faithful, lexical) > (best.faithful, best.lexical):
            best = _Held(claim.text, claim.chunk_ids, round(lexical, 4), faithful, window)
    return best


def _stands_in(said: str, text: str) -> bool:
    """Whether ``text`` has ``said`` as whole lines or sentences: a part of one may leave out its negation."""
    whole = rf"(?:^|[.!?][\"')*_]*\s)[\s\"'`(*_]*{re.escape(said)}[\"'`)*_]*(?:[.!?,;:](?:\s|$)|\s*$)"
    return said in text and re.search(whole, text, re.MULTILINE) is not None


def _faithful(claim: str, window: str, around: str, whole: str) -> bool:
    """Whether the claim's numbers are near its best sentence (``window``) and its names somewhere in the passage, and
    it is negated just when that sentence is.
    """
    if not set(_NUMBER.findall(claim)) <= set(_NUMBER.findall(around)):
        return False
    known = set(_WORD.findall(whole.lower()))
    if any(not known.issuperset(_WORD.findall(name.lower())) for name in _NAME.findall(claim)):
        return False
    return _negated(claim) == _negated(window)


def _negated(text: str) -> bool:
    return any(word in _NEGATIONS for word in tokens(text.replace("'", "").replace("’", "")))


def _assessed(held: _Held, cosine: float | None) -> AssessedClaim:
    similar = held.lexical >= LEXICAL_ACCEPT or (cosine is not None and cosine >= EMBEDDING_ACCEPT)
    return AssessedClaim(
        text=held.text,
        chunk_ids=held.chunk_ids,
        lexical_similarity=held.lexical,
        embedding_similarity=cosine,
        grounded=held.faithful and similar,
    )


def _assessment(event: StepCompleted, claims: Sequence[AssessedClaim]) -> StepAssessed:
    ungrounded = [claim.text for claim in claims if not claim.grounded]
    decision, finding = Assessment.ACCEPT, ""
    if ungrounded:
        decision = Assessment.REVISE if event.revision < _MAX_REVISIONS else Assessment.REJECT
        named = "; ".join(f"{text[:200]!r}" for text in ungrounded[:5])
        finding = f"the evidence does not support {len(ungrounded)} of {len(claims)} claims: {named}"
    elif not event.answer.strip():
        decision = Assessment.REVISE if event.revision < _MAX_REVISIONS else Assessment.REJECT
        finding = "the answer is empty"
    grounded = len(claims) - len(ungrounded)
    share = grounded / len(claims) if claims else float(bool(event.answer.strip()))
    return StepAssessed(
        task_id=event.task_id,
        step_id=event.step_id,
        attempt=event.attempt,
        revision=event.revision,
        decision=decision,
        groundedness=round(share, 4),
        claims=tuple(claims),
        finding=finding,
        answer=event.answer,
        citations=event.citations,
    )
