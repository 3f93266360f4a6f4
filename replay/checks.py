"""Holds what was recorded of one step against what is decided now, and against itself.

In: a step's recorded effects, outputs and dead letter, and the outputs decided again. Out: hashes, and a
:class:`~replay.findings.Finding` for each thing that is not as it should be, with its field and a diff. An effect's own
parts bind each other: its id is made of its identity, its request's hash of its request, and a language model's tokens
and cost stand in its response too, so that most changes of one byte show in the effect itself.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, Protocol

import orjson

from agents.agent import Failure
from replay.difference import Change, changes, text_diff, told
from replay.evolution import is_same_by_older_schema
from replay.findings import NOT_DECIDED, Finding, FindingKind, OutputCheck, record_hash
from replay.lazy import type_name
from schemas.codec import Codec, Encoded
from schemas.errors import DecodeError
from schemas.events import DeadLettered, Effect, LlmCalled
from schemas.metadata import Envelope, deterministic_id, request_hash
from schemas.record import Header, Record

__all__ = [
    "HashOf",
    "Outcome",
    "Report",
    "compare_outputs",
    "effect_faults",
    "letter_faults",
    "output_difference",
    "recorded_checks",
    "unrecorded",
]

Report = Callable[..., Finding]
"""Makes a finding of the step at hand: ``report(kind, message, field="", diff="")``."""

HashOf = Callable[[Record], str]
"""Gives a record's hash (:func:`replay.findings.record_hash`)."""

_ERROR_KEPT: Final = 4000
_FROM_RESPONSE: Final = ("provider", "model", "prompt_tokens", "completion_tokens", "cost_usd")


class Means(Protocol):
    """What comparing needs to know."""

    def gone(self, topic: str, record: Record) -> bool:
        """Whether the topic may have deleted what came of the record."""

    def hash_of(self, record: Record) -> str:
        """The record's hash."""


class Outcome:
    """What the comparison of outputs gave. ``sent`` are those with other keys, whose records are not at hand."""

    __slots__ = ("checks", "findings", "sent")

    def __init__(self) -> None:
        self.checks: list[OutputCheck] = []
        self.findings: list[Finding] = []
        self.sent: list[tuple[OutputCheck, Finding, Encoded]] = []


def compare_outputs(
    decided: Sequence[tuple[str, Envelope, Encoded]],
    recorded: Sequence[tuple[Record, Envelope]],
    key: str,
    report: Report,
    means: Means,
    cause: Record,
) -> Outcome:
    """Match outputs by event id; what stands on one side only has no hash on the other.

    ``decided`` are topic, event and bytes of each. ``key`` is the record key of ``cause``, the step's input.
    """
    outcome, hash_of = Outcome(), means.hash_of
    if len(decided) == len(recorded) == 1 and decided[0][1].metadata.id == recorded[0][1].metadata.id:
        (topic, envelope, encoded), (record, was) = decided[0], recorded[0]
        subject = envelope.metadata.subject
        outcome.checks.append(_check(topic, subject, envelope, encoded, record, was, outcome, report, hash_of))
        return outcome
    by_id: dict[str, list[tuple[Record, Envelope]]] = {}
    for item in recorded:
        by_id.setdefault(item[1].metadata.id, []).append(item)
    for topic, envelope, encoded in decided:
        subject = envelope.metadata.subject
        found = by_id.get(envelope.metadata.id)
        if found:
            record, was = found.pop(0)
            outcome.checks.append(_check(topic, subject, envelope, encoded, record, was, outcome, report, hash_of))
            continue
        hashed = record_hash(topic, subject.encode(), encoded.value, encoded.headers)
        name = type(envelope.event).__name__
        gone = means.gone(topic, cause)
        check = OutputCheck(name, envelope.metadata.id, topic, None, hashed, gone, not gone and subject != key)
        outcome.checks.append(check)
        if check.gone:
            continue
        missing = report(
            FindingKind.OUTPUT_MISSING,
            f"{name} {envelope.metadata.id} is decided, and {topic} holds no such record",
            diff=told(changes(None, envelope.event)),
        )
        if check.elsewhere:
            outcome.sent.append((check, missing, encoded))
        else:
            outcome.findings.append(missing)
    for left in by_id.values():
        for record, envelope in left:
            _unexpected(record, envelope, outcome, report, hash_of)
    return outcome


