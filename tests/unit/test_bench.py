import io
import json
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import pytest
from rich.console import Console

from agents.context import Ports
from agents.journal import Journal
from agents.step import run_step
from bench.__main__ import main
from bench.figures import RATIO, Figure, Histogram, Report, percentile, ratio
from bench.hop import ANY_PARTITION, Hop, Shot, shots_of
from bench.kafka import Output, committed_counts
from bench.parts import PARTS, Scale
from bench.priority import _probe
from bench.samples import chunk, completion, completion_metadata, metadata_for, record_of, step_completed, submission
from bench.trial import Sample, steady_part
from bench.workers.effects_worker import CallingAgent, WaitingModel
from bench.workers.task import WorkerTask
from schemas.codec import Codec
from schemas.events import PlanRejected, Priority
from schemas.metadata import Envelope
from schemas.record import Record
from schemas.topics import key_of

ROOT = Path(__file__).resolve().parents[2]


def test_a_ratio_is_made_round_by_round() -> None:
    made = ratio("p", "ours / theirs", [10.0, 30.0, 20.0], [2.0, 3.0])
    assert made.samples == (5.0, 10.0)
    assert (made.median, made.unit) == (7.5, RATIO)


@pytest.mark.parametrize(("share", "expected"), [(0.0, 1.0), (0.5, 51.0), (0.99, 100.0), (1.0, 100.0)])
def test_percentiles_are_samples(share: float, expected: float) -> None:
    assert percentile([float(number) for number in range(100, 0, -1)], share) == expected


def test_a_report_shows_every_figure_and_failure() -> None:
    report = Report(machine={"cores": 2, "system": "Linux", "python": "3.11", "load_1_min": 0.1})
    report.figures = [Figure("sink", "raw", "rows/s", (12_345.0, 99_999.0, 1_000.0)), ratio("sink", "r", [1.0], [4.0])]
    report.failures["step"] = "RuntimeError: lost"
    console = Console(width=120, record=True, file=io.StringIO())
    report.print(console)
    text = console.export_text()
    assert "12,300" in text
    assert "1,000 – 100,000" in text
    assert "0.25" in text
    assert "step failed: RuntimeError: lost" in text
    document = json.loads(report.as_json())
    assert document["figures"][0] | {"note": ""} == {
        "part": "sink",
        "name": "raw",
        "unit": "rows/s",
        "median": 12_345.0,
        "low": 1_000.0,
        "high": 99_999.0,
        "samples": [12_345.0, 99_999.0, 1_000.0],
        "note": "",
    }
    assert document["failures"] == {"step": "RuntimeError: lost"}


def test_a_histogram_counts_every_value_below_its_bound() -> None:
    values = [0.9, 1.0, 1.1, 3.9, 4.0, 100.0]
    spread = Histogram.of(values)
    assert sum(spread.counts) == len(values)
    below = 0.0
    for bound, count in zip(spread.bounds, spread.counts, strict=True):
        assert count == sum(1 for value in values if below < value <= bound * 1.000001)
        below = bound * 1.000001
    assert spread.bounds[0] >= 0.9
    assert spread.bounds[-1] / 2**0.5 < 100.0 <= spread.bounds[-1]


def test_a_histogram_is_shown_and_told() -> None:
    spread = Histogram((1.0, 2.0, 4.0), (1, 0, 1000))
    assert spread.as_text() == "1 \u2581 \u2588 4"
    figure = Figure("p", "p50", "ms", (1.0,), "of all", spread)
    assert figure.as_json()["histogram"] == {"bounds": (1.0, 2.0, 4.0), "counts": (1, 0, 1000)}
    assert "histogram" not in Figure("p", "p50", "ms", (1.0,)).as_json()
    report = Report([figure], machine={"cores": 2, "system": "Linux", "python": "3.11", "load_1_min": 0.1})
    console = Console(width=120, record=True, file=io.StringIO())
    report.print(console)
    assert f"of all {spread.as_text()}" in console.export_text()


def test_shots_are_ready_to_send() -> None:
    first, second = shots_of([submission(1), submission(2)], 3)
    assert (first.key, first.partition, second.key) == (b"bench-00000001", 3, b"bench-00000002")
    record = Record("tasks.normal", 3, 0, 0, first.key, first.value, first.headers)
    assert Codec().decode(record).event == submission(1)
    assert shots_of([submission(1)])[0].partition == ANY_PARTITION


