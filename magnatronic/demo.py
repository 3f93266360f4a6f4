"""The demo: a whole system on a fresh folder answers real questions about the software that is installed here.

In: the long descriptions of all installed Python distributions (real READMEs), and questions about them. Out: answers
with citations, the steps' timings from ClickHouse, a replay of one task, and what it all took. Nothing is prepared: the
documents go through the log, are chunked, embedded and indexed by the agents, and each answer is an event on Kafka.
"""

import importlib.metadata
import re
import threading
from collections.abc import Mapping
from typing import Final, Self

import psutil

from magnatronic.ingest import split_document
from schemas.events import DocumentSubmitted

__all__ = ["QUESTIONS", "MemoryMeter", "installed_documents"]

_MEDIA_TYPES: Final = frozenset({"text/markdown", "text/plain", "text/x-rst"})
_SAMPLE_S: Final = 0.2


QUESTIONS: Final = (
    "What does psutil do?",
    "What is Milvus Lite?",
    "How many times are connection errors retried by openai?",
    "How much faster is uvloop than asyncio?",
    "Which types can orjson serialize natively?",
    "What is chDB?",
    "Compare click and rich.",
)
"""About dependencies of this project, so that they are installed wherever the demo runs. The last one is compound."""


def installed_documents() -> list[DocumentSubmitted]:
    """The long description of every installed distribution that has one, by name."""
    found: dict[str, DocumentSubmitted] = {}
    for distribution in importlib.metadata.distributions():
        document = _document(distribution)
        if document is not None:
            found.setdefault(document.document_id, document)
    return [part for _, document in sorted(found.items()) for part in split_document(document)]


def _document(distribution: importlib.metadata.Distribution) -> DocumentSubmitted | None:
    metadata = distribution.metadata.json
    name, text = metadata.get("name"), metadata.get("description")
    if not isinstance(name, str) or not isinstance(text, str) or not text.strip():
        return None
    normal = re.sub(r"[-_.]+", "-", name).lower()
    declared = str(metadata.get("description_content_type", "")).partition(";")[0].strip().lower()
    # The core metadata specification: without a declared type, take it for reStructuredText.
    return DocumentSubmitted(
        document_id=f"distribution:{normal}",
        title=name,
        text=text.encode("utf-8", "replace").decode(),
        media_type=declared if declared in _MEDIA_TYPES else "text/x-rst",
        source=_home(metadata) or f"{name} {distribution.version}",
        attributes={"version": distribution.version},
    )


def _home(metadata: Mapping[str, str | list[str]]) -> str:
    """The distribution's first project link, which is usually its home page or repository."""
    for entry in metadata.get("project_url", ()):
        _, _, url = entry.partition(",")
        if url.strip():
            return url.strip()
    return str(metadata.get("home_page", ""))


class MemoryMeter:
    """The most memory that this process and its children had at once, in bytes, sampled in a thread.

    It is resident memory; pages that processes share count in each.
    """

    def __init__(self) -> None:
        self.peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memory meter", daemon=True)

    def _run(self) -> None:
        this = psutil.Process()
        while not self._stop.wait(_SAMPLE_S):
            self.peak = max(self.peak, sum(_memory(process) for process in [this, *this.children(recursive=True)]))

    def __enter__(self) -> Self:
        """Starts sampling."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stops sampling."""
        self._stop.set()
        self._thread.join()


def _memory(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.Error:  # it has ended since it was listed
        return 0
