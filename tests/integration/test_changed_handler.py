"""An event that older code began is taken up by changed code, through a real Kafka: it goes on in the old way."""

from typing import Any

import pytest

from agents.agent import Agent
from agents.context import Ports
from replay.decide import Station, redecide
from replay.findings import Verdict
from schemas.events import ChangeMarked, LlmCalled
from schemas.record import Record
from streams.binding import Binding
from tests.replay.racing import Racer, SecondRacer
from tests.replay.record import Paced
from tests.support.processors import CODEC, Bench, bench_on, read_committed


def named(kind: type[Agent[Any]], name: str) -> Agent[Any]:
    made: Agent[Any] = type(kind.__name__, (kind,), {"name": name, "predecessors": {}})()
    return made


class Asked(Paced):
    """Remembers what it was asked."""

    def __init__(self, *, stuck: bool = False) -> None:
        super().__init__(stuck=stuck)
        self.questions: list[str] = []

    async def complete(self, request: Any, *, idempotency_key: str) -> Any:
        self.questions.append(request.messages[-1].content)
        return await super().complete(request, idempotency_key=idempotency_key)


@pytest.fixture
def bench(kafka: Any) -> Bench:
    return bench_on(kafka, named(SecondRacer, kafka.unique("racer")))


def calls(bench: Bench) -> list[LlmCalled]:
    return [envelope.event for _, envelope in bench.committed("effects") if isinstance(envelope.event, LlmCalled)]


async def test_what_older_code_began_goes_on_in_the_old_way_and_what_is_new_takes_the_change(bench: Bench) -> None:
    bench.send("t", "race", ask="stuck,slow")
    async with bench.running(ports=Ports(llm=Asked(stuck=True)), drain_timeout_s=0.1):
        await bench.until(lambda: len(calls(bench)) == 2)  # the race is over and recorded, the question why is not
    assert bench.results() == {}

    changed = named(Racer, bench.agent.name)
    model = Asked()
    bench.send("t", "race", ask="quick,slow")
    async with bench.running(binding=Binding(changed, (bench.topic,)), ports=Ports(llm=model)):
        await bench.until(lambda: len(bench.results().get("t", ())) == 2)
    old, new = bench.results()["t"]
    assert old == "1: <stuck> <why <stuck>>"
    assert new == "2: <please, quick> <please, why <please, quick>>"
    assert "stuck" not in model.questions, "what was paid for is not asked again"
    marks = [envelope.event for _, envelope in bench.committed("effects") if isinstance(envelope.event, ChangeMarked)]
    assert [(mark.taken, mark.attempt) for mark in marks] == [(False, 2), (True, 1)]

    records: list[Record] = []
    for topic in (bench.topic, "effects", "work.results.normal"):
        records += read_committed(bench.kafka.config, topic)
    history = [(record, CODEC.decode(record)) for record in records if record.key == b"t"]
    mine = [item for item in history if item[0].topic == bench.topic or item[1].metadata.source == bench.agent.source]
    decided = await redecide(mine, stations=[Station(changed, frozenset({bench.topic}))], codec=CODEC)
    assert decided.findings == ()
    assert [step.verdict for step in decided.steps] == [Verdict.SAME, Verdict.SAME]
