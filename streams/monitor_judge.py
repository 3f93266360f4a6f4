"""The Monitor's judge: takes figures into hopping windows, and judges the windows that are complete.

In: samples in the order of topic ``telemetry``. Out: alerts, and verdicts that an instance is degraded. What to decide
is in :mod:`streams.alerting`; here it is kept in tables, such that a crash at any moment loses nothing: what is emitted
is in the log before the tables say so, what windows hold is in their changelog before the tables say that later records
of their time are late, and a record counts as done when what it changed is in the changelogs. That is so when its agent
is judged, so windows are written then, and not with each sample.
"""

import asyncio
from collections import defaultdict
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Final

from schemas.events import AgentHeartbeat, Health
from schemas.metadata import deterministic_id
from streams.alerting import EVERYBODY, Spending, Watch, forget, judge_spending, judge_window
from streams.figures import STEP_MS, Figures, Sample, windows_with
from streams.monitor_tables import Emit, Table, raise_alerts
from streams.rules import Thresholds

__all__ = ["Judge", "Place"]

Place = tuple[str, int]
"""``<agent>/<instance>``, and a window's end in milliseconds since the epoch."""

_NOTHING: Final = Figures()
_OVERDUE_MS: Final = 2 * STEP_MS
"""An agent that is not judged for so long has fallen silent: its records are done all the same."""
_MOST: Final = 5_000
"""An agent's samples that wait for being done, some 2 kB each: then its windows are written in between."""


class _Open:
    """What was taken of an agent and is not in the changelogs."""

    def __init__(self, at_ms: int) -> None:
        self.since_ms = at_ms
        self.samples = 0
        self.places: set[Place] = set()
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()


