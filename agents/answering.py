"""What the workers share: asking a language model over evidence, and taking its answer apart into claims and citations.

In: a step, the evidence found for it, a handler's context. Out: StepCompleted, whose answer's markers match its
citations one to one and whose claims name the chunks that are said to support them.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Final

from agents.agent import Failure
from agents.context import Context, LlmRequest, Message, Passage, Purpose
from agents.prompts import NOT_FOUND_WORD, Prompts
from agents.text import (
    best_sentences,
    content_words,
    markers_inside,
    markers_of,
    not_found,
    renumber,
    sentences,
    split_sentences,
    without_markers,
)
from schemas.events import Citation, Claim, Evidence, StepAssigned, StepCompleted, StepFailed

__all__ = ["answer_step", "merged", "no_evidence", "step_failed"]

_QUOTE_CHARS: Final = 400
"""A quote is there to be checked at a glance; the whole passage is in the evidence."""


async def answer_step(
    event: StepAssigned, evidence: Sequence[Evidence], ctx: Context[Any], prompts: Prompts, *, combine: bool = False
) -> StepCompleted:
    """Ask the language model for an answer to ``event``'s objective over ``evidence``, and take it apart.

    Raises:
        EffectFailedError: the language model failed.
    """
    messages: tuple[Message, ...] = (Message(role="user", content=event.objective),)
    if event.finding:
        messages += (Message(role="user", content=prompts.reviewing(event.finding)),)
    response = await ctx.llm(
        LlmRequest(
            purpose=Purpose.ANSWER,
            system=prompts.combining if combine else prompts.answer,
            messages=messages,
            passages=tuple(
                Passage(marker=number, chunk_id=item.chunk_id, title=_title(item), text=item.text)
                for number, item in enumerate(evidence, start=1)
            ),
        )
    )
    answer, cited = _numbered(response.text, len(evidence))
    if not answer or answer.strip(" .*\"'`").upper() == NOT_FOUND_WORD:
        answer, cited = not_found(event.objective), ()
    sources = [evidence[number - 1] for number in cited]
    chunk_ids = [source.chunk_id for source in sources]
    parts = [(sentence, markers_of(sentence)) for sentence in split_sentences(answer)] if cited else []
    claims = tuple(
        Claim(text=text, chunk_ids=tuple(chunk_ids[marker - 1] for marker in markers))
        for sentence, markers in parts
        if (text := without_markers(sentence))
    )
    citations = tuple(
        _citation(marker, source, " ".join(text for text, markers in parts if marker in markers))
        for marker, source in enumerate(sources, start=1)
    )
    return StepCompleted(
        task_id=event.task_id,
        step_id=event.step_id,
        attempt=event.attempt,
        revision=event.revision,
        capability=event.capability,
        objective=event.objective,
        answer=answer,
        claims=claims,
        citations=citations,
        # Only what the claims rest on travels on; all of it lies in the recall's own record.
        evidence=tuple(sources if cited and all(claim.chunk_ids for claim in claims) else evidence),
        model=f"{response.provider}/{response.model}",
    )


def no_evidence(event: StepAssigned) -> StepFailed:
    """The failure of a step for which memory holds nothing at all: another attempt would find nothing either."""
    message = f"nothing was found for {event.objective!r}: the corpus is empty; ingest documents, then ask again"
    return step_failed(event, Failure("NoEvidence", message, retryable=False))


def step_failed(event: StepAssigned, failure: Failure) -> StepFailed:
    """What tells the Coordinator that the step failed, and whether another attempt may succeed."""
    return StepFailed(
        task_id=event.task_id,
        step_id=event.step_id,
        attempt=event.attempt,
        error_type=failure.error_type,
        message=failure.message,
        retryable=failure.retryable,
    )


def merged(*groups: Iterable[Evidence]) -> list[Evidence]:
    """The evidence of all ``groups`` in order, each chunk once; of a chunk seen twice the longer text stays."""
    by_chunk: dict[str, Evidence] = {}
    for group in groups:
        for item in group:
            known = by_chunk.get(item.chunk_id)
            if known is None or len(item.text) > len(known.text):
                by_chunk[item.chunk_id] = item
    return list(by_chunk.values())


def _numbered(text: str, passages: int) -> tuple[str, tuple[int, ...]]:
    """The answer with its markers counted from 1 in order of appearance, and the passage behind each of them.

    Markers of passages that do not exist are dropped.
    """
    text = markers_inside(text.strip())
    cited = tuple(marker for marker in markers_of(text) if 1 <= marker <= passages)
    return renumber(text, {old: new for new, old in enumerate(cited, start=1)}), cited


def _citation(marker: int, source: Evidence, claimed: str) -> Citation:
    candidates = sentences(source.text) or (source.text,)
    _, best = best_sentences(content_words(claimed), candidates)[0]
    return Citation(
        marker=marker,
        chunk_id=source.chunk_id,
        document_id=source.document_id,
        title=source.title,
        heading=source.heading,
        source=source.source,
        quote=candidates[best][:_QUOTE_CHARS],
    )


def _title(item: Evidence) -> str:
    return f"{item.title} > {item.heading}" if item.heading and item.heading != item.title else item.title
