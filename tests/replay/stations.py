"""Who decides golden histories again: the system's agents on their topics, or the racer alone."""

from functools import lru_cache
from typing import Final

from magnatronic.roles import stations
from magnatronic.settings import Settings
from replay.decide import Station
from replay.golden import Pinned
from tests.replay.racing import Racer

__all__ = ["RACER_TOPICS", "stations_of", "system_stations"]

RACER_TOPICS: Final = ("work.research.high", "work.research.normal", "work.research.low")


@lru_cache(maxsize=1)
def system_stations() -> tuple[Station, ...]:
    """Every agent of the system, with the embedding model that the histories were recorded with."""
    return stations(Settings.load(embedding_model="all-MiniLM-L6-v2"))


def stations_of(pinned: Pinned) -> tuple[Station, ...]:
    """Those whose work the history is."""
    if "racer" in pinned.versions:
        return (Station(Racer(), frozenset(RACER_TOPICS)),)
    return system_stations()
