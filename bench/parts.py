"""The benchmark's parts: their names, their order, and how much each does.

In: a broker's address and a :class:`Scale`. Out: figures. Everything here is a module-level function, because each part
runs in a process of its own.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

from bench import audit, codec, inflight, latency, log, monitor, pipeline, priority, restore, sinks, slow, step, whatif
from bench.figures import Figure

__all__ = ["PARTS", "Part", "Scale"]


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is measured: events of the typed step, rows of a sink's round, tasks, lanes of a changelog, rounds,
    seconds of a probe, seconds of a slow handler and the quick ones beside it, calls in flight, a backlog and probes,
    events of the longest history.
    """

    events: int = 100_000
    rows: int = 20_000
    chunks: int = 5_000
    tasks: int = 1_000
    lanes: int = 1_000_000
    rounds: int = 3
    probe_s: float = 8.0
    slow_s: float = 60.0
    beside: int = 10_000
    calls: int = 40_000
    backlog: int = 100_000
    probes: int = 100
    history: int = 1_000_000
    is_quick: bool = False

    @classmethod
    def quick(cls) -> Self:
        """Enough to see that everything runs."""
        return cls(
            events=20_000,
            rows=2_000,
            chunks=500,
            tasks=50,
            lanes=20_000,
            rounds=1,
            probe_s=2.0,
            slow_s=5.0,
            beside=2_000,
            calls=12_000,
            backlog=20_000,
            probes=20,
            history=20_000,
            is_quick=True,
        )


@dataclass(frozen=True, slots=True)
class Part:
    """A benchmark. ``measure`` takes the broker's address (empty where it needs none) and the scale."""

    name: str
    needs_broker: bool
    measure: Callable[[str, Scale], list[Figure]]


def _log(line: str) -> None:
    print(f"  {line}", file=sys.stderr, flush=True)


def _codec(_: str, scale: Scale) -> list[Figure]:
    return codec.measure(quick=scale.is_quick)


def _step(bootstrap_servers: str, scale: Scale) -> list[Figure]:
    step.fill(bootstrap_servers, scale.events)
    return step.measure(bootstrap_servers, events=scale.events, rounds=scale.rounds, log=_log)


def _latency(bootstrap_servers: str, scale: Scale) -> list[Figure]:
    return latency.measure(bootstrap_servers, seconds=scale.probe_s)


def _slow(bootstrap_servers: str, scale: Scale) -> list[Figure]:
    return slow.measure(bootstrap_servers, slow_s=scale.slow_s, quick=scale.beside, log=_log)


def _inflight(bootstrap_servers: str, scale: Scale) -> list[Figure]:
    return inflight.measure(bootstrap_servers, events=scale.calls)


def _priority(bootstrap_servers: str, scale: Scale) -> list[Figure]:
    return priority.measure(bootstrap_servers, backlog=scale.backlog, probes=scale.probes, log=_log)


def _clickhouse(bootstrap_servers: str, scale: Scale) -> list[Figure]:
    step.fill(bootstrap_servers, scale.events)
    return sinks.measure_clickhouse(bootstrap_servers, tasks=scale.events, rows=scale.rows, rounds=scale.rounds)


def _milvus(bootstrap_servers: str, scale: Scale) -> list[Figure]:
    return sinks.measure_milvus(bootstrap_servers, chunks=scale.chunks, rounds=scale.rounds)


def _restore(bootstrap_servers: str, scale: Scale) -> list[Figure]:
    return restore.measure(bootstrap_servers, lanes=scale.lanes, rounds=scale.rounds, log=_log)


def _history(bootstrap_servers: str, scale: Scale) -> list[Figure]:
    return log.measure(bootstrap_servers, events=scale.history, rounds=scale.rounds, log=_log)


def _audit(bootstrap_servers: str, scale: Scale) -> list[Figure]:
    return audit.measure(bootstrap_servers, steps=scale.events, events=scale.history, rounds=scale.rounds, log=_log)


def _monitor(bootstrap_servers: str, scale: Scale) -> list[Figure]:
    return monitor.measure(bootstrap_servers, samples=scale.events)


def _pipeline(_: str, scale: Scale) -> list[Figure]:
    return pipeline.measure(tasks=scale.tasks, rounds=scale.rounds, log=_log)


def _what_if(_: str, scale: Scale) -> list[Figure]:
    return whatif.measure(tasks=scale.tasks, log=_log)


PARTS: tuple[Part, ...] = (
    Part("codec", False, _codec),
    Part("step", True, _step),
    Part("latency", True, _latency),
    Part("slow", True, _slow),
    Part("inflight", True, _inflight),
    Part("priority", True, _priority),
    Part("clickhouse", True, _clickhouse),
    Part("milvus", True, _milvus),
    Part("restore", True, _restore),
    Part("log", True, _history),
    Part("audit", True, _audit),
    Part("monitor", True, _monitor),
    Part("pipeline", False, _pipeline),
    Part("what-if", False, _what_if),
)
