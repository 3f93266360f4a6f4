"""W3C trace contexts that nobody has to remember: made from the ids of events.

In: an event's ids, or a ``traceparent`` header. Out: trace and span ids. They are hashes, so that a step that is run
again after a crash, and a client that sends a submission again, name their spans as before. Pure, and quick: with
tracing on, each event passes here.
"""

from hashlib import blake2b
from typing import Final, NamedTuple

__all__ = ["TraceContext", "derived_span_id", "derived_trace_id", "parse", "published"]

_HEX: Final = frozenset("0123456789abcdef")
_NO_TRACE: Final = "0" * 32
_NO_SPAN: Final = "0" * 16


class TraceContext(NamedTuple):
    """A place in a trace: 32 and 16 lowercase hex digits, and whether the trace is recorded."""

    trace_id: str
    span_id: str
    sampled: bool = True

    def __str__(self) -> str:
        """As a ``traceparent`` header."""
        return f"00-{self.trace_id}-{self.span_id}-{'01' if self.sampled else '00'}"


def parse(traceparent: str) -> TraceContext | None:
    """What the header says; None when it is empty or no trace context (https://www.w3.org/TR/trace-context/)."""
    if len(traceparent) < 55 or traceparent[:2] == "ff" or (len(traceparent) > 55 and traceparent[:2] == "00"):
        return None
    parts = traceparent[:55].split("-")
    if [len(part) for part in parts] != [2, 32, 16, 2] or not _HEX.issuperset("".join(parts)):
        return None
    _, trace_id, span_id, flags = parts
    if trace_id == _NO_TRACE or span_id == _NO_SPAN:
        return None
    return TraceContext(trace_id, span_id, bool(int(flags, 16) & 1))


def derived_trace_id(correlation_id: str) -> str:
    """The trace of all that happens for one task, or for one document."""
    return blake2b(correlation_id.encode(), digest_size=16, person=b"magnatronic-trc").hexdigest()


def derived_span_id(event_id: str, what: str) -> str:
    """The span of ``what`` is done about an event: handled by an agent (its name), published, called (an effect)."""
    return blake2b(f"{event_id}\x1f{what}".encode(), digest_size=8, person=b"magnatronic-spn").hexdigest()


def published(event_id: str, correlation_id: str) -> TraceContext:
    """The root of a trace: the publishing of an event that nothing in the log caused."""
    return TraceContext(derived_trace_id(correlation_id or event_id), derived_span_id(event_id, "publish"))
