"""Golden histories: a task's or a document's records in a file, decided again whenever the code changes.

In: a history read from a log, with what deciding it again showed. Out: a text file of JSON lines, small enough to be
reviewed and kept beside the code: first what it is, then the records, exact (places, times, keys, headers, raw bytes)
and beside each what it says, for people; then each step with its verdict. :func:`check` decides the file's records with
the code of today, and says in words what is no longer as it was. docs/versioning.md tells what to do then.
"""

import base64
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

import orjson

from replay.decide import Handled, Station, redecide
from replay.errors import PinnedFileError
from replay.findings import Decided, DecidedStep, Verdict
from replay.history import Entry, TaskHistory, decoded
from schemas.codec import Codec
from schemas.record import Header, Record

__all__ = ["CLEAN", "SUFFIX", "Difference", "Pinned", "PinnedStep", "check", "dump", "load", "pin"]

SUFFIX: Final = ".jsonl"
"""What golden histories' files are called by."""

CLEAN: Final = frozenset({Verdict.SAME, Verdict.CANCELLED, Verdict.UNREADABLE})
"""Verdicts of steps that nothing is wrong with."""

_FORMAT: Final = 1
_TEXT_CHARS: Final = 160
_LIST_ITEMS: Final = 16
_ZLIB: Final = "zlib:"
_PLAIN: Final = "base64:"

_ADVICE: Final = (
    "If events of that version exist anywhere, keep its decisions: raise the agent's `version` and name the old class "
    "in its `predecessors`, or put the change behind ctx.changed(...); docs/versioning.md shows both. If there are "
    "none, and the change is meant, record the history anew."
)


@dataclass(frozen=True, slots=True)
class PinnedStep:
    """One event's handling by one agent, as it was found when the history was pinned."""

    agent: str
    version: str
    event_type: str
    event_id: str
    place: str
    effects: int
    outputs: int
    verdict: str

    def __str__(self) -> str:
        return f"{self.agent}@{self.version} on {self.event_type} {self.event_id} ({self.place})"


@dataclass(frozen=True, slots=True)
class Pinned:
    """A golden history. ``id`` is the task's or document's; ``digest`` covers every recorded output, in order.

    ``unreadable`` are the places of records that were no events. ``reason`` says why it is kept though not all is right
    with it; empty where all is.
    """

    name: str
    about: str
    id: str
    kind: str
    records: tuple[Record, ...]
    steps: tuple[PinnedStep, ...]
    digest: str
    unreadable: tuple[str, ...] = ()
    reason: str = ""

    @property
    def versions(self) -> dict[str, list[str]]:
        """Each agent that took part, with its versions."""
        found: dict[str, set[str]] = {}
        for step in self.steps:
            found.setdefault(step.agent, set()).add(step.version)
        return {agent: sorted(versions) for agent, versions in sorted(found.items())}


@dataclass(frozen=True, slots=True)
class Difference:
    """Something that is no longer as it was pinned: whose decision, on what, in which field, and what to do."""

    agent: str
    event_type: str
    event_id: str
    field: str
    message: str

    def __str__(self) -> str:
        return self.message


class _AllFinished:
    """A pinned history is whole: what left nothing decided nothing."""

    def finished(self, topic: str, partition: int, offset: int) -> bool:
        """Whether the record there is done with."""
        return True


async def pin(
    history: TaskHistory,
    *,
    name: str,
    stations: Sequence[Station],
    codec: Codec,
    about: str = "",
    reason: str = "",
) -> tuple[Pinned, Decided]:
    """``history`` as a golden one, and what deciding it again showed.

    It is to be kept if :attr:`Decided.findings` is empty, and each verdict one of :data:`CLEAN`; or with a ``reason``.
    """
    decided = await _decide(history.entries, stations, codec)
    pinned = Pinned(
        name=name,
        about=about,
        id=history.id,
        kind=history.kind,
        records=tuple(entry.record for entry in history.entries),
        steps=tuple(_pinned(step) for step in decided.steps),
        digest=_digest(decided),
        unreadable=tuple(entry.place for entry in history.entries if entry.envelope is None),
        reason=reason,
    )
    return pinned, decided


