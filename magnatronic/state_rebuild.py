"""``magnatronic rebuild state``: an agent's lane states and timers decided again from the log, held against its
changelogs, and written where they differ or were lost.

In: an agent's binding, the log, and how to have its processor rest. Out: a report as JSON can hold it. Most is decided
while the agent works; then it rests, and what it finished meanwhile is decided too, so that log and changelog are
compared at the same committed offsets. What is written is written under the fencing that processors use
(:mod:`streams.custody`). Parked events, crash counts and journalled effects stay as they are; where a changelog was
lost they are made again too, as far as the log tells: crash counts begin at nothing.
"""

import threading
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Final

from magnatronic.audits import settled_spans
from magnatronic.errors import WrongInputError
from magnatronic.finished import finished_offsets
from magnatronic.rebuild import Options, only_one, opened_log
from magnatronic.state_comparison import StateComparison, whole_changelog
from replay.finished import Finished
from replay.lane_states import LaneStates, PartitionState
from replay.log import Log
from replay.selection import Place, Span
from replay.steps import Station
from schemas.codec import Codec
from schemas.topics import FOREVER, all_topics
from sinks.errors import HistoryLostError, RebuildStoppedError
from sinks.rebuild import Phase
from streams.binding import Binding
from streams.changelog import Restored
from streams.custody import Custody
from streams.offsets import decode_finished
from streams.state import StateCodec

__all__ = ["StateRebuild"]

_CLOSE: Final = 5_000
"""So many offsets behind, the rest is decided while the agent rests."""
_PASSES: Final = 5
_SHORT: Final = frozenset(name for name, topic in all_topics().items() if topic.retention_ms != FOREVER)

Tell = Callable[[str, int, int], None]


