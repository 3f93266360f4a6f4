"""What must hold, whatever went wrong: pure checks over what was read from the log, the calls file and the sink.

In: inputs, outputs, effects, dead letters, calls and rows as plain values. Out: a :class:`Verdict` that counts what is
wrong and shows the first of it. The invariants are those that Kafka's own EosTestDriver checks on Kafka Streams (each
partition's output equals what its input prefix implies, record by record; running sums a key; no transaction left
open), and for effects: none is made again once its result is committed.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

__all__ = ["Call", "ChaosError", "EffectSeen", "Input", "Output", "Verdict", "check_effects", "check_outputs"]

_SHOWN: Final = 12


class ChaosError(AssertionError):
    """An invariant does not hold, or can't be checked in time."""


@dataclass(frozen=True, slots=True)
class Input:
    """An event of an input topic; ``offset`` orders it within its partition. ``answer`` is what it should lead to."""

    partition: int
    offset: int
    key: str
    step_id: str
    answer: str


@dataclass(frozen=True, slots=True)
class Output:
    """An answer in an output topic, in the order of the log."""

    key: str
    step_id: str
    answer: str


@dataclass(frozen=True, slots=True)
class Call:
    """A real call to the outside world: when it began (ms since the epoch), by what process, for what."""

    at_ms: float
    pid: int
    question: str
    key: str


@dataclass(frozen=True, slots=True)
class EffectSeen:
    """A committed effect: its identity, what it asked, whether it failed, and when it was appended to the log."""

    identity: tuple[str, str, str, int]
    question: str
    failed: bool
    appended_ms: int


@dataclass(slots=True)
class Verdict:
    """How much of what is wrong. ``findings`` shows some of it; all counts are 0 when all is well."""

    events: int = 0
    lost: int = 0
    doubled: int = 0
    wrong: int = 0
    effects: int = 0
    effects_doubled: int = 0
    effects_repeated: int = 0
    effects_missing: int = 0
    calls: int = 0
    calls_again: int = 0
    """Calls whose identity had been called before: a crash came before their result was committed."""
    keys_unstable: int = 0
    stray_letters: int = 0
    missing_letters: int = 0
    rows: int = 0
    rows_lost: int = 0
    rows_doubled: int = 0
    findings: list[str] = field(default_factory=list)

    _BAD = (
        *("lost", "doubled", "wrong", "effects_doubled", "effects_repeated", "effects_missing", "keys_unstable"),
        *("stray_letters", "missing_letters", "rows_lost", "rows_doubled"),
    )

    @property
    def bad(self) -> dict[str, int]:
        """What is not as it must be, and how often."""
        return {name: getattr(self, name) for name in self._BAD if getattr(self, name)}

    def add(self, name: str, what: Iterable[str]) -> None:
        """Count findings under ``name``."""
        found = list(what)
        setattr(self, name, getattr(self, name) + len(found))
        self.findings += [f"{name}: {each}" for each in found[:_SHOWN]]

    def raise_if_bad(self) -> None:
        """Raises ChaosError, with all that is known, unless all is well."""
        if self.bad:
            raise ChaosError("\n".join([f"invariants broken: {self.bad}", *self.findings]))


def check_outputs(verdict: Verdict, inputs: Sequence[Input], outputs: Iterable[Output]) -> None:
    """Each key's outputs must be those of its inputs, in the inputs' order, with the right answers.

    A key lies in one partition of its input topic, and ``inputs`` are its finished events in offset order; so what
    holds for each key holds for each partition.
    """
    expected: dict[str, list[Input]] = defaultdict(list)
    for each in inputs:
        expected[each.key].append(each)
    found: dict[str, list[Output]] = defaultdict(list)
    for output in outputs:
        found[output.key].append(output)
    verdict.events += len(inputs)
    for key in expected.keys() | found.keys():
        wanted, seen = expected.get(key, []), found.get(key, [])
        if [(each.step_id, each.answer) for each in wanted] != [(each.step_id, each.answer) for each in seen]:
            _compare(verdict, wanted, seen)


