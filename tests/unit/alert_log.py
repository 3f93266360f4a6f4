"""What the Monitor must find in a log of figures: its rules over plain dicts, record by record. And logs for it."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from schemas.events import ProcessorStats
from streams.alerting import EVERYBODY, Spending, Watch, forget, judge_spending, judge_window
from streams.figures import Figures, Sample, windows_with
from streams.rules import Alert, Thresholds

START_MS = 1_767_225_600_000


class AlertLog:
    """Takes samples in the order of the log; ``alerts`` are those found so far."""

    def __init__(self, thresholds: Thresholds | None = None) -> None:
        self.thresholds = thresholds or Thresholds()
        self.alerts: list[Alert] = []
        self.windows: dict[tuple[str, str, int], Figures] = {}
        self.watches: dict[str, Watch] = {}
        self.spending = Spending()

    def take(self, sample: Sample) -> None:
        agent, instance = sample.stats.agent, sample.stats.instance
        watch = self.watches.get(agent) or Watch.beginning(sample.at_ms)
        held = [self.windows.get((agent, instance, end_ms), Figures()) for end_ms in watch.unjudged(sample.at_ms)]
        if watch.late(sample, held):
            return
        for end_ms in watch.due(sample.at_ms):
            watch, alerts = judge_window(watch, agent, end_ms, self._figures(agent, end_ms), self.thresholds)
            self.alerts += alerts
            if end_ms % 60_000 == 0:
                figures = self._figures(agent, end_ms).values()
                self.spending, alerts = judge_spending(self.spending, agent, end_ms, figures, self.thresholds)
                self.alerts += alerts
        reached = watch.reach(sample.at_ms).judged_ms > self.watches.get(agent, watch).judged_ms
        self.watches[agent] = watch = watch.reach(sample.at_ms)
        self.windows = {key: each for key, each in self.windows.items() if key[0] != agent or key[2] > watch.judged_ms}
        if reached:
            self._forget(sample.at_ms)
        for end_ms in windows_with(sample.at_ms):
            key = agent, instance, end_ms
            self.windows[key] = self.windows.get(key, Figures()) + sample

    def _figures(self, agent: str, end_ms: int) -> dict[str, Figures]:
        return {key[1]: each for key, each in self.windows.items() if key[0] == agent and key[2] == end_ms}

    def _forget(self, at_ms: int) -> None:
        for agent, watch in list(self.watches.items()):
            cleared = forget(watch, at_ms)
            if cleared is not None:
                self.alerts += cleared
                del self.watches[agent]
                self.windows = {key: each for key, each in self.windows.items() if key[0] != agent}

    def open_alerts(self) -> set[tuple[str, str]]:
        """(source, rule) of every alert that is open."""
        found = {each for watch in self.watches.values() for each in watch.open_alerts().items()}
        return found | {(EVERYBODY, key.partition(" ")[0]) for key in self.spending.standings}


def taken(samples: Iterable[Sample], thresholds: Thresholds | None = None) -> AlertLog:
    """All that is found in ``samples``; their offsets are their places."""
    log = AlertLog(thresholds)
    for sample in placed(samples):
        log.take(sample)
    return log


def placed(samples: Iterable[Sample]) -> list[Sample]:
    """The same samples with the offsets that they have in a partition of their own."""
    return [replace(sample, offset=offset) for offset, sample in enumerate(samples)]


def second(agent: str, instance: str, at_ms: int, **figures: Any) -> Sample:
    """One second's figures; idle where nothing else is said."""
    values = {
        "interval_s": 1.0,
        "events_in": 0,
        "events_out": 0,
        "failures": 0,
        "dead_letters": 0,
        "in_flight": 0,
        "lag": 0,
        "p50_ms": 0.0,
        "p99_ms": 0.0,
        **figures,
    }
    stats = ProcessorStats(source=f"{agent}/{instance}", agent=agent, instance=instance, **values)
    return Sample(stats, at_ms, -1, at_ms * 1000)


def minutes(agent: str, instance: str, *each_minute: Mapping[str, Any], start_ms: int = START_MS) -> Iterator[Sample]:
    """Sixty seconds of each of the figures."""
    for minute, figures in enumerate(each_minute):
        for number in range(60):
            yield second(agent, instance, start_ms + (minute * 60 + number) * 1000 + 137, **figures)
