"""One hop, timed from outside: from ``produce`` of an event to the moment a read_committed consumer has its output.

In: a broker, shots (encoded events), a pace. Out: seconds for each shot, in the order in which they were sent. The pace
does not wait for answers, so a hop that falls behind shows as latency; both clocks are this process's.
"""

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from confluent_kafka import Consumer, Producer, TopicPartition
from confluent_kafka.admin import AdminClient

from bench.kafka import stable_offsets
from bench.samples import metadata_for
from schemas.codec import Codec
from schemas.events import Event
from schemas.topics import key_of

__all__ = ["ANY_PARTITION", "Hop", "Shot", "shots_of"]

ANY_PARTITION: Final = -1
_TIMEOUT_S: Final = 30.0
_SPIN_S: Final = 0.0005


@dataclass(frozen=True, slots=True)
class Shot:
    """An encoded event and the partition that it goes to."""

    key: bytes
    value: bytes
    headers: Any
    partition: int = ANY_PARTITION


def shots_of(events: Iterable[Event], partition: int = ANY_PARTITION) -> list[Shot]:
    """``events`` encoded, so that sending costs next to nothing. Their keys must differ."""
    codec = Codec()
    shots = []
    for event in events:
        encoded = codec.encode(event, metadata_for(event))
        shots.append(Shot(key_of(event).encode(), encoded.value, encoded.headers, partition))
    return shots


class Hop:
    """Sends to ``source``, or wherever a call says, and reads ``target``, whose records answer by key. Close it.

    ``alive`` is asked while nothing comes, and raises when the worker has ended.
    """

    def __init__(
        self, bootstrap_servers: str, source: str, target: str, *, partitions: int, alive: Callable[[], object]
    ) -> None:
        self._source, self._target, self._alive = source, target, alive
        self._producer = Producer(
            {"bootstrap.servers": bootstrap_servers, "linger.ms": 0, "partitioner": "murmur2_random"}
        )
        self._consumer = Consumer(
            {
                "bootstrap.servers": bootstrap_servers,
                "group.id": "bench-hop",
                "isolation.level": "read_committed",
                "enable.auto.commit": False,
                "fetch.wait.max.ms": 100,
            }
        )
        ends = stable_offsets(AdminClient({"bootstrap.servers": bootstrap_servers}), target, partitions)
        self._consumer.assign([TopicPartition(target, number, end) for number, end in enumerate(ends)])
        self._consumer.poll(0.5)
        self._sent: dict[bytes, float] = {}
        self._seen: dict[bytes, float] = {}

    def __enter__(self) -> "Hop":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the connections."""
        self._producer.flush(5)
        self._consumer.close()

    def send(self, shot: Shot, source: str = "") -> None:
        """Send one event now; its time runs from here."""
        self._sent[shot.key] = time.perf_counter()
        partition = {} if shot.partition == ANY_PARTITION else {"partition": shot.partition}
        self._producer.produce(source or self._source, shot.value, shot.key, headers=shot.headers, **partition)
        self._producer.poll(0)

    def wait(self, keys: Iterable[bytes], *, timeout_s: float = _TIMEOUT_S) -> list[float]:
        """Seconds from sending to having the answer, of each of ``keys`` in order.

        Raises:
            RuntimeError: a key was answered twice, or nothing at all came for ``timeout_s`` seconds.
        """
        wanted = list(keys)
        missing = set(wanted) - self._seen.keys()
        moved = time.monotonic()
        while missing:
            message = self._consumer.poll(0.2)
            now = time.perf_counter()
            if message is None:
                self._alive()
                if time.monotonic() - moved > timeout_s:
                    raise RuntimeError(f"{len(missing)} outputs are missing after {timeout_s:g} s of silence")
                continue
            if message.error() is not None:
                raise RuntimeError(f"reading {self._target} failed: {message.error()}")
            key = message.key() or b""
            if key in self._seen:
                raise RuntimeError(f"two outputs for {key!r}")
            self._seen[key] = now
            missing.discard(key)
            moved = time.monotonic()
        return [self._seen[key] - self._sent[key] for key in wanted]

    def run(
        self, shots: Sequence[Shot], rate: float, *, source: str = "", timeout_s: float = _TIMEOUT_S
    ) -> list[float]:
        """Send ``shots`` at ``rate`` a second and wait for all answers: the seconds of each, in order.

        Raises:
            RuntimeError: as :meth:`wait`.
        """
        sender = threading.Thread(target=self._pace, args=(shots, rate, source), daemon=True)
        sender.start()
        delays = self.wait([shot.key for shot in shots], timeout_s=timeout_s)
        sender.join()
        return delays

    def _pace(self, shots: Sequence[Shot], rate: float, source: str) -> None:
        start = time.perf_counter()
        for number, shot in enumerate(shots):
            wait = start + number / rate - time.perf_counter()
            if wait > _SPIN_S:
                time.sleep(wait)
            self.send(shot, source)
