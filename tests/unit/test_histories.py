"""Opening history: an archive needs no system, and what it lacks is told."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest

from magnatronic.errors import NotRunningError
from magnatronic.histories import open_history
from replay.archive import Gap, Header, Manifest, Segment, Stretch
from replay.errors import ArchiveError


def test_an_archive_needs_no_system_and_tells_its_gaps(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = Manifest.create(tmp_path, Header("main", "c", ("t",)))
    first = Segment(0, "", 0, "", 0, 0, 0, (Stretch("t", 0, 0, 10, 0, ""),), cut=True)
    made.append(first)
    with open_history(tmp_path / "no system", tmp_path) as history:
        assert history.system is None
        assert history.log.spans() == {("t", 0): (0, 10)}
    assert caplog.messages == []
    lost = Gap("t", 0, 10, 12)
    made.append(replace(first, number=1, stretches=(Stretch("t", 0, 12, 20, 0, ""),), gaps=(lost,)))
    with caplog.at_level(logging.WARNING), open_history(tmp_path / "no system", tmp_path):
        assert "lacks offsets 10 to 12 of t/0" in caplog.messages[0]


def test_what_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match="holds no archive"):
        open_history(tmp_path, tmp_path)
    with pytest.raises(NotRunningError):
        open_history(tmp_path)
