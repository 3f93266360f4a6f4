"""A trace as an HTML page: figures, the critical path as a timeline, sums by agent, and the tree with everything in it.

In: a :class:`~replay.trace.Trace` and, for a moment in the past, what stood then. Out: the page as text.
"""

from collections.abc import Iterable, Sequence
from typing import Final

from replay.details import Detail, call_in_words, details
from replay.history import Entry
from replay.page import (
    Bar,
    Html,
    Node,
    Part,
    Tone,
    badge,
    code,
    facts,
    figures,
    fold,
    inline,
    muted,
    page,
    section,
    strong,
    table,
    timeline,
    tree,
)
from replay.story import Line, is_unanswered, story
from replay.trace import Decision, Letter, Sums, Trace
from replay.words import duration, error_of, say
from schemas.events import (
    Assessment,
    DeadLetterResolved,
    Effect,
    PlanRejected,
    StepAssessed,
    StepFailed,
    TaskCompleted,
    TaskExpired,
    TaskFailed,
)

__all__ = ["SUM_COLUMNS", "outcome_of", "sum_rows", "tone_of", "trace_page"]

SUM_COLUMNS: Final = ("agent", "decisions", "waited", "in calls", "calls", "failed", "again", "tokens", "cost $")
_LONG: Final = 300


def trace_page(trace: Trace, *, subtitle: str = "", then: Sequence[Part] = ()) -> str:
    """The page; ``then`` are sections on what stood at a moment, put before the tree."""
    history, sums = trace.history, trace.sums
    title = f"Trace of {history.kind} {history.id}"
    return page(
        title,
        figures(
            [
                ("outcome" if history.kind == "task" else "state", *_outcome(trace)),
                ("from the first record to the last", duration(trace.wall)),
                ("decisions", sums.decisions),
                ("calls", sums.calls),
                ("tokens", sums.prompt_tokens + sums.completion_tokens),
                ("cost", f"${sums.cost_usd:.4f}"),
                ("failed calls", sums.failed_calls, "bad" if sums.failed_calls else "plain"),
                ("dead letters", sums.dead_letters, "bad" if sums.dead_letters else "plain"),
            ]
        ),
        *then,
        section("What led to what", tree(_node(trace, line) for line in story(trace))),
        section("Where the time went", _path(trace)) if trace.path else None,
        section("Who took what", table(SUM_COLUMNS, sum_rows(trace), right=SUM_COLUMNS[1:])),
        subtitle=subtitle,
        footer=f"{len(history.entries):,} records, the first appended at {trace.began.isoformat()}",
    )


def sum_rows(trace: Trace) -> list[tuple[str | int | float, ...]]:
    """A row of :data:`SUM_COLUMNS` for each agent, and one for all of them."""
    rows = [*trace.by_agent.items(), ("all", trace.sums)]
    return [_sum_row(name, sums) for name, sums in rows]


def _sum_row(name: str, sums: Sums) -> tuple[str | int | float, ...]:
    tokens = f"{sums.prompt_tokens:,}+{sums.completion_tokens:,}"
    calls = sums.calls, sums.failed_calls, sums.repeats
    times = (duration(length) if sums.calls else "" for length in (sums.waited, sums.called))
    return name, sums.decisions, *times, *calls, tokens, f"{sums.cost_usd:.4f}"


def outcome_of(trace: Trace) -> tuple[str, Tone]:
    """How it ended, in a word, and whether that is good."""
    return _outcome(trace)


def tone_of(entry: Entry) -> Tone:
    """What an entry's name is coloured by."""
    match entry.event:
        case None:
            return "bad"
        case TaskCompleted():
            return "good"
        case TaskFailed() | StepFailed() | PlanRejected():
            return "bad"
        case StepAssessed(decision=decision):
            return {Assessment.ACCEPT: "good", Assessment.REVISE: "warn", Assessment.REJECT: "bad"}[decision]  # type: ignore[return-value]
        case Effect(error=error) if error:
            return "bad"
        case Effect():
            return "plain"
        case TaskExpired():
            return "warn"
        case _:
            return "info"


def _outcome(trace: Trace) -> tuple[str, Tone]:
    outcome = trace.outcome
    if outcome is not None:
        word = outcome.type.removeprefix("Task").lower()
        return word, "warn" if word == "cancelled" else tone_of(outcome)
    return ("under way", "info") if trace.history.kind == "task" else ("document", "plain")


