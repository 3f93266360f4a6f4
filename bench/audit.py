"""Deciding history again: records/s of an audit on one core, its memory, and how it compares to the recorded time.

In: a broker. Out: figures of audits read from Kafka, each in a process of its own, over histories that processors made:
events without a call (input, output) and with a recorded one (input, effect, output). Every step is decided twice under
the guard, and every output is compared byte for byte. A record counts once, whatever it is. "All" goes from the first
byte read to the report, "deciding" leaves out reading, hashing and spooling. An audit that finds anything fails the
part.
"""

import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from typing import Any, Final

from confluent_kafka.admin import AdminClient

from bench.figures import Figure
from bench.kafka import make_topics, produce, stable_offsets
from bench.samples import submissions
from bench.trial import Worker
from bench.workers.effects_worker import TARGET, CallingAgent
from bench.workers.task import WorkerTask
from replay.selection import Place, Span

__all__ = ["measure"]

PART: Final = "audit"
_TARGET: Final = f"{TARGET}.normal"
_SETTLED_S: Final = 1.0
_STALLED_S: Final = 60.0
_POLL_S: Final = 0.2
CALL_S: Final = 2.0
_PARTITIONS: Final = 4
_MIB: Final = 2**20
_ELSEWHERE: Final = ("effects", "dead-letters")


