"""The audit without Kafka: spooling, outputs with other keys, retention, erased fields, reports."""

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from agents.agent import Agent
from agents.context import Context
from agents.journal import Journal
from agents.step import run_step
from replay.audit import audit, verify
from replay.code_version import code_version
from replay.decide import Deciding, FindingKind, Station, Verdict, redecide
from replay.errors import ReportError
from replay.finished import Finished
from replay.log import ALL, Batch, Log, Progress
from replay.report import AuditReport
from replay.report_page import report_page
from replay.selection import Place, Selection, Span
from replay.spool import Spool, group_hash, read_part
from schemas.codec import Codec
from schemas.events import PlanProposed, Priority, StepCancelRequested, TaskSubmitted
from schemas.metadata import Envelope, Metadata
from schemas.record import Record
from schemas.topics import topic_name

CODEC = Codec()
NOW_MS = int(datetime.now(UTC).timestamp() * 1000)
DAY_MS = 86_400_000


class Memory(Log):
    """A log in memory; offsets are given by topic, in order."""

    def __init__(self, envelopes: Sequence[Envelope] = (), at_ms: int = NOW_MS, records: Sequence[Record] = ()) -> None:
        self.records = list(records)
        ends: dict[str, int] = {}
        for envelope in envelopes:
            topic = topic_name(envelope.event)
            offset = ends[topic] = ends.get(topic, -1) + 1
            value, headers = CODEC.encode(envelope.event, envelope.metadata)
            self.records.append(Record(topic, 0, offset, at_ms, envelope.metadata.subject.encode(), value, headers))

    def spans(self, topics: Any = ()) -> dict[Place, Span]:
        places = {(record.topic, record.partition) for record in self.records}
        return dict.fromkeys(places, (0, 1000))

    def read(
        self,
        selection: Selection = ALL,
        *,
        start: Mapping[Place, int] | None = None,
        on_progress: Progress | None = None,
    ) -> Iterator[Batch]:
        yield Batch([record for record in self.records if selection.takes(record)], {})

    def close(self) -> None:
        pass


class Broadcaster(Agent[Any]):
    """Plans its own task and, as told, another one's; and orders a step to stop."""

    name, version = "broadcaster", "1"
    consumes = (TaskSubmitted,)
    emits = (PlanProposed, StepCancelRequested)
    loud = ""

    async def handle(self, event: TaskSubmitted, ctx: Context[Any]) -> None:
        ctx.emit(PlanProposed(task_id=event.task_id, objective="own", steps=(), rationale=self.loud))
        if (other := event.parameters.get("other")) is not None:
            ctx.emit(PlanProposed(task_id=other, objective="other's", steps=(), rationale=self.loud))
        if (stop := event.parameters.get("stop")) is not None:
            ctx.emit(StepCancelRequested(target=stop, task_id=event.task_id, reason="enough"))


class Louder(Broadcaster):
    """The same agent, saying something else."""

    loud = "!"


STATION = Station(Broadcaster(), frozenset({"tasks.normal"}))


def submitted(task_id: str, **parameters: str) -> Envelope:
    metadata = Metadata(f"in-{task_id}", "/clients/test", task_id, datetime.now(UTC), correlation_id=task_id)
    return Envelope(TaskSubmitted(task_id=task_id, objective="why", parameters=parameters), metadata)


def history(*tasks: Envelope, at_ms: int = NOW_MS) -> Memory:
    """What the agent made of the tasks."""

    async def decide() -> list[Envelope]:
        made = list(tasks)
        for task in tasks:
            journal = Journal(agent="broadcaster", source="/agents/broadcaster@1", key="", cause=task.metadata)
            where: dict[str, Any] = {"timestamp_ms": at_ms, "priority": Priority.NORMAL, "state": None}
            made += (await run_step(Broadcaster(), task, journal=journal, **where)).outputs
        return made

    return Memory(asyncio.run(decide()), at_ms)


def finished(steps: int) -> dict[str, Finished]:
    return {"broadcaster": Finished({("tasks.normal", 0): (steps, ())})}


