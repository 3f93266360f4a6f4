"""What stood in the log's lasting topics at a moment: the policy in force, and the chunks that memory held.

In: a log and a time. Out: :class:`~replay.sheet.Sheet` values. Both are plain folds of what had been appended by then:
nothing has to be decided again. A chunk stands when the last DocumentIndexed of its document names it, or when it was
embedded after that, which is how memory is filled (see :mod:`sinks.milvus.sink`).
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Final

from replay.details import Cell, readable_json
from replay.errors import UnknownIdError
from replay.history import Entry, decoded
from replay.log import Log, Progress
from replay.selection import Selection
from replay.sheet import Sheet, SheetTable
from schemas.codec import Codec
from schemas.events import (
    ChunkEmbedded,
    DocumentIndexed,
    DocumentRemoved,
    DocumentSubmitted,
    Event,
    PolicyPromoted,
    PolicyProposed,
    PolicyRolledBack,
)
from schemas.topics import topic_of

__all__ = ["document_then", "documents_then", "policy_then"]

_MILLISECOND: Final = timedelta(milliseconds=1)


def policy_then(log: Log, codec: Codec, name: str, time: datetime, *, on_progress: Progress | None = None) -> Sheet:
    """The policy ``name`` as it was in force at ``time``, and how it had come to that.

    Raises:
        UnknownIdError: the log holds no policy of this name.
    """
    contents: dict[int, str] = {}
    rows: list[tuple[Cell, ...]] = []
    in_force: int | None = None
    since: datetime | None = None
    later = False
    for entry in _entries(log, codec, (PolicyProposed,), name, None, on_progress):
        if entry.time > time:
            later = True
            continue
        match entry.event:
            case PolicyProposed(version=version, content=content, rationale=why):
                contents.setdefault(version, content)
                rows.append((entry.time, "proposed", version, why, entry.source))
            case PolicyPromoted(version=version, content=content, evidence=why):
                contents[version] = content
                in_force, since = version, entry.time
                rows.append((entry.time, "promoted", version, why, entry.source))
            case PolicyRolledBack(version=version, to_version=to_version, reason=why):
                in_force, since = to_version, entry.time
                rows.append((entry.time, f"rolled back from {version}", to_version, why, entry.source))
    if not rows and not later:
        events = (entry.event for entry in _entries(log, codec, (PolicyProposed,), "", None, None))
        known = {each.name for each in events if isinstance(each, PolicyProposed | PolicyPromoted)}
        raise UnknownIdError(f"the log holds no policy {name!r}; there are: {', '.join(sorted(known)) or 'none yet'}")
    notes = [] if in_force is not None else ["No version was in force: agents decided by their own defaults."]
    if in_force is not None and in_force not in contents:
        notes.append(f"What version {in_force} said is not in the log.")
    texts = {} if in_force not in contents else {f"version {in_force}": readable_json(contents[in_force])}
    columns = ("when", "what", "version", "why", "by")
    return Sheet(
        f"Policy {name} at {time.isoformat()}",
        {"version in force": in_force, "since": since},
        (SheetTable("history", columns, tuple(rows)),),
        texts,
        notes,
    )


@dataclass(slots=True)
class _Document:
    """A document as far as it has been read. ``standing`` are its chunks by id, ``latest`` its last event's id."""

    title: str = ""
    source: str = ""
    latest: str = ""
    changed: datetime | None = None
    removed: bool = False
    erased: bool = False
    answered: str = ""
    indexed: datetime | None = None
    model: str = ""
    standing: dict[str, None] = field(default_factory=dict)

    def take(self, entry: Entry) -> None:
        envelope = entry.envelope
        assert envelope is not None
        match envelope.event:
            case DocumentSubmitted(title=title, source=source):
                self.title, self.source, self.removed = title, source, False
                self.latest, self.changed, self.erased = envelope.metadata.id, entry.time, envelope.erased
            case DocumentRemoved():
                self.latest, self.changed, self.removed = envelope.metadata.id, entry.time, True
            case ChunkEmbedded(chunk_id=chunk_id):
                self.standing[chunk_id] = None
            case DocumentIndexed(chunk_ids=chunk_ids) as indexed:
                self.standing = dict.fromkeys(chunk_ids)
                self.answered, self.indexed = envelope.metadata.causation_id, entry.time
                self.model = f"{indexed.model} {indexed.model_version}"

    @property
    def state(self) -> str:
        """Where it stands, in a word or two."""
        if self.latest != self.answered and self.latest:
            return "removal not yet done" if self.removed else "not indexed yet"
        return "removed" if not self.standing and self.removed else "erased" if self.erased else "indexed"


