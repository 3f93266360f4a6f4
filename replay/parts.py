"""Decides one part of a spool: group after group, each with its steps, and sums up what that shows.

In: a part's file, how to decide, and which steps are meant. Out: :class:`Part`: counts, the groups' digests in order,
findings, and the loose ends that other groups may hold. Nothing of a group is kept when the next one begins.
"""

import asyncio
import gc
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Final

from replay.decide import Deciding
from replay.findings import Decided, DecidedStep, Finding, FindingKind, OutputCheck, Verdict
from replay.lazy import lazily, type_name
from replay.recorded import agent_of
from replay.report import Counts
from replay.spool import read_part, seldom_collecting
from replay.stretch import Scope, record_of
from schemas.errors import DecodeError
from schemas.events import DeadLettered
from schemas.metadata import Envelope
from schemas.record import Record

__all__ = ["MOST_FINDINGS", "Part", "decide_part", "decide_parts"]

MOST_FINDINGS: Final = 1000
"""How many findings a report holds; all are counted."""

_TELL_EVERY: Final = 500


@dataclass(slots=True)
class Part:
    """What deciding a part showed. ``digests`` and ``decided_digests`` are hash and digest of each group (64 bytes),
    ``loose`` outputs whose cause or record other groups hold, by event id. ``others`` counts outputs and effects of
    agents that are not audited.
    """

    events: int = 0
    groups: int = 0
    counts: dict[str, Counts] = field(default_factory=dict)
    digests: bytearray = field(default_factory=bytearray)
    decided_digests: bytearray = field(default_factory=bytearray)
    findings: list[Finding] = field(default_factory=list)
    found: Counter[str] = field(default_factory=Counter)
    others: Counter[str] = field(default_factory=Counter)
    loose: list[tuple[bytes, Any]] = field(default_factory=list)

    def note(self, findings: Sequence[Finding]) -> None:
        """Count findings, and keep the first ones."""
        for finding in findings:
            self.found[finding.kind.value] += 1
            if len(self.findings) < MOST_FINDINGS:
                self.findings.append(finding)


def decide_parts(
    paths: Sequence[Path], deciding: Deciding, scope: Scope, on_events: Callable[[int], None], *, jobs: int = 1
) -> Iterator[Part]:
    """Decide parts, in their order, in ``jobs`` processes side by side; each part's file is deleted."""
    if jobs == 1 or len(paths) < 2:
        with watching(deciding):
            for path in paths:
                yield decide_part(path, deciding, scope, on_events)
                path.unlink()
        return
    # Forked, so that they have the agents as they are; they do nothing but decide.
    _inherited.append((deciding, scope))
    try:
        with ProcessPoolExecutor(min(jobs, len(paths)), mp_context=get_context("fork")) as pool:
            for part in pool.map(_decide_inherited, paths):
                on_events(part.events)
                yield part
    finally:
        _inherited.pop()


@contextmanager
def watching(deciding: Deciding) -> Iterator[None]:
    """With the guard installed, if there is one: for many parts at once, as it looks through all loaded modules."""
    if deciding.guard is None:
        yield
        return
    with deciding.guard.installed():
        yield


_inherited: Final[list[tuple[Deciding, Scope]]] = []


def _decide_inherited(path: Path) -> Part:
    part = decide_part(path, *_inherited[-1], lambda events: None)
    path.unlink()
    return part


def decide_part(path: Path, deciding: Deciding, scope: Scope, on_events: Callable[[int], None]) -> Part:
    """Decide the groups of the part in the file at ``path``; ``on_events`` is told of the records done with."""
    part = Part()
    with seldom_collecting(), watching(deciding):
        asyncio.run(_decide(path, deciding, scope, part, on_events))
    gc.collect()
    return part


async def _decide(path: Path, deciding: Deciding, scope: Scope, part: Part, on_events: Callable[[int], None]) -> None:
    everything = scope.is_all
    inputs, agents, unread = scope.inputs.takes, scope.selection.agents, scope.unread_topics()
    untold, codec, decode = 0, deciding.codec, deciding.codec.decode
    for group, items in read_part(path):
        records: list[tuple[Record, Envelope]] = []
        unreadable: list[tuple[Record, DecodeError]] = []
        for item in items:
            record: Record = record_of(item)
            if record.topic in unread and (lazy := lazily(codec, record)) is not None:
                records.append((record, lazy))
                continue
            try:
                records.append((record, decode(record)))
            except DecodeError as error:
                unreadable.append((record, error))
        decided = await deciding.decide(records)
        steps, meant = decided.steps, [True] * len(decided.steps)
        if not everything:
            meant = [(not agents or step.agent in agents) and inputs(step.record) for step in steps]
            steps = tuple(step for step, is_meant in zip(steps, meant, strict=True) if is_meant)
        _sum_up(part, group, steps)
        part.events += len(items)
        if decided.others and everything:
            part.others.update(decided.others)
        if decided.sent or decided.strays:
            known = {envelope.metadata.id for _, envelope in records}
            _loose_ends(part, decided, meant, deciding, known, all_=everything)
        for record, problem in unreadable:
            if everything or inputs(record):
                _unreadable(part, record, problem, records, deciding, scope)
        untold += len(items)
        if untold >= _TELL_EVERY:
            on_events(untold)
            untold = 0
    on_events(untold)