def audited(log: Log, steps: int, *, agent: Agent[Any] | None = None, **options: Any) -> AuditReport:
    station = STATION if agent is None else Station(agent, STATION.topics)
    return audit(log, stations=(station,), codec=CODEC, finished=finished(steps), **options)


def test_a_spool_gives_groups_in_order_of_their_hashes_whatever_its_parts(tmp_path: Path) -> None:
    names = [f"key-{number}".encode() for number in range(200)]
    seen = []
    for a_part in (1, 7, 1000):
        with Spool(600, folder=tmp_path, a_part=a_part) as spool:
            for number in range(3):
                for name in names:
                    spool.add(group_hash(name), (name, number, b"x" * 5000), 5000)
            seen.append([(group, items) for path in spool.parts() for group, items in read_part(path)])
            assert len(spool.parts()) > 1 or a_part == 1000
    assert seen[0] == seen[1] == seen[2]
    assert [group for group, _ in seen[0]] == sorted(map(group_hash, names))
    assert all([item[1] for item in items] == [0, 1, 2] for _, items in seen[0])
    assert list(tmp_path.iterdir()) == []


def test_outputs_with_other_keys_are_found_in_other_groups() -> None:
    log = history(submitted("a", other="b"), submitted("b"), submitted("c", stop="c/1"))
    report = audited(log, 3)
    assert report.findings == []
    assert report.digest == report.decided_digest
    assert (report.verdicts(), report.outputs) == ({"same": 3}, 5)


def test_an_output_with_another_key_that_is_gone_changed_or_forged_is_found() -> None:
    log = history(submitted("a", other="b"))
    others = next(record for record in log.records if record.key == b"b")
    rest = [record for record in log.records if record is not others]
    (gone,) = audited(Memory(records=rest), 1).findings
    assert (gone.kind, gone.event_id, gone.offset) == (FindingKind.OUTPUT_MISSING, "in-a", 0)
    changed = replace(others, value=(others.value or b"").replace(b"other's", b"other'z"))
    (differs,) = audited(Memory(records=[*rest, changed]), 1).findings
    assert (differs.kind, differs.field) == (FindingKind.OUTPUT_DIFFERS, "objective")
    assert differs.diff == "objective:\n- other'z\n+ other's"
    forged = CODEC.encode(
        PlanProposed(task_id="b", objective="x", steps=()),
        Metadata("forged", "/agents/broadcaster@1", "b", datetime.now(UTC), "nobody", "b"),
    )
    record = Record("tasks.lifecycle.normal", 0, 77, NOW_MS, b"b", *forged)
    (unexpected,) = audited(Memory(records=[*log.records, record]), 1).findings
    assert (unexpected.kind, unexpected.place) == (FindingKind.OUTPUT_UNEXPECTED, "tasks.lifecycle.normal[0]@77")
    louder = audited(log, 1, agent=Louder())
    assert [finding.field for finding in louder.findings] == ["rationale", "rationale"]
    assert louder.found == {"output differs": 2}


@pytest.mark.parametrize(("days", "found"), [(0, {"output missing": 1}), (30, {})])
def test_what_a_topic_no_longer_keeps_is_no_finding(days: int, found: dict[str, int]) -> None:
    log = history(submitted("c", stop="c/1"), at_ms=NOW_MS - days * DAY_MS)
    log.records = [record for record in log.records if record.topic != "control"]
    assert audited(log, 1).found == found


def test_agents_that_are_not_known_here_are_told_of() -> None:
    log = history(submitted("a"))
    other = Station(type("Other", (Broadcaster,), {"name": "other"})(), frozenset({"tasks.high"}))
    report = audit(log, stations=(other,), codec=CODEC)
    assert (report.steps, report.found, report.others) == (0, {}, {"broadcaster": 1})


def test_parts_are_decided_in_processes_side_by_side() -> None:
    log = history(*(submitted(f"task-{number}", other=f"task-{number + 1}") for number in range(60)))
    alone = audited(log, 60)
    assert alone.findings == []
    several = audited(log, 60, jobs=2)
    assert (several.digest, several.counts, several.found) == (alone.digest, alone.counts, {})


