"""From a cluster at rest to a verdict: reads all that the checks need.

In: a view of the log, the calls file, the sink's exported rows. Out: a :class:`~tests.chaos.harness.checks.Verdict`.
The truth is what the input topics hold; what the feeder meant to send plays no part.
"""

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

import orjson
import pyarrow.compute as pc
import pyarrow.parquet as pq

from agents.journal import identity_of
from schemas.codec import Codec
from schemas.events import DeadLettered, LlmCalled, StepAssigned, StepCompleted, StepFailed
from schemas.record import Record
from streams.state import changelog_topic
from tests.chaos.harness.agents import CALLER, SUMMER, answer_of
from tests.chaos.harness.checks import (
    Call,
    EffectSeen,
    Input,
    Output,
    Verdict,
    check_effects,
    check_letters,
    check_outputs,
    check_rows,
)
from tests.chaos.harness.log import Committed, LogView, Place
from tests.chaos.harness.worker import CALLS_TOPIC, SUMS_TOPIC

__all__ = ["Verifier"]

_OUTPUT: Final = "work.results.normal"
_FAILURES: Final = "tasks.lifecycle.normal"
_EFFECTS: Final = "effects"
_LETTERS: Final = "dead-letters"
_PARKED: Final = b"parked/"
_PARKED_EVERY_S: Final = 1.0


class Verifier:
    """Holds what is in the log against what must be."""

    def __init__(self, view: LogView, folder: Path, groups: Sequence[str], places: Sequence[Place]) -> None:
        self._view = view
        self._folder = folder
        self._groups = groups
        self._places = places
        self._codec = Codec()
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

    def nothing_parked(self) -> bool:
        """Whether no event waits for another attempt. Looks at most once a second; False in between."""
        if time.monotonic() - self._looked < _PARKED_EVERY_S:
            return False
        self._looked = time.monotonic()
        return not any(self._parked().values())

    def _parked(self) -> dict[Place, set[int]]:
        """The offsets of each partition whose events are parked in its changelog: committed, but not done."""
        topics = self._view.topics()
        parked: dict[Place, set[int]] = defaultdict(set)
        for group in self._groups:
            for topic in (SUMS_TOPIC, CALLS_TOPIC):
                changelog = changelog_topic(group, topic)
                for record in self._view.read(changelog) if changelog in topics else ():
                    if record.key is not None and record.key.startswith(_PARKED):
                        offset = int(record.key.removeprefix(_PARKED))
                        place = topic, record.partition
                        parked[place].discard(offset) if record.value is None else parked[place].add(offset)
        return parked

    def _verify(self, verdict: Verdict, done: dict[Place, Committed] | None) -> None:
        inputs = list(self._finished(self._inputs(SUMS_TOPIC), SUMS_TOPIC, done))
        sums: dict[str, int] = defaultdict(int)
        expected: list[Input] = []
        for place, event in inputs:
            sums[event.task_id] += int(event.parameters["number"])
            expected.append(replace(place, answer=str(sums[event.task_id])))
        calls = list(self._finished(self._inputs(CALLS_TOPIC), CALLS_TOPIC, done))
        counts: dict[str, int] = defaultdict(int)
        failing, questions = [], []
        for place, event in calls:
            questions += [f"{event.step_id}#{number}" for number in range(int(event.parameters["calls"]))]
            if "fail" in event.parameters:
                failing.append(event.step_id)
                continue
            counts[event.task_id] += 1
            expected.append(replace(place, answer=answer_of(event, counts[event.task_id])))
        check_outputs(verdict, expected, self._outputs())
        verdict.events += len(failing)
        check_letters(verdict, failing, self._letters())
        check_letters(verdict, failing, self._failures())
        made = self._calls()
        check_effects(verdict, made, list(self._effects()), questions, stable_keys=any(call.key for call in made))

    def _inputs(self, topic: str) -> Iterator[tuple[Input, StepAssigned]]:
        for record in self._view.read(topic):
            event = self._codec.decode(record).event
            if isinstance(event, StepAssigned):
                yield Input(record.partition, record.offset, event.task_id, event.step_id, ""), event

    def _finished(
        self, inputs: Iterable[tuple[Input, StepAssigned]], topic: str, done: dict[Place, Committed] | None
    ) -> Iterator[tuple[Input, StepAssigned]]:
        if done is None:
            yield from inputs
            return
        parked = self._parked()
        for place, event in inputs:
            committed = done.get((topic, place.partition))
            if committed is None or place.offset not in committed:
                continue
            if place.offset not in parked[topic, place.partition]:
                yield place, event

    def _outputs(self) -> Iterator[Output]:
        for record in self._view.read(_OUTPUT):
            event = self._codec.decode(record).event
            assert isinstance(event, StepCompleted)
            yield Output(event.task_id, event.step_id, event.answer)

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
            yield EffectSeen(identity_of(effect), question, bool(effect.error), record.timestamp_ms)

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
                wanted[topic, record.partition][record.offset] = (dict(record.headers)["ce_id"] or b"").decode()
            rows: dict[Place, dict[int, str]] = defaultdict(dict)
            table = everything.filter(pc.equal(everything.column("topic"), topic))
            for partition, offset, event_id in zip(
                *(table.column(name).to_pylist() for name in ("partition", "offset", "id")), strict=True
            ):
                rows[topic, partition][offset] = event_id
            check_rows(verdict, wanted, rows)
