"""The Milvus sink: topic ``embeddings`` into collections that can be searched.

In: ChunkEmbedded and DocumentIndexed, and SubjectForgotten of topic ``privacy``. Out: a row for each chunk that stands
and is about nobody who was forgotten. A batch is first folded into its net
effect: what each document's last DocumentIndexed leaves standing, and the chunks that came after it; so the order of
events counts, and a batch costs an upsert, a lookup and a delete for each collection. A repeat gives the same rows.
Offsets are kept in Milvus too, and are noted after the rows they stand for have been flushed.
"""

from collections.abc import Sequence
from typing import ClassVar

from schemas.events import ChunkEmbedded, DocumentIndexed, SubjectForgotten
from schemas.topics import topic_of
from sinks.errors import ReplacedError, StoreError
from sinks.milvus.forgetting import erase
from sinks.milvus.naming import collection_name, in_generation, offsets_name, row_key
from sinks.milvus.store import ChunkRow, MilvusStore
from sinks.sink import Offsets, Sink, SinkRecord

__all__ = ["MilvusSink"]


class MilvusSink(Sink):
    """Feeds ``store`` from topic ``embeddings``. Records that don't decode are passed over: ClickHouse keeps them.

    It feeds the generation of the index that is in use, or the ``generation`` that a rebuild makes.
    """

    name: ClassVar[str] = "milvus"

    def __init__(self, store: MilvusStore, generation: int | None = None) -> None:
        self.topics = (*topic_of(ChunkEmbedded).names(), *topic_of(SubjectForgotten).names())
        self._store = store
        self._fixed = generation is not None
        self._generation = generation

    def open(self) -> None:
        """Connect; see :meth:`sinks.sink.Sink.open`."""
        self._store.open()

    def offsets(self) -> Offsets:
        """What Milvus says is done; see :meth:`sinks.sink.Sink.offsets`."""
        if not self._fixed:
            self._generation = self._store.generation(fresh=True)
        return self._store.offsets(offsets_name(self.name, self._fed))

    def replaced(self) -> bool:
        """Whether a rebuild has put another generation into use; see :meth:`sinks.sink.Sink.replaced`."""
        return not self._fixed and self._generation not in (None, self._store.generation(fresh=True))

    @property
    def _fed(self) -> int:
        if self._generation is None:
            self._generation = self._store.generation(fresh=True)
        return self._generation

    def write(self, batch: Sequence[SinkRecord], offsets: Offsets) -> None:
        """Apply the batch's net effect, then note the offsets; see :meth:`sinks.sink.Sink.write`.

        Raises:
            ReplacedError: another generation is in use. What slips through goes to the old one, with its offsets.
        """
        if self.replaced():
            raise ReplacedError(f"a rebuild has put a new index into use in place of generation {self._fed}")
        net = _Net()
        for record in batch:
            if record.envelope is None:
                continue
            event = record.envelope.event
            if isinstance(event, ChunkEmbedded):
                # Nothing is left of one about somebody who was forgotten; that its row goes, another event says.
                if not record.envelope.erased:
                    net.embedded(event, record.envelope.metadata.data_subjects)
            elif isinstance(event, DocumentIndexed):
                net.indexed(event)
            elif isinstance(event, SubjectForgotten):
                net.forgotten.add(event.key_id)
        self._remove_stale(net)
        for name, chunks in net.by_collection().items():
            collection = in_generation(name, self._fed)
            rows = [_row(chunk, net.subjects.get(chunk.chunk_id, ())) for chunk in chunks]
            self._store.upsert(collection, len(chunks[0].vector), rows)
        # After the rows, so that whichever comes first, they or the note that somebody was forgotten, none is left.
        if forgotten := net.forgotten | self._store.forgotten(net.about()).keys():
            erase(self._store, offsets_name(self.name, self._fed), forgotten)
        self._store.note_offsets(offsets_name(self.name, self._fed), offsets)

    def close(self) -> None:
        """Flush and disconnect; see :meth:`sinks.sink.Sink.close`."""
        self._store.close()

    def _remove_stale(self, net: "_Net") -> None:
        if not net.standing:
            return
        # In every model's collection: the old text of a document is stale whoever embedded it.
        for collection in self._store.collections(self._fed):
            # Again until nothing is found: of a document with very many chunks not all are seen at once.
            before: list[str] = []
            while stale := self._stale(collection, net.standing):
                if stale == before:
                    raise StoreError(f"Milvus keeps {len(stale)} chunks of {collection} that it was told to delete")
                self._store.delete(collection, stale)
                before = stale

    def _stale(self, collection: str, standing: dict[str, set[str]]) -> list[str]:
        there = self._store.chunk_ids(collection, standing)
        return sorted(chunk_id for document, ids in there.items() for chunk_id in ids - standing[document])


class _Net:
    """What a batch comes to. ``standing``: for each document with a DocumentIndexed in it, the chunks that stand."""

    def __init__(self) -> None:
        self.standing: dict[str, set[str]] = {}
        self.forgotten: set[str] = set()
        self.subjects: dict[str, tuple[str, ...]] = {}
        self._chunks: dict[str, dict[str, ChunkEmbedded]] = {}

    def about(self) -> set[str]:
        return {subject for subjects in self.subjects.values() for subject in subjects}

    def embedded(self, event: ChunkEmbedded, subjects: tuple[str, ...]) -> None:
        if subjects:
            self.subjects[event.chunk_id] = subjects
        else:
            self.subjects.pop(event.chunk_id, None)
        key = row_key(event.chunk_id)
        self._chunks.setdefault(event.document_id, {})[key] = event
        if event.document_id in self.standing:
            self.standing[event.document_id].add(key)

    def indexed(self, event: DocumentIndexed) -> None:
        standing = set(map(row_key, event.chunk_ids))
        self.standing[event.document_id] = standing
        chunks = self._chunks.get(event.document_id, {})
        for chunk_id in chunks.keys() - standing:
            del chunks[chunk_id]

    def by_collection(self) -> dict[str, list[ChunkEmbedded]]:
        found: dict[str, list[ChunkEmbedded]] = {}
        for chunks in self._chunks.values():
            for chunk in chunks.values():
                name = collection_name(chunk.model, chunk.model_version, len(chunk.vector))
                found.setdefault(name, []).append(chunk)
        return found


def _row(chunk: ChunkEmbedded, subjects: tuple[str, ...]) -> ChunkRow:
    return ChunkRow(
        chunk_id=row_key(chunk.chunk_id),
        document_id=chunk.document_id,
        ordinal=chunk.ordinal,
        title=chunk.title,
        heading=chunk.heading,
        source=chunk.source,
        text=chunk.text,
        vector=chunk.vector,
        data_subjects=subjects,
    )
