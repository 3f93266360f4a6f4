"""Which history a command reads: the options that audit, trace, what-if and archive share.

In: ``--from``, ``--since``, ``--until``, ``--topic``, ``--offsets``, ``--task``, ``--agent``, ``--type``,
``--correlation``. Out: :class:`HistoryOptions`: an archive's folder or none, and a
:class:`~replay.selection.Selection`.
"""

import functools
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final, TypeVar

import click

from magnatronic.cli.when import When
from magnatronic.errors import WrongInputError
from replay.selection import Place, Selection, Span
from schemas.events import EVENT_TYPES
from schemas.topics import TOPICS

__all__ = ["HistoryOptions", "from_option", "history_options", "topics_named"]

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])

_OFFSETS: Final = re.compile(r"(?P<topic>[^/\s]+)/(?P<partition>\d+):(?P<first>\d+)-(?P<end>\d+)")


@dataclass(frozen=True, slots=True)
class HistoryOptions:
    """What is to be read: ``selection`` from the archive in the folder ``archive``, or from the running system."""

    archive: Path | None
    selection: Selection


def from_option(function: FunctionT) -> FunctionT:
    """Add ``--from FOLDER`` (given as ``archive``) to a command."""
    return click.option(
        "--from",
        "archive",
        type=click.Path(path_type=Path, file_okay=False),
        help="Read the archive in this folder (default: the running system's log).",
    )(function)


def history_options(function: FunctionT) -> FunctionT:
    """Add the options that say which history is meant; given as ``history``, a :class:`HistoryOptions`.

    Options that are given several times take all that any of their values takes; different options narrow it down.
    """

    @from_option
    @click.option("--since", type=When(), help="Written since: 90s, 15m, 2h, 7d ago, or an ISO time.")
    @click.option("--until", type=When(), help="Written before, likewise.")
    @click.option("--topic", "topics", multiple=True, help="Of this topic, or of all that it stands for (tasks).")
    @click.option("--offsets", multiple=True, metavar="TOPIC/PARTITION:FROM-TO", help="Of these offsets; TO is not in.")
    @click.option("--task", "tasks", multiple=True, help="Of this task.")
    @click.option("--agent", "agents", multiple=True, help="Written by this agent.")
    @click.option("--type", "types", multiple=True, help="Events of this type, StepCompleted for example.")
    @click.option("--correlation", "correlations", multiple=True, help="With this correlation id.")
    @functools.wraps(function)
    def command(
        *args: Any,
        archive: Path | None,
        since: datetime | None,
        until: datetime | None,
        topics: Sequence[str],
        offsets: Sequence[str],
        tasks: Sequence[str],
        agents: Sequence[str],
        types: Sequence[str],
        correlations: Sequence[str],
        **options: Any,
    ) -> Any:
        if since is not None and until is not None and since >= until:
            raise WrongInputError(f"--since {since.isoformat()} is not before --until {until.isoformat()}")
        selection = Selection(
            topics=topics_named(topics),
            since=since,
            until=until,
            spans=_spans(offsets) if offsets else None,
            tasks=frozenset(tasks),
            agents=frozenset(agents),
            event_types=_types(types),
            correlation_ids=frozenset(correlations),
        )
        return function(*args, history=HistoryOptions(archive, selection), **options)

    return command  # type: ignore[return-value]


def topics_named(names: Iterable[str]) -> frozenset[str]:
    """The Kafka topics that ``names`` mean: a topic of the design (``tasks``, ``work``) stands for all of its own.

    Raises:
        WrongInputError: there is no such topic.
    """
    known = {topic.name: topic.names() for topic in TOPICS}
    known |= {name: (name,) for topic in TOPICS for name in topic.names()}
    for name in names:
        if name not in known:
            raise WrongInputError(f"there is no topic {name!r}; there are: {', '.join(sorted(known))}")
    return frozenset(topic for name in names for topic in known[name])


def _types(names: Iterable[str]) -> frozenset[str]:
    known = {kind.__name__ for kind in EVENT_TYPES.values()}
    for name in names:
        if name not in known and name not in EVENT_TYPES:
            raise WrongInputError(f"there is no event type {name!r}; there are: {', '.join(sorted(known))}")
    return frozenset(names)


def _spans(texts: Iterable[str]) -> dict[Place, Span]:
    spans: dict[Place, Span] = {}
    for text in texts:
        found = _OFFSETS.fullmatch(text.strip())
        if found is None or int(found["first"]) >= int(found["end"]):
            raise WrongInputError(f"--offsets {text!r}: write TOPIC/PARTITION:FROM-TO, such as effects/0:100-200")
        place = found["topic"], int(found["partition"])
        if place in spans:
            raise WrongInputError(f"--offsets names {place[0]}/{place[1]} twice; give one stretch of a partition")
        spans[place] = int(found["first"]), int(found["end"])
    return spans
