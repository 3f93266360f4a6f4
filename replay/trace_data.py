"""A trace as JSON can hold it.

In: a :class:`~replay.trace.Trace`. Out: a dict. Entries are listed once, in the order of the log, and elsewhere named
by their place, ``topic[partition]@offset``; times are ISO 8601 in UTC, lengths of time seconds. Vectors are left out.
"""

from datetime import timedelta
from typing import Any

from replay.history import Entry
from replay.trace import Decision, Sums, Trace

__all__ = ["trace_as_dict"]

_VECTORS = {"vector", "vectors"}


def trace_as_dict(trace: Trace) -> dict[str, Any]:
    """Everything that the trace holds."""
    outcome = trace.outcome
    return {
        "id": trace.history.id,
        "kind": trace.history.kind,
        "outcome": None if outcome is None else outcome.type,
        "began": trace.began.isoformat(),
        "wall_s": trace.wall.total_seconds(),
        "sums": _sums(trace.sums),
        "by_agent": {name: _sums(sums) for name, sums in trace.by_agent.items()},
        "roots": [entry.place for entry in trace.roots],
        "path": [
            {
                "agent": hop.decision.agent,
                "from": hop.decision.cause.place,
                "to": hop.to.place,
                "waited_s": hop.waited.total_seconds(),
                "called_s": hop.called.total_seconds(),
                "handled_s": hop.other.total_seconds(),
            }
            for hop in trace.path
        ],
        "decisions": [_decision(decision) for decision in trace.decisions],
        "entries": [_entry(entry) for entry in trace.history.entries],
    }


def _entry(entry: Entry) -> dict[str, Any]:
    metadata = None if entry.envelope is None else entry.envelope.metadata
    return {
        "place": entry.place,
        "time": entry.time.isoformat(),
        "type": entry.type,
        "id": entry.id,
        "source": entry.source,
        "decided_at": None if metadata is None else metadata.time.isoformat(),
        "causation_id": "" if metadata is None else metadata.causation_id,
        "redriven_for": entry.redriven_for,
        "erased": entry.erased,
        "error": entry.error,
        "event": None if entry.event is None else entry.event.model_dump(mode="json", exclude=_VECTORS),
    }


def _decision(decision: Decision) -> dict[str, Any]:
    letter = decision.letter
    return {
        "agent": decision.agent,
        "version": decision.version,
        "on": decision.cause.place,
        "calls": [entry.place for entry in decision.calls],
        "outputs": [entry.place for entry in decision.outputs],
        "timers": [entry.place for entry in decision.timers],
        "dead_letter": None if letter is None else letter.entry.place,
        "sent_again": None if letter is None or letter.again is None else letter.again.place,
        "cancelled": None if decision.cancelled is None else decision.cancelled.place,
        "attempts": decision.attempts,
        "started": None if decision.started is None else decision.started.isoformat(),
        "waited_s": _seconds(decision.waited),
        "called_s": _seconds(decision.called),
        "took_s": _seconds(decision.took),
    }


def _sums(sums: Sums) -> dict[str, Any]:
    return {
        "decisions": sums.decisions,
        "waited_s": sums.waited.total_seconds(),
        "called_s": sums.called.total_seconds(),
        "calls": sums.calls,
        "llm_calls": sums.llm_calls,
        "failed_calls": sums.failed_calls,
        "repeats": sums.repeats,
        "dead_letters": sums.dead_letters,
        "prompt_tokens": sums.prompt_tokens,
        "completion_tokens": sums.completion_tokens,
        "cost_usd": sums.cost_usd,
    }


def _seconds(length: timedelta | None) -> float | None:
    return None if length is None else length.total_seconds()
