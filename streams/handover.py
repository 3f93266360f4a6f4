"""Partitions coming and going: restores in threads of their own, and the listener told on the event loop.

In: what the group assigns and takes away, from the consumer's thread. Out: calls of the :class:`FetchListener`, and
the places that are ready to be fetched. A restore holds up neither the consumer's thread nor the other partitions. The
listener hears of a partition's coming and going in the order in which they happened.
"""

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError as FutureCancelledError
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import contextmanager
from typing import Any, Final, Protocol

from confluent_kafka import Consumer, Message, TopicPartition

from streams.errors import ClusterError

__all__ = ["FetchListener", "Handover", "Place"]

Place = tuple[str, int]
"""A topic and a partition's number."""

_SLICE_S: Final = 0.05
_END_S: Final = 30.0

log = logging.getLogger(__name__)


class FetchListener(Protocol):
    """Who gets what is fetched."""

    def received(self, messages: Sequence[Message]) -> None:
        """A batch; on the event loop's thread."""

    def prepare(
        self, consumer: Consumer, partitions: Sequence[TopicPartition], cancelled: threading.Event
    ) -> Sequence[Any]:
        """Make ready to own ``partitions``, on a thread of its own; it may block, but has to end within a second when
        ``cancelled`` is set, however it likes. Returns what ``assigned`` gets.
        """

    async def assigned(self, prepared: Sequence[Any]) -> list[TopicPartition]:
        """The partitions are ours now; returns them with the offset to start at. Fetching them begins after that."""

    async def revoked(self, partitions: Sequence[Place], *, lost: bool) -> None:
        """The partitions go to somebody else when this returns; with ``lost`` they already have.

        Partitions are named that were never ``assigned``, when they went before they were restored.
        """


class _Restore:
    """One restore: its partitions, and how far it has come."""

    def __init__(self, places: Sequence[Place]) -> None:
        self.places = list(places)
        self.cancelled = threading.Event()
        self.told = False
        """The listener's ``assigned`` has begun: what is taken away now is taken away from the listener too."""
        self.gone: set[Place] = set()
        self.placed: list[TopicPartition] = []
        self.error: Exception | None = None


