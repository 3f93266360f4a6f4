"""The seam for personal fields: what is encrypted per data subject before it is recorded.

In: an event model whose field is marked ``Annotated[str, Personal("task_id")]`` and a :class:`FieldCipher` handed to
the codec. Out: records that hold only the ciphertext, named in the header ``ce_encryptedfields``. Whoever has no
cipher, or a cipher whose key for the subject was destroyed, still reads the rest of the event.
"""

from dataclasses import dataclass
from typing import Protocol

from schemas.events.base import Event

__all__ = ["FieldCipher", "Personal", "personal_fields"]


@dataclass(frozen=True, slots=True)
class Personal:
    """Annotation marker for an event's own ``str`` or ``bytes`` field.

    ``subject_field`` names the field, of the same event, whose value is the data subject that owns the key.
    """

    subject_field: str


class FieldCipher(Protocol):
    """Encrypts fields under one key for each data subject.

    ``encrypt`` must be deterministic (AES-SIV, for example): a decision made twice must give the same bytes.
    """

    def encrypt(self, subject: str, field: str, plaintext: bytes) -> bytes:
        """The ciphertext under the key of ``subject``, bound to ``field`` (``<full name>.<field>``)."""

    def decrypt(self, subject: str, field: str, ciphertext: bytes) -> bytes | None:
        """The plaintext, or None when ``subject``'s key was destroyed; the field then reads as empty.

        Raises:
            ValueError: the ciphertext is not what ``encrypt`` made.
        """


def personal_fields(model: type[Event]) -> dict[str, str]:
    """The names of the model's personal fields, each with the name of its subject field.

    Raises:
        TypeError: a subject field does not exist, or is personal itself.
    """
    marked = {
        name: mark.subject_field
        for name, info in model.model_fields.items()
        for mark in info.metadata
        if isinstance(mark, Personal)
    }
    for name, subject in marked.items():
        if subject not in model.model_fields or subject in marked:
            raise TypeError(
                f"{model.__name__}.{name}: the subject field {subject!r} must be a field that is not personal"
            )
    return marked
