"""From a cluster at rest to a verdict: reads all that the checks need.

In: a view of the log, the calls file, the sink's exported rows. Out: a :class:`~tests.chaos.harness.checks.Verdict`.
The truth is what the input topics hold; what the feeder meant to send plays no part.
"""

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

import orjson
import pyarrow.compute as pc
import pyarrow.parquet as pq

from agents.journal import identity_of
from schemas.codec import Codec
from schemas.events import DeadLettered, LlmCalled, StepAssigned, StepCompleted, StepFailed, TimerFired
from schemas.record import Record
from tests.chaos.harness.agents import CALLER, SUMMER, TIMER, answer_of, due_text
from tests.chaos.harness.checks import (
    Call,
    EffectSeen,
    Fired,
    Input,
    Output,
    Verdict,
    check_effects,
    check_letters,
    check_outputs,
    check_rows,
    check_timers,
)
from tests.chaos.harness.log import Committed, LogView, Place
from tests.chaos.harness.pending import Pending
from tests.chaos.harness.worker import CALLS_TOPIC, SUMS_TOPIC

__all__ = ["Verifier"]

_OUTPUT: Final = "work.results.normal"
_FAILURES: Final = "tasks.lifecycle.normal"
_EFFECTS: Final = "effects"
_LETTERS: Final = "dead-letters"
_PENDING_EVERY_S: Final = 1.0


