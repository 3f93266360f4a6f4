"""Golden histories of a real system: without a change, a what-if finds nothing in any of them and asks nobody."""

from pathlib import Path
from typing import Any, Final

import pytest

from agents.context import Ports
from replay.golden import SUFFIX, load
from replay.whatif.answers import Answers
from replay.whatif.budget import Budget
from replay.whatif.calls import CallLog
from replay.whatif.changes import Changes
from replay.whatif.fleet import LocalFleet, Post
from replay.whatif.past import Past
from replay.whatif.result import Status, TaskResult
from replay.whatif.simulation import Simulation
from schemas.codec import Codec
from schemas.errors import SchemaError
from schemas.metadata import Envelope
from schemas.record import Record
from streams.binding import Binding
from tests.replay.stations import stations_of

HISTORIES: Final = Path(__file__).parents[1] / "replay" / "histories"
PATHS: Final = sorted(HISTORIES.glob(f"*{SUFFIX}"))
CODEC: Final = Codec()


def readable(records: Any) -> list[tuple[Record, Envelope]]:
    found = []
    for record in records:
        try:
            found.append((record, CODEC.decode(record)))
        except SchemaError:
            continue
    return found


async def simulated(path: Path, folder: Path, changes: Changes) -> tuple[Past, TaskResult]:
    pinned = load(path)
    stations = stations_of(pinned)
    posts = {
        each.agent.name: Post(each.agent, each.topics, Binding(each.agent, tuple(each.topics))) for each in stations
    }
    history = readable(pinned.records)
    past = Past(history[0][1].metadata.correlation_id, history, posts)
    calls = CallLog(folder / "calls.jsonl", CODEC)
    try:
        answers = Answers(changes, Ports(), calls, Budget(), estimate=lambda request: (0, 0.0), run_id="test")
        fleet = LocalFleet([each.agent for each in stations], CODEC)
        return past, await Simulation(past, fleet, posts, answers, CODEC).run()
    finally:
        calls.close()


@pytest.mark.parametrize("path", [path for path in PATHS if path.stem != "unreadable"], ids=lambda path: path.stem)
async def test_without_a_change_nothing_differs(path: Path, tmp_path: Path) -> None:
    past, result = await simulated(path, tmp_path, Changes())
    assert result.divergences == ()
    assert (result.made, result.elsewhere, result.would) == (0, 0, ())
    assert result.steps > 0
    if past.outcome is not None:
        assert result.status is Status.SAME
        assert result.before == result.after
    else:
        assert result.status is Status.UNFINISHED


async def test_the_histories_have_what_can_go_wrong() -> None:
    assert {"cancelled", "expired", "failed-step", "mended-plan", "redriven", "repeated", "revised"} <= {
        path.stem for path in PATHS
    }