def _sum_up(part: Part, group: bytes, steps: Sequence[DecidedStep]) -> None:
    if not steps:
        return
    lines, decided_lines = [], []
    for step in steps:
        counts = part.counts.get(step.agent)
        if counts is None:
            counts = part.counts[step.agent] = Counts()
        verdict = str(step.verdict)
        counts.steps[verdict] = counts.steps.get(verdict, 0) + 1
        counts.effects += len(step.effects)
        counts.outputs += len(step.outputs)
        if step.findings:
            part.note(step.findings)
        record, outputs = step.record, step.outputs
        if len(outputs) > 1:
            here = [output for output in outputs if not (output.gone or output.elsewhere)]
            outputs = tuple(sorted(here, key=_id_of))
        elif outputs and (outputs[0].gone or outputs[0].elsewhere):
            outputs = ()
        place = f"{record.topic} {record.partition} {record.offset:020} {step.agent}"
        lines.append(place + "".join([f" {each.event_id}={each.recorded_hash or '-'}" for each in outputs]))
        if all(each.recorded_hash is each.redecided_hash for each in outputs):
            decided_lines.append(lines[-1])
        else:
            decided_lines.append(
                place + "".join([f" {each.event_id}={each.redecided_hash or '-'}" for each in outputs])
            )
    part.groups += 1
    same = lines == decided_lines
    digest = _digest(lines)
    part.digests += group + digest
    part.decided_digests += group + (digest if same else _digest(decided_lines))


def _id_of(output: OutputCheck) -> str:
    return output.event_id


def _digest(lines: Sequence[str]) -> bytes:
    return sha256("\n".join(sorted(lines)).encode()).digest()


def _loose_ends(
    part: Part, decided: Decided, meant: Sequence[bool], deciding: Deciding, known: set[str], *, all_: bool
) -> None:
    for sent in decided.sent:
        if meant[sent.step]:
            item = ("sent", _flat(sent.missing), sent.check.topic, *sent.encoded)
            part.loose.append((sent.check.event_id.encode(), item))
    for record, envelope in decided.strays:
        if all_ or envelope.metadata.causation_id in known:
            hashed = deciding.hash_of(record)
            item = ("stray", _flat(_stray(record, envelope)), *_fields(record), hashed)
            part.loose.append((envelope.metadata.id.encode(), item))


def _flat(finding: Finding) -> tuple[Any, ...]:
    return (finding.kind.value, *(getattr(finding, name) for name in Finding.__slots__[1:]))  # type: ignore[attr-defined]


def _fields(record: Record) -> tuple[Any, ...]:
    return tuple(getattr(record, name) for name in Record.__slots__)  # type: ignore[attr-defined]


def _stray(record: Record, envelope: Envelope) -> Finding:
    name, metadata = type_name(envelope), envelope.metadata
    return Finding(
        FindingKind.OUTPUT_UNEXPECTED,
        agent_of(metadata.source),
        metadata.id,
        name,
        record.topic,
        record.partition,
        record.offset,
        "",
        f"{name} says that event {metadata.causation_id} caused it; no step that was decided again did",
    )


def _unreadable(
    part: Part,
    record: Record,
    error: DecodeError,
    records: Sequence[tuple[Record, Envelope]],
    deciding: Deciding,
    scope: Scope,
) -> None:
    """A record that does not decode: its agents dead-lettered it; what nobody reads should always decode."""
    readers = [station.agent for station in scope.stations if record.topic in station.topics]
    headers = dict(record.headers)
    place = record.topic, record.partition, record.offset
    event_id = (headers.get("ce_id") or b"").decode(errors="replace")
    name = (headers.get("ce_type") or b"").decode(errors="replace").rpartition(".")[2]
    letters = {
        (event.agent, event.source_topic, event.source_partition, event.source_offset): event
        for _, envelope in records
        if isinstance(event := envelope.event, DeadLettered)
    }
    said = f"{type(error).__name__}: {error}"
    if not readers:
        agent = agent_of((headers.get("ce_source") or b"").decode(errors="replace"))
        part.note([Finding(FindingKind.UNREADABLE, agent, event_id, name, *place, "", said)])
    for reader in readers:
        if scope.selection.agents and reader.name not in scope.selection.agents:
            continue
        counts = part.counts.setdefault(reader.name, Counts())
        letter = letters.get((reader.name, *place))
        verdict = Verdict.OPEN if letter is None else Verdict.UNREADABLE
        if letter is None and deciding.finished(reader.name, record):
            verdict = Verdict.DIFFERS
            message = f"{said}; no dead letter tells of it"
            part.note([Finding(FindingKind.LETTER_MISSING, reader.name, event_id, name, *place, "", message)])
        counts.steps[verdict.value] = counts.steps.get(verdict.value, 0) + 1