async def check(pinned: Pinned, *, stations: Sequence[Station], codec: Codec) -> list[Difference]:
    """What today's code would decide otherwise; empty when all is as it was pinned."""
    entries = [decoded(record, codec) for record in pinned.records]
    decided = await _decide(entries, stations, codec)
    expected = {(step.agent, step.place): step for step in pinned.steps}
    differences = _read_otherwise(pinned, entries)
    for step in decided.steps:
        found = _pinned(step)
        was = expected.pop((found.agent, found.place), None)
        if was is None:
            said = f"{pinned.name}: {found} is handled now, and was not when it was recorded. {_ADVICE}"
            differences.append(Difference(found.agent, found.event_type, found.event_id, "", said))
        elif was.verdict != found.verdict or (was.verdict in CLEAN and step.findings):
            differences += _otherwise(pinned, was, step, differences)
    for was in expected.values():
        said = f"{pinned.name}: {was} is not handled any more, and was when it was recorded. {_ADVICE}"
        differences.append(Difference(was.agent, was.event_type, was.event_id, "", said))
    if not differences and (digest := _digest(decided)) != pinned.digest:
        said = f"{pinned.name}: the outputs' digest is {digest}, and was {pinned.digest} when it was recorded"
        differences.append(Difference("", "", "", "", said))
    return differences


def _read_otherwise(pinned: Pinned, entries: Sequence[Entry]) -> list[Difference]:
    found = []
    for entry in entries:
        if (entry.envelope is None) == (entry.place in pinned.unreadable):
            continue
        now = entry.error or "it is read now, and was no event when it was recorded"
        said = (
            f"{pinned.name}: the record at {entry.place} is read otherwise: {now}. Mend schemas.upcasters or the codec"
        )
        found.append(Difference("", entry.type, entry.id, "", said))
    return found


def _otherwise(pinned: Pinned, was: PinnedStep, step: DecidedStep, before: Sequence[Difference]) -> list[Difference]:
    # Where a step can't be decided, its lane's state is not known, and the steps after it are left open.
    after = step.verdict is Verdict.OPEN and any(each.agent == was.agent for each in before)
    found = []
    for finding in step.findings:
        field = f" in {finding.field}" if finding.field else ""
        said = f"{pinned.name}: {was} is decided otherwise{field}: {finding.kind}: {finding.message}"
        diff = f"\n{finding.diff}\n" if finding.diff else " "
        found.append(Difference(was.agent, was.event_type, was.event_id, finding.field, f"{said}{diff}{_ADVICE}"))
    if not found and not after:
        said = f"{pinned.name}: {was} was found to be {was.verdict}, and is {step.verdict.value} now. {_ADVICE}"
        found.append(Difference(was.agent, was.event_type, was.event_id, "", said))
    return found


async def _decide(entries: Sequence[Entry], stations: Sequence[Station], codec: Codec) -> Decided:
    records = [(entry.record, entry.envelope) for entry in entries if entry.envelope is not None]
    handled: dict[str, Handled] = {station.agent.name: _AllFinished() for station in stations}
    return await redecide(records, stations=stations, codec=codec, handled=handled)


def _pinned(step: DecidedStep) -> PinnedStep:
    record = step.record
    return PinnedStep(
        agent=step.agent,
        version=step.version,
        event_type=type(step.envelope.event).__name__,
        event_id=step.envelope.metadata.id,
        place=_place((record.topic, record.partition, record.offset)),
        effects=len(step.effects),
        outputs=len(step.outputs),
        verdict=step.verdict.value,
    )


def _place(parts: Sequence[Any]) -> str:
    topic, partition, offset = parts
    return f"{topic}[{partition}]@{offset}"


def _digest(decided: Decided) -> str:
    digest = sha256()
    for step in decided.steps:
        for output in step.outputs:
            digest.update((output.recorded_hash or "-").encode())
    return digest.hexdigest()


# The file.


def dump(pinned: Pinned, codec: Codec) -> str:
    """The file's text: JSON lines, each ended by a newline."""
    lines = [{"record": _record_json(record, codec)} for record in pinned.records]
    lines += [{"step": asdict(step)} for step in pinned.steps]
    rest = b"".join(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE) for line in lines)
    head = {
        "golden history": _FORMAT,
        "name": pinned.name,
        "about": pinned.about,
        "reason": pinned.reason,
        "kind": pinned.kind,
        "id": pinned.id,
        "agents": pinned.versions,
        "records": len(pinned.records),
        "steps": len(pinned.steps),
        "digest": pinned.digest,
        "sha256": sha256(rest).hexdigest(),
    }
    return (orjson.dumps(head, option=orjson.OPT_APPEND_NEWLINE) + rest).decode()


