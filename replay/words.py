"""Events in a line, for people: the words that the command line, traces and reports use.

In: an event. Out: what it says, without its key, on one line of text that is cut where it is long.
"""

from datetime import timedelta

import orjson

from schemas.events import (
    ChangeMarked,
    ChunkEmbedded,
    DeadLettered,
    DeadLetterResolved,
    DocumentIndexed,
    DocumentSubmitted,
    Effect,
    Event,
    LlmCalled,
    LogArchived,
    MemoryRecalled,
    PlanProposed,
    PlanRejected,
    ProcessorStats,
    Queried,
    StepAssessed,
    StepAssigned,
    StepCancelled,
    StepCancelRequested,
    StepCompleted,
    StepFailed,
    TaskCancelled,
    TaskCompleted,
    TaskExpired,
    TaskFailed,
    TaskSubmitted,
    TextsEmbedded,
    TimerFired,
    ToolCalled,
    ToolStarted,
    Waited,
)

__all__ = ["duration", "error_of", "say", "say_effect", "shorten"]


def shorten(text: str, width: int = 100) -> str:
    """``text`` on one line of at most ``width`` characters."""
    line = " ".join(text.split())
    return line if len(line) <= width else f"{line[: width - 1].rstrip()}…"


def duration(length: timedelta) -> str:
    """How long something took, with about three digits.

    >>> [duration(timedelta(seconds=s)) for s in (0.0004, 0.0123, 1.2345, 75, 7_500)]
    ['0.4 ms', '12 ms', '1.23 s', '1 min 15 s', '2 h 5 min']
    """
    seconds = length.total_seconds()
    if abs(seconds) < 0.01:
        return f"{seconds * 1000:.1f} ms" if seconds else "0 ms"
    if abs(seconds) < 1:
        return f"{seconds * 1000:.0f} ms"
    if abs(seconds) < 60:
        return f"{seconds:.2f} s"
    minutes, seconds = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {seconds} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes} min"


def _step(step_id: str) -> str:
    return f"step {step_id.rpartition('/')[2]}"


def _again(attempt: int, revision: int) -> str:
    return (f", attempt {attempt}" if attempt > 1 else "") + (f", revision {revision}" if revision else "")


def say(event: Event) -> str:
    """What the event says, without its key."""
    match event:
        case TaskSubmitted(objective=objective, priority=priority):
            return f"{priority.value}: {shorten(objective)}"
        case PlanProposed(steps=steps):
            return f"{len(steps)} {'step' if len(steps) == 1 else 'steps'}: " + shorten(
                "; ".join(f"{step.capability}: {step.objective}" for step in steps), 140
            )
        case PlanRejected(reason=reason):
            return shorten(reason, 160)
        case StepAssigned(step_id=step_id, capability=capability, objective=objective) as assigned:
            again = _again(assigned.attempt, assigned.revision)
            return f"{_step(step_id)} to {capability}{again}: {shorten(objective)}"
        case StepCompleted(step_id=step_id, answer=answer, citations=citations):
            return f"{_step(step_id)}, {len(citations)} citations: {shorten(answer)}"
        case StepAssessed(step_id=step_id, decision=decision, groundedness=groundedness, finding=finding):
            return f"{_step(step_id)}: {decision.value}, {groundedness:.0%} grounded {shorten(finding)}".rstrip()
        case StepFailed(step_id=step_id, message=message):
            return f"{_step(step_id)}: {shorten(message, 160)}"
        case TaskCompleted(answer=answer, groundedness=groundedness):
            return f"{groundedness:.0%} grounded: {shorten(answer)}"
        case TaskFailed(reason=reason):
            return shorten(reason, 160)
        case TaskExpired(deadline=deadline):
            return f"deadline {deadline:%H:%M:%S} UTC"
        case TaskCancelled(requested_by=who, reason=reason):
            return shorten(f"by {who} {reason}")
        case ChangeMarked(agent=agent, change=change, taken=taken):
            return f"{agent}: change {shorten(change)} {'applies' if taken else 'came too late'}"
        case TimerFired(agent=agent, timer=timer, due=due):
            return f"timer {timer} of {agent}, due {due:%H:%M:%S} UTC"
        case StepCancelRequested(target=step_id, reason=reason):
            return f"{_step(step_id)}: {shorten(reason)}"
        case StepCancelled(step_id=step_id, agent=agent, reason=reason):
            return f"{_step(step_id)}, {agent}: {shorten(reason)}"
        case Effect() as effect:
            failed = f", failed: {shorten(error_of(effect), 80)}" if effect.error else ""
            return f"{effect.agent}: {say_effect(effect)} in {effect.latency_ms:.0f} ms{failed}"
        case DocumentSubmitted(title=title, text=text):
            return f"{shorten(title)}, {len(text):,} characters"
        case ChunkEmbedded(ordinal=ordinal, heading=heading, tokens=tokens):
            return f"chunk {ordinal}, {tokens} tokens, {shorten(heading)}"
        case DocumentIndexed(chunk_ids=chunk_ids):
            return f"{len(chunk_ids)} chunks"
        case DeadLetterResolved(agent=agent) as dead:
            place = f"{dead.source_topic}[{dead.source_partition}]@{dead.source_offset}"
            return f"{place} of {agent}: {dead.resolution.value} by {dead.resolved_by} {shorten(dead.reason)}".rstrip()
        case DeadLettered(agent=agent, error_type=kind, error=error) as dead:
            place = f"{dead.source_topic}[{dead.source_partition}]@{dead.source_offset}"
            return f"{agent} gave up {place}: {kind}: {shorten(error)}"
        case LogArchived(records=records, head=head):
            return f"{records:,} records; head {head[:16]}"
        case ProcessorStats() as stats:
            return f"{stats.events_in} in, {stats.events_out} out, lag {stats.lag}, p99 {stats.p99_ms:.1f} ms"
        case _:
            fields = event.model_dump(mode="json", exclude={"task_id", "source", "document_id", "name"})
            return shorten(", ".join(f"{name} {value}" for name, value in fields.items() if value not in ("", None)))


def say_effect(effect: Effect) -> str:
    """What was called, without whose call it was."""
    match effect:
        case LlmCalled():
            return f"{effect.provider} {effect.model}, {effect.prompt_tokens}+{effect.completion_tokens} tokens"
        case MemoryRecalled():
            return f"{len(effect.hits)} {'passage' if len(effect.hits) == 1 else 'passages'} recalled"
        case TextsEmbedded():
            return f"{effect.count} texts embedded"
        case ToolStarted():
            return f"tool {effect.tool} started"
        case ToolCalled():
            return f"tool {effect.tool}"
        case Waited():
            return f"waited {effect.seconds:g} s"
        case Queried():
            return f"{effect.target} queried"
        case _:
            return type(effect).__name__


def error_of(effect: Effect) -> str:
    """Why a call failed: the error's type and message; empty where it did not."""
    try:
        error = orjson.loads(effect.error)
        return f"{error['type']}: {error['message']}"
    except (ValueError, TypeError, KeyError):
        return effect.error
