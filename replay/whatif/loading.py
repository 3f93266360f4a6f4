"""Reads the tasks of a what-if from the log: which there are, and all that each of them left.

In: a log, and which tasks are meant. Out: :class:`Chosen`, and then raw records task by task. Memory holds the records
of one share of the tasks at a time; the log is read once for each share.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from replay.log import Log, Progress
from replay.selection import Place, Selection
from schemas.events import DeadLettered, StepCancelRequested, TaskCompleted, TaskSubmitted
from schemas.record import Record
from schemas.topics import TOPICS, topic_of

__all__ = ["Chosen", "choose", "histories"]

_SHARE: Final = 1000
"""Tasks read at once: some 100 kB each with all their passages and vectors."""
_OUTCOMES: Final = topic_of(TaskCompleted).name
_SUBMISSIONS: Final = frozenset(topic_of(TaskSubmitted).names())
_BESIDE: Final = frozenset((topic_of(StepCancelRequested).name, topic_of(DeadLettered).name))
_OF_TASKS: Final = frozenset(name for topic in TOPICS if topic.key == "task_id" for name in topic.names())


@dataclass(frozen=True, slots=True)
class Chosen:
    """Tasks that are over, in the order of their submission; ``open`` counts those meant that are not over yet,
    ``unknown`` are ids that were asked for and that the log does not have. ``since_ms`` is when the first came.
    """

    tasks: tuple[str, ...]
    open: int
    unknown: tuple[str, ...]
    since_ms: int


def choose(
    log: Log,
    *,
    since: datetime | None = None,
    until: datetime | None = None,
    tasks: Collection[str] = (),
    limit: int | None = None,
    on_progress: Progress | None = None,
) -> Chosen:
    """The tasks that were submitted in [``since``, ``until``), or those of ``tasks``; of many the ``limit`` latest.

    Raises:
        LogReadError: the log could not be read.
    """
    meant = Selection(topics=_held(log, _SUBMISSIONS), since=since, until=until, tasks=frozenset(tasks))
    submitted: dict[str, int] = {}
    for record in _read(log, meant, on_progress):
        submitted.setdefault((record.key or b"").decode(errors="replace"), record.timestamp_ms)
    over: set[str] = set()
    if submitted:
        first = datetime.fromtimestamp(min(submitted.values()) / 1000, UTC)
        for record in _read(log, Selection(topics=_held(log, {_OUTCOMES}), since=first), on_progress):
            over.add((record.key or b"").decode(errors="replace"))
    done = sorted((at, task) for task, at in submitted.items() if task in over)
    kept = done if limit is None else done[-limit:]
    return Chosen(
        tasks=tuple(task for _, task in kept),
        open=len(submitted) - len(done),
        unknown=tuple(sorted(set(tasks) - submitted.keys())),
        since_ms=min((at for at, _ in kept), default=0),
    )


def histories(
    log: Log, tasks: Sequence[str], *, since_ms: int = 0, on_progress: Progress | None = None
) -> Iterator[tuple[str, list[Record]]]:
    """Every task with all of its records: those of its key, orders to stop its steps, dead letters of its events.

    ``since_ms`` is when the first of them was submitted: nothing of them is older.

    Raises:
        LogReadError: the log could not be read.
    """
    since = datetime.fromtimestamp(since_ms / 1000, UTC)
    for start in range(0, len(tasks), _SHARE):
        share = tasks[start : start + _SHARE]
        found: dict[str, dict[tuple[Place, int], Record]] = {task: {} for task in share}
        keyed = Selection(topics=_held(log, _OF_TASKS), since=since, tasks=frozenset(share))
        for record in _read(log, keyed, on_progress):
            found[(record.key or b"").decode()][(record.topic, record.partition), record.offset] = record
        beside = Selection(topics=_held(log, _BESIDE), since=since, correlation_ids=frozenset(share))
        for record in _read(log, beside, None) if beside.topics else ():
            task = (dict(record.headers).get("ce_correlationid") or b"").decode()
            if task in found:
                found[task][(record.topic, record.partition), record.offset] = record
        for task in share:
            yield task, list(found.pop(task).values())


def _held(log: Log, topics: Collection[str]) -> frozenset[str]:
    """Those of the topics that the log holds: an archive may have been asked to keep fewer."""
    return frozenset(topic for topic, _ in log.spans()) & frozenset(topics)


def _read(log: Log, selection: Selection, on_progress: Progress | None) -> Iterator[Record]:
    if selection.topics:
        for batch in log.read(selection, on_progress=on_progress):
            yield from batch.records
