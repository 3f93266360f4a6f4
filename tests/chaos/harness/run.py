"""One chaos run: a cluster, workers, a sink and a feeder, faults by plan, and at the end the verdict.

In: :class:`Options`. Out: a :class:`Report`, or a ChaosError that tells the seed, what was done when, and what is
wrong. Faults are scripts, generators that yield what to wait for; several run at once as long as they don't touch the
same process. The cluster's slow operations run in threads, but processes are started by the calling thread only: they
end when the thread that started them does.
"""

import itertools
import os
import time
from collections import Counter
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from confluent_kafka import KafkaException

from magnatronic.broker import TopicSpec, create_topics
from schemas.topics import all_topics
from streams.kafka import instance_id, transactional_ids
from tests.chaos.harness.checks import ChaosError, Verdict
from tests.chaos.harness.cluster import Cluster, cluster_of
from tests.chaos.harness.feed import Feeder
from tests.chaos.harness.log import LogView, Place
from tests.chaos.harness.observe import Observer
from tests.chaos.harness.plan import Fault, Kind, make_plan
from tests.chaos.harness.projection import SinkSettings
from tests.chaos.harness.verify import Verifier
from tests.chaos.harness.worker import CALLS_TOPIC, SUMS_TOPIC, WorkerSettings, bindings
from tests.chaos.harness.workers import SINK, WORKER, Children, last_lines

__all__ = ["Options", "Report", "run_chaos"]

OUTPUTS: Final = ("work.results.normal", "tasks.lifecycle.normal", "effects", "dead-letters")
GROUPS: Final = tuple(binding.group for binding in bindings())

_TICK_S: Final = 0.02
_SHORTER_S: Final = 0.6
_LOOK_AGAIN_S: Final = 0.3
_LEAD_S: Final = 2.0
_FIRST_S: Final = 60.0
_BACKLOG: Final = 60_000
_SNAPSHOT_EVENTS: Final = 150_000
_TOLD_EVERY_S: Final = 10.0

Step = float | Callable[[], bool]
Script = Generator[Step, None, None]


@dataclass(frozen=True, slots=True)
class Options:
    """What to run. ``rate`` is events fed a second, ``calls_share`` of them lead to calls, and ``serial_share`` of
    those to many calls in turn; ``pause_s`` is the longest pause beyond a session; ``quiet_s`` bounds the wait for the
    end after the last fault.
    """

    events: int
    faults: int
    brokers: int
    seed: int
    rate: float = 1500.0
    calls_share: float = 0.1
    serial_share: float = 0.1
    workers: int = 3
    partitions: int = 6
    session_timeout_ms: int = 6000
    sink: bool = True
    kinds: tuple[Kind, ...] | None = None
    pause_s: float = 5.0
    quiet_s: float = 180.0


@dataclass(slots=True)
class Report:
    """What happened. Times in seconds; ``takeovers`` count from the end of the dead worker's session, ``returns`` from
    the kill to the first commit of the same slot's new process. ``standstill_s`` is the longest time that nothing
    at all was committed though there was something to do.
    """

    options: Options
    verdict: Verdict = field(default_factory=Verdict)
    happened: list[str] = field(default_factory=list)
    kinds: Counter[Kind] = field(default_factory=Counter)
    ends: dict[str, int] = field(default_factory=dict)
    takeovers: list[float] = field(default_factory=list)
    returns: list[float] = field(default_factory=list)
    standstill_s: float = 0.0
    took_s: float = 0.0
    readable_s: float = 0.0
    snapshots: int = 0


@dataclass(slots=True)
class _Running:
    script: Script
    resources: frozenset[str]
    wait: Callable[[], bool]


