"""The Embedder: documents in, vectors out.

In: DocumentSubmitted and DocumentRemoved. Out: a ChunkEmbedded for each chunk that is new, then one DocumentIndexed
that lists the chunks that now stand, so that every submission and removal is answered by exactly one DocumentIndexed,
the same text's again too. Only chunks that the document did not have before go to the model; their vectors are recorded
as effects, so that a replay embeds nothing.
"""

from collections import Counter
from hashlib import sha256
from typing import Final

from pydantic import BaseModel, ConfigDict

from agents.agent import Agent
from agents.context import Context
from agents.memory.chunking import CHUNKING_VERSION, Chunk, Chunker
from agents.memory.errors import DocumentTooLargeError
from schemas.events import ChunkEmbedded, DocumentIndexed, DocumentRemoved, DocumentSubmitted, PersonalText
from schemas.metadata import deterministic_id

__all__ = ["Embedder", "IndexedDocument", "chunk_id_of"]

_TEXTS_A_CALL: Final = 64
"""An effect of this many texts and vectors is about 200 KB, far below the topic's 4 MiB."""

_MOST_CHUNKS: Final = 10_000
"""DocumentIndexed lists every chunk id in one message of less than 1 MiB: 37 bytes each."""


class IndexedDocument(BaseModel):
    """What the Embedder keeps of a document. ``fingerprint`` covers all that its chunks depend on."""

    model_config = ConfigDict(frozen=True)

    fingerprint: PersonalText
    content_hash: PersonalText
    chunk_ids: tuple[str, ...]
    model: str
    model_version: str


def chunk_id_of(document: DocumentSubmitted, chunk: Chunk, occurrence: int, model: str, model_version: str) -> str:
    """The id of a chunk: what it says, where it is cited from, and the model; ``occurrence`` counts equal ones from 0.

    Its ordinal is no part of it: a paragraph that is put in at the top of a document moves all others, and none of
    them is to be embedded again.
    """
    return deterministic_id(
        "chunk",
        document.document_id,
        document.title,
        document.source,
        chunk.heading,
        sha256(chunk.embedded.encode()).hexdigest(),
        occurrence,
        model,
        model_version,
    )


class Embedder(Agent[IndexedDocument]):
    """Chunks and embeds documents with the model that the process is given, whose name and version it is told."""

    name = "embedder"
    version = "1"
    consumes = (DocumentSubmitted, DocumentRemoved)
    emits = (ChunkEmbedded, DocumentIndexed)
    state_type = IndexedDocument
    starts_anew = True

    def __init__(self, model: str, model_version: str, chunker: Chunker) -> None:
        self._model = model
        self._model_version = model_version
        self._chunker = chunker

    async def handle(self, event: DocumentSubmitted | DocumentRemoved, ctx: Context[IndexedDocument]) -> None:
        """Bring the document's chunks up to date.

        Raises:
            EffectFailedError: the embedding model failed.
            DocumentTooLargeError: the document has too many chunks for one DocumentIndexed.
        """
        if isinstance(event, DocumentRemoved):
            ctx.emit(self._indexed(event.document_id, "", ()))
            ctx.state = None
            return
        before = ctx.state
        fingerprint = self._fingerprint(event)
        if before is not None and before.fingerprint == fingerprint:
            ctx.emit(self._indexed(event.document_id, before.content_hash, before.chunk_ids))
            return
        # An id is not sealed, and must not tell whether a text that somebody guesses is in the document.
        unguessed = ctx.metadata.id if ctx.data_subjects else ""
        chunks = self._identified(event, unguessed)
        known = frozenset(before.chunk_ids) if before is not None else frozenset()
        new = [(chunk_id, chunk) for chunk_id, chunk in chunks.items() if chunk_id not in known]
        for first in range(0, len(new), _TEXTS_A_CALL):
            await self._embed(event, new[first : first + _TEXTS_A_CALL], ctx)
        content_hash = sha256(event.text.encode()).hexdigest()
        ctx.emit(self._indexed(event.document_id, content_hash, tuple(chunks)))
        ctx.state = IndexedDocument(
            fingerprint=fingerprint,
            content_hash=content_hash,
            chunk_ids=tuple(chunks),
            model=self._model,
            model_version=self._model_version,
        )

    def _fingerprint(self, event: DocumentSubmitted) -> str:
        parts = (event.title, event.source, event.media_type, event.text, self._model, self._model_version)
        lengths = ",".join(
            str(len(part)) for part in parts
        )  # so that no two divisions of the same characters are alike
        return sha256("\x1f".join((CHUNKING_VERSION, lengths, *parts)).encode()).hexdigest()

    def _identified(self, event: DocumentSubmitted, unguessed: str = "") -> dict[str, Chunk]:
        """The document's chunks by id, in order. The ids depend on ``unguessed``, if there is one, and on no text."""
        chunks = self._chunker(event.text, event.media_type, event.title)
        if len(chunks) > _MOST_CHUNKS:
            raise DocumentTooLargeError(
                f"document {event.document_id} has {len(chunks)} chunks, more than {_MOST_CHUNKS}; "
                "submit it in parts, each with its own document_id"
            )
        seen: Counter[tuple[str, str]] = Counter()
        identified: dict[str, Chunk] = {}
        if unguessed:
            model, version = self._model, self._model_version
            return {deterministic_id("chunk", unguessed, chunk.ordinal, model, version): chunk for chunk in chunks}
        for chunk in chunks:
            same = (chunk.heading, chunk.embedded)
            identified[chunk_id_of(event, chunk, seen[same], self._model, self._model_version)] = chunk
            seen[same] += 1
        return identified

    async def _embed(
        self, event: DocumentSubmitted, chunks: list[tuple[str, Chunk]], ctx: Context[IndexedDocument]
    ) -> None:
        vectors = await ctx.embed([chunk.embedded for _, chunk in chunks])
        for (chunk_id, chunk), vector in zip(chunks, vectors.tolist(), strict=True):
            ctx.emit(
                ChunkEmbedded(
                    chunk_id=chunk_id,
                    document_id=event.document_id,
                    ordinal=chunk.ordinal,
                    title=event.title,
                    heading=chunk.heading,
                    source=event.source,
                    text=chunk.text,
                    tokens=chunk.tokens,
                    model=self._model,
                    model_version=self._model_version,
                    vector=tuple(vector),
                )
            )

    def _indexed(self, document_id: str, content_hash: str, chunk_ids: tuple[str, ...]) -> DocumentIndexed:
        return DocumentIndexed(
            document_id=document_id,
            content_hash=content_hash,
            chunk_ids=chunk_ids,
            model=self._model,
            model_version=self._model_version,
        )
