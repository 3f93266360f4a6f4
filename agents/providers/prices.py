"""What the vendors' models cost, in US dollars per million tokens.

In: a model's name and token counts. Out: dollars. The table is the vendors' list prices for text without caching, batch
or promotional discounts, as published in September 2026. A model that is not listed costs 0.0 in our records: it is
better that a sum shows a gap than that it shows a guess; :func:`is_priced` tells the two apart.
"""

from typing import Final

__all__ = ["cost_usd", "is_priced"]

_PER_MILLION: Final[dict[str, tuple[float, float]]] = {
    # model: (input, output)
    "gpt-4o": (2.50, 10.00),
    "gpt-4o-mini": (0.15, 0.60),
    "gpt-4.1": (2.00, 8.00),
    "gpt-4.1-mini": (0.40, 1.60),
    "gpt-4.1-nano": (0.10, 0.40),
    "gpt-5": (1.25, 10.00),
    "gpt-5-mini": (0.25, 2.00),
    "gpt-5-nano": (0.05, 0.40),
    "gpt-5.1": (1.25, 10.00),
    "gpt-5.2": (1.75, 14.00),
    "gpt-5.4": (2.50, 15.00),
    "gpt-5.4-mini": (0.75, 4.50),
    "gpt-5.4-nano": (0.20, 1.25),
    "gpt-5.6-sol": (4.00, 20.00),
    "gpt-6-sol": (2.00, 10.00),
    "gpt-6.1-sol": (2.00, 10.00),
    "claude-haiku-4-5": (1.00, 5.00),
    "claude-sonnet-4-5": (3.00, 15.00),
    "claude-opus-4-5": (5.00, 25.00),
    "claude-sonnet-5": (2.00, 10.00),
    "claude-opus-5": (5.00, 25.00),
    "claude-fable-5": (10.00, 50.00),
    "gemini-2.5-flash-lite": (0.10, 0.40),
    "gemini-2.5-flash": (0.30, 2.50),
    "gemini-2.5-pro": (1.25, 10.00),
    "gemini-3-flash-preview": (0.50, 3.00),
    "gemini-3.6-flash": (1.50, 7.50),
}


def _listed(model: str) -> tuple[float, float] | None:
    """The prices of ``model``; a dated snapshot (``-2026-03-17``, ``-20251001``) costs what its model does."""
    name = model.removeprefix("models/")
    while name not in _PER_MILLION:
        stem, _, ending = name.rpartition("-")
        if not stem or not ending.isdigit() or len(ending) not in (2, 4, 8):
            return None
        name = stem
    return _PER_MILLION[name]


def is_priced(model: str) -> bool:
    """Whether the table has a price for ``model``; where it has none, a cost of 0.0 means unknown."""
    return _listed(model) is not None


def cost_usd(model: str, prompt_tokens: int, completion_tokens: int) -> float:
    """What the call cost, in US dollars; 0.0 for a model without a listed price.

    >>> cost_usd("gpt-4.1-mini-2025-04-14", 1_000_000, 500_000)
    1.2
    """
    prices = _listed(model)
    if prices is None:
        return 0.0
    return round((prompt_tokens * prices[0] + completion_tokens * prices[1]) / 1_000_000, 9)
