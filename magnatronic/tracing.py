"""Tracing as OpenTelemetry's own variables configure it: off, or to a collector by OTLP over HTTP.

In: ``OTEL_EXPORTER_OTLP_ENDPOINT`` (or ``..._TRACES_ENDPOINT``), and whatever else the SDK reads: headers, timeout,
sampler, resource attributes, batch sizes. Out: a :class:`~streams.tracing.Tracer` for processors, or a tracer provider
for a client's process. Without an endpoint there is neither, and nothing of the SDK is imported.
"""

import os
from typing import TYPE_CHECKING, Final

from magnatronic.errors import WrongInputError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    from streams.tracing import Tracer

__all__ = ["client_provider", "make_tracer", "tracing_wanted"]

_QUEUE: Final = 32_768
"""Spans that may wait for their export. The SDK's 2,048 are those of a second of a busy process."""


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
