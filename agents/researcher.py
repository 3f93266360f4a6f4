"""The Researcher: looks at a question from several sides, and combines the results of the steps it depends on.

In: StepAssigned of the capability ``research``, with the accepted results of its dependencies. Out: StepCompleted with
answer, claims, citations and evidence, or StepFailed when there is nothing to go by. It recalls in rounds: first the
objective, then what the passages found so far do not cover; then it weighs the passages so that no single document
drowns the others.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Final

from pydantic import BaseModel

from agents.agent import Agent, Failure
from agents.answering import answer_step, merged, no_evidence, step_failed
from agents.context import Context
from agents.prompts import PROMPTS, Prompts
from agents.text import content_words
from schemas.events import Evidence, StepAssigned, StepCompleted, StepFailed

__all__ = ["Researcher"]

_PASSAGES: Final = 8
"""How many passages one recall asks for."""

_KEPT: Final = 12
"""How many passages the language model sees: about 3,000 tokens."""

_ROUNDS: Final = 3
"""The first recall and at most two derived ones; on the READMEs tried, a fourth found no new document."""

_DIVERSITY: Final = 0.85
"""A document's n-th passage counts 0.85**(n-1) of its score: a second one from the best document still beats a
passage that is 15 % less alike, a fourth one only such that are 40 % less alike."""


class Researcher(Agent[BaseModel]):
    """Several recalls, weighed sources, the dependencies' results as evidence."""

    name, version = "researcher", "1"
    consumes = (StepAssigned,)
    emits = (StepCompleted, StepFailed)
    capabilities = ("research",)

    def __init__(self, prompts: Prompts = PROMPTS) -> None:
        self._prompts = prompts

    def lane(self, event: StepAssigned) -> str:  # type: ignore[override]
        """Steps of one task run side by side."""
        return event.step_id

    async def handle(self, event: StepAssigned, ctx: Context[BaseModel]) -> None:
        """Recall in rounds, weigh, answer, cite.

        Raises:
            EffectFailedError: memory or the language model failed.
        """
        given = _from_inputs(event)
        found = merged(given, await ctx.recall(event.objective, limit=_PASSAGES))
        asked = {event.objective}
        for _ in range(_ROUNDS - 1):
            query = _next_query(event, found, asked)
            if not query:
                break
            asked.add(query)
            found = merged(found, await ctx.recall(query, limit=_PASSAGES))
        evidence = _weighed(found, {item.chunk_id for item in given}, _KEPT + _PASSAGES * event.revision)
        if evidence:
            ctx.emit(await answer_step(event, evidence, ctx, self._prompts, combine=True))
        else:
            ctx.emit(no_evidence(event))

    async def on_failure(self, event: StepAssigned, failure: Failure, ctx: Context[BaseModel]) -> None:
        """Tell the Coordinator that the step failed, and whether another attempt may succeed."""
        ctx.emit(step_failed(event, failure))


def _from_inputs(event: StepAssigned) -> list[Evidence]:
    """What the dependencies' results rest on: their quotes, which were held against the documents already."""
    return merged(
        Evidence(
            chunk_id=citation.chunk_id,
            document_id=citation.document_id,
            title=citation.title,
            heading=citation.heading,
            source=citation.source,
            text=citation.quote,
            score=1.0,
        )
        for result in event.inputs
        for citation in result.citations
    )


def _next_query(event: StepAssigned, found: Sequence[Evidence], asked: set[str]) -> str:
    """What to ask next: the finding, the inputs' objectives, then the objective's words that no passage holds yet."""
    for query in (event.finding, *(result.objective for result in event.inputs)):
        if query and query not in asked:
            return query
    covered = {word for item in found for word in content_words(f"{item.title} {item.text}")}
    missing = [word for word in event.objective.split() if set(content_words(word)) - covered]
    query = " ".join(missing)
    return query if query not in asked else ""


def _weighed(found: Sequence[Evidence], given: set[str], limit: int) -> list[Evidence]:
    """The ``limit`` weightiest passages: the inputs' first, then by score, each document's further ones discounted."""
    chosen = [item for item in found if item.chunk_id in given][:limit]
    rest = [item for item in found if item.chunk_id not in given]
    seen = Counter(item.document_id for item in chosen)
    while rest and len(chosen) < limit:
        best = max(rest, key=lambda item: item.score * _DIVERSITY ** seen[item.document_id])
        rest.remove(best)
        chosen.append(best)
        seen[best.document_id] += 1
    return chosen