def measure(
    bootstrap_servers: str, *, steps: int, events: int, rounds: int, log: Callable[[str], None]
) -> list[Figure]:
    """Figures over ``steps`` steps with a call each, over ``events`` records without, and over one minute's worth of
    slow calls. Not to be called twice on one broker.

    Raises:
        RuntimeError: outputs were lost or doubled, or an audit found something.
    """
    make_topics(bootstrap_servers, [_TARGET, *_ELSEWHERE], _PARTITIONS)
    calling = _record(bootstrap_servers, "calling", steps, wait_s=0.001, concurrency=1000)
    log(f"{steps:,} steps with a call each are recorded")
    runs = [_audit(bootstrap_servers, calling) for _ in range(rounds)]
    log(f"audited at {_rates(runs)[0]:,.0f} records/s")
    both = [_audit(bootstrap_servers, calling, jobs=2) for _ in range(rounds)]
    few = _audit(bootstrap_servers, _record(bootstrap_servers, "few", 5_000))
    many = _audit(bootstrap_servers, _record(bootstrap_servers, "many", events // 2))
    log(f"{many['records']:,.0f} records without calls audited in {many['seconds']:.1f} s")
    slow_events = max(1000, steps // 10)
    slow = _audit(bootstrap_servers, _record(bootstrap_servers, "slow", slow_events, wait_s=CALL_S))
    kinds = (("a call each", runs), ("no call", [many]))
    return [
        *(Figure(PART, f"steps with {kind}, all", "records/s", _rates(made), _note(made[0])) for kind, made in kinds),
        *(
            Figure(PART, f"steps with {kind}, deciding", "records/s", _rates(made, "reading_s"), "without reading")
            for kind, made in kinds
        ),
        Figure(PART, "steps with a call each, all, CPU", "µs/record", _cpu(runs), "of the whole process"),
        Figure(PART, "steps with a call each, all, 2 processes", "records/s", _rates(both)),
        Figure(PART, f"memory over {few['records']:,.0f} records", "MiB", (few["rss"] / _MIB,)),
        Figure(PART, f"memory over {many['records']:,.0f} records", "MiB", (many["rss"] / _MIB,)),
        Figure(
            PART,
            f"calls of {CALL_S:g} s, 256 at once: recorded time / audit",
            "x",
            (slow["span_s"] / slow["seconds"],),
            f"{slow['span_s']:.0f} s of work audited in {slow['seconds']:.1f} s",
        ),
    ]


def _record(bootstrap_servers: str, name: str, events: int, *, wait_s: float = 0.0, **options: Any) -> dict[str, Any]:
    """A history of ``events`` inputs with what a processor made of them, and what its audit has to know."""
    source, group = f"bench.audit-{name}.normal", f"bench-audit-{name}"
    make_topics(bootstrap_servers, [source], _PARTITIONS)
    before = _spans(bootstrap_servers, source)
    produce(bootstrap_servers, source, submissions(events, f"audit-{name}"))
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        told = {"wait_s": wait_s, "max_in_flight": 20_000, **options}
        task = WorkerTask(bootstrap_servers, group, source, _TARGET, _PARTITIONS, folder, told)
        worker = Worker("effects_worker", task)
        try:
            _wait(bootstrap_servers, worker, before, events)
        finally:
            worker.stop()
    spans = {
        place: (before[place][1] if place[0] != source else start, end)
        for place, (start, end) in _spans(bootstrap_servers, source).items()
    }
    return {"name": group, "wait_s": wait_s, "source": source, "spans": spans, "steps": events}


def _wait(bootstrap_servers: str, worker: Worker, before: Mapping[Place, Span], events: int) -> None:
    """Until the worker has committed an output for each event, and nothing more comes."""
    admin = AdminClient({"bootstrap.servers": bootstrap_servers})
    start = sum(end for (topic, _), (_, end) in before.items() if topic == _TARGET)
    last, moved = -1, time.monotonic()
    while True:
        worker.cpu_s()  # raises when it has ended
        written = sum(stable_offsets(admin, _TARGET, _PARTITIONS)) - start
        if written != last:
            last, moved = written, time.monotonic()
        elif time.monotonic() - moved > (_SETTLED_S if written >= events else _STALLED_S):
            if written < events:
                raise RuntimeError(f"{written} of {events} outputs: {worker.last_lines()}")
            return
        time.sleep(_POLL_S)


def _spans(bootstrap_servers: str, source: str) -> dict[Place, Span]:
    from replay.errors import LogReadError
    from replay.kafka_log import KafkaLog

    with KafkaLog({"bootstrap.servers": bootstrap_servers}) as log:
        for _ in range(100):
            try:
                return log.spans([source, _TARGET, *_ELSEWHERE])
            except LogReadError:
                time.sleep(0.1)  # a topic that was just created has its leaders a moment later
        return log.spans([source])


def _audit(bootstrap_servers: str, recorded: dict[str, Any], *, jobs: int = 1) -> dict[str, float]:
    """An audit in a fresh process: records, seconds, CPU seconds and the most memory."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        done = pool.submit(_audited, bootstrap_servers, recorded, jobs).result()
    return done


def _audited(bootstrap_servers: str, recorded: dict[str, Any], jobs: int) -> dict[str, float]:
    from magnatronic.finished import finished_offsets
    from replay.audit import audit
    from replay.decide import Station
    from replay.kafka_log import KafkaLog
    from replay.selection import Selection
    from schemas.codec import Codec

    kafka = {"bootstrap.servers": bootstrap_servers}
    agent = type("NamedAgent", (CallingAgent,), {"name": recorded["name"], "wait_s": recorded["wait_s"]})()
    finished = finished_offsets(kafka, [agent.name])
    cpu, start = time.process_time(), time.perf_counter()
    with KafkaLog(kafka) as log:
        report = audit(
            log,
            stations=(Station(agent, frozenset({recorded["source"]})),),
            codec=Codec(),
            finished=finished,
            spans=recorded["spans"],
            jobs=jobs,
        )
    seconds, cpu_s = time.perf_counter() - start, time.process_time() - cpu
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    with KafkaLog(kafka) as log:
        effects = {place: span for place, span in recorded["spans"].items() if place[0] == "effects"}
        batches = log.read(Selection(spans=effects)) if recorded["wait_s"] else ()
        times = [record.timestamp_ms for batch in batches for record in batch.records]
    if not report.ok or report.verdicts() != {"same": recorded["steps"]}:
        raise RuntimeError(f"{report.verdicts()}, {report.found}; the first: {report.findings[:1]}")
    return {
        "records": report.events,
        "steps": report.steps,
        "seconds": seconds,
        "reading_s": report.reading_s,
        "cpu_s": cpu_s,
        "span_s": (max(times) - min(times)) / 1000 if times else 0.0,
        "rss": rss,
    }


def _rates(runs: list[dict[str, float]], without: str = "") -> tuple[float, ...]:
    return tuple(run["records"] / (run["seconds"] - (run[without] if without else 0.0)) for run in runs)


def _cpu(runs: list[dict[str, float]]) -> tuple[float, ...]:
    return tuple(run["cpu_s"] / run["records"] * 1e6 for run in runs)


def _note(run: dict[str, float]) -> str:
    return f"{run['records']:,.0f} records of {run['steps']:,.0f} steps, decided twice"