def _check(
    topic: str,
    subject: str,
    envelope: Envelope,
    encoded: Encoded,
    record: Record,
    was: Envelope,
    outcome: Outcome,
    report: Report,
    hash_of: HashOf,
) -> OutputCheck:
    key = subject.encode()
    name = type(envelope.event).__name__
    recorded_hash = hash_of(record)
    same_place = record.key == key and record.topic == topic
    if same_place and record.value == encoded.value and _decided(record.headers) == _decided(encoded.headers):
        return OutputCheck(name, envelope.metadata.id, topic, recorded_hash, recorded_hash)
    try:
        if same_place and is_same_by_older_schema(record, was, envelope, encoded):
            return OutputCheck(name, envelope.metadata.id, topic, recorded_hash, recorded_hash)
        found = _differences(topic, key, envelope, encoded, record, was)
    except DecodeError as error:
        found = [Change("value", f"{len(record.value or b'')} bytes that do not decode: {error}", envelope.event)]
    fields = ", ".join(change.path for change in found[:5])
    outcome.findings.append(
        report(
            FindingKind.OUTPUT_DIFFERS,
            f"{name} at {record.topic}[{record.partition}]@{record.offset} is recorded with another {fields}",
            field=found[0].path,
            diff=told(found),
        )
    )
    decided_hash = record_hash(topic, key, encoded.value, encoded.headers)
    return OutputCheck(name, envelope.metadata.id, topic, recorded_hash, decided_hash)


def _differences(
    topic: str, key: bytes, envelope: Envelope, encoded: Encoded, record: Record, was: Envelope
) -> list[Change]:
    """In what the recorded output (old) and the decided one (new) differ; there is always something."""
    found = changes(was.event, envelope.event) if type(was.event) is type(envelope.event) else []
    if type(was.event) is not type(envelope.event):
        found.append(Change("type", type(was.event).__name__, type(envelope.event).__name__))
    found += changes(record.topic, topic, "topic") + changes(record.key, key, "key")
    if found:
        return found
    old, new = dict(_decided(record.headers)), dict(_decided(encoded.headers))
    found = changes(old, new, "headers")
    if record.value != encoded.value:
        # Other bytes for the same event: an older schema's, or bytes that no codec of ours writes.
        found.append(Change("value", record.value, encoded.value))
    return found or [Change("headers", _decided(record.headers), _decided(encoded.headers))]


def _decided(headers: Sequence[Header] | Sequence[tuple[str, bytes]]) -> list[Any]:
    if headers and headers[-1][0] == NOT_DECIDED:
        return list(headers[:-1])
    return [header for header in headers if header[0] != NOT_DECIDED]


def _unexpected(record: Record, envelope: Envelope, outcome: Outcome, report: Report, hash_of: HashOf) -> None:
    name, place = type_name(envelope), f"{record.topic}[{record.partition}]@{record.offset}"
    outcome.checks.append(OutputCheck(name, envelope.metadata.id, record.topic, hash_of(record), None))
    outcome.findings.append(
        report(
            FindingKind.OUTPUT_UNEXPECTED,
            f"{name} {envelope.metadata.id} at {place} is recorded, and not decided",
            diff=told(_shown(envelope)),
        )
    )


def output_difference(codec: Codec, topic: str, encoded: Encoded, record: Record) -> tuple[str, str] | None:
    """In what a recorded output differs from the decided one of the same id: the first field and a diff; None when it
    does not.
    """
    key = dict(encoded.headers).get("ce_subject", b"")
    decided = Record(topic, record.partition, record.offset, record.timestamp_ms, key, *encoded)
    if record_hash(topic, key, *encoded) == record_hash(record.topic, record.key, record.value, record.headers):
        return None
    try:
        found = _differences(topic, key, codec.decode(decided), encoded, record, codec.decode(record))
    except DecodeError as error:
        found = [Change("value", str(error), encoded.value)]
    return found[0].path, told(found)


def _shown(envelope: Envelope) -> list[Change]:
    try:
        return changes(envelope.event, None)
    except DecodeError as error:
        return [Change("value", str(error), None)]


def recorded_checks(outputs: Sequence[tuple[Record, Envelope]], hash_of: HashOf) -> tuple[OutputCheck, ...]:
    """Checks of outputs that are not decided again: their recorded hashes stand for both."""
    checks = []
    for record, envelope in outputs:
        hashed = hash_of(record)
        checks.append(OutputCheck(type_name(envelope), envelope.metadata.id, record.topic, hashed, hashed))
    return tuple(checks)