def load(path: Path) -> Pinned:
    """The golden history in the file.

    Raises:
        PinnedFileError: it can't be read, is none, or was changed by hand.
    """
    try:
        first, _, rest = path.read_bytes().partition(b"\n")
        head = orjson.loads(first)
        if head["golden history"] != _FORMAT:
            raise PinnedFileError(f"{path} has format {head['golden history']}, and this release reads {_FORMAT}")
        if head["sha256"] != sha256(rest).hexdigest():
            raise PinnedFileError(
                f"{path} is not as it was written: its lines have another SHA-256 than its first line says. "
                "Take it from version control again, or record it anew"
            )
        lines = [orjson.loads(line) for line in rest.splitlines()]
        records = [line["record"] for line in lines if "record" in line]
        return Pinned(
            name=head["name"],
            about=head["about"],
            id=head["id"],
            kind=head["kind"],
            records=tuple(map(_record_of, records)),
            steps=tuple(PinnedStep(**line["step"]) for line in lines if "step" in line),
            digest=head["digest"],
            unreadable=tuple(_place(record["place"]) for record in records if record["type"] == "?"),
            reason=head["reason"],
        )
    except OSError as error:
        raise PinnedFileError(f"{path} can't be read: {error.strerror}") from error
    except (KeyError, TypeError, ValueError, zlib.error) as error:
        raise PinnedFileError(f"{path} is no golden history: {type(error).__name__}: {error}") from error


def _record_json(record: Record, codec: Codec) -> dict[str, Any]:
    entry = decoded(record, codec)
    said: Any = {"unreadable": entry.error}
    if entry.event is not None:
        said = _shortened(entry.event.model_dump(mode="python"))
    return {
        "place": [record.topic, record.partition, record.offset],
        "time_ms": record.timestamp_ms,
        "type": entry.type,
        "says": said,
        "key": _text(record.key),
        "headers": [[name, _text(content)] for name, content in record.headers],
        "value": _packed(record.value),
    }


def _record_of(line: Mapping[str, Any]) -> Record:
    topic, partition, offset = line["place"]
    headers: list[Header] = [(name, _bytes(content)) for name, content in line["headers"]]
    return Record(topic, partition, offset, line["time_ms"], _bytes(line["key"]), _unpacked(line["value"]), headers)


def _text(content: bytes | None) -> str | list[str] | None:
    """Text as it is; other bytes as a list of one: their base64."""
    if content is None:
        return None
    try:
        return content.decode()
    except UnicodeDecodeError:
        return [base64.b64encode(content).decode()]


def _bytes(text: str | list[str] | None) -> bytes | None:
    if isinstance(text, list):
        return base64.b64decode(text[0])
    return None if text is None else text.encode()


def _packed(value: bytes | None) -> str | None:
    if value is None:
        return None
    small = zlib.compress(value, 9)
    prefix, content = (_ZLIB, small) if len(small) < len(value) else (_PLAIN, value)
    return prefix + base64.b64encode(content).decode()


def _unpacked(text: str | None) -> bytes | None:
    if text is None:
        return None
    prefix = _ZLIB if text.startswith(_ZLIB) else _PLAIN
    content = base64.b64decode(text.removeprefix(prefix), validate=True)
    return zlib.decompress(content) if prefix == _ZLIB else content


def _shortened(value: Any) -> Any:
    """What an event says, short enough to be read: the raw bytes hold all of it."""
    if isinstance(value, dict):
        return {str(name): _shortened(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        if len(value) > _LIST_ITEMS and all(isinstance(item, int | float) for item in value):
            return f"({len(value)} numbers, sha256 {_sha(orjson.dumps(value))})"
        return [_shortened(item) for item in value]
    if isinstance(value, bytes):
        return f"({len(value)} bytes, sha256 {_sha(value)})"
    if isinstance(value, str) and len(value) > _TEXT_CHARS:
        return f"{value[:_TEXT_CHARS]}... ({len(value)} characters, sha256 {_sha(value.encode())})"
    return value


def _sha(content: bytes) -> str:
    return sha256(content).hexdigest()[:12]


def told(differences: Iterable[Difference]) -> str:
    """All of them, each in a paragraph of its own."""
    return "\n\n".join(str(difference) for difference in differences)
