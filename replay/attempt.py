"""One run of a handler with recorded effects, and what two runs of it tell of each other.

In: two attempts at the same step, the second one with a shifted clock and other random numbers. Out: a finding for each
use of what is not the handler's own, with the field in which the two runs differ.
"""

from collections.abc import Iterator
from typing import Any

from agents.agent import Failure
from agents.errors import NondeterminismError
from agents.journal import Journal, Request
from agents.step import StepResult
from replay.checks import Report
from replay.difference import Change, changes, told
from replay.findings import Finding, FindingKind
from replay.guard import Use
from schemas.codec import Encoded
from schemas.metadata import Envelope

__all__ = ["Attempt", "ReplayJournal", "stability_faults"]


class ReplayJournal(Journal):
    """A journal that knows the call that it could not answer."""

    unrecorded: Request | None = None

    async def ask(self, request: Request, effect_type: Any) -> Any:
        """As the journal's own."""
        try:
            return await super().ask(request, effect_type)
        finally:
            if request.recorded is None:
                self.unrecorded = request


class Attempt:
    """One run of a handler, and of its on_failure."""

    __slots__ = ("encoded", "error", "failure", "fault", "journal", "result", "uses")

    def __init__(self, journal: ReplayJournal) -> None:
        self.journal = journal
        self.result: StepResult | None = None
        self.encoded: list[tuple[str, Envelope, Encoded]] = []
        self.failure: Failure | None = None
        self.error = ""
        self.fault: NondeterminismError | None = None
        self.uses: tuple[Use, ...] = ()


def stability_faults(first: Attempt, second: Attempt, report: Report) -> Iterator[Finding]:
    """What the handler used that is not its own, and where deciding twice gave two results."""
    differs: list[Change] = []
    if first.result != second.result or first.failure != second.failure or str(first.fault) != str(second.fault):
        differs = _differences(first, second)
    field, diff = (differs[0].path, told(differs)) if differs else ("", "")
    uses = dict.fromkeys((*first.uses, *second.uses))
    for use in uses:
        reaches = f"; it reaches {field}" if field else ""
        yield report(use.kind, f"{use.what} is used at {use.where or 'the handler'}{reaches}", field, diff)
    if differs and not uses:
        yield report(FindingKind.UNSTABLE, f"deciding it twice gives two results; the first is {field}", field, diff)


def _differences(first: Attempt, second: Attempt) -> list[Change]:
    """In what two attempts differ; old is the first's."""
    found = changes(_failure(first), _failure(second), "failure")
    one, other = first.result, second.result
    if one is None or other is None:
        return found
    if len(one.outputs) != len(other.outputs):
        found.append(Change("outputs", _types(one), _types(other)))
    for number, (old, new) in enumerate(zip(one.outputs, other.outputs, strict=False)):
        path = "" if len(one.outputs) == 1 else f"{type(old.event).__name__}[{number}]"
        found += changes(old.event, new.event, path)
        if type(old.event) is type(new.event):
            names = ("subject", "time", "source")
            found += changes(
                {name: getattr(old.metadata, name) for name in names},
                {name: getattr(new.metadata, name) for name in names},
                f"{path}.metadata".lstrip("."),
            )
    old_state, new_state = one.state, other.state
    if old_state is None or new_state is None:
        found += [] if old_state is new_state else [Change("state", old_state, new_state)]
    else:
        found += changes(old_state.value, new_state.value, "state")
        found += changes(old_state.expires_at, new_state.expires_at, "state.expires_at")
    found += changes(
        {timer.name: timer.due for timer in one.timers}, {timer.name: timer.due for timer in other.timers}, "timers"
    )
    return found


def _failure(attempt: Attempt) -> str:
    if attempt.fault is not None:
        return f"{type(attempt.fault).__name__}: {attempt.fault}"
    return "" if attempt.failure is None else f"{attempt.failure.error_type}: {attempt.failure.message}"


def _types(result: StepResult) -> str:
    return ", ".join(type(output.event).__name__ for output in result.outputs)
