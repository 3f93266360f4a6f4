"""Forgetting a data subject in Milvus: the chunks about it go, from every generation of the index and from the files.

In: key ids of subjects whose keys were destroyed. Out: collections without their rows. The key ids are noted before
rows are deleted, and the sink looks after each write whether it wrote about one of them: whichever comes first, nothing
is left. What is noted also says whether all of it was done; the offsets are forgotten while a collection is made anew.
So a crash in between is mended by doing it again, and from the log.
"""

from collections.abc import Collection, Iterator
from functools import partial
from typing import Any, Final

from sinks.errors import StoreError
from sinks.milvus.comparing import ranges
from sinks.milvus.store import MilvusStore

__all__ = ["erase", "erased_rows"]

_BEGUN: Final = -1
"""What is noted as the number of deleted rows while it is not done, less those deleted so far."""


def erase(store: MilvusStore, offsets: str, subjects: Collection[str]) -> None:
    """Delete all rows about these subjects; ``offsets`` is what the feeding sink's offsets are called. Can be repeated;
    returns when it is done.

    Raises:
        StoreError: Milvus failed; repeat it.
    """
    noted = store.forgotten(subjects)
    counts = {subject: _deleted(noted.get(subject, _BEGUN)) for subject in sorted(subjects)}
    # One that was begun before, and perhaps got no further than the rows.
    unfinished = any(value < 0 for value in noted.values())
    for subject in counts.keys() - noted.keys():
        store.note_forgotten(subject, _BEGUN)
    changed = set(store.all_collections()) if unfinished else set[str]()
    finished = {subject for subject in counts if noted.get(subject, _BEGUN) >= 0}
    for subject in counts:
        for collection in store.all_collections():
            if rows := _delete(store, collection, subject):
                counts[subject] += rows
                changed.add(collection)
                finished.discard(subject)
                store.note_forgotten(subject, _BEGUN - counts[subject])
    if changed:
        _purge(store, offsets, changed)
    for subject, rows in counts.items():
        if subject not in finished:
            store.note_forgotten(subject, rows)


def erased_rows(store: MilvusStore, subjects: Collection[str]) -> dict[str, int]:
    """How many rows were deleted for each of these subjects; those with which it is not done are missing."""
    return {subject: rows for subject, rows in store.forgotten(subjects).items() if rows >= 0}


def _deleted(noted: int) -> int:
    return noted if noted >= 0 else _BEGUN - noted


def _purge(store: MilvusStore, offsets: str, collections: Collection[str]) -> None:
    store.flush()
    at = store.offsets(offsets)
    if store.embedded:
        store.forget_offsets(offsets)
    for collection in sorted(collections):
        store.purge(collection, partial(_rows, store, collection))
    store.note_offsets(offsets, at)
    store.flush()


def _delete(store: MilvusStore, collection: str, subject: str) -> int:
    deleted, before = 0, list[str]()
    while found := store.about(collection, subject):
        if found == before:
            raise StoreError(f"Milvus keeps {len(found)} chunks of {collection} that it was told to delete")
        store.delete(collection, found)
        deleted += len(found)
        before = found
    return deleted


def _rows(store: MilvusStore, collection: str) -> Iterator[dict[str, Any]]:
    for (rows,) in ranges(store, (collection,)):
        yield from rows.values()
