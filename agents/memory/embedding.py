"""Texts to vectors for many callers at once: the :class:`~agents.context.EmbeddingModel` that a process is given.

In: concurrent ``embed`` calls from any thread or event loop, and an encoder (ONNX on the CPU, torch on a GPU) that is
fast on batches. Out: unit vectors. One thread of its own feeds the encoder with what all callers are waiting for;
requests of few texts (questions) go before those of many (documents), which are taken a slice at a time, so that a
question waits for one slice at most. Short texts that were seen lately are answered from a cache.
"""

import asyncio
import threading
from collections import OrderedDict, deque
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Final, Protocol

import numpy as np

from agents.context import Vectors
from agents.memory.errors import EmbedderClosedError

__all__ = ["BatchingEmbedder", "TextEncoder"]

_FEW_TEXTS: Final = 8
"""Requests of at most this many texts are a question's, not a document's."""

_SLICE_TEXTS: Final = 1024
_CACHED_CHARACTERS: Final = 500
"""Longer texts are chunks of documents, which hardly ever come twice."""


class TextEncoder(Protocol):
    """A model that turns texts into vectors and blocks meanwhile. One thread at a time calls it.

    ``slice_characters`` is how much text it takes about a quarter of a second for: what a question may have to wait.
    """

    model: str
    version: str
    dimensions: int
    slice_characters: int

    def encode(self, texts: Sequence[str]) -> Vectors:
        """One unit-length row a text, shape (len(texts), dimensions)."""

    def close(self) -> None:
        """Let go of threads and memory."""


class _Request:
    __slots__ = ("future", "taken", "texts", "vectors")

    def __init__(self, texts: Sequence[str], dimensions: int) -> None:
        self.texts = texts
        self.vectors: Vectors = np.empty((len(texts), dimensions), np.float32)
        self.taken = 0
        self.future: Future[Vectors] = Future()


_Slice = tuple[_Request, int, int]
"""A request, and the first and past-the-last index of its texts."""


class BatchingEmbedder:
    """An embedding model that coalesces concurrent calls.

    ``cache_size`` short texts are remembered (1.5 KB each at 384 dimensions).
    """

    def __init__(self, encoder: TextEncoder, *, cache_size: int = 8192) -> None:
        self.model = encoder.model
        self.version = encoder.version
        self.dimensions = encoder.dimensions
        self._encoder = encoder
        self._cache_size = cache_size
        self._cache: OrderedDict[str, Vectors] = OrderedDict()
        self._few: deque[_Request] = deque()
        self._many: deque[_Request] = deque()
        self._wake = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=f"embed-{encoder.model}", daemon=True)
        self._thread.start()

    def forget_texts(self) -> None:
        """Forget the texts that were seen lately, and their vectors."""
        # Another one: the thread that answers may be amid the old one.
        self._cache = OrderedDict()

    async def embed(self, texts: Sequence[str]) -> Vectors:
        """One unit-length row a text, shape (len(texts), dimensions).

        Raises:
            EmbedderClosedError: :meth:`close` was called.
            Exception: whatever the encoder raised on a batch with one of the texts.
        """
        return await asyncio.wrap_future(self.submit(texts))

    def submit(self, texts: Sequence[str]) -> "Future[Vectors]":
        """The same for callers without an event loop.

        Raises:
            EmbedderClosedError: :meth:`close` was called.
        """
        request = _Request(tuple(texts), self.dimensions)
        with self._wake:
            if self._closed:
                raise EmbedderClosedError(f"the embedder of {self.model} was closed; make a new one")
            if texts:
                (self._few if len(texts) <= _FEW_TEXTS else self._many).append(request)
                self._wake.notify()
        if not texts:
            request.future.set_result(request.vectors)
        return request.future

    def close(self) -> None:
        """Fail what still waits, stop the thread and close the encoder. Calling it again does nothing."""
        with self._wake:
            if self._closed:
                return
            self._closed = True
            waiting = [*self._few, *self._many]
            self._few.clear()
            self._many.clear()
            self._wake.notify()
        error = EmbedderClosedError(f"the embedder of {self.model} was closed before it came to these texts")
        for request in waiting:
            _fail(request, error)
        self._thread.join()
        self._encoder.close()

    def _run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._closed or self._few or self._many)
                if self._closed:
                    return
                slices = self._take()
            if not slices:
                continue
            try:
                self._answer(slices)
            except Exception as error:  # noqa: BLE001 - the callers get it; the thread serves the next ones
                for request, _, _ in slices:
                    _fail(request, error)

    def _take(self) -> list[_Slice]:
        """The next batch: questions first, then as much of a document as there is room for."""
        slices: list[_Slice] = []
        texts, characters = 0, 0
        most = self._encoder.slice_characters
        for queue in (self._few, self._many):
            while queue and texts < _SLICE_TEXTS and characters < most:
                request = queue[0]
                if request.future.done():  # its caller was cancelled, or an earlier slice of it failed
                    queue.popleft()
                    continue
                first = request.taken
                while request.taken < len(request.texts) and texts < _SLICE_TEXTS and characters < most:
                    texts += 1
                    characters += len(request.texts[request.taken])
                    request.taken += 1
                slices.append((request, first, request.taken))
                if request.taken == len(request.texts):
                    queue.popleft()
        return slices

    def _answer(self, slices: list[_Slice]) -> None:
        wanted = dict.fromkeys(text for request, first, last in slices for text in request.texts[first:last])
        found: dict[str, Vectors] = {}
        cache = self._cache
        for text in wanted:
            row = cache.get(text)
            if row is not None:
                cache.move_to_end(text)
                found[text] = row
        missing = [text for text in wanted if text not in found]
        if missing:
            for text, row in zip(missing, self._encoder.encode(missing), strict=True):
                found[text] = row
                if len(text) <= _CACHED_CHARACTERS:
                    cache[text] = row.copy()
            while len(cache) > self._cache_size:
                cache.popitem(last=False)
        for request, first, last in slices:
            for index in range(first, last):
                request.vectors[index] = found[request.texts[index]]
            if last == len(request.texts) and request.future.set_running_or_notify_cancel():
                request.future.set_result(request.vectors)


def _fail(request: _Request, error: Exception) -> None:
    if not request.future.done() and request.future.set_running_or_notify_cancel():
        request.future.set_exception(error)