class StateRebuild:
    """The rebuild of one agent's state.

    ``slot`` is that of its processor in this process and ``rest`` has that processor rest while it is entered; None
    where it runs elsewhere: then nobody may work in its group. Setting ``stopping`` ends it.
    """

    def __init__(
        self,
        binding: Binding,
        options: Options,
        *,
        kafka: Mapping[str, Any],
        codec: Codec,
        lock_folder: Path,
        slot: int | str | None = None,
        rest: Callable[[], AbstractContextManager[object]] = nullcontext,
        on_progress: Tell = lambda *_: None,
        stopping: threading.Event | None = None,
    ) -> None:
        if options.keep or options.carry:
            raise WrongInputError("rebuild state takes neither --keep nor --carry: a changelog keeps what it held")
        self._binding = binding
        self._options = options
        self._kafka = dict(kafka)
        self._codec = codec
        self._lock_folder = lock_folder
        self._slot = slot
        self._rest = rest
        self._tell = on_progress
        self._stopping = stopping or threading.Event()
        agent = binding.agent
        self._states = None if agent.state_type is None else StateCodec(agent.state_type, codec.cipher)
        self._steps = 0

    def run(self) -> dict[str, Any]:
        """Rebuild; the report.

        Raises:
            AlreadyRunningError: another rebuild of this agent's state runs on this machine.
            HistoryLostError: the log no longer holds all that its states were made of; nothing was changed.
            GroupBusyError: processors of its group work elsewhere.
            RebuildStoppedError: ``stopping`` was set; nothing was changed.
            StreamsError, ReplayError: it could not be done; run again, it goes on.
        """
        agent = self._binding.agent
        station = Station(agent, frozenset(self._binding.topics))
        with (
            only_one(self._lock_folder, f"state-{agent.name}"),
            opened_log(self._kafka, self._options.archive) as log,
            LaneStates(
                log,
                station,
                self._codec,
                self._dump,
                folder=self._spool_folder(),
                on_progress=self._progress,
            ) as lanes,
        ):
            began = time.monotonic()
            custody = Custody(self._kafka, self._binding.group, self._binding.topics, slot=self._slot)
            # Before anything is decided, and anybody has to rest.
            custody.wait_alone()
            self._decide_beside(log, lanes)
            with self._rest():
                rests = time.monotonic()
                with custody:
                    report = self._while_it_rests(custody, log, lanes)
                rested_s = time.monotonic() - rests
        return {**report, "seconds": round(time.monotonic() - began, 1), "rested_s": round(rested_s, 1)}

    def _spool_folder(self) -> Path:
        folder = self._lock_folder / "tmp"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _dump(self, state: Any) -> bytes:
        assert self._states is not None
        return self._states.dump(state)

    def _progress(self, what: str, done: int, of: int) -> None:
        self._tell(f"{self._binding.agent.name}: {what}", done, of)
        if self._stopping.is_set():
            raise RebuildStoppedError(
                f"the rebuild of the state of {self._binding.agent.name} was stopped; nothing was changed"
            )

    def _decide_beside(self, log: Log, lanes: LaneStates) -> None:
        """Most of it, while the agent works."""
        agent = self._binding.agent.name
        for _ in range(_PASSES):
            # First what was finished, then the log: it has to hold all that a finished step left.
            finished = finished_offsets(self._kafka, [agent]).get(agent, Finished({}))
            spans = self._spans(log, lanes)
            behind = lanes.behind(spans)
            self._steps += lanes.read(spans, finished)
            if behind < _CLOSE:
                break

    def _spans(self, log: Log, lanes: LaneStates) -> dict[Place, Span]:
        spans = settled_spans(log, self._kafka, lanes.topics())
        # What the others hold is no more than outputs, which nobody misses in a topic that keeps none for so long.
        if lost := {place: first for place, (first, _) in spans.items() if first > 0 and place[0] not in _SHORT}:
            places = ", ".join(
                f"{topic}[{number}] begins at offset {at:,}" for (topic, number), at in sorted(lost.items())
            )
            raise HistoryLostError(
                f"the log no longer holds all that the state of {self._binding.agent.name} was made of: {places}. "
                "Nothing was changed. Give an archive that has it with --from FOLDER"
            )
        return spans

    def _while_it_rests(self, custody: Custody, log: Log, lanes: LaneStates) -> dict[str, Any]:
        binding = self._binding
        committed = {place: at for place, at in custody.committed.items() if at.offset >= 0}
        finished = Finished.committed(
            {place: decode_finished(at.offset, at.metadata or "") for place, at in committed.items()}
        )
        self._steps += lanes.read(self._spans(log, lanes), finished)
        self._progress(Phase.COMPARING, 0, 0)
        stored, rebuilt = custody.restored(), lanes.partitions()
        lost = [place for place, at in committed.items() if at.offset > 0 and _is_lost(stored[place])]
        comparison = StateComparison(binding.group, self._states)
        for place, there in stored.items():
            if place not in lost:
                comparison.compare(place, there, rebuilt.get(place, PartitionState()))
        compared = comparison.compared
        equal = all(each.equal for each in compared)
        switched = equal or self._options.accept
        writing = dict(comparison.mending) if self._options.accept else {}
        if switched:
            for place in lost:
                found = rebuilt.get(place, PartitionState())
                writing[place] = whole_changelog(binding.group, place, stored[place], found)
        self._write(custody, writing)
        return {
            "projection": "state",
            "agent": binding.agent.name,
            "switched": switched,
            "equal": equal,
            "steps": self._steps,
            "differing_steps": lanes.differing,
            "compared": [each.as_dict() for each in compared],
            "lost": self._told(lost, rebuilt),
            "undecided": _undecided(rebuilt),
            "written": sum(map(len, writing.values())),
        }

    def _write(self, custody: Custody, writing: Mapping[Place, Any]) -> None:
        total, done = sum(map(len, writing.values())), 0
        if not total:
            return
        self._progress("writing its changelogs", 0, total)

        def wrote(count: int) -> None:
            nonlocal done
            done += count
            self._tell(f"{self._binding.agent.name}: writing its changelogs", done, total)

        custody.write(writing, wrote)

    @staticmethod
    def _told(lost: list[Place], rebuilt: Mapping[Place, PartitionState]) -> list[dict[str, Any]]:
        return [
            {
                "topic": place[0],
                "partition": place[1],
                "states": len(found.states),
                "timers": len(found.timers),
                "parked": len(found.waiting),
                "effects": len(found.copies),
            }
            for place in sorted(lost)
            for found in [rebuilt.get(place, PartitionState())]
        ]


def _is_lost(stored: Restored) -> bool:
    """Whether nothing was ever written there, or an earlier rebuild did not come to its end."""
    return stored.end == 0 or stored.rebuilding


def _undecided(rebuilt: Mapping[Place, PartitionState]) -> list[str]:
    return [
        f"{topic}[{number}] {lane}: {why}"
        for (topic, number), found in sorted(rebuilt.items())
        for lane, why in sorted(found.unknown.items())
    ]
