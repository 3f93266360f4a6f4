"""Counts of durations by bucket, fed from samples once a second.

In: samples in seconds. Out: cumulative counts, as Prometheus takes them. The loop that feeds and the thread that reads
need no lock: a reader gets one of the arrays that feeding made, never a half-made one.
"""

from collections.abc import Collection
from typing import Final

import numpy as np

__all__ = ["COMMIT_BOUNDS", "LATENCY_BOUNDS", "Histogram"]

LATENCY_BOUNDS: Final = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
    60.0,
    300.0,
)
"""Seconds: from a hop without a call to a long conversation with a model."""
COMMIT_BOUNDS: Final = (0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
"""Seconds: from an idle broker beside us to one that is about to time out."""


class Histogram:
    """A histogram over ``bounds`` (ascending, in seconds; the last bucket, +Inf, comes by itself)."""

    __slots__ = ("_bounds", "_edges", "_state")

    def __init__(self, bounds: tuple[float, ...] = LATENCY_BOUNDS) -> None:
        self._bounds = bounds
        self._edges = np.asarray(bounds)
        self._state = (np.zeros(len(bounds) + 1, dtype=np.int64), 0.0)

    def add(self, samples: Collection[float]) -> None:
        """Count ``samples``. A bucket holds what is at most its bound."""
        if not samples:
            return
        values = np.fromiter(samples, dtype=np.float64, count=len(samples))
        places = np.searchsorted(self._edges, values, side="left")
        counts, total = self._state
        self._state = (counts + np.bincount(places, minlength=len(counts)), total + float(values.sum()))

    def cumulative(self) -> tuple[list[tuple[str, float]], float]:
        """(bound as text, how many samples are at most that), the last for +Inf; and the samples' sum in seconds."""
        counts, total = self._state
        names = [*map(_text, self._bounds), "+Inf"]
        return list(zip(names, np.cumsum(counts).astype(float).tolist(), strict=True)), total


def _text(bound: float) -> str:
    return str(float(bound))
