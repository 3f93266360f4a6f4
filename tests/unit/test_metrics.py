"""Metrics as Prometheus reads them, and the endpoint that serves them and says whether the process is ready."""

import asyncio
import json
import re
import socket
import threading
import time
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from magnatronic import observing
from magnatronic.errors import PartFailedError
from magnatronic.observing import KafkaProbe, Observer
from streams.histogram import COMMIT_BOUNDS, Histogram
from streams.metrics import MetricName
from streams.readiness import Cause, Kind, Progress
from streams.stats import Stats

PROCESSOR = {"agent": "researcher", "instance": "host-up-0"}


class Samples:
    """A scrape, parsed."""

    def __init__(self, text: str) -> None:
        self.families = {family.name: family for family in text_string_to_metric_families(text)}

    def __call__(self, name: str, **labels: str) -> float:
        family = next(each for prefix, each in self.families.items() if name.startswith(prefix) and _has(each, name))
        found = [each.value for each in family.samples if each.name == name and labels.items() <= each.labels.items()]
        assert len(found) == 1, (name, labels, found)
        return found[0]


def _has(family: Any, name: str) -> bool:
    return any(sample.name == name for sample in family.samples)


class Loop:
    """Requests to an observer from another thread, as they come."""

    def __init__(self, observer: Observer) -> None:
        assert observer.url is not None
        self._url = observer.url

    async def get(self, path: str, method: str = "GET") -> httpx.Response:
        return await asyncio.to_thread(httpx.request, method, self._url + path, timeout=10)

    async def scrape(self) -> Samples:
        answer = await self.get("/metrics")
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/plain")
        return Samples(answer.text)


@pytest.fixture
async def observer() -> AsyncIterator[Observer]:
    made = Observer(host="127.0.0.1", port=0, instance="host-up-0")
    await made.start()
    yield made
    await made.stop()


def busy_runner(*causes: Cause) -> Any:
    """What an observer reads of a runner with one processor that has done something."""
    stats = Stats(
        events_in=100,
        events_out=90,
        skipped=3,
        failures=7,
        dead_letters=2,
        transactions=50,
        aborted=4,
        tokens=1234,
        cost_usd=0.25,
        in_flight=11,
        lag=42,
        parked=5,
        retries=6,
        journalled=8,
        cancelled=1,
        timers=9,
        restore_s=1.5,
        assigned=4,
        revoked=2,
        lost=1,
    )
    stats.handler_latencies.append(2.0)
    stats.waits[2].extend([0.1, 0.2])
    stats.latencies.extend([0.0005, 0.004, 0.004, 400.0])
    stats.commit_latencies.extend([0.003, 0.004])
    stats.interval(agent="researcher", instance="host-up-0", interval_s=1.0)
    progress = (Progress("tasks.normal", 0, 17, 2, 3.5), Progress("tasks.normal", 1, -1, 0, 0.0))
    return SimpleNamespace(
        processors={"researcher": SimpleNamespace(stats=stats, workers={1, 2, 3})},
        readiness={"researcher": SimpleNamespace(progress=progress, causes=causes)},
    )


def working_sink(**changes: Any) -> Any:
    return SimpleNamespace(
        **{"records_written": 77, "backlog": 3, "partitions": 4, "error": None, "trouble": None, "group": "sink-x"}
        | changes
    )


def test_names_follow_the_conventions_and_none_is_given_twice() -> None:
    names = [metric.value.name for metric in MetricName]
    assert len(set(names)) == len(names)
    for metric in MetricName:
        definition = metric.value
        assert re.fullmatch(r"magnatronic_[a-z]+(_[a-z]+)*", definition.name)
        assert not definition.name.endswith(("_total", "_ms", "_count", "_sum", "_bucket"))
        assert definition.help
        assert definition.type != "histogram" or definition.name.endswith("_seconds")


async def test_a_scrape_has_every_metric_with_its_labels(observer: Observer) -> None:
    observer.watch_agents(busy_runner())
    sink = observer.watch_sink("sink-clickhouse")
    sink.runner = working_sink()
    sink.on_batch(10, 0.02)
    observer.started()
    scrape = await Loop(observer).scrape()
    for metric in MetricName:
        family = scrape.families[metric.value.name]
        assert family.type == metric.value.type
        for sample in family.samples:
            assert set(sample.labels) - {"le"} == set(metric.value.labels), sample
    assert {"process_cpu_seconds", "python_gc_collections", "python_info"} <= set(scrape.families)


