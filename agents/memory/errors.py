"""The errors of memory.

MemoryPartError
├── ModelFileError        a model's or tokenizer's file is missing, or is not the pinned one
├── ExtraMissingError     the model needs packages of an extra that is not installed
├── DocumentTooLargeError a document gives more chunks than one index entry can list
└── EmbedderClosedError   an embedding was asked for after the embedder was closed
"""

__all__ = [
    "DocumentTooLargeError",
    "EmbedderClosedError",
    "ExtraMissingError",
    "MemoryPartError",
    "ModelFileError",
]


class MemoryPartError(Exception):
    """The base of all errors of :mod:`agents.memory`."""


class ModelFileError(MemoryPartError):
    """A model's file can't be used."""


class ExtraMissingError(MemoryPartError):
    """Optional packages are needed."""


class DocumentTooLargeError(MemoryPartError):
    """The document is to be split by whoever submits it."""


class EmbedderClosedError(MemoryPartError):
    """The embedder no longer takes texts."""
