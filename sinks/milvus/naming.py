"""What things are called in Milvus: collections, generations of the index, keys of rows.

In: models, ids, a generation's number. Out: names that Milvus takes and that need no escaping in its filters. A rebuild
makes the next generation of the index beside the one in use; generation 0 bears the plain names.
"""

import re
from typing import Final

from schemas.metadata import deterministic_id

__all__ = [
    "OFFSETS",
    "collection_name",
    "document_key",
    "in_generation",
    "offsets_name",
    "plain_name",
    "row_key",
]

OFFSETS: Final = "sink_offsets"
"""The collection of the sinks' offsets."""

_PREFIX: Final = "chunks_"
_PLAIN: Final = re.compile(r"[A-Za-z0-9_./:-]{1,200}")
"""Ids that need no escaping in a filter, whoever parses it."""


def collection_name(model: str, version: str, dimensions: int) -> str:
    """The collection of an embedding model's chunks.

    >>> collection_name("all-MiniLM-L6-v2", "1.0", 384)
    'chunks_all_MiniLM_L6_v2_1_0_384'
    """
    return _PREFIX + re.sub(r"\W", "_", f"{model}_{version}_{dimensions}", flags=re.ASCII)[:200]


def in_generation(collection: str, generation: int) -> str:
    """What ``collection`` is called in a generation of the index.

    >>> in_generation("chunks_m_1_384", 0), in_generation("chunks_m_1_384", 2)
    ('chunks_m_1_384', 'g2_chunks_m_1_384')
    """
    return f"g{generation}_{collection}" if generation else collection


def plain_name(collection: str, generation: int) -> str | None:
    """The name that ``collection`` would have in generation 0; None when it is none of ``generation``."""
    prefix = in_generation("", generation)
    plain = collection.removeprefix(prefix)
    return plain if collection.startswith(prefix) and plain.startswith(_PREFIX) else None


def offsets_name(sink: str, generation: int) -> str:
    """Under which name a generation's offsets are kept."""
    return f"{sink}@{generation}" if generation else sink


def row_key(chunk_id: str) -> str:
    """The primary key of a chunk: its id, hashed where it is not the plain kind that the Embedder makes."""
    return chunk_id if _PLAIN.fullmatch(chunk_id) else deterministic_id("row", chunk_id)


def document_key(document_id: str) -> str:
    """What a document is filtered by."""
    return deterministic_id("document", document_id)