async def test_a_scrape_says_what_the_counters_say(observer: Observer) -> None:
    observer.watch_agents(busy_runner())
    sink = observer.watch_sink("sink-clickhouse")
    sink.runner = working_sink()
    observer.started()
    scrape = await Loop(observer).scrape()
    for name, value in {
        "events_total": 100,
        "outputs_total": 90,
        "skipped_total": 3,
        "failures_total": 7,
        "dead_letters_total": 2,
        "retries_total": 6,
        "cancelled_total": 1,
        "timers_total": 9,
        "journalled_total": 8,
        "tokens_total": 1234,
        "cost_dollars_total": 0.25,
        "in_flight": 11,
        "lag": 42,
        "parked": 5,
        "handlers": 3,
        "partitions": 2,
        "ready": 1,
        "restore_seconds": 1.5,
    }.items():
        assert scrape(f"magnatronic_processor_{name}", **PROCESSOR) == value, name
    assert scrape("magnatronic_processor_transactions_total", outcome="committed") == 50
    assert scrape("magnatronic_processor_transactions_total", outcome="aborted") == 4
    for change, count in {"assigned": 4, "revoked": 2, "lost": 1}.items():
        assert scrape("magnatronic_processor_partition_changes_total", change=change) == count
    assert scrape("magnatronic_processor_handler_seconds_sum", **PROCESSOR) == 2.0
    counts = [
        scrape("magnatronic_processor_wait_seconds_count", priority=priority) for priority in ("high", "normal", "low")
    ]
    assert counts == [0, 0, 2]
    place = {"topic": "tasks.normal", "partition": "0"}
    assert scrape("magnatronic_partition_unfinished_offset", **place) == 17
    assert scrape("magnatronic_partition_in_flight", **place) == 2
    assert scrape("magnatronic_partition_stalled_seconds", **place) == 3.5
    assert scrape("magnatronic_sink_records_total", sink="clickhouse", instance="host-up-0") == 77
    assert scrape("magnatronic_sink_lag", sink="clickhouse") == 3
    assert scrape("magnatronic_ready") == 1


async def test_histograms_are_cumulative_and_add_up(observer: Observer) -> None:
    runner = busy_runner()
    observer.watch_agents(runner)
    client = Loop(observer)
    name = "magnatronic_processor_latency_seconds"
    scrape = await client.scrape()
    at = [scrape(f"{name}_bucket", le=bound) for bound in ("0.001", "0.0025", "0.005", "300.0", "+Inf")]
    assert at == [1, 1, 3, 3, 4]
    assert scrape(f"{name}_count") == 4
    assert scrape(f"{name}_sum") == pytest.approx(400.0085)
    # The next interval adds to it, though the samples themselves are forgotten each second.
    stats = runner.processors["researcher"].stats
    assert not stats.latencies
    assert not stats.commit_latencies
    stats.latencies.append(0.001)
    stats.interval(agent="researcher", instance="host-up-0", interval_s=1.0)
    scrape = await client.scrape()
    assert scrape(f"{name}_bucket", le="0.001") == 2
    assert scrape(f"{name}_count") == 5
    assert scrape("magnatronic_processor_commit_seconds_bucket", le="0.003") == 1


def test_a_histogram_without_samples_is_all_zeroes() -> None:
    histogram = Histogram(COMMIT_BOUNDS)
    histogram.add(())
    buckets, total = histogram.cumulative()
    assert [count for _, count in buckets] == [0.0] * (len(COMMIT_BOUNDS) + 1)
    assert total == 0.0
    assert buckets[-1][0] == "+Inf"


async def test_ready_begins_when_all_has_started_and_names_what_keeps_it(observer: Observer) -> None:
    client = Loop(observer)
    answer = await client.get("/ready")
    assert answer.status_code == 503
    assert answer.json()["causes"][0]["kind"] == "starting"
    observer.started()
    answer = await client.get("/ready")
    assert (answer.status_code, answer.json()) == (200, {"ready": True, "causes": []})
    cause = Cause(
        Kind.STALLED, "magnatronic.researcher-host-0", "it hangs", 95.04, "tasks.normal", 3, 1234, "StepAssigned", "s-1"
    )
    observer.watch_agents(busy_runner(cause))
    answer = await client.get("/ready")
    assert answer.status_code == 503
    assert answer.json() == {
        "ready": False,
        "causes": [
            {
                "kind": "stalled",
                "part": "magnatronic.researcher-host-0",
                "message": "it hangs",
                "since_s": 95.0,
                "topic": "tasks.normal",
                "partition": 3,
                "offset": 1234,
                "event_type": "StepAssigned",
                "lane": "s-1",
            }
        ],
    }
    scrape = await client.scrape()
    assert scrape("magnatronic_ready") == 0
    assert scrape("magnatronic_processor_ready", **PROCESSOR) == 0
    assert (await client.get("/live")).status_code == 200
    observer.stopping()
    answer = await client.get("/ready")
    assert (answer.status_code, answer.json()["causes"][0]["kind"]) == (503, "stopping")


