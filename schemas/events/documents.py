"""Documents and their vectors: topics ``documents`` and ``embeddings``, both keyed by ``document_id``."""

from typing import Annotated

from pydantic import Field

from schemas.events.base import Event, Float32, Personal, PersonalText

__all__ = ["ChunkEmbedded", "DocumentIndexed", "DocumentRemoved", "DocumentSubmitted"]


class DocumentSubmitted(Event, family="documents"):
    """A document, whole, as text; submitted again with the same id it replaces what was there.

    ``media_type`` says how ``text`` is to be read: text/markdown, text/plain, text/html or text/x-rst.
    ``source`` is where it came from (a path or URI).
    """

    document_id: str = Field(min_length=1, max_length=500)
    title: PersonalText
    text: PersonalText
    media_type: str = "text/plain"
    source: PersonalText = ""
    attributes: Annotated[dict[str, str], Personal] = Field(default_factory=dict)


class DocumentRemoved(Event, family="documents"):
    """The document is to be forgotten by every index."""

    document_id: str
    reason: PersonalText = ""


class ChunkEmbedded(Event, family="documents"):
    """One chunk of a document and its vector (unit length, ``len(vector)`` is the model's dimension).

    ``chunk_id`` is deterministic: it depends on the document, the chunk's place and text, and the model, so that a
    repeat is an upsert of the same row. ``ordinal`` is its place in the document, from 0; ``heading`` the section path.
    """

    chunk_id: str
    document_id: str
    ordinal: int
    title: PersonalText
    heading: PersonalText = ""
    source: PersonalText = ""
    text: PersonalText
    tokens: int
    model: str
    model_version: str
    vector: Annotated[tuple[Annotated[float, Float32], ...], Personal]


class DocumentIndexed(Event, family="documents"):
    """A document's chunks are all embedded: ``chunk_ids`` are the ones that now stand, in order; any other is stale.

    Empty ``chunk_ids``: the document was removed or has no text. ``content_hash`` is the SHA-256 (hex) of its text.
    """

    document_id: str
    content_hash: PersonalText
    chunk_ids: tuple[str, ...]
    model: str
    model_version: str
