"""Recall by similarity from Milvus: the :class:`~agents.context.Memory` that a process is given.

In: concurrent ``recall`` calls from any thread or event loop, an embedding model for their queries, the store. Out:
evidence, best first. A search in Milvus Lite costs nearly the same for one query as for thirty, so a thread of its own
searches for all that wait, and while it does the next ones gather. Equal scores are ordered by chunk id, and scores are
rounded to what does not depend on the batch, so that the same index gives the same answer.
"""

import asyncio
import threading
from collections import defaultdict, deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from agents.context import EmbeddingModel, RecallRequest, Vectors
from schemas.events import Evidence
from sinks.errors import StoreError
from sinks.milvus.naming import collection_name, in_generation
from sinks.milvus.store import Hit, MilvusStore

__all__ = ["MilvusMemory"]

_MOST_QUERIES: Final = 64
"""Queries in one search."""

_SPARE: Final = 8
"""Hits that are asked for beyond the limit, so that chunks of equal score at its edge are cut by id, not by chance."""

_DECIMALS: Final = 6


@dataclass(frozen=True, slots=True)
class _Recall:
    vector: NDArray[np.float32]
    limit: int
    document_ids: tuple[str, ...]
    future: "Future[tuple[Evidence, ...]]" = field(default_factory=Future)


class MilvusMemory:
    """Recalls chunks that were embedded by ``embedding``'s model. Opens ``store`` and closes it."""

    def __init__(self, store: MilvusStore, embedding: EmbeddingModel) -> None:
        self.model = embedding.model
        self._store = store
        self._embedding = embedding
        self._collection = collection_name(embedding.model, embedding.version, embedding.dimensions)
        self._waiting: deque[_Recall] = deque()
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = True

    def open(self) -> None:
        """Connect, and start the thread.

        Raises:
            SinkError: the store can't be opened.
        """
        self._store.open()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="recall", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Fail what still waits, stop the thread and disconnect."""
        with self._wake:
            if self._closed:
                return
            self._closed = True
            waiting = list(self._waiting)
            self._waiting.clear()
            self._wake.notify()
        for recall in waiting:
            _fail(recall, StoreError("the memory was closed before it came to this query", retryable=True))
        if self._thread is not None:
            self._thread.join()
        self._store.close()

    async def recall(self, request: RecallRequest) -> tuple[Evidence, ...]:
        """The chunks nearest to the query, best first; none when nothing is indexed.

        Raises:
            StoreError: the search failed, or the memory is not open.
        """
        if request.limit < 1:
            return ()
        vectors = await self._embedding.embed([request.query])
        recall = _Recall(vectors[0], request.limit, tuple(sorted(set(request.document_ids))))
        with self._wake:
            if self._closed:
                raise StoreError("the memory is not open; call open() first", retryable=True)
            self._waiting.append(recall)
            self._wake.notify()
        return await asyncio.wrap_future(recall.future)

    def _run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._closed or self._waiting)
                if self._closed:
                    return
                batch = [self._waiting.popleft() for _ in range(min(len(self._waiting), _MOST_QUERIES))]
            alike: defaultdict[tuple[str, ...], list[_Recall]] = defaultdict(list)
            for recall in batch:
                if recall.future.set_running_or_notify_cancel():
                    alike[recall.document_ids].append(recall)
            for document_ids, recalls in alike.items():
                self._answer(document_ids, recalls)

    def _answer(self, document_ids: tuple[str, ...], recalls: list[_Recall]) -> None:
        try:
            limit = max(recall.limit for recall in recalls) + _SPARE
            vectors = np.stack([recall.vector for recall in recalls])
            found = self._search(vectors, limit, document_ids)
        except Exception as error:  # noqa: BLE001 - the callers get it; the thread serves the next ones
            for recall in recalls:
                recall.future.set_exception(error)
            return
        for recall, hits in zip(recalls, found, strict=True):
            evidence = sorted(map(_evidence, hits), key=lambda one: (-one.score, one.chunk_id))
            recall.future.set_result(tuple(evidence[: recall.limit]))

    def _search(self, vectors: Vectors, limit: int, document_ids: tuple[str, ...]) -> list[list[Hit]]:
        generation = self._store.generation()
        while True:
            found = self._store.search(in_generation(self._collection, generation), vectors, limit, document_ids)
            if any(found):
                return found
            # Nothing may mean that a rebuild has dropped the collection meanwhile.
            before, generation = generation, self._store.generation(fresh=True)
            if generation == before:
                return found


def _evidence(hit: Hit) -> Evidence:
    return Evidence(
        chunk_id=hit.chunk_id,
        document_id=hit.document_id,
        title=hit.title,
        heading=hit.heading,
        source=hit.source,
        text=hit.text,
        score=min(1.0, max(-1.0, round(hit.score, _DECIMALS))),
        data_subjects=hit.data_subjects,
    )


def _fail(recall: _Recall, error: Exception) -> None:
    if recall.future.set_running_or_notify_cancel():
        recall.future.set_exception(error)
