"""What the log says that each step did: its effects, outputs, dead letter and cancellation, by what caused them.

In: the records of one record key with their events. Out: for each handling of an event by an agent what is recorded of
it. An event that was sent again after it had failed is handled anew under the same id: what was written before that is
the first handling's.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

from replay.lazy import LazyEnvelope
from schemas.events import DeadLettered, Effect, StepCancelled, TimerFired
from schemas.frozen import frozen
from schemas.metadata import REDRIVE_HEADER, Envelope
from schemas.record import Record

__all__ = ["History", "Left", "Recorded", "agent_of", "by_time", "redriven_for", "version_of"]

History = Sequence[tuple[Record, Envelope]]
"""Records with their events, in offset order within each partition."""

_AGENTS = "/agents/"


def by_time(history: Iterable[tuple[Record, Envelope]]) -> list[tuple[Record, Envelope]]:
    """In order of append time, and within a partition of offset, even where a broker's clock stepped back."""
    latest: dict[tuple[str, int], int] = {}
    timed = []
    for record, envelope in history:
        place = record.topic, record.partition
        at = latest[place] = max(latest.get(place, 0), record.timestamp_ms)
        timed.append((at, record, envelope))
    timed.sort(key=lambda item: item[0])
    return [(record, envelope) for _, record, envelope in timed]


def redriven_for(record: Record) -> str:
    """The one agent that the record was sent again for, empty for a record that is for all."""
    name, value = record.headers[-1] if record.headers else ("", None)
    return (value or b"").decode(errors="replace") if name == REDRIVE_HEADER else ""


def agent_of(source: str) -> str:
    """The agent's name in a CloudEvents source; empty when it is no agent's.

    >>> agent_of("/agents/coordinator@2"), agent_of("/clients/cli")
    ('coordinator', '')
    """
    return source[len(_AGENTS) :].partition("@")[0] if source.startswith(_AGENTS) else ""


def version_of(source: str) -> str:
    """The agent's version in a CloudEvents source.

    >>> version_of("/agents/coordinator@2")
    '2'
    """
    return source.partition("@")[2]


@frozen
class Left:
    """What one handling of an event left in the log. ``letter`` is its dead letter, ``cancelled`` its StepCancelled;
    ``fired`` says that a timer which it set has fired; ``calls`` are the effects' events.
    """

    effects: tuple[tuple[Record, Envelope], ...]
    outputs: tuple[tuple[Record, Envelope], ...]
    letter: tuple[DeadLettered, Envelope] | None
    cancelled: Envelope | None
    fired: bool = False
    calls: tuple[Effect, ...] = ()

    @property
    def ended(self) -> bool:
        """Whether anything shows that the handling came to its end."""
        return bool(self.outputs) or self.letter is not None or self.cancelled is not None or self.fired

    @property
    def source(self) -> str:
        """Who decided it, as its outputs say or else what it left before; empty when it left nothing."""
        if self.outputs:
            return self.outputs[-1][1].metadata.source
        if self.letter is not None:
            return self.letter[1].metadata.source
        if self.cancelled is not None:
            return self.cancelled.metadata.source
        return self.effects[-1][1].metadata.source if self.effects else ""


