"""What a what-if may spend: tokens and dollars, reserved before each call, settled after it.

In: limits, and what was spent before. Out: whether a call may be made. A call is refused when it could take the sum
over a limit, by an estimate that is on the high side; from then on no call is made, so that the end is a clean one.
"""

import asyncio
from collections.abc import Callable, Sequence

from agents.ports import LlmRequest

__all__ = ["Budget", "Estimate", "tokens_of"]

Estimate = Callable[[LlmRequest], tuple[int, float]]
"""The most that a call may take: tokens, and US dollars."""

_CHARS_A_TOKEN = 3
"""English text has about four characters a token; other scripts have fewer."""


def tokens_of(request: LlmRequest) -> tuple[int, int]:
    """The most prompt and completion tokens that the request may take, by the length of its text."""
    texts = [request.system, request.response_schema, *(message.content for message in request.messages)]
    texts += [f"{passage.title}{passage.text}" for passage in request.passages]
    return sum(len(text) for text in texts) // _CHARS_A_TOKEN + 1, request.max_tokens


class Budget:
    """Limits (None: none) and sums. ``exhausted`` says in words which limit the next call would have gone over."""

    def __init__(self, max_tokens: int | None = None, max_usd: float | None = None) -> None:
        self._max_tokens, self._max_usd = max_tokens, max_usd
        self.tokens, self.usd = 0, 0.0
        self.exhausted = ""
        self._reserved: list[tuple[int, float]] = []
        self._settled = asyncio.Event()

    async def reserve(self, tokens: int, usd: float) -> bool:
        """Set aside what a call may take; False when it is not to be made.

        Where only the calls under way stand in its way it waits for them: they hardly ever take all that they may.
        """
        while not self.exhausted:
            told = self._over(tokens, usd, self._reserved)
            if not told:
                self._reserved.append((tokens, usd))
                return True
            if not self._reserved:
                self.exhausted = told
                break
            self._settled.clear()
            await self._settled.wait()
        return False

    def _over(self, tokens: int, usd: float, under_way: Sequence[tuple[int, float]]) -> str:
        after_tokens = self.tokens + tokens + sum(each[0] for each in under_way)
        after_usd = self.usd + usd + sum(each[1] for each in under_way)
        if self._max_tokens is not None and after_tokens > self._max_tokens:
            return f"the next call could take it to {after_tokens:,} tokens, over {self._max_tokens:,}"
        if self._max_usd is not None and after_usd > self._max_usd:
            return f"the next call could take it to ${after_usd:.4f}, over ${self._max_usd:.4f}"
        return ""

    def settle(self, reserved: tuple[int, float], tokens: int, usd: float) -> None:
        """Count what a call took, in place of what was reserved for it."""
        self._reserved.remove(reserved)
        self.tokens += tokens
        self.usd += usd
        self._settled.set()
