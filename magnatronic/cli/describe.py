"""Observed records in a line, for people.

In: an observed record. Out: what it says, in words.
"""

from magnatronic.follow import Observed
from replay.words import say, shorten

__all__ = ["describe", "one_line", "shorten"]


def one_line(observed: Observed) -> str:
    """Time, topic, type, key and what the event says."""
    return (
        f"{observed.time.astimezone():%H:%M:%S.%f}"[:-3]
        + f"  {observed.topic:<24} {observed.type:<17} {observed.key[:36]:<36}  {describe(observed)}"
    )


def describe(observed: Observed) -> str:
    """What the event says, without its key; why there is none where the bytes don't decode."""
    return observed.error if observed.event is None else say(observed.event)
