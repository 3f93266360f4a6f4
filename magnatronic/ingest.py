"""Documents from files into the log, and the wait until they can be found.

In: files and folders of .md, .txt, .html, .rst and .pdf. Out: one DocumentSubmitted for each (or several, where the
text is larger than a message), and, when waited for, the DocumentIndexed that answers each. A document's id is its
path as URI, so that ingesting a file again replaces what was there.
"""

import hashlib
import html
import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from magnatronic.client import Client, DataSubjects
from magnatronic.errors import WaitTimeoutError, WrongInputError
from magnatronic.follow import Follower, Subscription, read_stored
from schemas.events import DeadLettered, DocumentIndexed, DocumentRemoved, DocumentSubmitted, Event
from schemas.metadata import Metadata
from schemas.record import Record
from schemas.topics import MAX_MESSAGE_BYTES

__all__ = ["MEDIA_TYPES", "IngestReport", "Skipped", "find_files", "ingest", "load_file", "split_document"]

MEDIA_TYPES: Final = {
    ".md": "text/markdown",
    ".markdown": "text/markdown",
    ".txt": "text/plain",
    ".text": "text/plain",
    ".html": "text/html",
    ".htm": "text/html",
    ".rst": "text/x-rst",
    ".pdf": "text/plain",
}
"""What can be read, by suffix, and what its text is submitted as."""

MAX_TEXT_BYTES: Final = MAX_MESSAGE_BYTES - 65_536
"""The most UTF-8 bytes of text in one document event; the rest of the message is room for its other fields."""

_MAX_ID_BYTES: Final = 400
_PART: Final = "#part-"
_BATCH: Final = 32
_DEAD_DOCUMENTS: Final = b"documents"
_BREAKS: Final = re.compile(rb"\n[ \t]*\n|</(?:p|div|section|article|table|ul|ol|pre|h[1-6])>")
_LINES: Final = re.compile(rb"\n|\. |>")


@dataclass(frozen=True, slots=True)
class Skipped:
    """A file that was not submitted, and why."""

    path: Path
    reason: str


@dataclass(slots=True)
class IngestReport:
    """What became of it, in documents (a file in several parts counts as several).

    ``found`` is how many files there are to read; ``chunks`` stand in the index for the ``indexed`` documents.
    ``failed`` holds the ids that went to dead-letters, with the reason. It is updated in place while it goes on.
    """

    found: int = 0
    read: int = 0
    submitted: int = 0
    indexed: int = 0
    chunks: int = 0
    seconds: float = 0.0
    skipped: list[Skipped] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether every file was submitted and none failed."""
        return not self.skipped and not self.failed


def find_files(paths: Sequence[Path]) -> tuple[list[Path], list[Skipped]]:
    """The files to read under ``paths``, each once and in order, and those named directly that can't be read.

    In folders, what is hidden is passed over, as are files of other kinds; symbolic links to folders are not followed.

    Raises:
        WrongInputError: a path does not exist.
    """
    files: dict[Path, None] = {}
    skipped = []
    for path in paths:
        if path.is_dir():
            for folder, subfolders, names in os.walk(path):
                subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
                for name in sorted(names):
                    if not name.startswith(".") and Path(name).suffix.lower() in MEDIA_TYPES:
                        files[Path(folder, name).absolute()] = None
        elif not path.exists():
            raise WrongInputError(f"there is no {path}; name files or folders of {' '.join(sorted(MEDIA_TYPES))}")
        elif path.suffix.lower() in MEDIA_TYPES:
            files[path.absolute()] = None
        else:
            kinds = " ".join(sorted(MEDIA_TYPES))
            skipped.append(Skipped(path, f"{path.suffix or 'a file without suffix'} can't be read, only {kinds}"))
    return list(files), skipped


def load_file(path: Path) -> DocumentSubmitted | Skipped:
    """The document in a file, whole; or why it can't be read."""
    suffix = path.suffix.lower()
    try:
        if suffix == ".pdf":
            title, text = _read_pdf(path)
        else:
            text = _decode(path.read_bytes())
            title = _title(text, MEDIA_TYPES[suffix])
    except OSError as error:
        return Skipped(path, error.strerror or str(error))
    except _UnreadableError as error:
        return Skipped(path, str(error))
    if not text.strip():
        return Skipped(path, "it holds no text")
    uri = path.absolute().as_uri()
    return DocumentSubmitted(
        document_id=_bounded_id(uri),
        title=(title or path.stem)[:300],
        text=text,
        media_type=MEDIA_TYPES[suffix],
        source=uri,
    )


