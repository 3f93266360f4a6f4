"""The feeder: a client that produces the input, at a rate, whatever happens to the cluster meanwhile.

In: a number of events, a rate and a seed. Out: events on the two input topics, each delivered once and in order, and
the highest offset of each partition, which says when all is done.
"""

import random
import threading
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final

from confluent_kafka import KafkaError, Message, Producer

from schemas.codec import Codec
from schemas.events import StepAssigned
from schemas.metadata import Metadata, deterministic_id
from streams.kafka import producer_settings
from tests.chaos.harness.agents import TIMER
from tests.chaos.harness.worker import CALLS_TOPIC, SUMS_TOPIC

__all__ = ["Feeder"]

Place = tuple[str, int]

_FAILING: Final = 0.005
_TIMERS: Final = 0.015
_TIMER_MS: Final = (100, 800)
_SUM_TASKS: Final = 2000
_CALL_TASKS: Final = 5000
_TICK_S: Final = 0.02
_BURST_S: Final = 0.5
_TRICKLE: Final = 60.0


class Feeder:
    """Feeds ``events`` events at most ``rate`` a second, in a thread of its own. ``calls_share`` of them are for the
    agent that makes calls, and ``serial_share`` of those make many, one after the other.

    None come while :meth:`hold` is set: a backlog that grows without bound shows nothing new. Few come past the number
    that :meth:`pace` was told, so that each partition still moves. ``fed`` counts what was produced, ``places`` holds
    the highest offset that was delivered to each partition.
    """

    def __init__(
        self,
        kafka: Mapping[str, Any],
        *,
        events: int,
        rate: float,
        seed: int,
        calls_share: float,
        serial_share: float,
    ) -> None:
        self.events = events
        self.fed = 0
        self.delivered = 0
        self.places: dict[Place, int] = {}
        self.error: BaseException | None = None
        self._rate = rate
        self._calls_share = calls_share
        self._serial_share = serial_share
        self._rng = random.Random(f"{seed}/feed")
        self._codec = Codec()
        self._producer = Producer(producer_settings(kafka, "chaos-feeder"))
        self._stopping = threading.Event()
        self._flowing = threading.Event()
        self._flowing.set()
        self._pace = 0.0
        self._thread = threading.Thread(target=self._run, name="feeder", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def hold(self, held: bool) -> None:
        """Produce nothing for now, or go on."""
        if held:
            self._flowing.clear()
        else:
            self._flowing.set()

    def pace(self, until: float) -> None:
        """Go at the full rate until so many events are fed, and slowly from there."""
        self._pace = until

    def stop(self) -> None:
        """Produce nothing any more; what was produced stays."""
        self._stopping.set()
        self._flowing.set()
        self._thread.join(60)

    @property
    def through(self) -> bool:
        """Whether every event is delivered."""
        if self.error is not None:
            raise AssertionError(f"the feeder failed: {self.error}") from self.error
        return self.delivered >= self.events

    def _run(self) -> None:
        try:
            last = time.monotonic()
            credit = 0.0
            while self.fed < self.events and not self._stopping.is_set():
                self._flowing.wait()
                self._producer.poll(_TICK_S)
                now = time.monotonic()
                rate = self._rate if self.fed < self._pace else min(_TRICKLE, self._rate)
                credit = min(credit + (now - last) * rate, max(rate * _BURST_S, 1.0))
                last = now
                while credit >= 1 and self.fed < self.events:
                    self._one(self.fed)
                    self.fed += 1
                    credit -= 1
            while not self._stopping.is_set() and self._producer.flush(0.5):
                pass
        except BaseException as error:  # noqa: BLE001 - a thread has nobody to raise to; `through` does
            self.error = error

    def _one(self, number: int) -> None:
        rng = self._rng
        parameters: dict[str, str]
        if rng.random() < self._calls_share:
            topic, task = CALLS_TOPIC, f"c{rng.randrange(_CALL_TASKS)}"
            parameters = {"calls": str(rng.choice((2, 2, 3)))}
            if rng.random() < self._serial_share:
                parameters = {"calls": "6", "order": "serial"}
            if rng.random() < _FAILING:
                parameters["fail"] = "yes"
        else:
            topic, task = SUMS_TOPIC, f"s{rng.randrange(_SUM_TASKS)}"
            parameters = {"number": str(rng.randrange(-50, 1000))}
        if rng.random() < _TIMERS:
            parameters[TIMER] = str(rng.randrange(*_TIMER_MS))
        event = StepAssigned(
            task_id=task, step_id=f"{task}/{number}", capability="research", objective="chaos", parameters=parameters
        )
        metadata = Metadata(
            id=deterministic_id("chaos", number),
            source="/clients/chaos",
            subject=task,
            time=datetime.now(UTC),
            correlation_id=task,
        )
        value, headers = self._codec.encode(event, metadata)
        while True:
            try:
                self._producer.produce(topic, value, task.encode(), headers=headers, on_delivery=self._delivered)
                return
            except BufferError:
                self._producer.poll(0.05)

    def _delivered(self, error: KafkaError | None, message: Message) -> None:
        if error is not None:
            self.error = AssertionError(f"an event was not delivered: {error.str()}")
            return
        self.delivered += 1
        place = message.topic() or "", message.partition() or 0
        self.places[place] = max(self.places.get(place, -1), message.offset() or 0)
