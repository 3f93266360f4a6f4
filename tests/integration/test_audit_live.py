"""The audit of what a real processor wrote to a real Kafka: no divergence, and every way to tamper with it is found."""

import asyncio
import contextlib
import datetime as datetime_module
import random
import socket
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from agents.context import Context, LlmRequest, LlmResponse, Ports
from agents.errors import EffectFailedError
from magnatronic.finished import finished_offsets
from replay.audit import audit, verify
from replay.decide import FindingKind, Station
from replay.errors import LogReadError
from replay.findings import Finding
from replay.finished import Finished
from replay.kafka_log import KafkaLog
from replay.log import ALL, Batch, Log, Progress
from replay.report import AuditReport
from replay.report_page import report_page
from replay.selection import Place, Selection, Span
from schemas.events import StepAssigned, StepCompleted, TimerFired
from schemas.metadata import Envelope, Metadata
from schemas.record import Record
from tests.support.asking import Asker
from tests.support.processors import CODEC, Bench, bench_on
from tests.support.steps import Total, completed

TASKS = 300
EVENTS = 4 * TASKS + 2
TIMERS = TASKS // 10


class Model:
    """Answers in capitals; ``boom`` fails for good, ``flaky`` once in a while."""

    name = "capitals"

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()

    async def complete(self, request: LlmRequest, *, idempotency_key: str) -> LlmResponse:
        text = request.messages[-1].content
        self.calls[idempotency_key] += 1
        await asyncio.sleep(0.001 * random.random())
        if text == "boom":
            raise EffectFailedError("Overloaded", "it is too much", retryable=False)
        if text == "flaky" and self.calls[idempotency_key] == 1:
            raise EffectFailedError("RateLimited", "slow down", retryable=True)
        return LlmResponse(text=text.upper(), provider=self.name, model="m", prompt_tokens=3, completion_tokens=1)


class Copy(Log):
    """What a log held, in memory, to be tampered with."""

    def __init__(self, records: Sequence[Record], spans: Mapping[Place, Span]) -> None:
        self.records = list(records)
        self._spans = dict(spans)

    def spans(self, topics: Any = ()) -> dict[Place, Span]:
        return dict(self._spans)

    def read(
        self,
        selection: Selection = ALL,
        *,
        start: Mapping[Place, int] | None = None,
        on_progress: Progress | None = None,
    ) -> Iterator[Batch]:
        for first in range(0, len(self.records), 100):
            yield Batch([each for each in self.records[first : first + 100] if selection.takes(each)], {})

    def close(self) -> None:
        pass

    def with_one_more(self, record: Record) -> "tuple[Copy, Record]":
        """A copy with ``record`` at the end of its partition; and that record."""
        place = record.topic, record.partition
        start, end = self._spans[place]
        record = replace(record, offset=end)
        return Copy([*self.records, record], {**self._spans, place: (start, end + 1)}), record

    def changed(
        self, change: Callable[[Record], Record | None], which: Callable[[Record], bool]
    ) -> "tuple[Copy, Record]":
        """A copy whose first record of a kind is another one, or gone; and that record."""
        at = next(index for index, record in enumerate(self.records) if which(record))
        after = change(self.records[at])
        rest = self.records[at + 1 :]
        return Copy([*self.records[:at], *([] if after is None else [after]), *rest], self._spans), self.records[at]


@dataclass
class Recorded:
    """A history and all that an audit of it needs."""

    bench: Bench
    copy: Copy
    finished: dict[str, Finished]

    def audit(self, log: Log | None = None, agent: Any = None, **options: Any) -> AuditReport:
        station = Station(agent or self.bench.agent, frozenset({self.bench.topic}))
        spans = log.spans() if isinstance(log, Copy) else self.copy.spans()
        log = log or self.copy
        return audit(log, stations=(station,), codec=CODEC, finished=self.finished, spans=spans, **options)

    def of_type(self, name: str, *, by: bool = True) -> Callable[[Record], bool]:
        """Records of this event type that the agent wrote (or, without ``by``, somebody)."""
        source = self.bench.agent.source.encode()
        kind = f".{name}".encode()

        def which(record: Record) -> bool:
            headers = dict(record.headers)
            return (headers.get("ce_type") or b"").endswith(kind) and (not by or headers.get("ce_source") == source)

        return which