def effect_faults(record: Record, envelope: Envelope, report: Report) -> Sequence[Finding]:
    """What in a recorded effect contradicts itself."""
    effect, metadata = envelope.event, envelope.metadata
    assert isinstance(effect, Effect)
    name = type(effect).__name__
    identity = (
        effect.event_id,
        effect.agent,
        name,
        effect.scope,
        "" if metadata.data_subjects else effect.request_hash,
        effect.occurrence,
        effect.sequence,
    )
    made, hashed = deterministic_id(*identity), request_hash(effect.request)
    said: dict[str, Any] = {}
    response = effect.response if type(effect) is LlmCalled else ""
    broken = ""
    if response:
        try:
            said = orjson.loads(response)
        except orjson.JSONDecodeError as error:
            broken = str(error)
    other = [field for field in _FROM_RESPONSE if field in said and said[field] != getattr(effect, field)]
    if (
        hashed == effect.request_hash
        and made == metadata.id
        and metadata.time == effect.started_at
        and metadata.causation_id == effect.event_id
        and not broken
        and not other
    ):
        return ()
    place = f"{record.topic}[{record.partition}]@{record.offset}"

    def altered(field: str, why: str, old: object, new: object) -> Finding:
        message = f"{name} at {place}: {why}"
        return report(FindingKind.EFFECT_ALTERED, message, field=field, diff=text_diff(str(old), str(new)))

    found = []
    if hashed != effect.request_hash:
        found.append(altered("request", "its request has another hash than it says", effect.request_hash, hashed))
    if made != metadata.id:
        found.append(altered("metadata.id", "its id is not that of its identity", metadata.id, made))
    if metadata.time != effect.started_at:
        found.append(altered("started_at", "it says two times", metadata.time, effect.started_at))
    if metadata.causation_id != effect.event_id:
        found.append(altered("event_id", "it says two causes", metadata.causation_id, effect.event_id))
    if broken:
        found.append(altered("response", f"its response is no JSON: {broken}", "JSON", response[:200]))
    for field in other:
        why = f"its response says another {field}"
        found.append(altered(field, why, said[field], getattr(effect, field)))
    return found


def letter_faults(
    letter: DeadLettered | None, failure: Failure | None, error: str, record: Record, report: Report
) -> Iterator[Finding]:
    """What is wrong with the dead letter, or the want of one. ``error`` is what it should say."""
    if letter is None:
        if failure is not None:
            yield report(
                FindingKind.LETTER_MISSING,
                f"the handler fails with {failure.error_type}: {error[:300]}; no dead letter tells of it",
            )
        return
    if failure is None:
        if letter.error_type != "OutputRefused":
            yield report(
                FindingKind.LETTER_UNEXPECTED,
                f"its dead letter says {letter.error_type}: {letter.error[:300]}; the handler does not fail",
            )
        return
    said, expected = (letter.error_type, letter.error), (failure.error_type, error[:_ERROR_KEPT])
    for field, old, new in zip(("error_type", "error"), said, expected, strict=True):
        # A letter too large for its topic says so behind the error.
        if old != new and not (field == "error" and letter.value is None and old.startswith(new[:1000])):
            yield report(
                FindingKind.LETTER_DIFFERS,
                f"its dead letter has another {field}",
                field=field,
                diff=text_diff(old, new),
            )
    if letter.value is not None and letter.value != record.value:
        yield report(FindingKind.LETTER_DIFFERS, "its dead letter holds another record than the topic", field="value")


def unrecorded(
    name: str, request: str, scope: str, occurrence: int, recorded: Sequence[Effect], report: Report
) -> Finding:
    """The handler asked for what was not recorded; the diff is against the recorded request of this type that it did
    not ask for, where there is one.
    """
    near = next((effect for effect in recorded if type(effect).__name__ == name), None)
    where = f" in scope {scope!r}" if scope else ""
    again = f" (occurrence {occurrence})" if occurrence else ""
    message = f"it asks for {name}{where}{again}, which is not recorded: {request[:200]}"
    if near is None:
        return report(FindingKind.EFFECT_MISSING, message, field="request")
    try:
        found = changes(orjson.loads(near.request), orjson.loads(request))
    except orjson.JSONDecodeError:
        found = [Change("", near.request, request)]
    fields = [f"request.{change.path}" if change.path else "request" for change in found]
    renamed = [Change(field, change.old, change.new) for field, change in zip(fields, found, strict=True)]
    return report(FindingKind.EFFECT_MISSING, message, field=fields[0] if fields else "request", diff=told(renamed))
