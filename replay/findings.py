"""What deciding again shows: each step with its verdict, each output with its hashes, each fault with its place.

In: nothing; these are the values that :mod:`replay.decide` makes, and that audit, trace, what-if and reports read. Out:
plain, immutable records. :func:`record_hash` is the one definition of a record's hash in all of them.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, field
from enum import StrEnum
from functools import lru_cache
from hashlib import sha256
from typing import Any, Final

from agents.step import LaneState, StepResult
from schemas.codec import Encoded
from schemas.events import Effect
from schemas.frozen import frozen
from schemas.metadata import Envelope
from schemas.record import Header, Record

__all__ = ["Decided", "DecidedStep", "Finding", "FindingKind", "OutputCheck", "Sent", "Verdict", "record_hash"]

NOT_DECIDED: Final = "traceparent"
"""The header that is no part of a decision."""

_SHORT: Final = 256
_LENGTHS: Final = tuple(size.to_bytes(8) for size in range(_SHORT))


def record_hash(topic: str, key: bytes | None, value: bytes | None, headers: Iterable[Header]) -> str:
    """The SHA-256 (hex) of a record as decided: topic, key, value and headers, but for the trace context.

    Each part is preceded by its length (8 bytes, big-endian), or is ``-`` where there is none, so that no two different
    records read the same.
    """
    parts = [_prefixed_text(topic), _prefixed(key), _prefixed(value)]
    for name, content in headers:
        if name != NOT_DECIDED:
            if content is None:
                parts += (_prefixed_text(name), b"-")
            else:
                size = len(content)
                parts += (_prefixed_text(name), _LENGTHS[size] if size < _SHORT else size.to_bytes(8), content)
    return sha256(b"".join(parts)).hexdigest()


def _prefixed(part: bytes | None) -> bytes:
    return b"-" if part is None else len(part).to_bytes(8) + part


@lru_cache(maxsize=1024)
def _prefixed_text(text: str) -> bytes:
    return _prefixed(text.encode())


class Verdict(StrEnum):
    """What became of one step."""

    SAME = "same"
    DIFFERS = "differs"
    OPEN = "open"
    """Not finished yet, or nothing is known of its end; or it could not be decided for want of the state before it."""
    CANCELLED = "cancelled"
    UNREADABLE = "unreadable"
    """The record was no event for its agent, which dead-lettered it."""
    ERASED = "erased"
    """Personal fields that it rests on are gone: its hashes stand, and it is not decided again."""


class FindingKind(StrEnum):
    """What is wrong with a step."""

    OUTPUT_DIFFERS = "output differs"
    OUTPUT_MISSING = "output missing"
    OUTPUT_UNEXPECTED = "output unexpected"
    EFFECT_MISSING = "effect missing"
    EFFECT_UNASKED = "effect unasked"
    EFFECT_ALTERED = "effect altered"
    LETTER_MISSING = "dead letter missing"
    LETTER_DIFFERS = "dead letter differs"
    LETTER_UNEXPECTED = "dead letter unexpected"
    UNREADABLE = "unreadable"
    TIMER = "timer"
    STATE = "state"
    UNSTABLE = "unstable"
    """Deciding twice gave two results, and no use of clock, randomness or the outside was seen."""
    CLOCK = "clock"
    RANDOMNESS = "randomness"
    NETWORK = "network"
    FILE = "file"
    PROCESS = "process"
    THREAD = "thread"
    NONDETERMINISM = "nondeterminism"
    """The handler waits in a way that can't be repeated; the message says how."""


@frozen
class Finding:
    """One fault: of whose step, where its event lies, and in what field of what it left.

    ``field`` is a dotted path (``answer``, ``citations.0.quote``, ``metadata.time``), empty where the fault is none of
    one field. ``diff`` is text, old and new lines marked with - and +; empty where there is nothing to hold against.
    """

    kind: FindingKind
    agent: str
    event_id: str
    event_type: str
    topic: str
    partition: int
    offset: int
    field: str
    message: str
    diff: str = ""

    @property
    def place(self) -> str:
        """Where the step's event lies: ``topic[partition]@offset``."""
        return f"{self.topic}[{self.partition}]@{self.offset}"

    def __str__(self) -> str:
        field = f", {self.field}" if self.field else ""
        return f"{self.kind}: {self.agent} on {self.event_type} {self.event_id} at {self.place}{field}: {self.message}"

    def as_dict(self) -> dict[str, Any]:
        """The finding as JSON can hold it."""
        return asdict(self)


@frozen
class OutputCheck:
    """One output: its type and id, and its hash as recorded and as decided now; None where there is no such output.

    ``gone`` says that its record is missing because its topic keeps none for so long, ``elsewhere`` that it has another
    key, and is not among the records at hand.
    """

    event_type: str
    event_id: str
    topic: str
    recorded_hash: str | None
    redecided_hash: str | None
    gone: bool = False
    elsewhere: bool = False

    @property
    def same(self) -> bool:
        """Whether the recorded output is the one decided now."""
        return self.recorded_hash == self.redecided_hash


@frozen
class DecidedStep:
    """One event's handling by one agent, decided again.

    ``version`` is the agent's as recorded (the present one's where nothing says it), ``effects`` what the handling
    recorded, in order. ``before`` and ``after`` are its lane's state, ``result`` what was decided now: None where it
    was not decided, or could not be.
    """

    agent: str
    version: str
    record: Record
    envelope: Envelope
    effects: tuple[Effect, ...]
    before: LaneState | None
    after: LaneState | None
    result: StepResult | None
    outputs: tuple[OutputCheck, ...]
    findings: tuple[Finding, ...]
    verdict: Verdict

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong with it."""
        return not self.findings


@frozen
class Sent:
    """An output for another record key that the records at hand do not hold, and the step that decided it."""

    check: OutputCheck
    missing: Finding
    step: int
    """Its place in :attr:`Decided.steps`."""
    encoded: Encoded


@frozen
class Decided:
    """All steps of some records in the order of the log, and the states that they left.

    ``states`` are by (agent, topic, partition, lane). ``sent`` are outputs with other keys that have to be looked for
    elsewhere; ``strays`` outputs and effects of the agents that no step has caused. ``others``
    counts what agents left that are not among those that decide here.
    """

    steps: tuple[DecidedStep, ...]
    states: Mapping[tuple[str, str, int, str], LaneState | None]
    sent: tuple[Sent, ...] = ()
    strays: tuple[tuple[Record, Envelope], ...] = ()
    others: Mapping[str, int] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong with any step."""
        return all(step.ok for step in self.steps)

    @property
    def findings(self) -> tuple[Finding, ...]:
        """What is wrong, step by step."""
        return tuple(finding for step in self.steps for finding in step.findings)