class Run:
    def __init__(self, options: Options, folder: Path, say: Callable[[str], None]) -> None:
        self.options = options
        self.report = Report(options)
        self._folder = folder
        self._say = say
        self._plan = make_plan(
            options.seed,
            events=options.events,
            faults=options.faults,
            brokers=options.brokers,
            workers=options.workers,
            kinds=options.kinds,
            pause_s=options.pause_s,
        )
        self._running: list[_Running] = []
        self._began = time.monotonic()
        self._extra = itertools.count(options.workers)
        self._threads = ThreadPoolExecutor(4)
        self._cluster: Cluster
        self._children: Children
        self._feeder: Feeder
        self._observer: Observer
        self._view: LogView
        self._verifier: Verifier

    def run(self) -> Report:
        folder = self._folder
        folder.mkdir(parents=True, exist_ok=True)
        self._children = Children(folder)
        try:
            with cluster_of(self.options.brokers, folder) as self._cluster:
                try:
                    self._go()
                finally:
                    self._children.end()
        except Exception as error:
            raise ChaosError(self._told(error)) from error
        finally:
            self._threads.shutdown(wait=False)
        return self.report

    def _told(self, error: Exception) -> str:
        options = self.options
        lines = [f"seed {options.seed}, {options.brokers} brokers: {type(error).__name__}: {error}"]
        lines += ["what happened:", *self.report.happened, "what the processes said last:"]
        lines += [f"{path.name}:\n{last_lines(path, 40)}" for path in sorted(self._folder.glob("*.log"))]
        return "\n".join([*lines, f"all of it is in {self._folder}"])

    def _note(self, text: str) -> None:
        line = f"{time.monotonic() - self._began:7.1f} s  {text}"
        self.report.happened.append(line)
        self._say(line)

    def _go(self) -> None:
        options, cluster = self.options, self._cluster
        self._view = LogView(cluster.bootstrap_servers)
        self._prepare()
        places = [(topic, number) for topic in (SUMS_TOPIC, CALLS_TOPIC) for number in range(options.partitions)]
        self._observer = Observer(cluster.bootstrap_servers, GROUPS, places)
        self._feeder = Feeder(
            {"bootstrap.servers": cluster.bootstrap_servers, "log_level": 0},
            events=options.events,
            rate=options.rate,
            seed=options.seed,
            calls_share=options.calls_share,
            serial_share=options.serial_share,
        )
        self._verifier = Verifier(self._view, self._folder, GROUPS, places)
        self._note(f"{options.brokers} brokers are up; seed {options.seed}")
        for number in range(options.workers):
            self._start_worker(str(number))
        if options.sink:
            self._children.start("sink", SINK, self._sink_settings().as_argument())
        self._observer.start()
        self._feeder.start()
        try:
            self._wait(lambda: self._observer.done() > 0, _FIRST_S, "the first commits")
            self._strike()
            self._finish()
        except BaseException:
            self._children.tell()
            raise
        finally:
            self._feeder.stop()
            self._observer.stop()
            self._view.close()
        self.report.took_s = time.monotonic() - self._began
        self.report.ends = self._children.ends

    def _prepare(self) -> None:
        options, cluster = self.options, self._cluster
        topics = all_topics()
        specs = [TopicSpec(topic, options.partitions) for topic in (SUMS_TOPIC, CALLS_TOPIC)]
        specs += [
            TopicSpec(name, topics[name].partitions or 3, {"max.message.bytes": str(topics[name].max_message_bytes)})
            for name in OUTPUTS
        ]
        create_topics({"bootstrap.servers": cluster.bootstrap_servers}, specs, replication_factor=cluster.copies)

    def _start_worker(self, slot: str) -> None:
        settings = WorkerSettings(
            self._cluster.bootstrap_servers,
            slot,
            str(self._folder / "calls.tsv"),
            self.options.session_timeout_ms,
            os.getpid(),
        )
        self._children.start(f"worker-{slot}", WORKER, settings.as_argument())

    def _sink_settings(self, export: str = "") -> SinkSettings:
        return SinkSettings(
            self._cluster.bootstrap_servers,
            str(self._folder / "clickhouse"),
            (SUMS_TOPIC, CALLS_TOPIC, *OUTPUTS),
            os.getpid(),
            export,
        )

    # The loop.

    def _tick(self) -> None:
        self._children.tend()
        for each in list(self._running):
            if each.wait():
                try:
                    each.wait = self._until(next(each.script))
                except StopIteration:
                    self._running.remove(each)
        lag = self._observer.lag(self._feeder.places)
        self._feeder.hold(lag > _BACKLOG)
        self._observer.watch(lag > 0)
        _ = self._feeder.through  # raises when the feeder failed
        time.sleep(_TICK_S)

    def _wait(self, done: Callable[[], bool], timeout_s: float, what: str) -> None:
        deadline = time.monotonic() + timeout_s
        while not done():
            self._tick()
            if time.monotonic() > deadline:
                raise ChaosError(f"{what} did not come within {timeout_s:g} s")

    def _until(self, step: Step) -> Callable[[], bool]:
        if callable(step):
            return step
        at = time.monotonic() + step
        return lambda: time.monotonic() >= at

    def _strike(self) -> None:
        told, options = time.monotonic(), self.options
        for number, fault in enumerate(self._plan, 1):
            resources = self._resources(fault)
            # Each fault strikes a busy system, however long those before it take.
            self._feeder.pace(fault.at + options.rate * _LEAD_S)
            while self._feeder.fed < fault.at or any(resources & each.resources for each in self._running):
                self._tick()
                if time.monotonic() - told > _TOLD_EVERY_S:
                    told = time.monotonic()
                    self._say(f"{told - self._began:7.1f} s  fed {self._feeder.fed:,}, done {self._observer.done():,}")
            self._note(f"{number}/{len(self._plan)} at {self._feeder.fed:,} events: {fault}")
            self.report.kinds[fault.kind] += 1
            script = self._script(fault)
            self._running.append(_Running(script, resources, lambda: True))
        self._feeder.pace(options.events)

    def _finish(self) -> None:
        options = self.options
        self._wait(lambda: not self._running, options.quiet_s, "the end of the last faults")
        self._wait(lambda: self._feeder.through, options.quiet_s, "the delivery of all events")
        self._note(f"all is fed and all faults are over; {self._observer.lag(self._feeder.places):,} events behind")
        self._wait(
            lambda: self._observer.behind(self._feeder.places) == 0 and self._verifier.nothing_pending(),
            options.quiet_s,
            "the end of all work",
        )
        ends = self._verifier.ends(self._feeder.places)
        self._wait(lambda: self._observer.behind(ends) == 0, options.quiet_s, "the end of what timers led to")
        self._wait(lambda: self._children.zombies == 0, 60, "the end of the workers that were replaced")
        for name in [name for name in self._children.living if name.startswith("worker-")]:
            self._wait(lambda: self._children.ready(name), 60, f"the start of {name}")  # noqa: B023 - used at once
            self._children.terminate(name)
            self._wait(lambda: self._children.stopped(name), 60, f"the end of {name}")  # noqa: B023
        self._note("all is done and all workers stopped")
        still = self._observer.standstills
        self.report.standstill_s = max((to - since for since, to in still), default=0.0)
        told = ", ".join(f"{to - since:.1f} s until {to - self._began:.1f}" for since, to in still if to - since > 2)
        self._note(f"standstills of more than 2 s: {told or 'none'}")
        self.report.readable_s = self._view.wait_readable(30.0)
        export = ""
        self._note(f"every partition can be read to its end, {self.report.readable_s:.1f} s later")
        if options.sink:
            self._wait(lambda: self._children.ready("sink"), 60, "the start of the sink")
            self._children.terminate("sink")
            self._wait(lambda: self._children.stopped("sink"), options.quiet_s, "the sink's catching up")
            export = str(self._folder / "rows.parquet")
            self._children.start("export", SINK, self._sink_settings(export).as_argument())
            self._wait(self._exported, options.quiet_s, "the sink's rows")
            self._note("the sink caught up and told its rows")
        self._verifier.verify(self.report.verdict, sink_topics=(SUMS_TOPIC, CALLS_TOPIC, *OUTPUTS), export=export)
        self._note("all was checked")

    def _exported(self) -> bool:
        self._children.living["export"].stopping = True
        return self._children.stopped("export")

    # Faults.

    def _resources(self, fault: Fault) -> frozenset[str]:
        """What the fault touches; others that touch the same wait until it is over."""
        workers = {f"worker-{slot}" for slot in range(self.options.workers)}
        match fault.kind:
            case Kind.WORKERS_ROLLING | Kind.WORKER_JOINS:
                return frozenset(workers)
            case Kind.WORKERS_KILLED | Kind.WORKER_GONE:
                # Its time is taken, or the log is looked at: nothing else may be the cause of what is seen.
                return frozenset({*workers, "brokers"})
            case Kind.WORKER_ZOMBIE | Kind.WORKER_REPLACED:
                # One at a time, so that somebody is there to take over.
                return frozenset({f"worker-{fault.target}", "absent"})
            case Kind.SINK_KILL | Kind.SINK_ZOMBIE:
                return frozenset({"sink"})
            case _ if fault.kind.name.startswith("BROKER"):
                return frozenset({"brokers"})
            case _:
                return frozenset({f"worker-{fault.target}"})

    def _script(self, fault: Fault) -> Script:
        session_s = self.options.session_timeout_ms / 1000
        name = f"worker-{fault.target}"
        match fault.kind:
            case Kind.WORKER_KILL:
                return self._kill(name, 0.0)
            case Kind.WORKER_GONE:
                return self._kill(name, session_s + fault.pause_s)
            case Kind.WORKER_PAUSE:
                return self._pause(name, min(fault.pause_s, session_s * _SHORTER_S))
            case Kind.WORKER_ZOMBIE:
                return self._pause(name, session_s + fault.pause_s)
            case Kind.WORKER_REPLACED:
                return self._replace(name, fault.pause_s)
            case Kind.WORKER_RESTART:
                return self._restart(name)
            case Kind.WORKERS_ROLLING:
                return self._roll()
            case Kind.WORKERS_KILLED:
                return self._kill_all()
            case Kind.WORKER_JOINS:
                return self._join(fault.pause_s)
            case Kind.SINK_KILL:
                return self._kill("sink", 0.0)
            case Kind.SINK_ZOMBIE:
                return self._pause("sink", 10.0 + fault.pause_s)
            case Kind.BROKER_KILL:
                return self._kill_broker(fault.target, fault.pause_s)
            case Kind.BROKER_PAUSE:
                return self._pause_broker(fault.target, min(fault.pause_s, 1.5))
            case Kind.BROKER_ZOMBIE:
                return self._pause_broker(fault.target, 4.0 + fault.pause_s)
            case Kind.BROKER_RESTART:
                return self._restart_broker(fault.target)
            case Kind.BROKERS_ROLLING:
                return self._roll_brokers(fault.pause_s)

    def _kill(self, name: str, away_s: float) -> Script:
        worker = name.startswith("worker-")
        places = self._owned(name) if worker else set()
        while away_s and not places:
            yield _LOOK_AGAIN_S  # it has just come back; its end would be nobody's loss
            places = self._owned(name)
        killed = time.monotonic()
        self._children.kill(name)
        if away_s:
            yield away_s
            yield lambda: self._observer.moved(places, since=killed + 1.0) or self._fed_out()
            if (took := self._observer.slowest(places, since=killed + 1.0)) is not None:
                self.report.takeovers.append(took - killed - self.options.session_timeout_ms / 1000)
                self._note(f"{name}'s {len(places)} partitions were taken over {took - killed:.1f} s after its end")
        self._children.again(name)
        yield lambda: self._children.ready(name)
        if not away_s and worker:
            yield lambda: self._observer.moved(places, since=killed + 0.5) or self._fed_out()
            if (took := self._observer.slowest(places, since=killed + 0.5)) is not None:
                self.report.returns.append(took - killed)

    def _fed_out(self) -> bool:
        """No new commit is to be expected where nothing new comes in."""
        return self._feeder.through and self._observer.behind(self._feeder.places) == 0

    def _owned(self, name: str) -> set[Place]:
        try:
            return {
                place
                for group in GROUPS
                for place in self._view.assigned_to(group, instance_id(group, name.removeprefix("worker-")))
            }
        except KafkaException:
            return set()  # A broker is down just now; then this takeover is not measured.

    def _pause(self, name: str, seconds: float) -> Script:
        self._children.pause(name)
        yield seconds
        self._children.resume(name)
        yield 0.5

    def _replace(self, name: str, pause_s: float) -> Script:
        """An orchestrator that can't reach a worker starts another one in its place; then the first one wakes up."""
        self._children.pause(name)
        yield 1.0
        paused = self._children.set_aside(name)
        self._children.again(name)
        yield lambda: self._children.ready(name)
        yield pause_s
        self._children.wake(name, paused)
        yield lambda: self._children.zombies == 0

    def _restart(self, name: str) -> Script:
        yield lambda: self._children.ready(name)
        self._children.terminate(name)
        yield lambda: self._children.stopped(name)
        self._children.again(name)
        yield lambda: self._children.ready(name)

    def _roll(self) -> Script:
        for slot in range(self.options.workers):
            yield from self._restart(f"worker-{slot}")

    def _join(self, stay_s: float) -> Script:
        slot = str(next(self._extra))
        self._start_worker(slot)
        yield lambda: self._children.ready(f"worker-{slot}")
        yield 3.0 + stay_s
        self._children.terminate(f"worker-{slot}")
        yield lambda: self._children.stopped(f"worker-{slot}")

    def _kill_all(self) -> Script:
        """With nobody left, what is committed must be just what the committed offsets say, to the record."""
        names = [name for name in self._children.living if name.startswith("worker-")]
        for name in names:
            self._children.kill(name)
        if self._feeder.fed < _SNAPSHOT_EVENTS:
            yield self._later(self._snapshot)
            self.report.snapshots += 1
        for name in names:
            self._children.again(name)
        yield lambda: all(self._children.ready(name) for name in names)

    def _snapshot(self) -> None:
        slots = [str(slot) for slot in range(self.options.workers)]
        self._view.abort_open(each for group in GROUPS for slot in slots for each in transactional_ids(group, slot))
        self._view.wait_readable(30.0)
        verdict = Verdict()
        self._verifier.verify_prefix(verdict)
        verdict.raise_if_bad()

    def _later(self, work: Callable[[], None]) -> Callable[[], bool]:
        """Do ``work`` in a thread; the condition that it is done, which raises what it raised."""
        future: Future[None] = self._threads.submit(work)

        def done() -> bool:
            if not future.done():
                return False
            future.result()
            return True

        return done

    def _kill_broker(self, node: int, away_s: float) -> Script:
        yield self._later(lambda: self._cluster.kill(node))
        yield away_s if self._cluster.nodes > 1 else 0.0
        yield self._later(lambda: self._cluster.restart(node))
        yield self._later(self._cluster.wait_in_sync)

    def _pause_broker(self, node: int, seconds: float) -> Script:
        self._cluster.pause(node)
        yield seconds
        self._cluster.resume(node)
        yield self._later(self._cluster.wait_in_sync)

    def _restart_broker(self, node: int) -> Script:
        yield self._later(lambda: self._cluster.shut(node))
        yield self._later(lambda: self._cluster.restart(node))
        yield self._later(self._cluster.wait_in_sync)

    def _roll_brokers(self, away_s: float) -> Script:
        for node in range(self._cluster.nodes):
            yield from self._kill_broker(node, away_s)


def run_chaos(options: Options, folder: Path, say: Callable[[str], None] = lambda _: None) -> Report:
    """Run it all and check it.

    Raises:
        ChaosError: an invariant does not hold, or the system did not come to rest in time.
    """
    report = Run(options, folder, say).run()
    report.verdict.raise_if_bad()
    return report
