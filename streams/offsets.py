"""The finished-offset map: which offsets of a partition are done, and how a commit says so.

In: offsets as they are fetched (ascending) and as they finish (any order). Out: for a commit, the offset before which
all is done, and metadata (at most 4,096 bytes, as brokers allow) that names what is done past it, so that a slow event
holds nobody back and the next owner skips what is done. As in Confluent's Parallel Consumer. Pure: no Kafka, no clock.

The metadata's first character is the coding, the rest is base64 without padding. ``r``: LEB128 run lengths from the
committed offset on, unfinished and finished in turn. ``b``: LEB128 count of offsets, then a bit for each, 1 for
unfinished, lowest bit first. The shorter one is taken; empty when nothing past the committed offset is done.
Offsets that carry no record (transaction markers, compacted ones) may be coded either way.
"""

from base64 import b64decode, b64encode
from binascii import Error as Base64Error
from collections import deque
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from streams.errors import OffsetMetadataError

__all__ = ["METADATA_LIMIT", "Checkpoint", "OffsetTracker", "decode_finished", "encode_finished"]

METADATA_LIMIT: Final = 4095
"""Bytes. The broker's offset.metadata.max.bytes is 4096, and a text of just that length is refused already
(OFFSET_METADATA_TOO_LARGE, which aborts the transaction); tests/contract holds it against a broker."""

