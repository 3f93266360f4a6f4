"""The whole pipeline: tasks/s from TaskSubmitted to TaskCompleted, with every agent and sink at work in one process.

In: nothing; an embedded system is started on a folder of its own, and the READMEs of installed packages are ingested.
Out: tasks/s when all tasks come at once, the latency of tasks then and of tasks one by one, events and CPU seconds a
task, and who used the CPU. The load comes from another process. Answers come from the extractive provider.
"""

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib.metadata import distributions
from pathlib import Path
from typing import Final

import orjson
import psutil
from confluent_kafka.admin import AdminClient

from bench.figures import Figure, percentile
from bench.kafka import read_between, stable_offsets
from bench.workers.load_worker import Load, Timing
from magnatronic.client import Client
from magnatronic.control import call
from magnatronic.finished import finished_offsets
from magnatronic.ingest import ingest
from magnatronic.settings import Settings
from magnatronic.stations import stations
from magnatronic.system import RunningSystem
from replay.audit import audit
from replay.kafka_log import KafkaLog
from replay.report import AuditReport
from schemas.codec import Codec
from schemas.events import DocumentSubmitted
from schemas.topics import all_topics

__all__ = ["PARTITIONS", "corpus", "measure", "questions"]

PART: Final = "pipeline"
PARTITIONS: Final = 4
_ROOT: Final = Path(__file__).resolve().parent.parent
_DOCUMENTS: Final = 40
_CHARACTERS: Final = 6_000
_BUDGET_S: Final = 60.0
_CATCH_UP_S: Final = 120.0
_MAY_FAIL: Final = 0.02
"""The Overseer may turn an answer down; that is its work, but a broken pipeline fails more than two in a hundred."""
_TEMPLATES: Final = (
    "What is {0}?",
    "What does {0} do?",
    "How do I install {0}?",
    "How do I use {0}?",
    "Which Python versions does {0} support?",
    "What is the license of {0}?",
    "Who maintains {0}?",
    "Is {0} thread safe?",
    "What are the features of {0}?",
    "How can I contribute to {0}?",
    "What is {0}, and what is {1}?",
    "Where is the documentation of {0}?",
    "What is new in {0}?",
    "Which platforms does {0} run on?",
    "How do I run the tests of {0}?",
    "What problem does {0} solve?",
    "Does {0} work with asyncio?",
    "What does {0} depend on?",
    "How fast is {0}?",
    "Can {0} be configured?",
    "What are the limits of {0}?",
    "How do I install {0}, and how do I install {1}?",
    "How are errors handled in {0}?",
    "Who uses {0}?",
    "What is a simple example of {0}?",
)
_OPENERS: Final = ("", "Please tell me: ", "I would like to know: ", "Say in a few words: ", "A question: ")
"""One a round: no question comes twice, so no cache has its vector."""


