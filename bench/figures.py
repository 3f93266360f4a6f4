"""What a benchmark gives: figures, and how they are shown.

In: samples of one quantity, one a round. Out: :class:`Figure` (median, lowest, highest), :class:`Report`, a rich table
and JSON. Ratios are figures too, made round by round from two systems that ran side by side.
"""

import math
import os
import platform
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any, Final, Self

import orjson
import psutil
from rich.console import Console
from rich.table import Table

__all__ = ["RATIO", "Figure", "Histogram", "Report", "machine", "percentile", "ratio"]

RATIO = "x"
"""The unit of ratios."""

_BARS: Final = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True, slots=True)
class Histogram:
    """How a quantity is spread: ``counts`` of values up to each of ``bounds``, ascending, in the figure's unit."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        """Bounds go up by the factor √2, so that a bar is as wide for quick values as for slow ones. ``values`` must
        be positive; there must be some.
        """
        steps = [math.ceil(2 * math.log2(max(value, 1e-9))) for value in values]
        first, last = min(steps), max(steps)
        counts = Counter(steps)
        return cls(
            tuple(2.0 ** (step / 2) for step in range(first, last + 1)),
            tuple(counts[step] for step in range(first, last + 1)),
        )

    def as_text(self) -> str:
        """One line: the lowest bar's bound, a bar for each (its height is the logarithm of the count), the highest's.

        >>> Histogram((1.0, 1.4, 2.0), (1, 100, 0)).as_text()
        '1 ▂█  2'
        """
        most = math.log2(max(self.counts) + 1)
        heights = [math.ceil(math.log2(count + 1) / most * len(_BARS)) for count in self.counts]
        bars = "".join(_BARS[height - 1] if height else " " for height in heights)
        return f"{self.bounds[0]:.3g} {bars} {self.bounds[-1]:.3g}"


@dataclass(frozen=True, slots=True)
class Figure:
    """One quantity. ``samples`` has one value a round, in ``unit``; ``part`` is the benchmark it belongs to."""

    part: str
    name: str
    unit: str
    samples: tuple[float, ...]
    note: str = ""
    histogram: Histogram | None = None

    @property
    def median(self) -> float:
        """The median over the rounds."""
        return statistics.median(self.samples)

    def as_json(self) -> dict[str, Any]:
        """The figure with its median, lowest and highest sample, and its histogram if it has one."""
        spread = self.histogram
        return {
            "part": self.part,
            "name": self.name,
            "unit": self.unit,
            "median": self.median,
            "low": min(self.samples),
            "high": max(self.samples),
            "samples": list(self.samples),
            "note": self.note,
        } | ({} if spread is None else {"histogram": {"bounds": spread.bounds, "counts": spread.counts}})


def ratio(part: str, name: str, ours: Sequence[float], theirs: Sequence[float], note: str = "") -> Figure:
    """``ours / theirs``, round by round. Both have one sample a round; a longer one is cut."""
    pairs = zip(ours, theirs, strict=False)
    return Figure(part, name, RATIO, tuple(mine / other for mine, other in pairs), note)


def percentile(samples: Sequence[float], share: float) -> float:
    """The sample below which ``share`` (in [0, 1]) of them lie, by nearest rank. ``samples`` must not be empty."""
    ordered = sorted(samples)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    packages = ("confluent-kafka", "faust-streaming", "quixstreams", "fastavro", "pydantic", "chdb", "milvus-lite")
    return {
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "load_1_min": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {name: version(name) for name in packages},
    }


@dataclass(slots=True)
class Report:
    """All figures of a run, and the parts that failed with the reason."""

    figures: list[Figure] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    machine: Mapping[str, Any] = field(default_factory=machine)
    started: datetime = field(default_factory=lambda: datetime.now(UTC))

    def as_json(self) -> bytes:
        """The whole report as JSON, with a line feed at its end."""
        document = {
            "started": self.started.isoformat(timespec="seconds"),
            "machine": dict(self.machine),
            "seconds": {part: round(took, 1) for part, took in self.seconds.items()},
            "figures": [figure.as_json() for figure in self.figures],
            "failures": self.failures,
        }
        return orjson.dumps(document, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)

    def print(self, console: Console) -> None:
        """One table: a row for each figure, a section for each part."""
        cores, load = self.machine["cores"], self.machine["load_1_min"]
        table = Table(title=f"{cores} cores, {self.machine['system']}, Python {self.machine['python']}, load {load}")
        table.add_column("part", no_wrap=True)
        table.add_column("figure", overflow="fold")
        table.add_column("median", justify="right", no_wrap=True)
        table.add_column("unit", no_wrap=True)
        table.add_column("lowest – highest", justify="right", no_wrap=True)
        table.add_column("note", overflow="fold")
        part = ""
        for figure in self.figures:
            if part and figure.part != part:
                table.add_section()
            span = f"{_short(min(figure.samples))} – {_short(max(figure.samples))}" if len(figure.samples) > 1 else ""
            style = "bold" if figure.unit == RATIO else ""
            shown = figure.part if figure.part != part else ""
            note = figure.note
            if figure.histogram is not None:
                note = f"{note} {figure.histogram.as_text()}".strip()
            table.add_row(shown, figure.name, _short(figure.median), figure.unit, span, note, style=style)
            part = figure.part
        console.print(table)
        for failed, reason in self.failures.items():
            console.print(f"[red]{failed} failed:[/red] {reason}", highlight=False)


def _short(value: float) -> str:
    """Three significant digits, thousands separated."""
    if abs(value) >= 1000:
        return f"{float(f'{value:.3g}'):,.0f}"
    return f"{value:.3g}"