async def _record(bench: Bench) -> None:
    def send(number: int, objective: str, **parameters: str) -> None:
        bench.send(f"{bench.topic}/{number % TASKS}", objective, 1, **parameters)

    for number in range(TASKS):
        send(number, "plain")
    for number in range(TASKS):
        send(number, "one after another", ask=f"why {number}")
    for number in range(TASKS):
        send(number, "together", ask=f"a{number},b{number},flaky" if number % 5 == 0 else f"a{number},b{number}")
    for number in range(TASKS):
        if number % 10 == 0:
            send(number, "plain", timer="remind", after="0.3")
        else:
            send(number, "plain", ask="boom" if number % 10 == 1 else "", lane="step")
    bench.send_raw(b"garbage", b"\x07no event")
    bench.send_raw(
        f"{bench.topic}/3".encode(), b"\x00\x00\x00\x00\x01", [("ce_type", b"magnatronic.work.StepAssigned")]
    )
    async with bench.running(ports=Ports(llm=Model())) as processor:
        await bench.until(lambda: processor.stats.timers >= TIMERS and processor.stats.events_in >= EVENTS + TIMERS)
    assert processor.stats.dead_letters == TASKS // 10 + 2


def _spans(log: Log, topics: Sequence[str]) -> dict[Place, Span]:
    """A topic that was just created has its leaders a moment later."""
    for _ in range(100):
        with contextlib.suppress(LogReadError):
            return log.spans(topics)
        time.sleep(0.1)
    return log.spans(topics)


@pytest.fixture(scope="module")
def recorded(kafka: Any) -> Recorded:
    bench = bench_on(kafka, Asker(kafka.unique("audited")))
    topics = [bench.topic, "work.results.normal", "tasks.lifecycle.normal", "effects", "dead-letters"]
    with KafkaLog(kafka.config) as log:
        before = _spans(log, topics)
        asyncio.run(_record(bench))
        finished = finished_offsets(kafka.config, [bench.agent.name])
        spans = {place: (before[place][1], end) for place, (_, end) in log.spans(topics).items()}
        records = [record for batch in log.read(Selection(spans=spans)) for record in batch.records]
    return Recorded(bench, Copy(records, spans), finished)


def only(report: AuditReport, kind: FindingKind) -> Finding:
    """The report's one finding, of this kind."""
    assert [finding.kind for finding in report.findings] == [kind], [str(finding) for finding in report.findings]
    return report.findings[0]


def test_an_audit_of_what_a_processor_did_finds_no_divergence(recorded: Recorded) -> None:
    with KafkaLog(recorded.bench.kafka.config) as log:
        report = recorded.audit(log)
    assert report.findings == []
    assert report.ok
    # The bytes that no codec reads were dead-lettered.
    assert report.verdicts() == {"same": EVENTS + TIMERS - 2, "unreadable": 2}
    assert report.outputs == EVENTS + TIMERS - 2
    assert report.digest == report.decided_digest
    assert report.events == len(recorded.copy.records)
    again = AuditReport.from_bytes(report.to_bytes())
    assert again.as_json() == report.as_json()
    assert "no divergence" in report_page(again)


