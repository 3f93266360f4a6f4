"""Tracing as OpenTelemetry's own variables configure it: off, or to a collector by OTLP over HTTP.

In: ``OTEL_EXPORTER_OTLP_ENDPOINT`` (or ``..._TRACES_ENDPOINT``), and whatever else the SDK reads: headers, timeout,
sampler, resource attributes, batch sizes. Out: a :class:`~streams.tracing.Tracer` for processors, or a tracer provider
for a client's process. Without an endpoint there is neither, and nothing of the SDK is imported. :class:`Publishing`
begins the traces of what clients send.
"""

import os
from typing import TYPE_CHECKING, Final, Self

from opentelemetry import trace
from opentelemetry.trace import Span, SpanKind, Status, StatusCode

from magnatronic.errors import WrongInputError
from streams.traceparent import TraceContext, published

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    from streams.tracing import Tracer

__all__ = ["Publishing", "client_provider", "make_tracer", "tracing_wanted"]

_QUEUE: Final = 32_768
"""Spans that may wait for their export. The SDK's 2,048 are those of a second of a busy process."""


class Publishing:
    """Begins a trace for each event that a client sends, as a child of the caller's span where there is one; a context
    manager, to be left when the log has them all.

    With ``provider``, or a tracer provider that the application has set, the client makes the span of the publishing;
    without one its ids are derived from the event's, and the first agent that handles the event makes the span.
    """

    def __init__(self, provider: "TracerProvider | None" = None) -> None:
        self._tracer = trace.get_tracer("magnatronic", tracer_provider=provider)
        self._open: list[Span] = []

    def traceparent(self, topic: str, *, event_id: str, correlation_id: str, key: str) -> str:
        """The ``traceparent`` to send an event with."""
        span = self._tracer.start_span(
            f"publish {topic}",
            kind=SpanKind.PRODUCER,
            attributes={
                "messaging.system": "kafka",
                "messaging.operation.name": "publish",
                "messaging.operation.type": "send",
                "messaging.destination.name": topic,
                "messaging.kafka.message.key": key,
                "messaging.message.id": event_id,
                "messaging.message.conversation_id": correlation_id,
            },
        )
        if span.is_recording():
            self._open.append(span)
        context = span.get_span_context()
        if not context.is_valid:
            return str(published(event_id, correlation_id))
        return str(TraceContext(f"{context.trace_id:032x}", f"{context.span_id:016x}", context.trace_flags.sampled))

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        """Ends the spans; with an error, when the events may not be in the log."""
        for span in self._open:
            if error is not None:
                span.set_attribute("error.type", type(error).__name__)
                span.set_status(Status(StatusCode.ERROR, str(error)))
            span.end()


def tracing_wanted() -> bool:
    """Whether spans are to be exported.

    Raises:
        WrongInputError: they are, but in a way that this process can't.
    """
    if os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return False
    exporter = os.environ.get("OTEL_TRACES_EXPORTER", "otlp").lower()
    traces_only, general = "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"
    endpoint = os.environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") or os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT")
    if exporter == "none" or not endpoint:
        return False
    if exporter not in ("", "otlp"):
        raise WrongInputError(f"OTEL_TRACES_EXPORTER is {exporter!r}; Magnatronic exports traces by `otlp`, or `none`")
    for variable in (traces_only, general):
        protocol = os.environ.get(variable)
        if protocol and protocol != "http/protobuf":
            raise WrongInputError(
                f"{variable} is {protocol!r}; Magnatronic speaks OTLP as http/protobuf (port 4318 of most collectors)"
            )
        if protocol:
            break
    return True


def make_tracer(instance: str) -> "Tracer | None":
    """A tracer for this process's processors, None when tracing is off. ``instance`` is its service.instance.id.

    Raises:
        WrongInputError: as :func:`tracing_wanted`.
    """
    if not tracing_wanted():
        return None
    from opentelemetry.sdk.trace import TracerProvider

    from streams.tracing import Tracer

    # Not to be used for spans: it reads the sampler and the resource from the environment.
    configured = TracerProvider(shutdown_on_exit=False)
    return Tracer(_exporting(), sampler=configured.sampler, instance=instance, resource=configured.resource)


def client_provider(service: str) -> "TracerProvider | None":
    """A tracer provider for a process that submits tasks and has none of its own, None when tracing is off.

    Raises:
        WrongInputError: as :func:`tracing_wanted`.
    """
    if not tracing_wanted():
        return None
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource
    from opentelemetry.sdk.trace import TracerProvider

    named = Resource({"service.namespace": "magnatronic", "service.name": service})
    provider = TracerProvider(resource=Resource.create().merge(named).merge(OTELResourceDetector().detect()))
    provider.add_span_processor(_exporting())
    return provider


def _exporting() -> "BatchSpanProcessor":
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    own_size = None if os.environ.get("OTEL_BSP_MAX_QUEUE_SIZE") else _QUEUE
    return BatchSpanProcessor(OTLPSpanExporter(), max_queue_size=own_size)