class Handover:
    """Tells ``listener`` on ``loop`` of partitions that come and go. Its methods are for the consumer's thread, but
    :attr:`restoring` and :attr:`unsettled` for any.

    ``done()`` is called on a restore's thread when :meth:`ready` has something. ``discard(places)`` is called on the
    event loop before the listener hears that the places are gone.
    """

    def __init__(
        self,
        name: str,
        listener: FetchListener,
        loop: asyncio.AbstractEventLoop,
        *,
        timeout_s: float,
        done: Callable[[], object],
        discard: Callable[[set[Place]], object],
    ) -> None:
        self._name = name
        self._listener = listener
        self._loop = loop
        self._timeout_s = timeout_s
        self._done = done
        self._discard = discard
        self._restores: list[_Restore] = []
        self._threads: list[threading.Thread] = []
        self._ready: queue.SimpleQueue[_Restore] = queue.SimpleQueue()
        # Made and used on the loop's thread: nobody is told of a coming in the midst of a going.
        self._telling = asyncio.Lock()
        self._counting = threading.Lock()
        self._unsettled = 0

    @property
    def restoring(self) -> list[Place]:
        """The partitions that are assigned but not restored yet."""
        return [place for restore in list(self._restores) for place in restore.places]

    @property
    def unsettled(self) -> bool:
        """Partitions went that the listener has not been told of yet. Nothing may be committed until it was."""
        return self._unsettled > 0

    @contextmanager
    def telling_later(self) -> Iterator[None]:
        """Within it partitions may go before the listener hears of them: :attr:`unsettled` is true."""
        with self._counting:
            self._unsettled += 1
        try:
            yield
        finally:
            with self._counting:
                self._unsettled -= 1

    def begin(self, consumer: Consumer, places: Sequence[Place]) -> None:
        """Restore ``places`` in the background; :meth:`ready` has them when the listener owns them."""
        restore = _Restore(places)
        self._restores.append(restore)
        thread = threading.Thread(
            target=self._restore, args=(consumer, restore), name=f"{self._name}-restore", daemon=True
        )
        self._threads = [thread, *(other for other in self._threads if other.is_alive())]
        thread.start()

    def ready(self) -> list[TopicPartition]:
        """The places that can be fetched from now on, with their offsets.

        Raises:
            Exception: what ``prepare`` or ``assigned`` raised, unless the restore was cancelled.
        """
        placed: list[TopicPartition] = []
        while not self._ready.empty():
            restore = self._ready.get()
            if restore in self._restores:
                self._restores.remove(restore)
                if restore.error is not None:
                    raise restore.error
                placed += [at for at in restore.placed if (at.topic, at.partition) not in restore.gone]
        return placed

    def give_up(self, consumer: Consumer, places: Sequence[Place], *, lost: bool) -> None:
        """Cancel the restores of ``places`` and have the listener give them up, which it gets ``timeout_s`` for.

        When the loop is stuck for longer than that, the places are gone all the same, and the listener will hear that
        they are lost as soon as the loop is back; until then :attr:`unsettled` is true.
        """
        gone = set(places)
        for restore in list(self._restores):
            if gone.isdisjoint(restore.places):
                continue
            with self._counting:
                if restore.told:
                    restore.gone |= gone
                    continue
                restore.cancelled.set()
            self._restores.remove(restore)
            # It was one restore for all of them; what stays begins anew.
            if stays := [place for place in restore.places if place not in gone]:
                self.begin(consumer, stays)
        late = threading.Event()
        telling = asyncio.run_coroutine_threadsafe(self._tell(places, late, lost=lost), self._loop)
        try:
            telling.result(self._timeout_s)
        except (FutureTimeoutError, FutureCancelledError):
            log.error(
                "%s: the event loop did not give up %s within %g s; they count as lost, and nothing is committed "
                "until it has heard of it",
                self._name,
                ", ".join(f"{topic}[{number}]" for topic, number in places),
                self._timeout_s,
            )
            with self._counting:
                self._unsettled += 1
            late.set()
            telling.cancel()
            asyncio.run_coroutine_threadsafe(self._tell_late(places), self._loop)

    def end(self) -> None:
        """Cancel all restores and wait for their threads: the consumer must not be closed while one uses it.

        Raises:
            ClusterError: one did not end within 30 s.
        """
        for restore in self._restores:
            restore.cancelled.set()
        deadline = time.monotonic() + _END_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                raise ClusterError(
                    f"{self._name}: a restore does not end though it was cancelled {_END_S:g} s ago; the consumer is "
                    "left open, and its partitions wait until its session has timed out"
                )
        self._restores.clear()

    def _restore(self, consumer: Consumer, restore: _Restore) -> None:
        try:
            partitions = [TopicPartition(topic, number) for topic, number in restore.places]
            prepared = self._listener.prepare(consumer, partitions, restore.cancelled) if partitions else []
            telling = asyncio.run_coroutine_threadsafe(self._assign(restore, prepared), self._loop)
            while not restore.cancelled.is_set():
                try:
                    restore.placed = telling.result(_SLICE_S)
                    break
                except FutureTimeoutError:
                    if telling.done():
                        raise
        except Exception as error:  # noqa: BLE001 - handed over to the consumer's thread
            restore.error = error
        if not restore.cancelled.is_set():
            self._ready.put(restore)
            self._done()

    async def _assign(self, restore: _Restore, prepared: Sequence[Any]) -> list[TopicPartition]:
        async with self._telling:
            with self._counting:
                if restore.cancelled.is_set():
                    return []
                restore.told = True
            return await self._listener.assigned(prepared)

    async def _tell(self, places: Sequence[Place], late: threading.Event, *, lost: bool) -> None:
        async with self._telling:
            if not late.is_set():
                self._discard(set(places))
                await self._listener.revoked(places, lost=lost)

    async def _tell_late(self, places: Sequence[Place]) -> None:
        async with self._telling:
            self._discard(set(places))
            await self._listener.revoked(places, lost=True)
        with self._counting:
            self._unsettled -= 1