def documents_then(log: Log, codec: Codec, time: datetime, *, on_progress: Progress | None = None) -> Sheet:
    """Every document that memory knew at ``time``, with how many chunks stood. Vectors are not read."""
    documents: dict[str, _Document] = {}
    kinds = (DocumentSubmitted, DocumentRemoved, DocumentIndexed)
    for entry in _entries(log, codec, kinds, "", time, on_progress):
        event = entry.event
        if isinstance(event, DocumentSubmitted | DocumentRemoved | DocumentIndexed):
            documents.setdefault(event.document_id, _Document()).take(entry)
    there = {name: each for name, each in sorted(documents.items()) if each.standing or each.state != "removed"}
    rows = tuple(
        (name, each.title, len(each.standing), each.state, each.indexed, each.model) for name, each in there.items()
    )
    columns = ("document", "title", "chunks", "state", "indexed", "model")
    counted = {"documents": len(rows), "chunks": sum(len(each.standing) for each in there.values())}
    return Sheet(f"Memory at {time.isoformat()}", counted, (SheetTable("documents", columns, rows),))


def document_then(
    log: Log, codec: Codec, document_id: str, time: datetime, *, on_progress: Progress | None = None
) -> Sheet:
    """The chunks of one document that stood in memory at ``time``, with their texts.

    Raises:
        UnknownIdError: the log holds no such document.
    """
    document, chunks, later = _Document(), dict[str, ChunkEmbedded](), False
    kinds = (DocumentSubmitted, DocumentRemoved, DocumentIndexed, ChunkEmbedded)
    for entry in _entries(log, codec, kinds, document_id, None, on_progress):
        if entry.time > time:
            later = True
            continue
        document.take(entry)
        if isinstance(entry.event, ChunkEmbedded):
            chunks[entry.event.chunk_id] = entry.event
    if document.changed is None and document.indexed is None and not later:
        raise UnknownIdError(
            f"the log holds no document {document_id!r}; `magnatronic trace --memory` lists them, by their whole ids"
        )
    rows = tuple(
        (number, chunk_id, *_said(chunks.get(chunk_id))) for number, chunk_id in enumerate(document.standing, start=1)
    )
    known = document.changed is not None or document.indexed is not None
    return Sheet(
        f"Document {document_id} in memory at {time.isoformat()}",
        {
            "title": document.title,
            "source": document.source,
            "state": document.state if known else "not there yet",
            "submitted or removed": document.changed,
            "indexed": document.indexed,
            "model": document.model,
            "chunks": len(rows),
        },
        (SheetTable("chunks that stood", ("number", "chunk", "heading", "tokens", "text"), rows),),
    )


def _said(chunk: ChunkEmbedded | None) -> tuple[Cell, Cell, Cell]:
    return ("", None, "its text is not in the log") if chunk is None else (chunk.heading, chunk.tokens, chunk.text)


def _entries(
    log: Log,
    codec: Codec,
    kinds: tuple[type[Event], ...],
    key: str,
    until: datetime | None,
    on_progress: Progress | None,
) -> Iterator[Entry]:
    """What the topics of ``kinds`` hold of them, in order within a partition: all that is of one key in one topic."""
    wanted = {name for kind in kinds for name in topic_of(kind).names()}
    topics = frozenset(wanted & {topic for topic, _ in log.spans()})
    if not topics:
        return
    selection = Selection(
        topics=topics,
        until=None if until is None else until + _MILLISECOND,
        tasks=frozenset((key,)) if key else frozenset(),
        event_types=frozenset(kind.full_name for kind in kinds) if len(kinds) > 1 else frozenset(),
    )
    for batch in log.read(selection, on_progress=on_progress):
        for record in batch.records:
            entry = decoded(record, codec)
            if entry.envelope is not None:
                yield entry
