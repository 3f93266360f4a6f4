"""all-MiniLM-L6-v2 on the CPU by onnxruntime: the embedding model of a machine without a GPU.

In: texts. Out: 384-dimensional unit vectors, mean-pooled over the tokens. The weights are int8, the arithmetic float32,
so a text's vector does not depend on what it is batched with. Measured on two cores: one run at a time takes 30 ms for
200 tokens whatever the batch, and large batches are slower and need gigabytes; so a run is given some 256 tokens of
texts of like length, and ``threads`` runs go on side by side in one session, each on one core.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from tokenizers import Tokenizer

from agents.context import Vectors
from agents.memory.model_files import MODEL, MODEL_SHA256, model_path, tokenizer_path

__all__ = ["OnnxMiniLm"]

_MAX_TOKENS: Final = 256
"""What the model was trained with; what is longer is cut."""

_RUN_TOKENS: Final = 256
_Batch = list[tuple[int, list[int]]]
"""Positions among the texts, and their token ids."""


class OnnxMiniLm:
    """The encoder. ``threads`` runs go on at once, each on one core.

    Raises:
        ModelFileError: the model's files are missing or are not the pinned ones.
    """

    model = MODEL
    version = MODEL_SHA256[:12]
    dimensions = 384
    slice_characters = 16_000

    def __init__(self, *, threads: int = 2) -> None:
        self._tokenizer = Tokenizer.from_file(str(tokenizer_path()))
        self._tokenizer.enable_truncation(_MAX_TOKENS)
        self._tokenizer.no_padding()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(str(model_path()), options, providers=["CPUExecutionProvider"])
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="onnx") if threads > 1 else None

    def encode(self, texts: Sequence[str]) -> Vectors:
        """One unit-length row a text, shape (len(texts), 384)."""
        vectors: Vectors = np.empty((len(texts), self.dimensions), np.float32)
        batches = self._batches(texts)
        results = map(self._run, batches) if self._pool is None else self._pool.map(self._run, batches)
        for batch, rows in zip(batches, results, strict=True):
            vectors[[position for position, _ in batch]] = rows
        return vectors

    def close(self) -> None:
        """Stop the threads."""
        if self._pool is not None:
            self._pool.shutdown()

    def _batches(self, texts: Sequence[str]) -> list[_Batch]:
        """The texts by falling length, so that little is padded and the threads finish together."""
        encoded = [found.ids for found in self._tokenizer.encode_batch_fast(list(texts))]
        batches: list[_Batch] = []
        room = 0
        for position in sorted(range(len(texts)), key=lambda index: -len(encoded[index])):
            ids = encoded[position]
            if room == 0:
                batches.append([])
                room = max(1, _RUN_TOKENS // len(ids))
            batches[-1].append((position, ids))
            room -= 1
        return batches

    def _run(self, batch: _Batch) -> Vectors:
        shape = len(batch), len(batch[0][1])  # the longest comes first
        ids = np.zeros(shape, np.int64)
        mask = np.zeros(shape, np.int64)
        for row, (_, tokens) in enumerate(batch):
            ids[row, : len(tokens)] = tokens
            mask[row, : len(tokens)] = 1
        feeds = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros(shape, np.int64)}
        hidden: NDArray[np.float32] = self._session.run(None, feeds)[0]
        # Rows need no division by their token count: they are brought to unit length anyway.
        pooled = np.matmul(mask[:, None, :].astype(np.float32), hidden)[:, 0, :]
        return np.asarray(pooled / np.linalg.norm(pooled, axis=1, keepdims=True), np.float32)