class Verifier:
    """Holds what is in the log against what must be."""

    def __init__(self, view: LogView, folder: Path, groups: Sequence[str], places: Sequence[Place]) -> None:
        self._view = view
        self._folder = folder
        self._groups = groups
        self._places = places
        self._codec = Codec()
        self._pending = Pending(view, groups, (SUMS_TOPIC, CALLS_TOPIC))
        self._looked = 0.0

    def verify(self, verdict: Verdict, *, sink_topics: Sequence[str], export: str) -> None:
        """All events are done: check everything."""
        self._verify(verdict, None)
        if export:
            self._verify_rows(verdict, sink_topics, Path(export))

    def verify_prefix(self, verdict: Verdict) -> None:
        """Nobody runs, and no transaction is open: what is there must be just what the committed offsets stand for."""
        done: dict[Place, Committed] = {}
        for group in self._groups:
            committed = self._view.committed(group, self._places)
            done.update((place, each) for place, each in committed.items() if each.count())
        self._verify(verdict, done)

    def nothing_pending(self) -> bool:
        """Whether no event is parked and no timer set. Looks at most once a second; False in between."""
        if time.monotonic() - self._looked < _PENDING_EVERY_S:
            return False
        self._pending.look()
        self._looked = time.monotonic()
        return self._pending.nothing

    def ends(self, since: Mapping[Place, int]) -> dict[Place, int]:
        """The last record's offset of each input partition, ``since`` being offsets that are known: timers fire into
        them after the last event was fed.
        """
        found = dict(since)
        for topic in (SUMS_TOPIC, CALLS_TOPIC):
            known = {number: last for (name, number), last in since.items() if name == topic}
            for record in self._view.read(topic, since=known):
                found[topic, record.partition] = record.offset
        return found

    def _verify(self, verdict: Verdict, done: dict[Place, Committed] | None) -> None:
        self._pending.look()
        verdict.parked = self._pending.parkings
        sums: dict[str, int] = defaultdict(int)
        counts: dict[str, int] = defaultdict(int)
        expected: list[Input] = []
        timers: dict[str, int] = {}
        fired: list[Fired] = []
        failing, questions = [], []
        for topic in (SUMS_TOPIC, CALLS_TOPIC):
            for record, event in self._inputs(topic):
                finished = self._is_done(record, done)
                if isinstance(event, TimerFired):
                    fired.append(
                        Fired(_event_id(record), event.timer, due_text(event.due), record.timestamp_ms, finished)
                    )
                    continue
                if not finished:
                    continue
                task = event.task_id
                questions += [f"{event.step_id}#{number}" for number in range(int(event.parameters.get("calls", 0)))]
                if "fail" in event.parameters:
                    failing.append(event.step_id)
                    continue
                if TIMER in event.parameters:
                    timers[event.step_id] = record.timestamp_ms + int(event.parameters[TIMER])
                if topic == SUMS_TOPIC:
                    sums[task] += int(event.parameters["number"])
                    answer = str(sums[task])
                else:
                    counts[task] += 1
                    answer = answer_of(event, counts[task])
                expected.append(Input(record.partition, record.offset, task, event.step_id, answer))
        answers: list[Output] = []
        check_outputs(verdict, expected, self._outputs(answers))
        verdict.events += len(failing)
        pending = {name for names in self._pending.timers.values() for name in names}
        check_timers(verdict, timers, fired, answers, pending=pending)
        check_letters(verdict, failing, self._letters())
        check_letters(verdict, failing, self._failures())
        made = self._calls()
        check_effects(verdict, made, list(self._effects()), questions, stable_keys=any(call.key for call in made))

    def _inputs(self, topic: str) -> Iterator[tuple[Record, StepAssigned | TimerFired]]:
        for record in self._view.read(topic):
            event = self._codec.decode(record).event
            assert isinstance(event, StepAssigned | TimerFired), f"{type(event).__name__} in {topic}"
            yield record, event

    def _is_done(self, record: Record, done: dict[Place, Committed] | None) -> bool:
        if done is None:
            return True
        place = record.topic, record.partition
        committed = done.get(place)
        return committed is not None and record.offset in committed and record.offset not in self._pending.parked[place]

    def _outputs(self, answers: list[Output]) -> Iterator[Output]:
        """The outputs of events; those of timers are added to ``answers``."""
        for record in self._view.read(_OUTPUT):
            event = self._codec.decode(record).event
            assert isinstance(event, StepCompleted)
            output = Output(event.task_id, event.step_id, event.answer)
            if event.capability == TIMER:
                answers.append(output)
            else:
                yield output

    def _failures(self) -> Iterator[tuple[str, str]]:
        for record in self._view.read(_FAILURES):
            event = self._codec.decode(record).event
            assert isinstance(event, StepFailed), f"{type(event).__name__} in {_FAILURES}"
            yield event.step_id, f"StepFailed: {event.error_type}: {event.message}"

    def _letters(self) -> Iterator[tuple[str, str]]:
        for record in self._view.read(_LETTERS):
            letter = self._codec.decode(record).event
            assert isinstance(letter, DeadLettered)
            assert letter.agent in (SUMMER, CALLER)
            headers = list(zip(letter.header_names, letter.header_values, strict=True))
            source = Record(
                letter.source_topic, letter.source_partition, letter.source_offset, 0, None, letter.value, headers
            )
            event = self._codec.decode(source).event
            assert isinstance(event, StepAssigned)
            yield event.step_id, f"DeadLettered after {letter.attempts} attempts: {letter.error_type}: {letter.error}"

    def _effects(self) -> Iterator[EffectSeen]:
        for record in self._view.read(_EFFECTS):
            effect = self._codec.decode(record).event
            assert isinstance(effect, LlmCalled), f"{type(effect).__name__} in {_EFFECTS}"
            question = orjson.loads(effect.request)["messages"][-1]["content"]
            error = orjson.loads(effect.error)["type"] if effect.error else ""
            yield EffectSeen(identity_of(effect), question, error, record.timestamp_ms)

    def _calls(self) -> list[Call]:
        path = self._folder / "calls.tsv"
        calls = []
        for line in path.read_text().splitlines() if path.exists() else ():
            at_ns, pid, question, key = line.split("\t")
            calls.append(Call(int(at_ns) / 1e6, int(pid), question, key))
        return calls

    def _verify_rows(self, verdict: Verdict, topics: Sequence[str], export: Path) -> None:
        """Topic by topic, since all records of a long run are many."""
        everything = pq.ParquetFile(export).read()
        for topic in topics:
            wanted: dict[Place, dict[int, str]] = defaultdict(dict)
            for record in self._view.read(topic):
                wanted[topic, record.partition][record.offset] = _event_id(record)
            rows: dict[Place, dict[int, str]] = defaultdict(dict)
            table = everything.filter(pc.equal(everything.column("topic"), topic))
            for partition, offset, event_id in zip(
                *(table.column(name).to_pylist() for name in ("partition", "offset", "id")), strict=True
            ):
                rows[topic, partition][offset] = event_id
            check_rows(verdict, wanted, rows)


def _event_id(record: Record) -> str:
    return (dict(record.headers)["ce_id"] or b"").decode()