class _AnsweringHop(Hop):
    """Answers at once, in as many seconds as it has answered."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []

    def send(self, shot: Shot, source: str = "") -> None:
        self.sent.append(shot.key)

    def wait(self, keys: Iterable[bytes], *, timeout_s: float = 1.0) -> list[float]:
        assert list(keys) == self.sent[-1:]
        return [float(len(self.sent))]


def test_probes_that_may_have_outlived_the_backlog_do_not_count() -> None:
    shots = shots_of(submission(number) for number in range(9))
    hop, left = _AnsweringHop(), iter([True, True, True, False])
    assert _probe(hop, shots, lambda: next(left)) == [2000.0, 3000.0]  # the first warms up, the fourth is too late
    assert len(hop.sent) == 4
    with pytest.raises(RuntimeError, match="worked off before a probe"):
        _probe(_AnsweringHop(), shots, lambda: False)


async def test_the_calling_agent_waits_as_long_as_its_task_says() -> None:
    model, agent = WaitingModel(), CallingAgent()
    for seconds, calls in (("0", 0), ("0.01", 1)):
        event = submission(1).model_copy(update={"parameters": {"wait_s": seconds}})
        cause = metadata_for(event)
        journal = Journal(
            agent=agent.name, source=agent.source, key=cause.subject, cause=cause, ports=Ports(llm=model), timeout_s=5.0
        )
        result = await run_step(
            agent, Envelope(event, cause), timestamp_ms=0, priority=Priority.HIGH, state=None, journal=journal
        )
        assert len(journal.performed) == calls
        (made,) = result.outputs
        assert made.event == PlanRejected(task_id=event.task_id, objective=event.objective, reason=event.objective)
    assert (model.calls, model.peak_calls) == (0, 1)


def test_a_worker_is_told_its_options() -> None:
    task = WorkerTask("127.0.0.1:1", "g", "s", "t", 4, "/tmp", {"topics": ["a", "b"], "wait_s": 0.5})
    assert WorkerTask(**json.loads(task.as_json())) == task


def test_a_quick_run_measures_less_of_everything() -> None:
    full, quick = asdict(Scale()), asdict(Scale.quick())
    assert quick.pop("is_quick")
    assert not full.pop("is_quick")
    assert all(quick[name] < full[name] for name in full)


def output(partition: int, offset: int) -> Output:
    return Output(partition, offset, b"", Record("t", partition, offset, 0, None, None))


def test_committed_counts_leave_control_records_out() -> None:
    outputs = [output(0, 0), output(0, 1), output(0, 3), output(1, 5)]  # offsets 2 and 4 of partition 0 are markers
    assert committed_counts(outputs, [[0, 5], [3, 5], [5, 5], [5, 6]]) == [0, 2, 3, 4]


def test_the_steady_part_leaves_out_warm_up_and_the_last_commit() -> None:
    samples = [Sample(float(second), [second * 100], second * 0.5) for second in range(11)]
    samples.append(Sample(50.0, [1001], 6.0))  # one last event, long after the others
    outputs = [output(0, offset) for offset in range(1001)]
    trial = steady_part("w", samples, outputs, wanted=1000)
    assert trial.rate == pytest.approx(100.0)
    assert trial.cpu_s_per_1k == pytest.approx(5.0)
    assert trial.events == 900


def test_too_few_commits_are_no_measurement() -> None:
    samples = [Sample(0.0, [0], 0.0), Sample(1.0, [1000], 1.0)]
    with pytest.raises(RuntimeError, match="committed 1 times only"):
        steady_part("w", samples, [output(0, offset) for offset in range(1000)], wanted=1000)


def test_samples_are_the_same_each_time_and_survive_the_log() -> None:
    codec = Codec()
    for event in (submission(7), step_completed(7), chunk(7)):
        record = record_of(codec, event, 3)
        assert record.key == key_of(event).encode()
        assert codec.decode(record).event == event
        assert {name for name, _ in record.headers} >= {"ce_id", "ce_causationid", "ce_correlationid", "traceparent"}
    assert (submission(7), step_completed(7), chunk(7)) == (submission(7), step_completed(7), chunk(7))
    assert submission(7) != submission(8)
    assert sum(value * value for value in chunk(7).vector) == pytest.approx(1.0, abs=1e-5)


def test_the_step_answers_its_event_and_names_its_cause() -> None:
    event = submission(1)
    cause = metadata_for(event)
    made = completion_metadata(cause, cause.time, "/agents/bench@1")
    assert completion(event).answer == event.objective.upper()
    assert (made.causation_id, made.correlation_id, made.subject) == (cause.id, event.task_id, event.task_id)
    assert made.id == completion_metadata(cause, cause.time, "/agents/bench@1").id != cause.id


def test_an_unknown_part_is_refused_with_the_names_of_all(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        main(["--only", "codec,speed"])
    assert refused.value.code == 2
    told = capsys.readouterr().err
    assert "no part is called speed" in told
    assert all(part.name in told for part in PARTS)


def test_a_quick_run_of_the_codec_writes_its_figures(tmp_path: Path) -> None:
    written = tmp_path / "figures.json"
    command = [sys.executable, "-m", "bench", "--quick", "--only", "codec", "--json", str(written)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    document = json.loads(written.read_bytes())
    names = {figure["name"] for figure in document["figures"]}
    for event in ("TaskSubmitted", "StepCompleted", "ChunkEmbedded"):
        assert {f"{event} encode / (fastavro + pydantic)", f"{event} decode / (fastavro + pydantic)"} <= names
    assert all(figure["low"] > 0 for figure in document["figures"])
    assert document["failures"] == {}
    assert document["machine"]["cores"] >= 1
    assert "TaskSubmitted encode" in done.stdout