def _compare(verdict: Verdict, wanted: Sequence[Input], seen: Sequence[Output]) -> None:
    places = {each.step_id: each for each in wanted}
    counts = Counter(each.step_id for each in seen)
    verdict.add(
        "lost",
        (f"{each.step_id} at {each.partition}@{each.offset}" for each in wanted if each.step_id not in counts),
    )
    verdict.add("doubled", (f"{step} came {count} times" for step, count in counts.items() if count > 1))
    verdict.add("wrong", (f"{step} has no finished input" for step in counts if step not in places))
    verdict.add(
        "wrong",
        (
            f"{each.step_id} says {each.answer}, not {places[each.step_id].answer}"
            for each in seen
            if each.step_id in places and each.answer != places[each.step_id].answer
        ),
    )
    order = [each.step_id for each in wanted if each.step_id in counts]
    came = list(dict.fromkeys(each.step_id for each in seen if each.step_id in places))
    if order != came:
        verdict.add("wrong", [f"order of {order[0].rpartition('/')[0]}: {came[:6]}..., not {order[:6]}..."])


def check_effects(
    verdict: Verdict, calls: Sequence[Call], effects: Sequence[EffectSeen], wanted: Iterable[str], *, stable_keys: bool
) -> None:
    """Every question of ``wanted`` has one committed success, and no call began after its success was in the log.

    An effect's append is earlier than its commit, so the check is stricter than the promise by a few milliseconds;
    but nobody else may run an event whose owner can still commit. With ``stable_keys`` each question is always asked
    under the same idempotency key, and under one of its own.
    """
    successes: dict[str, list[EffectSeen]] = defaultdict(list)
    for effect in effects:
        if not effect.failed:
            successes[effect.question].append(effect)
    verdict.effects += len(effects)
    verdict.calls += len(calls)
    verdict.add(
        "effects_doubled",
        (f"{question} has {len(each)} committed results" for question, each in successes.items() if len(each) > 1),
    )
    verdict.add("effects_missing", (question for question in set(wanted) if question not in successes))
    again = Counter(call.question for call in calls)
    verdict.calls_again += sum(again.values()) - len(again)
    verdict.add(
        "effects_repeated",
        (
            f"{call.question} was called by process {call.pid} {call.at_ms - first:.0f} ms after its result"
            for call in calls
            if call.question in successes
            and call.at_ms > (first := min(each.appended_ms for each in successes[call.question])) + 1
        ),
    )
    if stable_keys:
        keys: dict[str, set[str]] = defaultdict(set)
        for call in calls:
            keys[call.question].add(call.key)
        owners = Counter(key for each in keys.values() for key in each)
        verdict.add("keys_unstable", (f"{q} went out as {sorted(each)}" for q, each in keys.items() if len(each) > 1))
        verdict.add("keys_unstable", (f"key {key!r} stands for {n} questions" for key, n in owners.items() if n > 1))


def check_letters(verdict: Verdict, wanted: Iterable[str], letters: Iterable[tuple[str, str]]) -> None:
    """``wanted``: the step ids that must be in dead-letters, once each; ``letters``: what is there, as (step, why)."""
    expected = set(wanted)
    seen: Counter[str] = Counter()
    for step, why in letters:
        seen[step] += 1
        if step not in expected or seen[step] > 1:
            verdict.add("stray_letters", [f"{step}: {why}"])
    verdict.add("missing_letters", (step for step in expected if step not in seen))


def check_rows(
    verdict: Verdict,
    wanted: Mapping[tuple[str, int], Mapping[int, str]],
    rows: Mapping[tuple[str, int], Mapping[int, str]],
) -> None:
    """The sink's rows are the log's records: event ids by offset, for each partition. Ids and places are unique."""
    for place in wanted.keys() | rows.keys():
        log, store = wanted.get(place, {}), rows.get(place, {})
        verdict.rows += len(store)
        verdict.add("rows_lost", (f"{place}@{offset}" for offset in log if log[offset] != store.get(offset)))
        verdict.add("rows_doubled", (f"{place}@{offset} is not in the log" for offset in store if offset not in log))
    ids = Counter(event_id for store in rows.values() for event_id in store.values())
    verdict.add("rows_doubled", (f"event {event_id} has {count} rows" for event_id, count in ids.items() if count > 1))