def test_erased_steps_are_told_apart_and_what_follows_them_in_their_lane() -> None:
    log = history(submitted("a"), submitted("b"))
    records: list[tuple[Record, Envelope]] = [(record, CODEC.decode(record)) for record in log.records]
    first = records[0][1]
    erased = [(records[0][0], replace(first, erased=True)), *records[1:]]
    again = replace(records[0][0], offset=9)
    followed = [*erased, (again, replace(first, metadata=replace(first.metadata, id="later")))]
    decided = asyncio.run(redecide(followed, stations=[STATION], codec=CODEC))
    assert [step.verdict for step in decided.steps] == [Verdict.ERASED, Verdict.SAME, Verdict.ERASED]
    assert decided.ok
    assert decided.steps[0].outputs[0].same


def test_a_report_survives_json_and_is_verified() -> None:
    log = history(submitted("a", other="b"), submitted("b"))
    report = AuditReport.from_bytes(audited(log, 2, source="here").to_bytes())
    assert verify(report, log, stations=(STATION,), codec=CODEC).ok
    other = verify(report, log, stations=(Station(Louder(), STATION.topics),), codec=CODEC)
    assert not other.ok
    assert any("outputs decided again" in line for line in other.disagrees)
    with pytest.raises(ReportError, match="no audit report"):
        AuditReport.from_bytes(b"{}")
    with pytest.raises(ReportError, match="format 9"):
        AuditReport.from_bytes(b'{"format": 9}')


def test_the_hashes_are_what_the_documentation_says_they_are() -> None:
    """docs/audit.md, followed by hand: from raw records alone, without the audit's code."""
    log = history(submitted("a", other="b"), submitted("b"))
    log.records[0] = replace(log.records[0], headers=[*log.records[0].headers, ("traceparent", b"00-not-hashed-01")])
    report = audited(log, 2)

    def prefixed(part: bytes | None) -> bytes:
        return b"-" if part is None else len(part).to_bytes(8, "big") + part

    def hash_of(record: Record) -> bytes:
        parts = [record.topic.encode(), record.key, record.value]
        for name, content in record.headers:
            parts += [] if name == "traceparent" else [name.encode(), content]
        return sha256(b"".join(map(prefixed, parts))).digest()

    def header(record: Record, name: str) -> str:
        return (dict(record.headers).get(name) or b"").decode()

    digest = sha256()
    for key in sorted((b"a", b"b"), key=lambda key: sha256(key).digest()):
        lines = []
        for step in log.records:
            if step.topic == "tasks.normal" and step.key == key:
                caused = [each for each in log.records if header(each, "ce_causationid") == header(step, "ce_id")]
                made = [each for each in caused if each.key == key]
                outputs = sorted(f" {header(each, 'ce_id')}={hash_of(each).hex()}" for each in made)
                lines.append(f"{step.topic} {step.partition} {step.offset:020} broadcaster" + "".join(outputs))
        digest.update(sha256(key).digest() + sha256("\n".join(sorted(lines)).encode()).digest())
    for span in report.spans:
        mine = [record for record in log.records if record.topic == span.topic]
        chained = sha256()
        for record in mine:
            chained.update(record.offset.to_bytes(8, "big") + record.timestamp_ms.to_bytes(8, "big") + hash_of(record))
        assert (span.records, span.sha256) == (len(mine), chained.hexdigest())
    assert report.digest == digest.hexdigest()


def test_a_report_tells_of_recorded_text_without_trusting_it() -> None:
    log = history(submitted("<script>alert(1)</script>"))
    html = report_page(audited(log, 1, agent=Louder(), source="<b>"))
    assert "<script" not in html
    assert "output differs" in html
    assert "tasks.normal[0]@0" in html


def test_the_code_version_names_what_decides() -> None:
    version = code_version([Broadcaster()])
    assert version.agents == {"broadcaster": "1"}
    assert len(version.sources) == 64
    assert version == code_version([Broadcaster()])


def test_what_is_not_decided_twice_needs_no_guard() -> None:
    assert Deciding([STATION], CODEC, twice=False).guard is None
