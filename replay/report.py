"""What an audit found, as data: for the terminal, for JSON, and for another person to verify.

In: counts, hashes and findings of an audit. Out: :class:`AuditReport`, which goes to JSON and back. It names exactly
what was read (spans, each with the hash of its records) and what the agents had finished then, so that
``replay verify`` can read the same again, recompute all hashes, and decide anew.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final

import orjson

from replay.errors import ReportError
from replay.findings import Finding, FindingKind, Verdict
from replay.finished import Finished
from replay.selection import Place, Selection, Span

__all__ = ["AuditReport", "CodeVersion", "Counts", "SpanHash", "selection_as_json", "selection_from_json"]

_FORMAT: Final = 1
_SETS: Final = ("topics", "tasks", "agents", "event_types", "correlation_ids")


@dataclass(frozen=True, slots=True)
class SpanHash:
    """What was read of a partition: offsets ``[start, end)``, how many records, and the SHA-256 (hex) over them.

    The hash is over each record's offset and append time in ms (8 bytes each, big-endian) and its hash
    (:func:`replay.findings.record_hash`, 32 bytes), in offset order.
    """

    topic: str
    partition: int
    start: int
    end: int
    records: int
    sha256: str

    def as_json(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class CodeVersion:
    """The code that decided: Magnatronic's version, the git commit (empty where there is none; ``+`` behind it: with
    changes), the agents' versions, and the SHA-256 (hex) over the source files that they decide by.
    """

    package: str
    commit: str
    agents: Mapping[str, str]
    sources: str

    def as_json(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {
            "package": self.package,
            "commit": self.commit,
            "agents": dict(self.agents),
            "sources": self.sources,
        }


@dataclass(slots=True)
class Counts:
    """What an agent did: steps by verdict, effects that they rest on, outputs compared."""

    steps: dict[str, int] = field(default_factory=dict)
    effects: int = 0
    outputs: int = 0

    def add(self, other: "Counts") -> None:
        """Add the other's."""
        for verdict, count in other.steps.items():
            self.steps[verdict] = self.steps.get(verdict, 0) + count
        self.effects += other.effects
        self.outputs += other.outputs

    @property
    def total(self) -> int:
        """All steps."""
        return sum(self.steps.values())


@dataclass(slots=True)
class AuditReport:
    """The result of an audit.

    ``digest`` is over the recorded outputs of all audited steps, ``decided_digest`` over what was decided now in their
    place: the two are equal just when every output is the recorded one. ``findings`` are the first ones in the order of
    the groups' hashes, ``found`` counts all by kind. Of the ``seconds`` that it took, ``reading_s`` went into reading,
    hashing and spooling, the rest into deciding. ``others`` counts outputs and effects of agents that are not known
    here, and so not audited (when everything is). ``events`` is how many records were read and decided upon.
    """

    started: datetime
    seconds: float
    reading_s: float
    source: str
    selection: Selection
    code: CodeVersion
    spans: list[SpanHash]
    finished: dict[str, Finished]
    events: int
    groups: int
    counts: dict[str, Counts]
    digest: str
    decided_digest: str
    findings: list[Finding]
    found: dict[str, int]
    others: dict[str, int]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.found

    @property
    def steps(self) -> int:
        """How many steps were audited."""
        return sum(counts.total for counts in self.counts.values())

    @property
    def outputs(self) -> int:
        """How many outputs were compared."""
        return sum(counts.outputs for counts in self.counts.values())

    def verdicts(self) -> dict[str, int]:
        """Steps by verdict, of all agents."""
        return {
            verdict.value: total
            for verdict in Verdict
            if (total := sum(counts.steps.get(verdict.value, 0) for counts in self.counts.values()))
        }

    def as_json(self) -> dict[str, Any]:
        """The report as JSON can hold it."""
        return {
            "format": _FORMAT,
            "ok": self.ok,
            "started": self.started.isoformat(),
            "seconds": round(self.seconds, 3),
            "reading_s": round(self.reading_s, 3),
            "source": self.source,
            "selection": selection_as_json(self.selection),
            "code": self.code.as_json(),
            "events": self.events,
            "groups": self.groups,
            "steps": self.steps,
            "outputs": self.outputs,
            "verdicts": self.verdicts(),
            "agents": {
                name: {"steps": counts.steps, "effects": counts.effects, "outputs": counts.outputs}
                for name, counts in sorted(self.counts.items())
            },
            "digest": self.digest,
            "decided_digest": self.decided_digest,
            "found": self.found,
            "others": self.others,
            "findings": [finding.as_dict() for finding in self.findings],
            "spans": [span.as_json() for span in self.spans],
            "finished": {agent: finished.as_json() for agent, finished in sorted(self.finished.items())},
        }

    def to_bytes(self) -> bytes:
        """The JSON document."""
        return orjson.dumps(self.as_json(), option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)

    @classmethod
    def from_bytes(cls, raw: bytes) -> "AuditReport":
        """The report of a JSON document.

        Raises:
            ReportError: it is none.
        """
        try:
            said = orjson.loads(raw)
            if said["format"] != _FORMAT:
                raise ReportError(f"the report has format {said['format']}, and this release reads {_FORMAT}")
            return cls(
                started=datetime.fromisoformat(said["started"]),
                seconds=said["seconds"],
                reading_s=said["reading_s"],
                source=said["source"],
                selection=selection_from_json(said["selection"]),
                code=CodeVersion(**said["code"]),
                spans=[SpanHash(**span) for span in said["spans"]],
                finished={agent: Finished.from_json(value) for agent, value in said["finished"].items()},
                events=said["events"],
                groups=said["groups"],
                counts={
                    name: Counts(counts["steps"], counts["effects"], counts["outputs"])
                    for name, counts in said["agents"].items()
                },
                digest=said["digest"],
                decided_digest=said["decided_digest"],
                findings=[_finding(each) for each in said["findings"]],
                found=said["found"],
                others=said["others"],
            )
        except (orjson.JSONDecodeError, KeyError, TypeError, ValueError) as error:
            raise ReportError(f"this is no audit report ({type(error).__name__}: {error})") from error


def _finding(said: Mapping[str, Any]) -> Finding:
    return Finding(**{**said, "kind": FindingKind(said["kind"])})


def selection_as_json(selection: Selection) -> dict[str, Any]:
    """The selection as JSON can hold it; what selects all is left out."""
    said: dict[str, Any] = {name: sorted(getattr(selection, name)) for name in _SETS if getattr(selection, name)}
    for name in ("since", "until"):
        if (time := getattr(selection, name)) is not None:
            said[name] = time.isoformat()
    if selection.spans is not None:
        said["spans"] = spans_as_json(selection.spans)
    return said


def selection_from_json(said: Mapping[str, Any]) -> Selection:
    """The other way round."""
    sets: dict[str, Collection[str]] = {name: frozenset(said[name]) for name in _SETS if name in said}
    times = {name: datetime.fromisoformat(said[name]) for name in ("since", "until") if name in said}
    spans = None if "spans" not in said else spans_from_json(said["spans"])
    return Selection(spans=spans, **times, **sets)  # type: ignore[arg-type]


def spans_as_json(spans: Mapping[Place, Span]) -> list[list[Any]]:
    """Topic, partition, from, to of each, in order."""
    return [[topic, partition, start, end] for (topic, partition), (start, end) in sorted(spans.items())]


def spans_from_json(said: Iterable[Sequence[Any]]) -> dict[Place, Span]:
    """The other way round."""
    return {(str(topic), int(partition)): (int(start), int(end)) for topic, partition, start, end in said}
