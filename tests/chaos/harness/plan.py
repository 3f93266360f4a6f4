"""The plan of faults: what goes wrong, when, and for how long. Pure, and the same again for the same seed.

In: a seed, how many events are fed, how many faults, how many brokers and workers. Out: :class:`Fault` values in the
order in which they strike, each when so many events have been fed.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

__all__ = ["Fault", "Kind", "kinds_for", "make_plan"]


class Kind(StrEnum):
    """What can go wrong. A worker's slot, the sink or a broker is the target."""

    WORKER_KILL = "worker killed, back at once"
    WORKER_GONE = "worker killed, away past its session"
    WORKER_PAUSE = "worker paused"
    WORKER_ZOMBIE = "worker paused past its session"
    WORKER_REPLACED = "worker paused and replaced, then awake"
    WORKER_RESTART = "worker restarted"
    WORKERS_ROLLING = "workers restarted one by one"
    WORKERS_KILLED = "all workers killed at once"
    WORKER_JOINS = "worker joins, leaves later"
    SINK_KILL = "sink killed"
    SINK_ZOMBIE = "sink paused past its session"
    BROKER_KILL = "broker killed"
    BROKER_PAUSE = "broker paused"
    BROKER_ZOMBIE = "broker paused past its session"
    BROKER_RESTART = "broker restarted"
    BROKERS_ROLLING = "brokers killed one by one"


_WEIGHTS: Final = {
    Kind.WORKER_KILL: 5,
    Kind.WORKER_GONE: 3,
    Kind.WORKER_PAUSE: 2,
    Kind.WORKER_ZOMBIE: 4,
    Kind.WORKER_REPLACED: 2,
    Kind.WORKER_RESTART: 1,
    Kind.WORKERS_ROLLING: 2,
    Kind.WORKERS_KILLED: 1,
    Kind.WORKER_JOINS: 2,
    Kind.SINK_KILL: 2,
    Kind.SINK_ZOMBIE: 1,
    Kind.BROKER_KILL: 4,
    Kind.BROKER_PAUSE: 1,
    Kind.BROKER_ZOMBIE: 1,
    Kind.BROKER_RESTART: 1,
    Kind.BROKERS_ROLLING: 2,
}
_THREE_ONLY: Final = frozenset({Kind.BROKERS_ROLLING})
_SHORT_S: Final = 0.3
_LONG_S: Final = 1.0
_SHORTER: Final = 0.5


@dataclass(frozen=True, slots=True)
class Fault:
    """``kind`` strikes ``target`` (a slot or node, -1 for none) when ``at`` events are fed.

    ``pause_s`` is how long the target is paused or away; for faults that outlast a session, how much longer than it.
    """

    at: int
    kind: Kind
    target: int
    pause_s: float

    def __str__(self) -> str:
        return f"{self.kind} (target {self.target}, {self.pause_s:.1f} s)"


def kinds_for(brokers: int) -> list[Kind]:
    """The kinds of faults that make sense with so many brokers."""
    return [kind for kind in Kind if brokers > 1 or kind not in _THREE_ONLY]


def make_plan(
    seed: int,
    *,
    events: int,
    faults: int,
    brokers: int,
    workers: int,
    kinds: Sequence[Kind] | None = None,
    pause_s: float = 5.0,
) -> list[Fault]:
    """``faults`` faults spread over ``events`` events. Each kind comes once before one comes twice by weight.

    ``pause_s`` is the longest pause; of those that need not outlast a session it is half.
    """
    rng = random.Random(seed)
    wanted = list(kinds) if kinds is not None else kinds_for(brokers)
    chosen = rng.sample(wanted, min(faults, len(wanted)))
    chosen += rng.choices(wanted, [_WEIGHTS[kind] for kind in wanted], k=faults - len(chosen))
    rng.shuffle(chosen)
    plan = []
    for number, kind in enumerate(chosen, 1):
        if kind.name.startswith("BROKER"):
            target = rng.randrange(brokers)
        elif kind.name.startswith("WORKER_"):
            target = rng.randrange(workers)
        else:
            target = -1
        at = int(events * (number - rng.uniform(0.0, 0.5)) / (faults + 1))
        between = (_LONG_S, pause_s) if _is_long(kind) else (_SHORT_S, pause_s * _SHORTER)
        plan.append(Fault(at, kind, target, round(rng.uniform(*between), 2)))
    return plan


def _is_long(kind: Kind) -> bool:
    return kind in (Kind.WORKER_GONE, Kind.WORKER_ZOMBIE, Kind.WORKER_REPLACED, Kind.SINK_ZOMBIE, Kind.BROKER_ZOMBIE)
