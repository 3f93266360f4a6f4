"""A process that is watched: named causes while a handler hangs, metrics of a running system, a task's one trace."""

import asyncio
import json
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import httpx
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client.parser import text_string_to_metric_families

from agents.context import LlmRequest, LlmResponse, Ports
from magnatronic.client import Client
from magnatronic.observing import Observer
from streams.binding import Binding
from streams.metrics import MetricName
from streams.runner import Runner
from streams.traceparent import derived_trace_id
from tests.support.otlp import Collector, ReceivedSpan
from tests.support.processors import CODEC, bench_on

if TYPE_CHECKING:
    from tests.integration.conftest import SystemForTests


class HangingModel:
    """Answers when it is let."""

    name = "hanging"

    def __init__(self) -> None:
        self.let = asyncio.Event()

    async def complete(self, request: LlmRequest, *, idempotency_key: str) -> LlmResponse:
        await self.let.wait()
        return LlmResponse(text="at last", provider="test", model="test")


def values(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """A scrape: values by sample name and labels."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def until(get: Callable[[], httpx.Response], status: int, timeout_s: float = 30.0) -> dict[str, Any]:
    """What ``get`` answers when it answers with ``status``."""
    deadline = time.monotonic() + timeout_s
    while True:
        answer = await asyncio.to_thread(get)
        said: dict[str, Any] = answer.json()
        if answer.status_code == status:
            return said
        assert time.monotonic() < deadline, said
        await asyncio.sleep(0.1)


async def test_a_handler_that_hangs_is_named_until_it_is_done(kafka: Any) -> None:
    bench = bench_on(kafka)
    model = HangingModel()
    runner = Runner(
        [Binding(bench.agent, (bench.topic,))],
        codec=CODEC,
        kafka=kafka.config,
        ports=Ports(llm=model),
        slot="host-x-0",
        stalled_after_s=1.0,
    )
    observer = Observer(host="127.0.0.1", port=0, instance="host-x-0")
    await observer.start()
    observer.watch_kafka(kafka.config)
    observer.watch_agents(runner)
    observer.started()

    def ready() -> httpx.Response:
        return httpx.get(f"{observer.url}/ready", timeout=10)

    def scrape() -> dict[Any, float]:
        return values(httpx.get(f"{observer.url}/metrics", timeout=10).text)

    running = asyncio.create_task(runner.run())
    try:
        await bench.until(lambda: bench.agent.name in runner.readiness)  # without a look, no cause is known
        await until(ready, 200)
        bench.send("hangs", "ask")
        for number in range(30):
            bench.send(f"quick-{number}")
        bench.flush()
        said = await until(ready, 503)
        [cause] = said["causes"]
        assert (cause["kind"], cause["topic"]) == ("stalled", bench.topic)
        assert (cause["offset"], cause["event_type"], cause["lane"]) == (0, "StepAssigned", "hangs")
        place = f"{bench.topic}[{cause['partition']}]@0"
        assert f"has not come past {place} (StepAssigned, lane hangs)" in cause["message"]
        assert "it runs for " in cause["message"]
        assert "in attempt 1" in cause["message"]
        # It says so in its figures too, which the monitor reads; and nobody else is held up.
        assert runner.readiness[bench.agent.name].stalled == cause["message"]
        at = (("agent", bench.agent.name), ("instance", "host-x-0"))
        figures = await asyncio.to_thread(scrape)
        assert figures["magnatronic_processor_events_total", at] == 30
        assert figures["magnatronic_processor_handlers", at] == 1
        assert figures["magnatronic_processor_ready", at] == figures["magnatronic_ready", ()] == 0
        partition = (*at, ("partition", str(cause["partition"])), ("topic", bench.topic))
        assert figures["magnatronic_partition_unfinished_offset", partition] == 0
        assert figures["magnatronic_partition_stalled_seconds", partition] >= 1.0
        model.let.set()
        await until(ready, 200)
        figures = await asyncio.to_thread(scrape)
        assert figures["magnatronic_processor_events_total", at] == 31
        assert figures["magnatronic_processor_latency_seconds_count", at] > 0
        assert figures["magnatronic_processor_commit_seconds_count", at] > 0
        assert figures["magnatronic_processor_handler_seconds_count", at] == 31
        waited = (*at, ("priority", "normal"))
        assert figures["magnatronic_processor_wait_seconds_count", waited] == 31
        assert figures["magnatronic_processor_wait_seconds_sum", waited] < 31
        changes = (at[0], ("change", "assigned"), at[1])
        assert figures["magnatronic_processor_partition_changes_total", changes] == 3
        assert figures["magnatronic_ready", ()] == 1
    finally:
        runner.stop()
        await running
        await observer.stop()


def test_a_system_serves_every_metric_and_says_where(system: "SystemForTests") -> None:
    done = system.run("status", "--json")
    assert done.returncode == 0, done.stdout
    status = json.loads(done.stdout)
    assert (status["ready"], status["causes"]) == (True, [])
    url = status["metrics"]
    assert url.startswith("http://127.0.0.1:")
    assert f"{url}/metrics" in system.run("status").stdout
    assert httpx.get(f"{url}/live", timeout=10).status_code == 200
    assert httpx.get(f"{url}/ready", timeout=10).json() == {"ready": True, "causes": []}
    families = {
        each.name: each for each in text_string_to_metric_families(httpx.get(f"{url}/metrics", timeout=10).text)
    }
    for metric in MetricName:
        assert families[metric.value.name].type == metric.value.type
        assert families[metric.value.name].samples, metric
    events = {each.labels["agent"]: each.value for each in families["magnatronic_processor_events"].samples}
    assert {"decomposer", "coordinator", "retriever", "researcher", "overseer", "embedder"} <= set(events)
    # The corpus was ingested.
    assert events["embedder"] >= 4
    records = {each.labels["sink"]: each.value for each in families["magnatronic_sink_records"].samples}
    assert records["clickhouse"] > 0
    assert records["milvus"] > 0


def tree(spans: list[ReceivedSpan]) -> dict[str, ReceivedSpan]:
    return {span.span_id: span for span in spans}


def is_whole(spans: list[ReceivedSpan]) -> bool:
    """Every span has its parent, one has none, and the task's end is there."""
    known = tree(spans)
    orphans = [span for span in spans if span.parent_id not in known]
    # The Coordinator's last step, on the assessment of the last answer, ends the task.
    ended = any(span.attributes.get("magnatronic.event.type") == "StepAssessed" for span in spans)
    return ended and len(orphans) == 1 and orphans[0].parent_id == ""


def test_a_task_through_all_agents_is_one_connected_trace(system: "SystemForTests", collector: Collector) -> None:
    asked = system.run("ask", "--json", "What is a widget?")
    assert asked.returncode == 0, asked.stderr
    answer = json.loads(asked.stdout)
    trace = collector.trace(derived_trace_id(answer["task_id"]), is_whole)
    assert is_whole(trace), sorted((span.service, span.name, span.parent_id) for span in trace)
    assert len(tree(trace)) == len(trace)  # no span came twice
    [root] = [span for span in trace if not span.parent_id]
    assert (root.name, root.service) == ("publish tasks.normal", "clients/cli")
    steps = [span for span in trace if span.name.startswith("process ")]
    assert {span.service for span in steps} >= {"decomposer", "coordinator", "overseer"}
    assert {span.service for span in steps} & {"retriever", "researcher"}
    known = tree(trace)
    for span in trace:
        assert span.start_ns <= span.end_ns
        if span.parent_id:
            # An effect or a next step begins after what caused it has begun.
            assert span.start_ns >= known[span.parent_id].start_ns
    for step in steps:
        assert step.attributes["messaging.system"] == "kafka"
        assert step.attributes["messaging.destination.name"] == step.name.removeprefix("process ")
        assert step.attributes["messaging.consumer.group.name"] == f"magnatronic.{step.service}"
        assert step.attributes["gen_ai.conversation.id"] == answer["task_id"]
    # Of kind CLIENT, and named "<operation> <model, or what is asked>".
    calls = {span.name.partition(" ")[0]: span for span in trace if span.kind == 3}
    assert calls["chat"].attributes["gen_ai.provider.name"] == "extractive"
    assert calls["retrieval"].attributes["magnatronic.retrieval.hits"] > 0
    assert calls["query"].attributes["db.namespace"] == "directory"
    for call in calls.values():
        assert known[call.parent_id].service == call.service
    # Each of the task's events in the log that an agent handled is a step of the trace.
    handled = {event["type"] for event in answer["events"]} & {"TaskSubmitted", "PlanProposed", "StepAssigned"}
    assert handled <= {step.attributes["magnatronic.event.type"] for step in steps}


def test_a_client_s_own_span_is_the_trace_s_root(system: "SystemForTests", collector: Collector) -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    with (
        Client.connect(system.data_dir, name="traced", tracer_provider=provider) as client,
        provider.get_tracer("test").start_as_current_span("a request"),
    ):
        task_id = client.submit("What is a gadget?", deadline=datetime(2040, 1, 1, tzinfo=UTC))
        client.outcome(task_id)
    publish, request = exporter.get_finished_spans()
    assert publish.context is not None
    assert request.context is not None
    trace_id, span_id = f"{publish.context.trace_id:032x}", f"{publish.context.span_id:016x}"
    assert publish.parent == request.context
    provider.shutdown()

    def has_begun(spans: list[ReceivedSpan]) -> bool:
        return any(span.parent_id == span_id for span in spans)

    trace = collector.trace(trace_id, has_begun)
    [first] = [span for span in trace if span.parent_id == span_id]
    assert (first.service, first.name) == ("decomposer", "process tasks.normal")
    assert not [span for span in trace if span.name.startswith("publish ")]