def split_document(document: DocumentSubmitted, max_bytes: int = MAX_TEXT_BYTES) -> list[DocumentSubmitted]:
    """``document`` in parts of at most ``max_bytes`` UTF-8 bytes of text, cut between paragraphs where there are any.

    The first part keeps the id; the others are ``<id>#part-2`` and on, so that a shorter version can be told from them.
    """
    raw = document.text.encode()
    if len(raw) <= max_bytes:
        return [document]
    texts = []
    start = 0
    while start < len(raw):
        end = start + max_bytes
        if end < len(raw):
            end = _cut(raw, start, end)
        texts.append(raw[start:end].decode())
        start = end
    return [
        document.model_copy(
            update={
                "document_id": document.document_id if number == 1 else f"{document.document_id}{_PART}{number}",
                "title": f"{document.title} (part {number} of {len(texts)})",
                "text": text,
                "attributes": {**document.attributes, "part": str(number), "parts": str(len(texts))},
            }
        )
        for number, text in enumerate(texts, 1)
    ]


def ingest(
    client: Client,
    documents: Iterable[DocumentSubmitted | Skipped],
    *,
    report: IngestReport | None = None,
    wait: bool = True,
    data_subject: DataSubjects = None,
    stall_timeout: float = 120.0,
    on_progress: Callable[[IngestReport], None] = lambda _: None,
) -> IngestReport:
    """Submit ``documents``; with ``wait``, return when each is indexed or has failed.

    ``report`` is the one to go on with (what was found already). ``on_progress`` is called whenever it has changed.
    ``data_subject`` names whom the documents are about: what is personal in them is sealed under the subject's key, and
    so that their ids tell nothing, each id is replaced by a keyed hash of it.

    Raises:
        WaitTimeoutError: nothing was indexed for ``stall_timeout`` seconds.
        ClusterError: the cluster failed.
    """
    report = IngestReport() if report is None else report
    began = time.monotonic()
    subjects = client.key_ids(data_subject)
    parts = _stored_parts(client)
    answers = _Answers(client, report) if wait else None
    try:
        batch: list[Event] = []
        for document in documents:
            report.read += 1
            if isinstance(document, Skipped):
                report.skipped.append(document)
            else:
                batch += _events(_opaque(document, client, subjects), parts)
            if len(batch) >= _BATCH:
                _submit(client, batch, report, answers, data_subject)
                batch.clear()
            if answers is not None:
                answers.take(0)
            report.seconds = time.monotonic() - began
            on_progress(report)
        _submit(client, batch, report, answers, data_subject)
        last = time.monotonic()
        while answers is not None and answers.pending:
            if answers.take(0.2):
                last = time.monotonic()
            elif time.monotonic() - last > stall_timeout:
                raise WaitTimeoutError(
                    f"{len(answers.pending)} of {report.submitted} documents are not indexed, and none was for "
                    f"{stall_timeout:g} s; is the embedder running? They are in the log and will be indexed by it"
                )
            report.seconds = time.monotonic() - began
            on_progress(report)
    finally:
        if answers is not None:
            answers.close()
    report.seconds = time.monotonic() - began
    on_progress(report)
    return report


def _submit(
    client: Client,
    batch: list[Event],
    report: IngestReport,
    answers: "_Answers | None",
    data_subject: DataSubjects,
) -> None:
    report.submitted += sum(isinstance(event, DocumentSubmitted) for event in batch)
    client.publish(batch, on_sent=None if answers is None else answers.expect, data_subject=data_subject)


def _opaque(document: DocumentSubmitted, client: Client, subjects: Sequence[str]) -> DocumentSubmitted:
    """The document under an id that tells nothing, where it is about somebody: ids are no secret, and this one is a
    path. The same path has the same id for as long as the subject has its key.
    """
    if not subjects or client.codec.cipher is None:
        return document
    sealed = client.codec.cipher.seal(subjects, (b"document id",), document.document_id.encode())
    return document.model_copy(update={"document_id": f"document-{hashlib.sha256(sealed).hexdigest()[:32]}"})


def _events(document: DocumentSubmitted, stored: dict[str, set[int]]) -> Iterator[Event]:
    """The parts of a document, and the end of parts that an earlier, longer version had."""
    parts = split_document(document)
    yield from parts
    for number in sorted(stored.get(document.document_id, ())):
        if number > len(parts):
            yield DocumentRemoved(
                document_id=f"{document.document_id}{_PART}{number}", reason="the document has fewer parts now"
            )


def _stored_parts(client: Client) -> dict[str, set[int]]:
    """Which further parts the log holds, by the id of the whole; keys and headers tell, nothing is decoded."""
    parts: dict[str, set[int]] = {}
    mark = _PART.encode()
    for record in read_stored(client.kafka, ["documents"], accept=lambda message: mark in (message.key() or b"")):
        if record is None:
            break
        whole, _, number = (record.key or b"").decode(errors="replace").rpartition(_PART)
        if number.isdigit():
            numbers = parts.setdefault(whole, set())
            (numbers.discard if _type_of(record) == DocumentRemoved.full_name else numbers.add)(int(number))
    return parts