def test_the_digest_depends_neither_on_the_order_of_reading_nor_on_how_much_lies_in_a_part(
    recorded: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = recorded.audit()
    shuffled = sorted(recorded.copy.records, key=lambda record: (record.topic, record.partition, record.offset))
    monkeypatch.setattr("replay.spool.Spool.__init__.__kwdefaults__", {"folder": None, "a_part": 50})
    again = recorded.audit(Copy(shuffled, recorded.copy.spans()))
    assert (again.digest, again.decided_digest, again.spans) == (report.digest, report.decided_digest, report.spans)


def test_another_person_verifies_the_report(recorded: Recorded) -> None:
    report = AuditReport.from_bytes(recorded.audit().to_bytes())
    station = Station(recorded.bench.agent, frozenset({recorded.bench.topic}))
    with KafkaLog(recorded.bench.kafka.config) as log:
        agreement = verify(report, log, stations=(station,), codec=CODEC)
    assert agreement.ok, agreement.disagrees
    # What decides nothing, and what nothing contradicts: when an effect was written.
    doctored, _ = recorded.copy.changed(
        lambda record: replace(record, timestamp_ms=record.timestamp_ms + 1), changed_effect
    )
    agreement = verify(report, doctored, stations=(station,), codec=CODEC)
    assert len(agreement.disagrees) == 1
    assert agreement.disagrees[0].startswith("effects[")
    gone, _ = recorded.copy.changed(lambda _: None, recorded.of_type("StepCompleted"))
    told = verify(report, gone, stations=(station,), codec=CODEC).disagrees
    assert any("work.results.normal[" in line for line in told)
    assert any("the digest of recorded outputs" in line for line in told)
    assert any("output missing" in line for line in told)


def changed_effect(record: Record) -> bool:
    return b'"text":"WHY 7"' in (record.value or b"")


def test_one_byte_of_one_effect_is_found_and_named(recorded: Recorded) -> None:
    doctored, effect = recorded.copy.changed(
        lambda record: replace(record, value=(record.value or b"").replace(b'"text":"WHY 7"', b'"text":"WHY 8"')),
        changed_effect,
    )
    finding = only(recorded.audit(doctored), FindingKind.OUTPUT_DIFFERS)
    event_id = CODEC.decode(effect).event.event_id  # type: ignore[attr-defined]
    caused = next(each for each in recorded.copy.records if dict(each.headers).get("ce_id") == event_id.encode())
    assert (finding.agent, finding.event_id) == (recorded.bench.agent.name, event_id)
    assert (finding.topic, finding.partition, finding.offset) == (caused.topic, caused.partition, caused.offset)
    assert finding.field == "answer"
    assert finding.diff == "answer:\n- 1 WHY 7\n+ 1 WHY 8"


def test_one_effect_record_that_is_gone_is_found_and_named(recorded: Recorded) -> None:
    doctored, effect = recorded.copy.changed(lambda _: None, changed_effect)
    finding = only(recorded.audit(doctored), FindingKind.EFFECT_MISSING)
    assert finding.event_id == CODEC.decode(effect).event.event_id  # type: ignore[attr-defined]
    assert finding.field == "request"
    assert "why 7" in finding.message


@pytest.mark.parametrize(
    ("name", "kind"),
    [("StepCompleted", FindingKind.OUTPUT_MISSING), ("StepFailed", FindingKind.OUTPUT_MISSING)],
)
def test_an_output_that_is_gone_is_found(recorded: Recorded, name: str, kind: FindingKind) -> None:
    doctored, _ = recorded.copy.changed(lambda _: None, recorded.of_type(name))
    assert only(recorded.audit(doctored), kind).agent == recorded.bench.agent.name


def test_a_dead_letter_that_is_gone_is_found(recorded: Recorded) -> None:
    doctored, _ = recorded.copy.changed(lambda _: None, recorded.of_type("DeadLettered"))
    only(recorded.audit(doctored), FindingKind.LETTER_MISSING)


def test_a_timer_that_nobody_set_is_found(recorded: Recorded) -> None:
    def forged(record: Record) -> Record:
        envelope = CODEC.decode(record)
        assert isinstance(envelope.event, TimerFired)
        value, headers = CODEC.encode(envelope.event, replace(envelope.metadata, id=str(uuid.uuid4())))
        return replace(record, value=value, headers=headers)

    doctored, timer = recorded.copy.changed(forged, recorded.of_type("TimerFired"))
    findings = {finding.kind: finding for finding in recorded.audit(doctored).findings}
    assert findings.keys() == {FindingKind.TIMER, FindingKind.OUTPUT_MISSING, FindingKind.OUTPUT_UNEXPECTED}
    assert findings[FindingKind.TIMER].offset == timer.offset


def test_an_output_that_no_step_made_is_found(recorded: Recorded) -> None:
    agent = recorded.bench.agent
    event = StepCompleted(task_id="forged", step_id="f/1", attempt=1, capability="research", objective="", answer="42")
    metadata = Metadata("forged", agent.source, "forged", datetime_module.datetime.now(datetime_module.UTC), "no such")
    value, headers = CODEC.encode(event, metadata)
    log, record = recorded.copy.with_one_more(Record("work.results.normal", 0, 0, 10**12, b"forged", value, headers))
    finding = only(recorded.audit(log), FindingKind.OUTPUT_UNEXPECTED)
    assert (finding.agent, finding.place) == (agent.name, f"work.results.normal[0]@{record.offset}")


def test_a_record_that_does_not_decode_any_more_is_found(recorded: Recorded) -> None:
    doctored, output = recorded.copy.changed(
        lambda record: replace(record, value=b"\x01" + (record.value or b"")[1:]), recorded.of_type("StepCompleted")
    )
    finding = only(recorded.audit(doctored), FindingKind.OUTPUT_DIFFERS)
    assert finding.field == "value"
    assert f"{output.topic}[{output.partition}]@{output.offset}" in finding.message
    broken, effect = recorded.copy.changed(lambda record: replace(record, value=b"\x01"), changed_effect)
    kinds = {finding.kind: finding for finding in recorded.audit(broken).findings}
    assert kinds.keys() == {FindingKind.UNREADABLE, FindingKind.EFFECT_MISSING}
    unreadable = kinds[FindingKind.UNREADABLE]
    assert (unreadable.agent, unreadable.place) == (
        recorded.bench.agent.name,
        f"effects[{effect.partition}]@{effect.offset}",
    )


class Tempted(Asker):
    """The same agent, but for what it does to a plain event's answer."""

    def __init__(self, name: str, look: Callable[[], Any]) -> None:
        super().__init__(name)
        self.look = look

    async def handle(self, event: Any, ctx: Context[Total]) -> None:
        await super().handle(event, ctx)
        if isinstance(event, StepAssigned) and event.task_id.endswith("/7") and event.objective == "plain":
            ctx.outputs.emitted[-1] = completed(event, str(self.look()))


@pytest.mark.parametrize(
    ("look", "kind"),
    [
        (lambda: time.time(), FindingKind.CLOCK),
        (lambda: datetime_module.datetime.now(), FindingKind.CLOCK),
        (lambda: uuid.uuid4(), FindingKind.RANDOMNESS),
        (lambda: random.random(), FindingKind.RANDOMNESS),
        (lambda: socket.create_connection(("127.0.0.1", 9)), FindingKind.NETWORK),
        (lambda: Path("/etc/hostname").read_text(), FindingKind.FILE),
    ],
)
def test_a_handler_that_reaches_past_its_context_is_found_and_named(
    recorded: Recorded, look: Callable[[], Any], kind: FindingKind
) -> None:
    report = recorded.audit(agent=Tempted(recorded.bench.agent.name, look))
    findings = [finding for finding in report.findings if finding.kind is kind]
    assert {finding.agent for finding in findings} == {recorded.bench.agent.name}
    assert {finding.event_type for finding in findings} == {"StepAssigned"}
    assert all("test_audit_live" in finding.message for finding in findings)
    if kind in (FindingKind.CLOCK, FindingKind.RANDOMNESS):
        assert {finding.field for finding in findings} == {"answer"}
        assert report.found["output differs"] == len(findings)
    places = {(finding.topic, finding.partition, finding.offset) for finding in findings}
    inputs = [each for each in recorded.copy.records if (each.topic, each.partition, each.offset) in places]
    assert {record.key for record in inputs} == {f"{recorded.bench.topic}/7".encode()}


def test_a_stretch_is_audited_with_what_was_before_it(recorded: Recorded) -> None:
    tasks = frozenset({f"{recorded.bench.topic}/7", f"{recorded.bench.topic}/20"})
    report = recorded.audit(selection=Selection(tasks=tasks))
    assert report.findings == []
    assert report.steps == 9  # four events each, and a timer
    place, (start, end) = max(recorded.copy.spans().items(), key=lambda item: item[0][0] == recorded.bench.topic)
    later = Selection(spans={place: (start + (end - start) // 2, end)})
    part = recorded.audit(selection=later)
    assert part.findings == []
    assert 0 < part.steps < recorded.audit(selection=Selection(spans={place: (start, end)})).steps
    assert recorded.audit(selection=Selection(agents=frozenset({"another"}))).steps == 0
    assert recorded.audit(selection=Selection(event_types=frozenset({"TimerFired"}))).verdicts() == {"same": TIMERS}


def test_what_is_not_finished_is_open(recorded: Recorded) -> None:
    nothing = {recorded.bench.agent.name: Finished({})}
    envelope = Envelope(
        StepAssigned(task_id="new", step_id="new/1", capability="research", objective="plain"),
        Metadata("new", "/clients/test", "new", datetime_module.datetime.now(datetime_module.UTC)),
    )
    value, headers = CODEC.encode(envelope.event, envelope.metadata)
    log, _ = recorded.copy.with_one_more(Record(recorded.bench.topic, 0, 0, 10**12, b"new", value, headers))
    assert recorded.audit(log).verdicts()["open"] == 1
    station = Station(recorded.bench.agent, frozenset({recorded.bench.topic}))
    report = audit(log, stations=(station,), codec=CODEC, finished=nothing, spans=log.spans())
    assert report.findings == []
    assert report.verdicts() == {"same": EVENTS + TIMERS - 2, "open": 1, "unreadable": 2}
