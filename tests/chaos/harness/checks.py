"""What must hold, whatever went wrong: pure checks over what was read from the log, the calls file and the sink.

In: inputs, outputs, timers, effects, dead letters, calls and rows as plain values. Out: a :class:`Verdict` that counts
what is wrong and shows the first of it. The invariants are those that Kafka's own EosTestDriver checks on Kafka Streams
(each partition's output equals what its input prefix implies, record by record; running sums a key; no transaction left
open), for effects: none is made again once its result is committed, and for timers: each fires once, and not too early.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Final

__all__ = [
    "Call",
    "ChaosError",
    "EffectSeen",
    "Fired",
    "Input",
    "Output",
    "Verdict",
    "check_effects",
    "check_letters",
    "check_outputs",
    "check_rows",
    "check_timers",
]

GIVEN_UP: Final = "CancelledError"
"""The error of an effect that its handler did not wait for any longer."""
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
class Fired:
    """A TimerFired in the log: its event's id, the step that set it, when it was due (microseconds since the epoch, as
    its answer says it), when it was appended, and whether its offset is done.
    """

    event_id: str
    step_id: str
    due: str
    appended_ms: int
    done: bool = True


@dataclass(frozen=True, slots=True)
class Call:
    """A real call to the outside world: when it began (ms since the epoch), by what process, for what."""

    at_ms: float
    pid: int
    question: str
    key: str


@dataclass(frozen=True, slots=True)
class EffectSeen:
    """A committed effect: its identity, what it asked, why it failed (empty for a success), when it was appended."""

    identity: tuple[str, str, str, int]
    question: str
    error: str
    appended_ms: int


@dataclass(slots=True)
class Verdict:
    """How much of what is wrong. ``findings`` shows some of it; all counts are 0 when all is well."""

    events: int = 0
    lost: int = 0
    doubled: int = 0
    wrong: int = 0
    timers: int = 0
    timers_lost: int = 0
    timers_doubled: int = 0
    timers_early: int = 0
    timers_stray: int = 0
    parked: int = 0
    effects: int = 0
    effects_failed: int = 0
    effects_doubled: int = 0
    effects_repeated: int = 0
    effects_missing: int = 0
    effects_invented: int = 0
    calls: int = 0
    calls_again: int = 0
    """Calls that left nothing, neither result nor failure: a crash came before it was committed."""
    keys_unstable: int = 0
    stray_letters: int = 0
    missing_letters: int = 0
    rows: int = 0
    rows_lost: int = 0
    rows_doubled: int = 0
    findings: list[str] = field(default_factory=list)

    _BAD = (
        *("lost", "doubled", "wrong", "timers_lost", "timers_doubled", "timers_early", "timers_stray"),
        *("effects_doubled", "effects_repeated", "effects_missing", "effects_invented", "keys_unstable"),
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


def check_timers(
    verdict: Verdict,
    wanted: Mapping[str, int],
    fired: Sequence[Fired],
    answers: Iterable[Output],
    *,
    pending: Set[str],
) -> None:
    """Each timer of ``wanted`` (by step: the earliest moment in ms since the epoch that it may be due) has fired once
    or is still ``pending``, and what fired and is done has one answer.
    """
    verdict.timers += len(fired)
    counts = Counter(each.step_id for each in fired)
    verdict.add("timers_doubled", (f"{step} fired {count} times" for step, count in counts.items() if count > 1))
    ids = Counter(each.event_id for each in fired)
    verdict.add("timers_doubled", (f"id {event_id} stands {n} times" for event_id, n in ids.items() if n > 1))
    verdict.add("timers_stray", (f"{step} set no timer" for step in counts if step not in wanted))
    verdict.add("timers_stray", (f"{step} is pending, but was not set" for step in pending - wanted.keys()))
    verdict.add("timers_doubled", (f"{step} fired and is pending" for step in pending & counts.keys()))
    verdict.add("timers_lost", (f"{step}'s is gone" for step in wanted.keys() - counts.keys() - pending))
    verdict.add(
        "timers_early",
        (
            f"{each.step_id}, due at {each.due}, came at {each.appended_ms}; set for {wanted.get(each.step_id)}"
            for each in fired
            if not wanted.get(each.step_id, 0) <= int(each.due) / 1000 < each.appended_ms + 1
        ),
    )
    rung = {each.step_id: each.due for each in fired if each.done}
    said: dict[str, list[str]] = defaultdict(list)
    for answer in answers:
        said[answer.step_id].append(answer.answer)
    verdict.add("timers_lost", (f"{step}'s led to nothing" for step in rung if step not in said))
    for step, each in said.items():
        if rung.get(step) not in each:
            verdict.add("timers_stray", [f"{step}'s answer {each} is not that of {rung.get(step)}"])
        if len(each) > 1:
            verdict.add("timers_doubled", [f"{step}'s led to {each}"])


def check_effects(
    verdict: Verdict, calls: Sequence[Call], effects: Sequence[EffectSeen], wanted: Iterable[str], *, stable_keys: bool
) -> None:
    """Every question of ``wanted`` has one committed success, and no call began after its success was in the log.

    An effect's append is earlier than its commit, so the check is stricter than the promise by a few milliseconds;
    but nobody else may run an event whose owner can still commit. With ``stable_keys`` each question is always asked
    under the same idempotency key, and under one of its own. No effect tells of a call that nobody made; one that its
    handler gave up may not have begun.
    """
    successes: dict[str, list[EffectSeen]] = defaultdict(list)
    told: Counter[str] = Counter()
    for effect in effects:
        if not effect.error:
            successes[effect.question].append(effect)
        if effect.error != GIVEN_UP:
            told[effect.question] += 1
    verdict.effects += len(effects)
    verdict.effects_failed += sum(1 for effect in effects if effect.error)
    verdict.calls += len(calls)
    verdict.add(
        "effects_doubled",
        (f"{question} has {len(each)} committed results" for question, each in successes.items() if len(each) > 1),
    )
    verdict.add("effects_missing", (question for question in set(wanted) if question not in successes))
    made = Counter(call.question for call in calls)
    verdict.calls_again += sum(max(0, count - told[question]) for question, count in made.items())
    verdict.add(
        "effects_invented",
        (
            f"{question}: {count} effects, {made[question]} calls"
            for question, count in told.items()
            if count > made[question]
        ),
    )
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
