"""What one cut through the log takes: fixed before the first record is read, so that a repeat takes the same.

In: where the archive and the log stand. Out: :class:`Plan`, for each partition the stretch to be archived, the gaps
that retention has made before it, and what the agents had finished; kept in ``plan.json`` until the cut is complete.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import orjson

from replay.archive.manifest import Gap, Manifest, sync_folder
from replay.errors import ArchiveError, ArchiveGapError
from replay.selection import Place, Span

__all__ = ["Plan", "load_plan", "make_plan", "save_plan"]

_NAME: Final = "plan.json"


@dataclass(frozen=True, slots=True)
class Plan:
    """One cut: ``ends`` of all partitions, in order; ``starts`` where each was to be gone on."""

    cut: int
    starts: Mapping[Place, int]
    ends: Mapping[Place, int]
    gaps: tuple[Gap, ...]
    finished: Mapping[str, Any]


def make_plan(manifest: Manifest, held: Mapping[Place, Span], finished: Mapping[str, Any], allow_gaps: bool) -> Plan:
    """The next cut: all of ``held`` that is not archived yet.

    Raises:
        ArchiveGapError: the log's beginning has passed the archive's end, and ``allow_gaps`` is not given.
        ArchiveError: the log ends before the archive does, so it is not the one that was archived.
    """
    archived = {place: end for place, (_, end) in manifest.spans().items()}
    if lost := sorted(archived.keys() - held.keys()):
        raise ArchiveError(
            f"the log has no partition {lost[0][0]}/{lost[0][1]}, and the archive in {manifest.folder} does; "
            "was the topic made anew? Archive it to another folder"
        )
    plan = Plan(manifest.cuts, {}, {}, (), finished)
    starts = {place: archived.get(place, first) for place, (first, _) in held.items()}
    ends = {place: end for place, (_, end) in held.items()}
    for place, start in starts.items():
        if start > ends[place]:
            raise ArchiveError(
                f"{place[0]}/{place[1]} ends at offset {ends[place]}, and the archive in {manifest.folder} at {start}; "
                "was the topic made anew? Archive it to another folder"
            )
    plan = replace(plan, starts=dict(sorted(starts.items())), ends=dict(sorted(ends.items())))
    return without_lost(plan, manifest, held, allow_gaps)


def without_lost(plan: Plan, manifest: Manifest, held: Mapping[Place, Span], allow_gaps: bool) -> Plan:
    """The plan without what the log no longer holds, which is noted as gaps.

    Raises:
        ArchiveGapError: something is lost, and ``allow_gaps`` is not given.
    """
    archived = {place: end for place, (_, end) in manifest.spans().items()}
    known = {(gap.topic, gap.partition): gap for gap in plan.gaps}
    for place, end in plan.ends.items():
        start = max(plan.starts[place], archived.get(place, 0))
        low = min(held[place][0], end)
        if start < low:
            known[place] = Gap(*place, start, low)
    gaps = tuple(known[place] for place in sorted(known))
    if gaps != plan.gaps and not allow_gaps:
        lost = ", ".join(f"{gap.topic}/{gap.partition} {gap.start} to {gap.end}" for gap in gaps)
        raise ArchiveGapError(
            f"retention deleted these offsets before they were archived: {lost}; `--allow-gaps` notes them and goes "
            "on, a longer retention or more frequent archiving prevents it"
        )
    return replace(plan, gaps=gaps)


def save_plan(folder: Path, plan: Plan) -> None:
    """Write ``plan.json`` whole, or not at all."""
    raw = orjson.dumps(
        {
            "cut": plan.cut,
            "places": [[*place, plan.starts[place], end] for place, end in plan.ends.items()],
            "gaps": [[gap.topic, gap.partition, gap.start, gap.end] for gap in plan.gaps],
            "finished": plan.finished,
        }
    )
    partial = folder / f"{_NAME}.partial"
    with partial.open("wb") as file:
        file.write(raw)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(folder / _NAME)
    sync_folder(folder)


def load_plan(folder: Path, cuts: int) -> Plan | None:
    """The plan of the cut that is under way, if one is; ``cuts`` are complete."""
    try:
        found = orjson.loads((folder / _NAME).read_bytes())
    except FileNotFoundError:
        return None
    if found["cut"] != cuts:
        return None
    return Plan(
        cuts,
        {(topic, partition): start for topic, partition, start, _ in found["places"]},
        {(topic, partition): end for topic, partition, _, end in found["places"]},
        tuple(Gap(*gap) for gap in found["gaps"]),
        found["finished"],
    )