def _node(trace: Trace, line: Line) -> Node:
    children = [_node(trace, below) for below in line.below]
    match line.what:
        case Decision() as decision:
            return Node(_decision(trace, decision), (), children)
        case Letter() as letter:
            return Node(_letter(letter), [_shown(detail) for detail in details(letter.letter)], children, open=True)
        case entry:
            body = _facts(entry), *(() if entry.event is None else map(_shown, details(entry.event)))
            inner = [Node(muted("all of it"), body, open=False)] if children else []
            return Node(_entry(trace, entry), () if children else body, [*inner, *children], open=bool(children))


def _entry(trace: Trace, entry: Entry) -> Html:
    kind = badge(entry.type, tone_of(entry))
    if isinstance(entry.event, Effect):
        took = f"{entry.event.latency_ms:,.0f} ms"
        failed = inline(badge("failed", "bad"), error_of(entry.event)) if entry.event.error else None
        return inline(kind, call_in_words(entry.event), muted(took), failed, _erased(entry))
    return inline(
        muted(_after(trace, entry)),
        kind,
        entry.error if entry.event is None else say(entry.event),
        badge(f"sent again for {entry.redriven_for}", "warn") if entry.redriven_for else None,
        badge("no answer yet", "warn") if is_unanswered(trace, entry) else None,
        _erased(entry),
    )


def _erased(entry: Entry) -> Html | None:
    return badge("erased", "warn") if entry.erased else None


def _decision(trace: Trace, decision: Decision) -> Html:
    version = f"@{decision.version}" if decision.version else ""
    return inline(
        strong(decision.agent + version),
        muted(", ".join(_figures(decision))),
        badge(f"{decision.attempts} attempts", "warn") if decision.attempts > 1 else None,
        badge("gave up", "bad") if decision.letter is not None else None,
        badge("stopped", "warn") if decision.cancelled is not None else None,
        badge("not finished", "warn") if decision.ended is None and not decision.timers else None,
    )


def _figures(decision: Decision) -> Iterable[str]:
    if decision.waited is not None:
        yield f"waited {duration(decision.waited)}"
        yield f"in calls {duration(decision.called)}"
    if decision.took is not None:
        yield f"took {duration(decision.took)} in all"


def _letter(letter: Letter) -> Html:
    resolved = [entry.event for entry in letter.resolved if isinstance(entry.event, DeadLetterResolved)]
    return inline(
        badge("DeadLettered", "bad"),
        say(letter.letter),
        *(badge(f"{each.resolution} by {each.resolved_by}", "warn") for each in resolved),
    )


def _facts(entry: Entry) -> Html:
    metadata = None if entry.envelope is None else entry.envelope.metadata
    known: dict[str, Part] = {"appended": entry.time, "at": entry.place}
    if metadata is not None:
        known |= {
            "decided at": metadata.time,
            "by": metadata.source,
            "event id": metadata.id,
            "answers": metadata.causation_id,
        }
    if isinstance(entry.event, Effect):
        effect = entry.event
        known |= {"started": effect.started_at, "attempt": effect.attempt, "scope": effect.scope}
        known |= {"request hash": effect.request_hash}
    return facts(known)


def _shown(detail: Detail) -> Html:
    if detail.columns:
        shown: Html = table(detail.columns, detail.rows)
        many = len(detail.rows) > 3 and not detail.brief
    else:
        shown, many = code(detail.text), len(detail.text) > _LONG and not detail.brief
    count = f"{len(detail.rows):,}" if detail.columns else ""
    return fold(inline(detail.name, muted(count)), shown, open=not many)


def _path(trace: Trace) -> Html:
    bars = []
    for hop in trace.path:
        start = (hop.decision.cause.time - trace.began).total_seconds()
        label = inline(hop.decision.agent, muted(f"{hop.decision.cause.type} → {hop.to.type}"))
        called = start + hop.waited.total_seconds()
        decided = called + hop.called.total_seconds()
        if hop.waited:
            bars.append(Bar(label, start, called, f"waited {duration(hop.waited)}", "warn"))
        if hop.called:
            bars.append(Bar(label, called, decided, f"in calls {duration(hop.called)}", "info"))
        bars.append(
            Bar(label, decided, decided + hop.other.total_seconds(), f"handled in {duration(hop.other)}", "plain")
        )
    return timeline(bars)


def _after(trace: Trace, entry: Entry) -> str:
    return f"+{(entry.time - trace.began).total_seconds():.3f} s"