@pytest.mark.parametrize(
    ("changes", "kind", "said"),
    [
        ({"partitions": None}, "not-joined", "has no partitions of its group sink-x"),
        ({"error": RuntimeError("disk full")}, "failed", "has stopped: disk full"),
        ({"trouble": (-1e6, "ClickHouse is away")}, "store", "ClickHouse is away"),
    ],
)
async def test_a_sink_that_does_not_write_is_named(
    observer: Observer, changes: dict[str, Any], kind: str, said: str
) -> None:
    sink = observer.watch_sink("sink-clickhouse")
    observer.started()
    [cause] = observer.causes()
    assert cause.kind is Kind.STARTING
    sink.runner = working_sink(**changes)
    answer = await Loop(observer).get("/ready")
    [told] = answer.json()["causes"]
    assert (answer.status_code, told["kind"], told["part"]) == (503, kind, "sink-clickhouse")
    assert said in told["message"]
    sink.runner = working_sink(trouble=(time.monotonic(), "a hiccup"))
    assert observer.causes() == []


async def test_it_answers_while_the_event_loop_stands_still_and_says_where(
    observer: Observer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(observing, "_BLOCKED_S", 0.3)
    monkeypatch.setattr(observing, "_DEAD_S", 0.3)
    observer.started()
    await asyncio.sleep(0.3)
    answers: dict[str, httpx.Response] = {}
    url = observer.url

    def ask() -> None:
        time.sleep(1.0)
        for path in ("/ready", "/live", "/metrics"):
            answers[path] = httpx.get(f"{url}{path}", timeout=5)

    asking = threading.Thread(target=ask)
    asking.start()
    deadline = time.monotonic() + 10
    while asking.is_alive() and time.monotonic() < deadline:
        time.sleep(0.05)  # noqa: ASYNC251 - that it holds up the loop is the point
    asking.join()
    assert answers["/ready"].status_code == 503
    [cause] = answers["/ready"].json()["causes"]
    assert cause["kind"] == "event-loop-blocked"
    assert "test_it_answers_while_the_event_loop_stands_still" in cause["message"]
    assert answers["/live"].status_code == 503
    assert Samples(answers["/metrics"].text)("magnatronic_event_loop_delay_seconds") > 0.3
    await asyncio.sleep(0.6)
    assert (await Loop(observer).get("/ready")).status_code == 200


async def test_other_paths_and_methods_are_refused(observer: Observer) -> None:
    client = Loop(observer)
    assert (await client.get("/")).status_code == 404
    assert (await client.get("/ready", "POST")).status_code == 405
    head = await client.get("/live", "HEAD")
    assert (head.status_code, head.content) == (200, b"")


async def test_a_client_that_says_nothing_holds_up_nobody(observer: Observer) -> None:
    assert observer.url is not None
    port = int(observer.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port)):
        assert (await Loop(observer).get("/live")).status_code == 200


async def test_a_port_that_is_taken_is_named(observer: Observer) -> None:
    assert observer.url is not None
    port = int(observer.url.rpartition(":")[2])
    second = Observer(host="127.0.0.1", port=port, instance="other")
    with pytest.raises(PartFailedError, match=f"127.0.0.1:{port}.*MAGNATRONIC_METRICS_PORT"):
        await second.start()
    await second.stop()


async def test_off_serves_nothing() -> None:
    observer = Observer(host="127.0.0.1", port=None, instance="quiet")
    await observer.start()
    assert observer.url is None
    assert json.dumps([cause.as_dict() for cause in observer.causes()])
    await observer.stop()


def test_a_cluster_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observing, "_PROBE_S", 0.1)
    monkeypatch.setattr(observing, "_PROBE_TIMEOUT_S", 0.5)
    monkeypatch.setattr(observing, "_UNREACHABLE_S", 1.0)
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # taken, but it does not listen
        servers = f"127.0.0.1:{nobody.getsockname()[1]}"
        probe = KafkaProbe({"bootstrap.servers": servers, "log_level": 0})
        probe.start()
        deadline = time.monotonic() + 10
        while not (causes := list(probe.causes())) and time.monotonic() < deadline:
            time.sleep(0.1)
        probe.stop()
    [cause] = causes
    assert cause.kind is Kind.UNREACHABLE
    assert f"Kafka at {servers} has not answered for" in cause.message