_MAX_SPAN: Final = 100_000_000
_MAX_UNFINISHED: Final = 1_000_000


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What to commit for a partition: the first unfinished ``offset`` and its ``metadata``.

    ``cutoff``: of the offsets that were offered as finished, those from here on are not part of it, because the
    metadata had no room; offer them again. None: all are part of it.
    """

    offset: int
    metadata: str
    cutoff: int | None = None


class OffsetTracker:
    """The offsets in flight of one partition.

    ``committed`` is the group's committed offset, None where there is none, and ``metadata`` what was committed with
    it.

    Raises:
        OffsetMetadataError: ``metadata`` can't be read.
    """

    __slots__ = ("_expected", "_finished_until", "_limit", "_position", "_skip_until", "_unfinished")

    def __init__(self, committed: int | None = None, metadata: str = "", *, limit: int = METADATA_LIMIT) -> None:
        unfinished, until = decode_finished(committed or 0, metadata)
        self._limit = limit
        self._position = committed
        self._skip_until = self._finished_until = until
        # Insertion order is offset order: what an earlier owner left comes first, and fetching goes upwards.
        self._unfinished: dict[int, None] = dict.fromkeys(unfinished)
        self._expected = deque(unfinished)
        if unfinished:
            self._position = until

    def __len__(self) -> int:
        """How many offsets are begun, or known from an earlier owner, and not finished."""
        return len(self._unfinished)

    @property
    def first_unfinished(self) -> int | None:
        """What a commit now would say; None when nothing was ever begun or committed."""
        return next(iter(self._unfinished), self._position)

    @property
    def position(self) -> int:
        """The offset after the highest that was begun or is known as finished; 0 at the beginning."""
        return self._position or 0

    @property
    def refetching(self) -> bool:
        """Whether offsets that an earlier owner left unfinished are still to be fetched."""
        return bool(self._expected)

    def begin(self, offset: int) -> bool:
        """Note a fetched offset. False: it is done, by an earlier owner, or was fetched before; skip it."""
        if offset < self._skip_until:
            expected = self._expected
            while expected and expected[0] < offset:
                # Coded as unfinished, but no record is there (any more).
                self._unfinished.pop(expected.popleft(), None)
            if expected and expected[0] == offset:
                expected.popleft()
                return True
            return False
        if self._expected:
            for gone in self._expected:
                self._unfinished.pop(gone, None)
            self._expected.clear()
        if self._position is not None and offset < self._position:
            return False  # fetched again; it is in flight or done
        self._unfinished[offset] = None
        self._position = offset + 1
        return True

    def checkpoint(self, finished: Collection[int]) -> Checkpoint | None:
        """Count ``finished``, offsets that were begun, as done. None: nothing was ever begun or committed here."""
        if self._position is None:
            return None
        unfinished = self._unfinished
        for offset in finished:
            del unfinished[offset]
        highest = max(finished, default=-1) + 1
        until = max(self._finished_until, highest)
        offset = next(iter(unfinished), self._position)
        metadata = self._encode(offset, until)
        cutoff = None
        if len(metadata) > self._limit:
            offset, metadata, cutoff, until = self._cut(sorted(finished))
        self._finished_until = until
        return Checkpoint(offset, metadata, cutoff)

    def _encode(self, base: int, until: int) -> str:
        if until <= base:
            return ""
        return encode_finished(base, self._unfinished, until)

    def _cut(self, finished: Sequence[int]) -> tuple[int, str, int, int]:
        """Take as many of ``finished``, from the lowest, as the metadata has room for.

        Taking none always fits: the unfinished offsets below the highest finished one are then those of the last
        checkpoint, or fewer.
        """
        everything = sorted([*self._unfinished, *finished])
        before = self._finished_until
        position = self._position or 0

        def attempt(taken: int) -> tuple[int, str, int]:
            done = set(finished[:taken])
            self._unfinished = {offset: None for offset in everything if offset not in done}
            until = max(before, finished[taken - 1] + 1 if taken else 0)
            base = next(iter(self._unfinished), position)
            return base, self._encode(base, until), until

        low, high = 0, len(finished) - 1
        while low < high:
            middle = (low + high + 1) // 2
            if len(attempt(middle)[1]) <= self._limit:
                low = middle
            else:
                high = middle - 1
        base, metadata, until = attempt(low)
        return base, metadata, finished[low], until


def encode_finished(base: int, unfinished: Iterable[int], until: int) -> str:
    """Metadata for a commit at ``base``: of the offsets from ``base`` to before ``until``, all but ``unfinished``
    (ascending) are done.
    """
    runs = bytearray()
    bits = bytearray((until - base + 7) // 8)
    begin = end = base
    for offset in unfinished:
        if offset >= until:
            break
        place = offset - base
        bits[place >> 3] |= 1 << (place & 7)
        if offset == end:
            end += 1
            continue
        _put(runs, end - begin)
        _put(runs, offset - end)
        begin, end = offset, offset + 1
    _put(runs, end - begin)
    if until > end:
        _put(runs, until - end)
    count = bytearray()
    _put(count, until - base)
    if len(runs) <= len(count) + len(bits):
        return "r" + b64encode(runs).decode().rstrip("=")
    return "b" + b64encode(count + bits).decode().rstrip("=")


def decode_finished(base: int, metadata: str) -> tuple[list[int], int]:
    """The unfinished offsets, ascending, and the offset before which all others are done: (offsets, until).

    Raises:
        OffsetMetadataError: it is no such metadata.
    """
    if not metadata:
        return [], base
    try:
        raw = b64decode(metadata[1:] + "=" * (-len(metadata[1:]) % 4), validate=True)
        if metadata[0] == "r":
            return _decode_runs(base, raw)
        if metadata[0] == "b":
            return _decode_bits(base, raw)
    except (Base64Error, ValueError, IndexError):
        pass
    raise OffsetMetadataError(
        f"the commit at offset {base} has metadata {metadata[:40]!r}, which is no finished-offset map of this release; "
        "was the offset committed by another program?"
    )


def _decode_runs(base: int, raw: bytes) -> tuple[list[int], int]:
    unfinished: list[int] = []
    at, offset, done = 0, base, False
    while at < len(raw):
        run, at = _get(raw, at)
        if run > _MAX_SPAN or (not done and len(unfinished) + run > _MAX_UNFINISHED):
            raise ValueError(run)
        if not done:
            unfinished.extend(range(offset, offset + run))
        offset += run
        done = not done
    return unfinished, offset


def _decode_bits(base: int, raw: bytes) -> tuple[list[int], int]:
    count, at = _get(raw, 0)
    if (count + 7) // 8 != len(raw) - at:
        raise ValueError(count)
    return [base + place for place in range(count) if raw[at + (place >> 3)] >> (place & 7) & 1], base + count


def _put(target: bytearray, number: int) -> None:
    while number > 127:
        target.append(number & 127 | 128)
        number >>= 7
    target.append(number)


def _get(raw: bytes, at: int) -> tuple[int, int]:
    number = shift = 0
    while True:
        byte = raw[at]
        number |= (byte & 127) << shift
        at += 1
        if byte < 128:
            return number, at
        shift += 7
        if shift > 63:
            raise ValueError(number)
