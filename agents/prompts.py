"""What the agents say to language models: every prompt by its name, in one place.

In: nothing, or other texts by name. Out: :class:`Prompts`, which agents are made with. A prompt is part of the request
whose hash an effect is known by, so a changed one shows in every audit, and what it would have done to tasks that are
over is what a what-if tells.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Final

from agents.errors import PromptError
from agents.planning import MAX_STEPS
from schemas.topics import CAPABILITIES

__all__ = ["NOT_FOUND_WORD", "PROMPTS", "Prompts"]

NOT_FOUND_WORD: Final = "NOT_FOUND"
"""What a language model answers, alone, when the passages don't hold the answer."""

_WHAT: Final = {
    "retrieve": "answer one self-contained question from the corpus, with citations",
    "research": "look from several sides, and combine the results of the steps it depends on, with citations",
}

_PLAN: Final = f"""You plan how a question is answered from a corpus of documents.
Answer with a JSON plan: steps (id, capability, objective, depends_on) and a one-sentence rationale.
Capabilities:
{chr(10).join(f"- {name}: {_WHAT[name]}" for name in CAPABILITIES)}
A simple question is one retrieve step whose objective is the question as it was asked.
A question with several parts gets a retrieve step for each part; each objective must stand alone, without pronouns.
Where the parts have to be weighed against each other, as in a comparison, add a research step that depends on them.
Dependencies must not form a cycle. At most {MAX_STEPS} steps, and no more than the question needs."""

_ANSWER: Final = f"""You answer questions from numbered passages of a corpus, and from nothing else.
Put the number of the passage that supports it behind each sentence, as in [1]; several as in [1][3].
Keep numbers, names, versions and negations exactly as the passages have them. Be brief: a few sentences.
If the passages do not hold the answer, reply with the one word {NOT_FOUND_WORD}."""

_COMBINE: Final = (
    "The question asks you to weigh several things: say what the passages tell of each of them, and where they differ."
)

_SYNTHESISE: Final = """You combine the notes into one answer to the question.
Use only what the notes say, keep their markers such as [1] behind the sentences they belong to, and be brief."""

_NEEDED: Final = {"mend": "{error}", "review": "{finding}"}


@dataclass(frozen=True, slots=True)
class Prompts:
    """The prompts by name: ``plan`` (the Decomposer's), ``mend`` (it follows a plan that can't be used; ``{error}``
    stands for why), ``answer`` (the workers'), ``combine`` (what the Researcher adds to ``answer``), ``review`` (it
    follows an answer that was sent back; ``{finding}`` stands for why) and ``synthesise`` (the Coordinator's).

    Raises:
        PromptError: one of them lacks what it has to hold a place for.
    """

    plan: str = _PLAN
    mend: str = "That plan can't be used: {error}. Answer with the corrected plan as JSON and nothing else."
    answer: str = _ANSWER
    combine: str = _COMBINE
    review: str = "A reviewer sent the last answer back: {finding}\nAnswer again."
    synthesise: str = _SYNTHESISE

    def __post_init__(self) -> None:
        for name, place in _NEEDED.items():
            if place not in getattr(self, name):
                raise PromptError(f"the prompt {name!r} has no {place}: put it where the text is to stand")

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The names of all prompts."""
        return tuple(field.name for field in fields(cls))

    def with_texts(self, texts: Mapping[str, str]) -> "Prompts":
        """These prompts, with other ``texts`` under their names.

        Raises:
            PromptError: there is no prompt of that name, or its text lacks a place.
        """
        for name in texts:
            if name not in self.names():
                raise PromptError(f"there is no prompt {name!r}; choose one of: {', '.join(self.names())}")
        return replace(self, **texts)

    @property
    def combining(self) -> str:
        """The system text for an answer that weighs several things."""
        return f"{self.answer}\n{self.combine}"

    def mending(self, error: str) -> str:
        """What is said of a plan that can't be used."""
        return self.mend.replace("{error}", error)

    def reviewing(self, finding: str) -> str:
        """What is said of an answer that was sent back."""
        return self.review.replace("{finding}", finding)


PROMPTS: Final = Prompts()
"""The prompts that agents have when they are given none."""
