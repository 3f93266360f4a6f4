"""ctx.changed: which events a change of code applies to, live, over attempts and crashes, and in replay."""

import asyncio
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agents.agent import Agent
from agents.context import Context
from agents.errors import EffectFailedError
from agents.journal import Journal
from agents.ports import InDoubt, Ports, ToolInfo
from agents.step import StepResult, run_step
from schemas.codec import Codec
from schemas.events import ChangeMarked, Effect, PlanRejected, Priority, TaskSubmitted
from schemas.metadata import Envelope, Metadata
from schemas.record import Record
from schemas.topics import key_of, topic_name

CAUSE = Metadata("cause-1", "/clients/test", "t1", datetime(2026, 1, 1, tzinfo=UTC), correlation_id="t1")


class Bench:
    """Tools that answer with how often they were called. Names say what they do: pay-... has side effects, fails-...
    fails at its first call, slow-... takes three turns of the loop."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def describe(self, name: str) -> ToolInfo:
        return ToolInfo(name=name, side_effects=name.startswith("pay"), in_doubt=InDoubt.RETRY)

    async def call(self, name: str, arguments_json: str, *, idempotency_key: str) -> str:
        self.calls.append(name)
        for _ in range(3 if name.startswith("slow") else 0):
            await asyncio.sleep(0)
        if name.startswith("fails") and self.calls.count(name) == 1:
            raise EffectFailedError("Overloaded", "later", retryable=True)
        if name.endswith("doubt") and self.calls.count(name) == 1:
            raise EffectFailedError("HandlerTimeout", "no answer", retryable=True)
        return f'"{name} {self.calls.count(name)}"'


class Teller(Agent[Any]):
    """Emits what it decided. What it asks for, and in which order, is the objective: words are tools, ``?x`` asks
    whether change x applies, ``a|b`` does both side by side, ``x:a/b`` does a if change x applies and else b."""

    name, version = "teller", "1"
    consumes, emits = (TaskSubmitted,), (PlanRejected,)

    async def handle(self, event: TaskSubmitted, ctx: Context[Any]) -> None:
        said = await self._all(event.objective.split(), ctx)
        ctx.emit(PlanRejected(task_id=event.task_id, objective="", reason=" ".join(said)))

    async def _all(self, words: Sequence[str], ctx: Context[Any]) -> list[str]:
        said: list[str] = []
        for word in words:
            if "|" in word:
                branches = [self._all([one], ctx.scope(str(n))) for n, one in enumerate(word.split("|"))]
                said += [part for branch in await asyncio.gather(*branches) for part in branch]
            elif ":" in word:
                change, _, ways = word.partition(":")
                new, old = ways.split("/")
                said += await self._all([new if ctx.changed(change) else old], ctx)
            elif word.startswith("?"):
                said.append(f"{word[1:]}={ctx.changed(word[1:])}")
            else:
                said.append((await ctx.tool(word, {})).result.strip('"'))
        return said


def journal_of(bench: Bench | None, recorded: Iterable[Effect] = ()) -> Journal:
    return Journal(
        agent="teller",
        source="/agents/teller@1",
        key="t1",
        cause=CAUSE,
        recorded=tuple(recorded),
        **({"replaying": True} if bench is None else {"ports": Ports(tools=bench)}),
    )


async def run(journal: Journal, objective: str) -> str:
    """What the agent says when it is to do ``objective``: as a release of its code would."""
    result: StepResult = await run_step(
        Teller(),
        Envelope(TaskSubmitted(task_id="t1", objective=objective), CAUSE),
        timestamp_ms=1_767_225_600_000,
        priority=Priority.NORMAL,
        state=None,
        journal=journal,
    )
    (output,) = result.outputs
    assert isinstance(output.event, PlanRejected)
    return output.event.reason


def effects_of(*journals: Journal) -> list[Effect]:
    made = [envelope.event for journal in journals for envelope in journal.performed]
    return [effect for effect in made if isinstance(effect, Effect)]


async def replayed(objective: str, *journals: Journal) -> str:
    journal = journal_of(None, effects_of(*journals))
    said = await run(journal, objective)
    assert journal.unasked() == []
    return said


async def test_a_change_applies_to_what_the_changed_code_handles_and_the_log_says_so() -> None:
    journal = journal_of(Bench())
    assert await run(journal, "a ?x ?x ?y") == "a 1 x=True x=True y=True"
    marks = [(type(effect).__name__, getattr(effect, "change", ""), effect.sequence) for effect in effects_of(journal)]
    assert marks == [("ToolCalled", "", 0), ("ChangeMarked", "x", 1), ("ChangeMarked", "y", 2)]
    assert await replayed("a ?x ?x ?y", journal) == "a 1 x=True x=True y=True"


async def test_in_replay_a_change_does_not_apply_to_what_older_code_decided() -> None:
    journal = journal_of(Bench())
    assert await run(journal, "old") == "old 1"
    assert await replayed("x:new/old", journal) == "old 1"


async def test_a_handler_without_effects_can_change_too() -> None:
    journal = journal_of(Bench())
    assert await run(journal, "?x") == "x=True"
    assert await replayed("?x", journal) == "x=True"
    assert await replayed("?x") == "x=False"


async def test_a_handler_that_does_not_ask_records_nothing() -> None:
    journal = journal_of(Bench())
    await run(journal, "a")
    assert len(journal.performed) == 1


async def test_a_marker_goes_through_the_codec_to_the_topic_of_effects() -> None:
    journal = journal_of(Bench())
    await run(journal, "?x")
    (made,) = journal.performed
    assert (topic_name(made.event), key_of(made.event)) == ("effects", "t1")
    codec = Codec()
    encoded = codec.encode(made.event, made.metadata)
    record = Record("effects", 0, 0, 0, b"t1", encoded.value, encoded.headers)
    decoded = codec.decode(record).event
    assert decoded == made.event
    assert isinstance(decoded, ChangeMarked)
    assert (decoded.change, decoded.taken) == ("x", True)


async def test_a_retry_and_a_crash_are_told_what_the_first_was_told() -> None:
    bench = Bench()
    journal = journal_of(bench)
    with pytest.raises(EffectFailedError, match="later"):
        await run(journal, "?x fails")
    journal.next_attempt()
    assert await run(journal, "?x fails") == "x=True fails 2"
    assert [type(effect) for effect in effects_of(journal)].count(ChangeMarked) == 1
    again = journal_of(bench, effects_of(journal))
    assert await run(again, "?x fails") == "x=True fails 2"
    assert not again.performed
    assert await replayed("?x fails", journal) == "x=True fails 2"


async def test_what_older_code_began_goes_on_in_the_older_way() -> None:
    bench = Bench()
    crashed = journal_of(bench)
    await run(crashed, "old")
    later = journal_of(bench, effects_of(crashed))
    assert await run(later, "x:new/old ?x more") == "old 1 x=False more 1"
    assert bench.calls == ["old", "more"], "what was paid for is not paid for again"
    (marker,) = [effect for effect in effects_of(later) if isinstance(effect, ChangeMarked)]
    assert (marker.change, marker.taken, marker.attempt) == ("x", False, 2)
    assert await replayed("x:new/old ?x more", crashed, later) == "old 1 x=False more 1"
    last = journal_of(bench, effects_of(crashed, later))
    assert await run(last, "x:new/old ?x more") == "old 1 x=False more 1"
    assert not last.performed


async def test_what_older_code_had_not_got_to_takes_the_change() -> None:
    bench = Bench()
    crashed = journal_of(bench)
    await run(crashed, "first")
    later = journal_of(bench, effects_of(crashed))
    assert await run(later, "first x:new/old") == "first 1 new 1"
    assert await replayed("first x:new/old", crashed, later) == "first 1 new 1"


async def test_a_call_that_failed_for_sure_can_be_mended_by_a_change() -> None:
    bench = Bench()
    journal = journal_of(bench)
    with pytest.raises(EffectFailedError):
        await run(journal, "fails")
    later = journal_of(bench, effects_of(journal))
    assert await run(later, "x:mended/fails") == "mended 1"
    assert await replayed("x:mended/fails", journal, later) == "mended 1"


async def test_a_call_that_may_have_done_its_work_holds_the_older_way() -> None:
    bench = Bench()
    journal = journal_of(bench)
    with pytest.raises(EffectFailedError, match="no answer"):
        await run(journal, "pay-doubt")
    later = journal_of(bench, effects_of(journal))
    assert await run(later, "x:pay-other/pay-doubt") == "pay-doubt 2"
    assert await replayed("x:pay-other/pay-doubt", journal, later) == "pay-doubt 2"


@pytest.mark.parametrize("objective", ["slow|?x|x:a/b ?x", "x:a/b|slow-x|x:a/b"])
async def test_concurrent_branches_are_told_alike_after_a_crash_anywhere_and_in_replay(objective: str) -> None:
    bench = Bench()
    whole = journal_of(bench)
    said = await run(whole, objective)
    assert "False" not in said
    assert "b" not in said.split()
    assert await replayed(objective, whole) == said
    effects = effects_of(whole)
    for kept in range(len(effects) + 1):
        later = journal_of(bench, effects[:kept])
        again = await run(later, objective)
        assert "False" not in again
        assert "b" not in again.split()
        assert await _replay(objective, [*effects[:kept], *effects_of(later)]) == again


async def _replay(objective: str, effects: Sequence[Effect]) -> str:
    return await run(journal_of(None, effects), objective)


WORDS = st.sampled_from(["a", "slow", "fails", "?x", "x:a/b", "x:fails/a", "a|?x", "slow|x:a/b", "fails|slow|?x", "?y"])


async def finished(bench: Bench, objective: str, recorded: Sequence[Effect]) -> tuple[str, list[Effect]]:
    """What is said in the end, over as many attempts as it takes, and all that is recorded by then."""
    journal = journal_of(bench, recorded)
    while True:
        try:
            said = await run(journal, objective)
        except EffectFailedError:
            journal.next_attempt()
        else:
            return said, [*recorded, *effects_of(journal)]


@settings(max_examples=60, deadline=None)
@given(st.lists(WORDS, min_size=1, max_size=5), st.lists(WORDS, max_size=4))
def test_whatever_is_done_and_wherever_it_crashes_replay_goes_the_same_way(new: list[str], old: list[str]) -> None:
    async def scenario() -> None:
        objective = " ".join(new)
        for first in (objective, " ".join(word for word in old if "?" not in word and ":" not in word) or "a"):
            _, effects = await finished(Bench(), first, ())
            for kept in range(len(effects) + 1):
                said, recorded = await finished(Bench(), objective, effects[:kept])
                assert await _replay(objective, recorded) == said
                told = {word for word in said.split() if word.startswith("x=")}
                assert len(told) < 2, "all who ask are told the same"
                marks = [effect.change for effect in recorded if isinstance(effect, ChangeMarked)]
                assert len(marks) == len(set(marks)), "a change is marked once"

    asyncio.run(scenario())


async def test_code_that_no_longer_asks_decides_marked_events_as_before() -> None:
    journal = journal_of(Bench())
    assert await run(journal, "x:new/old") == "new 1"
    assert await replayed("new", journal) == "new 1"


@pytest.mark.parametrize("name", ["", "a\nb"])
async def test_a_change_needs_a_name(name: str) -> None:
    class Nameless(Teller):
        async def handle(self, event: TaskSubmitted, ctx: Context[Any]) -> None:
            ctx.changed(name)

    with pytest.raises(ValueError, match="give it a name"):
        await run_step(
            Nameless(),
            Envelope(TaskSubmitted(task_id="t1", objective="x"), CAUSE),
            timestamp_ms=0,
            priority=Priority.NORMAL,
            state=None,
            journal=journal_of(Bench()),
        )