class Recorded:
    """The history's records by the agent and the event that caused them."""

    def __init__(self, history: History) -> None:
        self._effects: dict[tuple[str, str], list[tuple[Record, Envelope]]] = defaultdict(list)
        self._outputs: dict[tuple[str, str], list[tuple[Record, Envelope]]] = defaultdict(list)
        self._letters: dict[tuple[str, str, int, int], tuple[DeadLettered, Envelope]] = {}
        self._cancelled: dict[tuple[str, str], Envelope] = {}
        self._fired: set[tuple[str, str]] = set()
        self._redriven: dict[tuple[str, str], list[int]] = {}
        self.first_source: dict[str, str] = {}
        """By agent, the source of the first output or effect that it left."""
        for record, envelope in history:
            if type(envelope) is LazyEnvelope:
                # No agent reads it, and it is none of those below.
                if agent := agent_of(envelope.metadata.source):
                    self._outputs[agent, envelope.metadata.causation_id].append((record, envelope))
                    self.first_source.setdefault(agent, envelope.metadata.source)
                continue
            event, metadata = envelope.event, envelope.metadata
            if isinstance(event, Effect):
                self._effects[event.agent, event.event_id].append((record, envelope))
                self.first_source.setdefault(event.agent, metadata.source)
            elif record.headers and record.headers[-1][0] == REDRIVE_HEADER:
                agent = redriven_for(record)
                self._redriven.setdefault((agent, metadata.id), []).append(record.timestamp_ms)
            elif isinstance(event, DeadLettered):
                place = event.agent, event.source_topic, event.source_partition, event.source_offset
                self._letters[place] = event, envelope
            elif isinstance(event, StepCancelled):
                self._cancelled[event.agent, event.event_id] = envelope
            elif isinstance(event, TimerFired):
                self._fired.add((event.agent, metadata.causation_id))
            elif metadata.causation_id and (agent := agent_of(metadata.source)):
                self._outputs[agent, metadata.causation_id].append((record, envelope))
                self.first_source.setdefault(agent, metadata.source)

    def shows_end(self, agent: str, event_id: str, record: Record) -> bool:
        """Whether anything not taken yet shows that the agent has come to an end with the record."""
        return (
            bool(self._outputs.get((agent, event_id)))
            or (agent, event_id) in self._cancelled
            or (agent, event_id) in self._fired
            or (agent, record.topic, record.partition, record.offset) in self._letters
        )

    def take(self, agent: str, event_id: str, record: Record, *, more: bool) -> Left:
        """What the agent's handling of ``record``, which holds the event, left; each thing is taken once.

        ``more`` says that the event is handled again later, because it was written twice.
        """
        step = agent, event_id
        letter = self._letters.get((agent, record.topic, record.partition, record.offset))
        effects: History = self._effects.pop(step, ())
        outputs: History = self._outputs.pop(step, ())
        if step in self._redriven or more:
            effects, outputs = self._mine(step, record, effects, outputs, more, gave_up=letter is not None)
        if len(effects) > 1:
            effects = sorted(effects, key=_sequence)
        calls: Any = tuple([item[1].event for item in effects]) if effects else ()
        return Left(tuple(effects), tuple(outputs), letter, self._cancelled.get(step), step in self._fired, calls)

    def _mine(
        self,
        step: tuple[str, str],
        record: Record,
        effects: History,
        outputs: History,
        more: bool,
        *,
        gave_up: bool,
    ) -> tuple[History, History]:
        """The part of what the event's handlings left that is this one's; the rest is kept for the next."""
        times = [at for at in self._redriven.get(step, ()) if at > record.timestamp_ms]
        if times and (gave_up or not more):
            # Whoever sends it again does so when it has failed.
            again = min(times)
            mine = [item for item in effects if item[0].timestamp_ms < again]
            made = [item for item in outputs if item[0].timestamp_ms < again]
        elif more:
            # Written twice: each handling counts its effects from 0, and names its outputs alike.
            runs = _runs(effects)
            mine, seen = list(runs[0]) if runs else [], set[str]()
            made = []
            for item in outputs:
                if item[1].metadata.id not in seen:
                    seen.add(item[1].metadata.id)
                    made.append(item)
        else:
            return effects, outputs
        self._effects[step] = _without(effects, mine)
        self._outputs[step] = _without(outputs, made)
        return mine, made

    def rest(self) -> list[tuple[Record, Envelope]]:
        """Outputs and effects of agents that no step took."""
        return [item for items in (*self._outputs.values(), *self._effects.values()) for item in items]


def _without(items: History, taken: History) -> list[tuple[Record, Envelope]]:
    gone = {id(item) for item in taken}
    return [item for item in items if id(item) not in gone]


def _runs(effects: History) -> list[History]:
    starts = [0, *(at for at, (one, other) in enumerate(pairwise(effects), 1) if _sequence(other) <= _sequence(one))]
    return (
        [effects[start:end] for start, end in zip(starts, [*starts[1:], len(effects)], strict=True)] if effects else []
    )


def _sequence(item: tuple[Record, Envelope]) -> int:
    event = item[1].event
    assert isinstance(event, Effect)
    return event.sequence