class _Answers:
    """Waits for what the embedder says to each submitted document."""

    def __init__(self, client: Client, report: IngestReport) -> None:
        self.pending: dict[str, str] = {}
        self._report = report
        self._codec = client.codec
        self._follower = Follower(client.kafka, ["embeddings", "dead-letters"], client.codec).start()
        self._subscription: Subscription = self._follower.subscribe()

    def expect(self, event: Event, metadata: Metadata) -> None:
        if isinstance(event, DocumentSubmitted):
            self.pending[metadata.id] = event.document_id

    def take(self, timeout: float) -> bool:
        """Take all there is, after a wait of at most ``timeout`` seconds for the first; whether there was any."""
        record = self._subscription.next_record(timeout)
        seen = record is not None
        while record is not None:
            if record.topic == "embeddings":
                self._embedded(record)
            elif record.key == _DEAD_DOCUMENTS:
                self._dead(record)
            record = self._subscription.next_record(0)
        return seen

    def _embedded(self, record: Record) -> None:
        if _type_of(record) == DocumentIndexed.full_name:
            envelope = self._codec.decode(record)
            if self.pending.pop(envelope.metadata.causation_id, None) is not None:
                assert isinstance(envelope.event, DocumentIndexed)
                self._report.indexed += 1
                self._report.chunks += len(envelope.event.chunk_ids)

    def _dead(self, record: Record) -> None:
        dead = self._codec.decode(record).event
        if isinstance(dead, DeadLettered):
            event_id = dict(zip(dead.header_names, dead.header_values, strict=True)).get("ce_id", b"").decode()
            if (document := self.pending.pop(event_id, None)) is not None:
                self._report.failed[document] = f"{dead.error_type}: {dead.error}"

    def close(self) -> None:
        self._follower.close()


def _type_of(record: Record) -> str:
    return (dict(record.headers).get("ce_type") or b"").decode(errors="replace")


class _UnreadableError(Exception):
    """The file holds no text that can be read; the message says why."""


def _decode(raw: bytes) -> str:
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        encoding = "utf-16"
    elif b"\0" in raw[:65_536]:
        raise _UnreadableError("it is binary, not text")
    else:
        encoding = "utf-8-sig"
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError:
        if encoding == "utf-16":
            raise _UnreadableError("it starts as UTF-16 and isn't") from None
    declared = re.search(rb"<meta[^>]+charset=[\"']?([\w-]{2,30})", raw[:4096], re.IGNORECASE)
    try:
        return raw.decode(declared[1].decode() if declared else "cp1252")
    except (LookupError, UnicodeDecodeError):
        return raw.decode("latin-1")  # every byte means something there


def _read_pdf(path: Path) -> tuple[str, str]:
    """Title and text of a PDF, its pages apart by blank lines."""
    from pypdf import PdfReader

    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # it reports each flaw of a file that it can still read
    try:
        reader = PdfReader(path)
        if reader.is_encrypted and not reader.decrypt(""):
            raise _UnreadableError("it is encrypted")
        pages = [page.extract_text() for page in reader.pages]
        title = str(reader.metadata.title or "") if reader.metadata else ""
    except (OSError, _UnreadableError):
        raise
    except Exception as error:
        raise _UnreadableError(f"it can't be read as PDF ({type(error).__name__}: {error})") from error
    text = "\n\n".join(page.strip() for page in pages)
    if not text.strip():
        raise _UnreadableError("it has no text layer (scanned pages need OCR first)")
    return title.strip(), text.encode("utf-8", "replace").decode()


_MARKDOWN_TITLE: Final = re.compile(r"^#\s+(.+?)\s*#*$|^(\S[^\n]*)\n=+\s*$", re.MULTILINE)
_RST_TITLE: Final = re.compile(r"^(\S[^\n]*)\n([=\-~^\"'#*+`:.])\2{2,}\s*$", re.MULTILINE)
_HTML_TITLE: Final = re.compile(r"<title[^>]*>(.*?)</title>|<h1[^>]*>(.*?)</h1>", re.IGNORECASE | re.DOTALL)


def _title(text: str, media_type: str) -> str:
    """The title that the text gives itself near its beginning, or nothing."""
    pattern = {"text/markdown": _MARKDOWN_TITLE, "text/x-rst": _RST_TITLE, "text/html": _HTML_TITLE}.get(media_type)
    found = pattern.search(text[:20_000]) if pattern is not None else None
    if found is None:
        return ""
    title = next((group for group in found.groups() if group), "")
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", title)).split())


def _bounded_id(uri: str) -> str:
    if len(uri) <= _MAX_ID_BYTES:
        return uri
    return f"{uri[:300]}...{hashlib.sha256(uri.encode()).hexdigest()[:32]}"


def _cut(raw: bytes, start: int, end: int) -> int:
    """Where to end a part that starts at ``start`` and may reach to ``end``."""
    earliest = start + (end - start) // 2
    for pattern in (_BREAKS, _LINES):
        found = [match.end() for match in pattern.finditer(raw, earliest, end)]
        if found:
            return found[-1]
    while raw[end] & 0xC0 == 0x80:  # inside a character
        end -= 1
    return end