def measure(*, tasks: int, rounds: int, log: Callable[[str], None]) -> list[Figure]:
    """Figures over up to ``rounds`` rounds of ``tasks`` tasks (further rounds only within a minute).

    Raises:
        RuntimeError: over 2 % of the tasks were not completed, or one had two outcomes.
    """
    documents = list(corpus())
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        data_dir = Path(folder) / "data"
        with RunningSystem(Settings.load(data_dir=data_dir, partitions=PARTITIONS)) as system:
            servers = system.info.bootstrap_servers
            with Client(servers, name="bench") as client:
                ingested = ingest(client, documents)
            log(f"{ingested.indexed} documents, {ingested.chunks} chunks in {ingested.seconds:.1f} s")
            _drive(Load(servers, PARTITIONS, "warm-up", questions(documents, max(20, tasks // 10), 3)))
            alone = _drive(Load(servers, PARTITIONS, "alone", questions(documents, 20, 4), one_by_one=True))
            meter = _Meter(system.info.broker_pid)
            timings: list[Timing] = []
            caught_up: list[float] = []
            before = _ends(servers)
            began = time.monotonic()
            while len(timings) < rounds and (not timings or time.monotonic() - began < _BUDGET_S):
                meter.start()
                number = len(timings)
                timing = _drive(Load(servers, PARTITIONS, f"round-{number}", questions(documents, tasks, number)))
                meter.stop()
                start = time.monotonic()
                if not call(data_dir, "catch_up", timeout=_CATCH_UP_S):
                    raise RuntimeError("the sinks did not catch up in time")
                caught_up.append(time.monotonic() - start)
                timings.append(timing)
                log(f"{tasks / timing.seconds:.0f} tasks/s, {len(timing.failed)} of {tasks} failed{_reasons(timing)}")
            events = _count_events(servers, before)
            audited = _audit(system)
            log(f"audited: {audited.steps} steps in {audited.seconds:.1f} s")
            system.check()
    return [*_figures(tasks, timings, alone, caught_up, events, meter), *_audit_figures(audited, timings, tasks)]


def corpus() -> Iterator[DocumentSubmitted]:
    """The long descriptions of installed distributions, cut to a few pages each; in order of their names."""
    found: dict[str, str] = {}
    for dist in distributions():
        # The text is the body of METADATA, after the first empty line, as in a mail.
        text = (dist.read_text("METADATA") or "").partition("\n\n")[2]
        if len(text) > 1_500:
            found[dist.metadata["Name"]] = text
    for name in sorted(found, key=str.lower)[:_DOCUMENTS]:
        yield DocumentSubmitted(
            document_id=f"bench/{name}",
            title=name,
            text=found[name][:_CHARACTERS],
            media_type="text/markdown",
            source=f"bench/{name}/README.md",
        )


def questions(documents: list[DocumentSubmitted], count: int, opener: int) -> list[str]:
    """``count`` different questions about the documents, up to 1,000; two in 25 are compound."""
    names = [document.title for document in documents]
    made = []
    for number in range(count):
        template, place = _TEMPLATES[number % len(_TEMPLATES)], number // len(_TEMPLATES)
        asked = template.format(names[place % len(names)], names[(place * 7 + 3) % len(names)])
        made.append(_OPENERS[opener % len(_OPENERS)] + asked)
    return made


def _drive(load: Load) -> Timing:
    environment = {**os.environ, "PYTHONPATH": str(_ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "bench.workers.load_worker"],
        input=orjson.dumps(asdict(load)),
        capture_output=True,
        env=environment,
        cwd=_ROOT,
        timeout=600,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"the load worker failed: {done.stderr.decode(errors='replace')[-2000:]}")
    timing = Timing(**orjson.loads(done.stdout))
    if len(timing.failed) > _MAY_FAIL * len(load.questions):
        failed, asked = len(timing.failed), len(load.questions)
        raise RuntimeError(f"{failed} of {asked} tasks were not completed, the first: {timing.failed[0][:500]}")
    return timing


def _ends(servers: str) -> dict[str, list[int]]:
    admin = AdminClient({"bootstrap.servers": servers})
    return {name: stable_offsets(admin, name, topic.partitions or PARTITIONS) for name, topic in all_topics().items()}


def _count_events(servers: str, before: dict[str, list[int]]) -> Counter[str]:
    """Committed events since ``before``, by topic; control records are none."""
    after = _ends(servers)
    return Counter({name: len(read_between(servers, name, start, after[name])) for name, start in before.items()})


def _audit(system: RunningSystem) -> AuditReport:
    """All tasks so far, decided again.

    Raises:
        RuntimeError: something is not as recorded.
    """
    finished = finished_offsets(system.kafka)
    with KafkaLog(system.kafka) as log:
        report = audit(log, stations=stations(), codec=Codec(), finished=finished)
    if not report.ok:
        raise RuntimeError(f"the audit found {report.found}; the first: {report.findings[0]}")
    return report


def _audit_figures(report: AuditReport, timings: list[Timing], tasks: int) -> list[Figure]:
    note = (
        f"{report.events:,} records of {report.steps:,} steps, each decided twice, on one core beside the idle system"
    )
    # The warm-up and the tasks one by one are audited too.
    worked_s = sum(one.seconds for one in timings) / (tasks * len(timings)) * report.groups
    return [
        Figure(PART, "audit of all tasks", "records/s", (report.events / report.seconds,), note),
        Figure(PART, "time of the tasks, all at once / audit", "x", (worked_s / report.seconds,)),
    ]


class _Meter:
    """CPU seconds of this process's threads, by what they do, and of the broker, between ``start`` and ``stop``."""

    def __init__(self, broker_pid: int | None) -> None:
        self._broker = None if broker_pid is None else psutil.Process(broker_pid)
        self._at: dict[tuple[int, str], float] = {}
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.peak_mib = 0.0

    def start(self) -> None:
        self._at = self._now()

    def stop(self) -> None:
        for (thread, kind), used in self._now().items():
            self.seconds[kind] += used - self._at.get((thread, kind), 0.0)
        memory = psutil.Process().memory_info().rss
        if self._broker is not None:
            memory += self._broker.memory_info().rss
        self.peak_mib = max(self.peak_mib, memory / 2**20)

    def _now(self) -> dict[tuple[int, str], float]:
        names = {thread.native_id: thread.name for thread in threading.enumerate()}
        used: dict[tuple[int, str], float] = {}
        for thread in psutil.Process().threads():
            used[thread.id, _kind(thread.id, names)] = thread.user_time + thread.system_time
        if self._broker is not None:
            times = self._broker.cpu_times()
            used[self._broker.pid, "broker (JVM)"] = times.user + times.system
        return used


def _kind(thread: int, names: dict[int | None, str]) -> str:
    """What a thread of this process works for. Native threads name themselves, Python's are known by their objects."""
    name = names.get(thread)
    if name is None:
        try:
            name = Path(f"/proc/self/task/{thread}/comm").read_text().strip()
        except OSError:
            name = ""
        if name.startswith("rdk:"):
            return "Kafka client"
        return "native threads of stores and models"
    if name == "system":
        return "agents' event loop"
    if name.endswith("-fetch") or "-commit" in name:
        return "fetching and committing"
    if name.startswith("sink-"):
        return name
    if name.startswith(("embed-", "onnx")):
        return "embedding model"
    # Milvus Lite serves its requests from a pool that it gives no name.
    if name == "recall" or name.startswith("ThreadPoolExecutor-"):
        return "recall and Milvus Lite"
    return "other Python threads"


def _figures(
    tasks: int, timings: list[Timing], alone: Timing, caught_up: list[float], events: Counter[str], meter: _Meter
) -> list[Figure]:
    done = tasks * len(timings)
    cpu_s = sum(meter.seconds.values())
    figures = [
        Figure(PART, "tasks at once", "tasks/s", tuple(tasks / one.seconds for one in timings), f"{tasks:,} tasks"),
        Figure(PART, "tasks not completed", "tasks", tuple(float(len(one.failed)) for one in timings)),
        Figure(PART, "p50 of a task, all at once", "ms", _milliseconds(timings, 0.5), "submitted to outcome"),
        Figure(PART, "p99 of a task, all at once", "ms", _milliseconds(timings, 0.99), "submitted to outcome"),
        Figure(PART, "p50 of a task, one by one", "ms", _milliseconds([alone], 0.5), "nothing else to do"),
        Figure(PART, "p99 of a task, one by one", "ms", _milliseconds([alone], 0.99), f"{len(alone.tasks)} tasks"),
        Figure(PART, "sinks caught up after the last outcome", "s", tuple(caught_up)),
        Figure(PART, "events a task", "events", (sum(events.values()) / done,), _top(events, done)),
        Figure(PART, "CPU a task", "ms", (cpu_s / done * 1000,), "all processes but the load"),
        Figure(PART, "memory", "MiB", (meter.peak_mib,), "this process and the broker"),
    ]
    for kind, seconds in sorted(meter.seconds.items(), key=lambda item: -item[1]):
        if seconds / cpu_s >= 0.01:
            figures.append(Figure(PART, f"CPU share: {kind}", "%", (seconds / cpu_s * 100,)))
    return figures


def _reasons(timing: Timing) -> str:
    return "".join(f"\n    {reason[:300]}" for reason in timing.failed[:3])


def _milliseconds(timings: list[Timing], share: float) -> tuple[float, ...]:
    return tuple(percentile(timing.tasks, share) * 1000 for timing in timings)


def _top(events: Counter[str], done: int) -> str:
    return ", ".join(f"{name} {count / done:.1f}" for name, count in events.most_common(4))
