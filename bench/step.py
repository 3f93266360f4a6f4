"""The typed step: Avro in, a trivial handler, Avro out, on our processor, on quixstreams and on Faust.

In: a broker. Out: events/s and CPU seconds per 1,000 events of each system, and ratios. All three read the same topic
with the same codec and do the same decision; ours and quixstreams exactly once (their outputs are checked: each id
once), Faust at least once. Rounds are interleaved, so that a busy moment of the machine hits all, and begin when the
broker is warm.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from confluent_kafka.admin import AdminClient

from bench.figures import Figure, ratio
from bench.kafka import make_topics, produce, stable_offsets
from bench.samples import submission, submissions
from bench.trial import Trial, run_trial
from schemas.codec import Codec
from schemas.events import TaskCompleted

__all__ = ["OURS_TARGET", "PARTITIONS", "SOURCE", "fill", "measure"]

PART: Final = "typed step"
PARTITIONS: Final = 4
SOURCE: Final = "tasks.normal"
OURS_TARGET: Final = "task.outcomes"


@dataclass(frozen=True, slots=True)
class _System:
    label: str
    module: str
    exactly_once: bool
    share: float
    """The share of the events that it is run on: the slow one need not do all for its rate to be known."""


OURS: Final = _System("ours, exactly once", "processor_worker", True, 1.0)
QUIX: Final = _System("quixstreams, exactly once", "quix_worker", True, 1.0)
FAUST: Final = _System("Faust, at least once", "faust_worker", False, 0.2)


def fill(bootstrap_servers: str, events: int) -> None:
    """See to it that :data:`SOURCE` holds ``events`` TaskSubmitted, for this part and those that read it too."""
    make_topics(bootstrap_servers, [SOURCE, OURS_TARGET], PARTITIONS)
    if not sum(stable_offsets(AdminClient({"bootstrap.servers": bootstrap_servers}), SOURCE, PARTITIONS)):
        produce(bootstrap_servers, SOURCE, submissions(events))


def measure(bootstrap_servers: str, *, events: int, rounds: int, log: Callable[[str], None]) -> list[Figure]:
    """Figures over ``rounds`` rounds on topic :data:`SOURCE`, which holds ``events`` TaskSubmitted.

    Raises:
        RuntimeError: a system lost or doubled outputs though it promises not to, or could not be measured.
    """
    trials: dict[str, list[Trial]] = {system.label: [] for system in (OURS, QUIX, FAUST)}
    for system in (OURS, QUIX):
        # Not counted: a broker that has just started compiles its code, for half a minute of CPU.
        _run(bootstrap_servers, system, rounds, events)
    for number in range(rounds):
        for system in (OURS, FAUST, QUIX):
            trial = _run(bootstrap_servers, system, number, events)
            trials[system.label].append(trial)
            log(f"round {number + 1}: {system.label} {trial.rate:,.0f} events/s")
    return _figures(trials, events)


def _run(bootstrap_servers: str, system: _System, number: int, events: int) -> Trial:
    target = OURS_TARGET if system is OURS else f"bench.{system.module}.{number}"
    make_topics(bootstrap_servers, [target], PARTITIONS)
    wanted = int(events * system.share)
    trial = run_trial(
        system.module,
        bootstrap_servers,
        group=f"bench-{system.module.replace('_', '-')}-{number}",
        source=SOURCE,
        target=target,
        partitions=PARTITIONS,
        wanted=wanted,
        all_of_it=system.exactly_once,
    )
    _check(system, trial, events, wanted)
    # Only the rates are kept; a round's outputs are tens of MiB.
    return Trial(trial.rate, trial.cpu_s_per_1k, trial.events, trial.commits, [])


def _check(system: _System, trial: Trial, events: int, wanted: int) -> None:
    """Each task has its output, exactly once where that is promised, and outputs say what they should."""
    seen = Counter(output.key for output in trial.outputs)
    if system.exactly_once:
        expected = {f"bench-{number:08d}".encode() for number in range(events)}
        lost, doubled = len(expected - seen.keys()), sum(seen.values()) - len(seen)
        if lost or doubled or len(seen) != events:
            raise RuntimeError(f"{system.label}: {lost} of {events} outputs lost, {doubled} doubled")
    elif len(seen) < wanted:
        raise RuntimeError(f"{system.label}: {len(seen)} outputs seen, {wanted} wanted")
    codec = Codec()
    for output in trial.outputs[:: max(1, len(trial.outputs) // 200)]:
        event = codec.decode(output.record).event
        source = submission(int(output.key[-8:]))
        if event != TaskCompleted(task_id=source.task_id, objective=source.objective, answer=source.objective.upper()):
            raise RuntimeError(f"{system.label}: the output for {output.key!r} is {event}")


def _figures(trials: dict[str, list[Trial]], events: int) -> list[Figure]:
    figures = []
    for label, run in trials.items():
        figures.append(Figure(PART, label, "events/s", tuple(trial.rate for trial in run), f"over {run[0].events:,}"))
    for label, run in trials.items():
        figures.append(Figure(PART, f"{label}, CPU", "s/1k events", tuple(trial.cpu_s_per_1k for trial in run)))
    ours = [trial.rate for trial in trials[OURS.label]]
    ours_cpu = [trial.cpu_s_per_1k for trial in trials[OURS.label]]
    for other, name in ((FAUST, "Faust"), (QUIX, "quixstreams")):
        rates = [trial.rate for trial in trials[other.label]]
        cpu = [trial.cpu_s_per_1k for trial in trials[other.label]]
        figures.append(ratio(PART, f"ours / {name}, events/s", ours, rates, "more is better"))
        figures.append(ratio(PART, f"ours / {name}, CPU an event", ours_cpu, cpu, "less is better"))
    return figures
