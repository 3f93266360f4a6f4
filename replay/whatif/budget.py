"""What a what-if may spend: tokens and dollars, reserved before each call, settled after it.

In: limits, and what was spent before. Out: whether a call may be made. A call is refused when it could take the sum
over a limit, by an estimate that is on the high side; from then on no call is made, so that the end is a clean one.
"""

from collections.abc import Callable
from dataclasses import dataclass

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


@dataclass
class Budget:
    """Limits (None: none) and sums. ``exhausted`` says in words which limit the next call would have gone over."""

    max_tokens: int | None = None
    max_usd: float | None = None
    tokens: int = 0
    usd: float = 0.0
    exhausted: str = ""
    _reserved_tokens: int = 0
    _reserved_usd: float = 0.0

    def reserve(self, tokens: int, usd: float) -> bool:
        """Set aside what a call may take; False when it is not to be made."""
        if self.exhausted:
            return False
        after_tokens, after_usd = self.tokens + self._reserved_tokens + tokens, self.usd + self._reserved_usd + usd
        if self.max_tokens is not None and after_tokens > self.max_tokens:
            self.exhausted = f"the next call could take it to {after_tokens:,} tokens, over {self.max_tokens:,}"
        elif self.max_usd is not None and after_usd > self.max_usd:
            self.exhausted = f"the next call could take it to ${after_usd:.4f}, over ${self.max_usd:.4f}"
        else:
            self._reserved_tokens += tokens
            self._reserved_usd += usd
        return not self.exhausted

    def settle(self, reserved: tuple[int, float], tokens: int, usd: float) -> None:
        """Count what a call took, in place of what was reserved for it."""
        self._reserved_tokens -= reserved[0]
        self._reserved_usd -= reserved[1]
        self.tokens += tokens
        self.usd += usd
