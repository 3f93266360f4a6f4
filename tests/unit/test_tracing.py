"""Spans from task to effect, and the trace contexts that lead from one to the next."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import NonRecordingSpan, SpanContext, SpanKind, StatusCode, TraceFlags, use_span

from agents.context import LlmRequest, LlmResponse, Message, Purpose
from agents.journal import identity_of
from magnatronic.errors import WrongInputError
from magnatronic.tracing import Publishing, client_provider, make_tracer, tracing_wanted
from schemas.events import LlmCalled, MemoryRecalled, TaskSubmitted, TextsEmbedded, ToolCalled, ToolStarted
from schemas.metadata import Envelope, Metadata, canonical_json, request_hash
from schemas.record import Record
from streams.traceparent import TraceContext, derived_span_id, derived_trace_id, parse, published
from streams.tracing import StepTrace, Tracer, effect_span
from tests.support.otlp import Collector

THEN = datetime(2030, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)
OUTSIDE = TraceContext("4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7")


def submitted(traceparent: str = "", event_id: str = "event-1") -> Envelope:
    event = TaskSubmitted(task_id="task-1", objective="count sheep")
    metadata = Metadata(event_id, "/clients/cli", "task-1", THEN, "", "task-1", traceparent)
    return Envelope(event, metadata)


def record_of(offset: int = 7) -> Record:
    return Record("tasks.normal", 2, offset, int(THEN.timestamp() * 1000) + 5, b"task-1", b"12345", ())


def called(step: Metadata, **changes: Any) -> Envelope:
    request = canonical_json(
        LlmRequest(purpose=Purpose.PLAN, messages=(Message(role="user", content="secret words"),), max_tokens=77)
    )
    response = canonical_json(LlmResponse(text="hidden words", provider="google", model="gemini-9"))
    fields: dict[str, Any] = {
        "task_id": "task-1",
        "agent": "decomposer",
        "event_id": step.id,
        "request_hash": request_hash(request),
        "request": request,
        "started_at": THEN,
        "latency_ms": 12.5,
        "provider": "google",
        "model": "gemini-9",
        "response": response,
        "prompt_tokens": 11,
        "completion_tokens": 22,
        "cost_usd": 0.5,
    } | changes
    effect = LlmCalled(**fields)
    metadata = Metadata(
        f"effect-of-{step.id}", "/agents/decomposer@1", "task-1", THEN, step.id, "task-1", step.traceparent
    )
    return Envelope(effect, metadata)


class Collected:
    """A tracer whose spans can be looked at."""

    def __init__(self, **options: Any) -> None:
        self.exporter = InMemorySpanExporter()
        self.tracer = Tracer(SimpleSpanProcessor(self.exporter), instance="host-up-0", **options)

    @property
    def spans(self) -> dict[str, ReadableSpan]:
        return {span.name: span for span in self.exporter.get_finished_spans()}

    def step(self, envelope: Envelope, agent: str = "decomposer") -> tuple[Envelope, StepTrace]:
        given_to_handler, trace = self.tracer.begin(agent, envelope, record_of())
        assert trace is not None
        return given_to_handler, trace


def ids(span: ReadableSpan) -> TraceContext:
    context = span.get_span_context()
    assert context is not None
    return TraceContext(f"{context.trace_id:032x}", f"{context.span_id:016x}", context.trace_flags.sampled)


def parent_of(span: ReadableSpan) -> str:
    return "" if span.parent is None else f"{span.parent.span_id:016x}"


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


def test_a_trace_context_survives_its_header() -> None:
    header = f"00-{OUTSIDE.trace_id}-{OUTSIDE.span_id}-01"
    assert parse(header) == OUTSIDE
    assert str(OUTSIDE) == header
    assert parse(f"cc-{OUTSIDE.trace_id}-{OUTSIDE.span_id}-03-what-a-later-version-adds") == OUTSIDE
    assert parse(f"00-{OUTSIDE.trace_id}-{OUTSIDE.span_id}-00") == OUTSIDE._replace(sampled=False)


@pytest.mark.parametrize(
    "header",
    [
        "",
        "00",
        f"ff-{OUTSIDE.trace_id}-{OUTSIDE.span_id}-01",
        f"00-{OUTSIDE.trace_id}-{OUTSIDE.span_id}-01-more",
        f"00-{'0' * 32}-{OUTSIDE.span_id}-01",
        f"00-{OUTSIDE.trace_id}-{'0' * 16}-01",
        f"00-{OUTSIDE.trace_id.upper()}-{OUTSIDE.span_id}-01",
        f"00-{OUTSIDE.trace_id[:-1]}-{OUTSIDE.span_id}0-01",
    ],
)
def test_what_is_no_trace_context_is_none(header: str) -> None:
    assert parse(header) is None


@given(st.text(max_size=80))
def test_any_header_is_read_without_an_error(header: str) -> None:
    found = parse(header)
    assert found is None or parse(str(found)) == found


@given(st.text(max_size=20), st.text(max_size=20))
def test_derived_contexts_are_valid_and_each_its_own(one: str, other: str) -> None:
    first, second = published(one, "task"), published(other, "task")
    assert parse(str(first)) == first
    assert (first == second) is (one == other)
    assert first.trace_id == derived_trace_id("task")


def test_a_step_is_the_child_of_what_caused_it_and_the_parent_of_what_it_emits() -> None:
    collected = Collected()
    envelope, trace = collected.step(submitted(str(OUTSIDE)))
    own = parse(envelope.metadata.traceparent)
    assert own == TraceContext(OUTSIDE.trace_id, derived_span_id("event-1", "decomposer"))
    assert collected.spans == {}
    trace.handled([], 1)
    assert collected.spans == {}  # nothing is told before the commit
    trace.committed()
    assert list(collected.spans) == ["process tasks.normal"]
    span = collected.spans["process tasks.normal"]
    assert ids(span) == own
    assert parent_of(span) == OUTSIDE.span_id
    assert span.kind is SpanKind.CONSUMER
    assert span.start_time is not None
    assert span.end_time is not None
    assert span.start_time <= span.events[0].timestamp <= span.end_time
    found = attributes(span)
    assert found["messaging.system"] == "kafka"
    assert found["messaging.destination.name"] == "tasks.normal"
    assert found["messaging.destination.partition.id"] == "2"
    assert found["messaging.kafka.offset"] == 7
    assert found["messaging.consumer.group.name"] == "magnatronic.decomposer"
    assert found["messaging.message.id"] == "event-1"
    assert found["gen_ai.operation.name"] == "invoke_agent"
    assert found["gen_ai.agent.name"] == "decomposer"
    assert found["magnatronic.event.type"] == "TaskSubmitted"
    assert span.resource.attributes["service.name"] == "decomposer"
    assert span.resource.attributes["service.instance.id"] == "host-up-0"
    assert span.status.status_code is StatusCode.UNSET


def test_a_step_that_is_run_again_names_its_span_alike() -> None:
    before, after = Collected(), Collected()
    first, _ = before.step(submitted(str(OUTSIDE)))
    second, trace = after.step(submitted(str(OUTSIDE)))
    assert first.metadata == second.metadata
    trace.committed()
    assert before.spans == {}
    assert ids(after.spans["process tasks.normal"]) == parse(first.metadata.traceparent)
    other, _ = after.step(submitted(str(OUTSIDE)), agent="auditor")
    assert other.metadata.traceparent != first.metadata.traceparent


@pytest.mark.parametrize("traceparent", ["", "nonsense", str(published("event-1", "task-1"))])
def test_an_event_from_outside_without_a_span_gets_one_for_its_publishing(traceparent: str) -> None:
    collected = Collected()
    _, trace = collected.step(submitted(traceparent))
    trace.committed()
    publish, step = collected.spans["publish tasks.normal"], collected.spans["process tasks.normal"]
    assert ids(publish) == published("event-1", "task-1")
    assert publish.parent is None
    assert parent_of(step) == ids(publish).span_id
    assert publish.kind is SpanKind.PRODUCER
    assert publish.resource.attributes["service.name"] == "clients/cli"
    assert publish.start_time == 1_893_553_445_678_901_000
    assert publish.end_time == 1_893_553_445_683_000_000


def test_a_call_is_the_child_of_its_step_and_tells_no_content() -> None:
    collected = Collected()
    envelope, trace = collected.step(submitted())
    trace.handled([called(envelope.metadata)], 2)
    trace.committed()
    span, step = collected.spans["chat gemini-9"], collected.spans["process tasks.normal"]
    assert parent_of(span) == ids(step).span_id
    assert ids(span).trace_id == ids(step).trace_id
    assert span.kind is SpanKind.CLIENT
    assert span.start_time == 1_893_553_445_678_901_000
    assert span.end_time == span.start_time + 12_500_000
    found = attributes(span)
    assert found["gen_ai.operation.name"] == "chat"
    assert found["gen_ai.provider.name"] == "gcp.gemini"
    assert found["gen_ai.request.model"] == found["gen_ai.response.model"] == "gemini-9"
    assert found["gen_ai.usage.input_tokens"] == 11
    assert found["gen_ai.usage.output_tokens"] == 22
    assert found["gen_ai.request.max_tokens"] == 77
    assert found["gen_ai.request.temperature"] == 0.0
    assert found["gen_ai.response.finish_reasons"] == ("stop",)
    assert found["magnatronic.cost_usd"] == 0.5
    assert "error.type" not in found
    assert "words" not in repr(found)
    assert attributes(step)["magnatronic.attempt"] == 2


def test_calls_that_an_earlier_owner_journalled_belong_to_the_step_that_went_on() -> None:
    before, after = Collected(), Collected()
    crashed, _ = before.step(submitted())
    journalled = called(crashed.metadata)
    envelope, trace = after.step(submitted())
    own = called(envelope.metadata, model="gemini-8", request="{}")
    trace.restored = (journalled,)
    trace.handled([Envelope(own.event, replace(own.metadata, id="effect-of-the-second-life"))], 1)
    trace.committed()
    step = ids(after.spans["process tasks.normal"])
    assert parent_of(after.spans["chat gemini-9"]) == parent_of(after.spans["chat gemini-8"]) == step.span_id
    assert len({ids(span).span_id for span in after.spans.values()}) == 4


def test_a_failed_call_and_a_failed_step_say_so() -> None:
    collected = Collected()
    envelope, trace = collected.step(submitted())
    error = canonical_json({"type": "RateLimited", "message": "later", "retryable": True})
    trace.error = "RateLimited", "gave up"
    trace.handled([called(envelope.metadata, error=error, response="")], 3)
    trace.committed()
    span, step = collected.spans["chat gemini-9"], collected.spans["process tasks.normal"]
    assert attributes(span)["error.type"] == attributes(step)["error.type"] == "RateLimited"
    assert span.status.status_code is step.status.status_code is StatusCode.ERROR
    assert span.status.description == "later"
    assert "gen_ai.response.model" not in attributes(span)


def test_every_kind_of_call_has_its_operation() -> None:
    common: dict[str, Any] = {
        "task_id": "task-1",
        "agent": "researcher",
        "event_id": "event-1",
        "request_hash": "ab",
        "request": "{}",
        "started_at": THEN,
        "latency_ms": 1.0,
    }
    effects = [
        (MemoryRecalled(**common, model="minilm"), "retrieval", "retrieval minilm"),
        (TextsEmbedded(**common, model="minilm", model_version="1", dimensions=384, count=2), "embeddings", None),
        (ToolCalled(**common, tool="calculator"), "execute_tool", "execute_tool calculator"),
    ]
    spans = []
    for effect, operation, name in effects:
        metadata = Metadata(str(identity_of(effect)), "/agents/x@1", "task-1", THEN, traceparent=str(OUTSIDE))
        span = effect_span(Envelope(effect, metadata), Resource({}))
        assert span is not None
        assert attributes(span)["gen_ai.operation.name"] == operation
        assert name is None or span.name == name
        assert parent_of(span) == OUTSIDE.span_id
        spans.append(ids(span).span_id)
    assert len(set(spans)) == len(spans)
    note = ToolStarted(**common, tool="calculator")
    assert effect_span(Envelope(note, Metadata("x", "y", "z", THEN)), Resource({})) is None


def test_a_trace_that_is_not_recorded_stays_unrecorded_downstream() -> None:
    collected = Collected()
    refused = OUTSIDE._replace(sampled=False)
    envelope, trace = collected.tracer.begin("decomposer", submitted(str(refused)), record_of())
    assert trace is None
    assert parse(envelope.metadata.traceparent) == refused


def test_the_sampler_decides_on_traces_that_begin_here_only() -> None:
    collected = Collected(sampler=ALWAYS_OFF)
    envelope, trace = collected.tracer.begin("decomposer", submitted(), record_of())
    assert trace is None
    assert parse(envelope.metadata.traceparent) == published("event-1", "task-1")._replace(sampled=False)
    _, trace = collected.tracer.begin("decomposer", submitted(str(OUTSIDE)), record_of())
    assert trace is not None


def test_a_service_name_from_outside_wins() -> None:
    collected = Collected(resource=Resource.create({"service.name": "ours", "deployment.environment": "prod"}))
    _, trace = collected.step(submitted(str(OUTSIDE)))
    trace.committed()
    found = collected.spans["process tasks.normal"].resource.attributes
    assert found["service.name"] == "ours"
    assert found["deployment.environment"] == "prod"


@pytest.fixture
def collector() -> Iterator[Collector]:
    made = Collector()
    yield made
    made.close()


def test_spans_arrive_at_a_collector_as_otlp(collector: Collector) -> None:
    tracer = Tracer(BatchSpanProcessor(OTLPSpanExporter(f"{collector.url}/v1/traces")), instance="host-up-0")
    envelope, trace = tracer.begin("decomposer", submitted(), record_of())
    assert trace is not None
    trace.handled([called(envelope.metadata)], 1)
    trace.committed()
    tracer.close()
    assert collector.requests == [("/v1/traces", "application/x-protobuf")]
    publish, step, call = collector.spans
    assert [publish.name, step.name, call.name] == ["publish tasks.normal", "process tasks.normal", "chat gemini-9"]
    assert [publish.service, step.service, call.service] == ["clients/cli", "decomposer", "decomposer"]
    assert publish.trace_id == step.trace_id == call.trace_id == derived_trace_id("task-1")
    assert [publish.parent_id, step.parent_id, call.parent_id] == ["", publish.span_id, step.span_id]
    assert call.end_ns - call.start_ns == 12_500_000
    assert call.attributes["gen_ai.usage.input_tokens"] == 11
    assert call.attributes["gen_ai.usage.output_tokens"] == 22


def test_without_an_endpoint_nothing_is_traced() -> None:
    assert not tracing_wanted()
    assert make_tracer("host-up-0") is None
    assert client_provider("clients/cli") is None


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318"}, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://collector:4318/v1/traces"}, True),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318", "OTEL_SDK_DISABLED": "true"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318", "OTEL_TRACES_EXPORTER": "none"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318", "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}, True),
    ],
)
def test_otel_s_variables_say_whether_to_trace(
    settings: dict[str, str], wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    assert tracing_wanted() is wanted


@pytest.mark.parametrize(
    ("name", "value"), [("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"), ("OTEL_TRACES_EXPORTER", "jaeger")]
)
def test_what_it_can_t_speak_is_refused_by_name(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://collector:4317")
    monkeypatch.setenv(name, value)
    with pytest.raises(WrongInputError, match=f"{name} is '{value}'"):
        tracing_wanted()


def test_a_tracer_is_configured_by_otel_s_variables(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "service.name=ours,deployment.environment=prod")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_always_off")
    tracer = make_tracer("host-up-0")
    assert tracer is not None
    assert tracer.begin("decomposer", submitted(), record_of())[1] is None
    _, trace = tracer.begin("decomposer", submitted(str(OUTSIDE)), record_of())
    assert trace is not None
    trace.committed()
    tracer.close()
    [span] = collector.spans
    assert (span.service, span.parent_id) == ("ours", OUTSIDE.span_id)


def test_a_client_without_a_provider_derives_its_trace() -> None:
    with Publishing() as publishing:
        header = publishing.traceparent("tasks.normal", event_id="event-1", correlation_id="task-1", key="task-1")
    assert parse(header) == published("event-1", "task-1")


def test_a_client_within_a_span_continues_its_trace() -> None:
    ambient = SpanContext(int(OUTSIDE.trace_id, 16), int(OUTSIDE.span_id, 16), True, TraceFlags(0))
    with use_span(NonRecordingSpan(ambient)), Publishing() as publishing:
        header = publishing.traceparent("tasks.normal", event_id="event-1", correlation_id="task-1", key="task-1")
    assert parse(header) == OUTSIDE._replace(sampled=False)


def test_a_client_with_a_provider_makes_the_span_of_its_publishing(
    collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
    provider = client_provider("clients/cli")
    assert provider is not None
    with (
        provider.get_tracer("test").start_as_current_span("ask"),
        suppress(KeyError),
        Publishing(provider) as publishing,
    ):
        header = publishing.traceparent("tasks.normal", event_id="event-1", correlation_id="task-1", key="task-1")
        raise KeyError("the log did not take it")
    provider.shutdown()
    publish, ask = collector.spans
    assert parse(header) == TraceContext(publish.trace_id, publish.span_id)
    assert (publish.name, publish.parent_id, publish.service) == ("publish tasks.normal", ask.span_id, "clients/cli")
    assert publish.attributes["error.type"] == "KeyError"
    # The agent that handles the event does not make that span again.
    collected = Collected()
    _, trace = collected.step(submitted(header))
    trace.committed()
    assert list(collected.spans) == ["process tasks.normal"]