class Judge:
    """Takes samples, one at a time. :meth:`forget_derived` is for tables that were read again."""

    def __init__(
        self,
        windows: Table[Place, Figures],
        watches: Table[str, Watch],
        spending: Table[str, Spending],
        emit: Emit,
        thresholds: Thresholds,
    ) -> None:
        self._windows = windows
        self._watches = watches
        self._spending = spending
        self._emit = emit
        self._thresholds = thresholds
        self._open: dict[str, _Open] = {}
        self._places: defaultdict[str, set[Place]] | None = None
        self._unwritten: set[Place] = set()

    def forget_derived(self) -> None:
        """Forget what follows from the tables, which hold something else now."""
        self._open, self._places, self._unwritten = {}, None, set()

    async def take(self, sample: Sample) -> "asyncio.Future[None] | None":
        """Count ``sample``, after judging what is due by it. When the answer is done (None: now), the sample is."""
        agent, source = sample.stats.agent, sample.stats.source
        watch = self._watches.get(agent)
        if watch is None:
            watch = Watch.beginning(sample.at_ms)
            self._watches.hold(agent, watch)
        held = [self._windows.get((source, end_ms)) or _NOTHING for end_ms in watch.unjudged(sample.at_ms)]
        if watch.late(sample, held):
            return None
        if watch.is_due(sample.at_ms):
            await self._judge_due(agent, watch, sample.at_ms)
            await self._look_at_others(sample.at_ms)
        elif agent in self._open and self._open[agent].samples >= _MOST:
            await self._write(agent)
        if agent not in self._open:
            self._open[agent] = _Open(sample.at_ms)
        opened = self._open[agent]
        opened.samples += 1
        for end_ms in windows_with(sample.at_ms):
            place = source, end_ms
            known = self._windows.get(place)
            if known is None:
                self._places_by_agent()[agent].add(place)
                self._unwritten.add(place)
            self._windows.hold(place, (known or _NOTHING) + sample)
            opened.places.add(place)
        return opened.done

    def _places_by_agent(self) -> defaultdict[str, set[Place]]:
        """Every agent's windows: judging one agent must not cost a look at all of them."""
        if self._places is None:
            self._places = defaultdict(set)
            for place, _ in self._windows.items():  # noqa: PERF102 - it is no dictionary
                self._places[place[0].partition("/")[0]].add(place)
        return self._places

    async def _judge_due(self, agent: str, watch: Watch, at_ms: int) -> None:
        held: dict[int, dict[str, Figures]] = {}
        for source, end_ms in self._places_by_agent()[agent]:
            figures = self._windows.get((source, end_ms))
            if figures is not None:
                held.setdefault(end_ms, {})[source.partition("/")[2]] = figures
        for end_ms in watch.due(at_ms):
            figures_by_instance = held.get(end_ms, {})
            before = watch.open_alerts()
            watch, alerts = judge_window(watch, agent, end_ms, figures_by_instance, self._thresholds)
            await raise_alerts(self._emit, alerts)
            await self._say_degraded(agent, end_ms, figures_by_instance, before, watch.open_alerts())
            if end_ms % 60_000 == 0:
                await self._judge_spending(agent, end_ms, figures_by_instance)
        watch = watch.reach(at_ms)
        await self._write(agent, watch)
        await self._drop(agent, watch.judged_ms)

    async def _judge_spending(self, agent: str, end_ms: int, figures: Mapping[str, Figures]) -> None:
        known = self._spending.get(EVERYBODY) or Spending()
        spent, alerts = judge_spending(known, agent, end_ms, figures.values(), self._thresholds)
        await raise_alerts(self._emit, alerts)
        self._spending.hold(EVERYBODY, spent)
        await (await self._spending.write(EVERYBODY))

    async def _write(self, agent: str, after: Watch | None = None) -> None:
        """Bring the agent's windows that are not judged, and then its watch, into the changelogs: what was taken of
        it is done with that.
        """
        opened = self._open.get(agent)
        judged_ms = 0 if after is None else after.judged_ms
        places = [] if opened is None else [place for place in opened.places if place[1] > judged_ms]
        await asyncio.gather(*[await self._windows.write(place) for place in places])
        self._unwritten.difference_update(places)
        if after is not None:
            self._watches.hold(agent, after)
        await (await self._watches.write(agent))
        self._close(agent)

    def _close(self, agent: str) -> None:
        """All that was taken of the agent is done."""
        opened = self._open.pop(agent, None)
        if opened is not None:
            opened.done.set_result(None)

    async def _drop(self, agent: str, until_ms: int) -> None:
        """Forget the agent's windows up to that end."""
        places = self._places_by_agent()[agent]
        for place in [each for each in places if each[1] <= until_ms]:
            places.discard(place)
            self._windows.drop(place)
            if place in self._unwritten:
                self._unwritten.discard(place)
            else:
                # Nobody waits for it: a judged window that is read back is dropped with the next ones.
                await self._windows.write(place)

    async def _say_degraded(
        self,
        agent: str,
        end_ms: int,
        figures: Mapping[str, Figures],
        before: Mapping[str, str],
        now: Mapping[str, str],
    ) -> None:
        """Say of instances with an open alert, theirs or their agent's, that they are degraded; and once that no
        more.
        """
        for instance, each in sorted(figures.items()):
            sources = {agent, f"{agent}/{instance}"}
            is_, was = bool(sources & now.keys()), bool(sources & before.keys())
            if is_ or was:
                health = Health.DEGRADED if is_ else Health.READY
                verdict = AgentHeartbeat(name=agent, instance=instance, health=health, in_flight=each.in_flight)
                event_id = deterministic_id("verdict", agent, instance, health.value, end_ms)
                await self._emit(verdict, event_id, datetime.fromtimestamp(end_ms / 1000, UTC))

    async def _look_at_others(self, at_ms: int) -> None:
        """Let go of agents that have fallen silent."""
        for agent, opened in list(self._open.items()):
            if at_ms - opened.since_ms > _OVERDUE_MS:
                await self._write(agent)
        for agent, watch in list(self._watches.items()):
            cleared = forget(watch, at_ms)
            if cleared is None:
                continue
            await raise_alerts(self._emit, cleared)
            self._watches.drop(agent)
            await (await self._watches.write(agent))
            await self._drop(agent, at_ms)
            self._places_by_agent().pop(agent, None)
            self._close(agent)
