"""OpenTelemetry spans from task to effect, made when a step's transaction has committed.

In: an event as its step begins, and what the step left. Out: finished spans for an OpenTelemetry span processor: one a
step, as its parent's child, one a call below it, and one for the publishing of an event that came from outside. Their
attributes follow the semantic conventions for messaging and for generative AI; no prompt or answer is among them.

A step's span id is derived (:mod:`streams.traceparent`) and travels in the ``traceparent`` of all that the step emits,
so the next step, in whatever process, is its child. What aborts, or was done before a crash and is done again, leaves
one span. Nothing here runs when tracing is off.
"""

import time
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any, Final

import orjson
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event as SpanEvent
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor
from opentelemetry.sdk.trace.sampling import Decision, Sampler
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags

from schemas.events import Effect, LlmCalled, MemoryRecalled, Queried, TextsEmbedded, ToolCalled
from schemas.metadata import Envelope, Metadata
from schemas.record import Record
from streams.traceparent import TraceContext, derived_span_id, parse, published

__all__ = ["StepTrace", "Tracer", "effect_span"]

Attributes = dict[str, str | bool | int | float | tuple[str, ...]]

_SCOPE: Final = InstrumentationScope("magnatronic")
_SAMPLED: Final = TraceFlags(TraceFlags.SAMPLED)
_PROVIDERS: Final = {"google": "gcp.gemini"}
"""Providers that the conventions call otherwise than we do."""
_MAX_SERVICES: Final = 1024
"""Clients name themselves, so there is no telling how many there are."""
_CALLS: Final = (LlmCalled, MemoryRecalled, TextsEmbedded, ToolCalled, Queried)
"""Effects that reach outside; the others are notes that a handler made for its replay."""


class StepTrace:
    """One step, from its begin to its commit. ``metadata`` is what the handler is to be given: its ``traceparent``
    names the step's own span.
    """

    __slots__ = (
        "_agent",
        "_began_ns",
        "_context",
        "_effects",
        "_event_type",
        "_handled_ns",
        "_original",
        "_parent",
        "_record",
        "_tracer",
        "attempt",
        "error",
        "metadata",
        "restored",
    )

    def __init__(
        self,
        tracer: "Tracer",
        agent: str,
        envelope: Envelope,
        record: Record,
        parent: TraceContext,
        context: TraceContext,
    ) -> None:
        self._tracer = tracer
        self._agent = agent
        self._original = envelope.metadata
        self._event_type = type(envelope.event).__name__
        self._record = record
        self._parent = parent
        self._context = context
        self._began_ns = time.time_ns()
        self._handled_ns = 0
        self._effects: tuple[Envelope, ...] = ()
        self.attempt = 1
        self.restored: tuple[Envelope, ...] = ()
        """Calls that an earlier owner made and journalled before it lost the event."""
        self.error: tuple[str, str] | None = None
        """Why the step failed for good: the error's type and message."""
        self.metadata = _with_traceparent(envelope.metadata, str(context))

    def begin(self) -> None:
        """The handler starts, for the first time."""
        self._began_ns = time.time_ns()

    def handled(self, effects: Iterable[Envelope], attempt: int) -> None:
        """The handler is through, for good, with these calls, in its ``attempt`` (from 1)."""
        self._handled_ns = time.time_ns()
        self._effects = tuple(effects)
        self.attempt = attempt

    def committed(self) -> None:
        """Its transaction is through: hand its spans on."""
        self._tracer.finished(self)

    def spans(self, group: str, resource: Resource, now_ns: int) -> Iterable[ReadableSpan]:
        """Its span, and those of its calls."""
        record, metadata = self._record, self._original
        attributes: Attributes = {
            "messaging.system": "kafka",
            "messaging.operation.name": "process",
            "messaging.operation.type": "process",
            "messaging.destination.name": record.topic,
            "messaging.destination.partition.id": str(record.partition),
            "messaging.kafka.offset": record.offset,
            "messaging.kafka.message.key": metadata.subject,
            "messaging.consumer.group.name": group,
            "messaging.message.id": metadata.id,
            "messaging.message.conversation_id": metadata.correlation_id,
            "messaging.message.body.size": len(record.value or b""),
            "gen_ai.operation.name": "invoke_agent",
            "gen_ai.agent.name": self._agent,
            "gen_ai.conversation.id": metadata.correlation_id,
            "magnatronic.event.type": self._event_type,
            "magnatronic.attempt": self.attempt,
        }
        status = Status(StatusCode.UNSET)
        if self.error is not None:
            attributes["error.type"], description = self.error
            status = Status(StatusCode.ERROR, description)
        yield ReadableSpan(
            f"process {record.topic}",
            context=_span_context(self._context),
            parent=_span_context(self._parent, is_remote=True),
            resource=resource,
            attributes=attributes,
            # Handlers end before their transaction does; the next step can't begin before it.
            events=[SpanEvent("handled", timestamp=self._handled_ns)] if self._handled_ns else (),
            kind=SpanKind.CONSUMER,
            status=status,
            start_time=self._began_ns,
            end_time=now_ns,
            instrumentation_scope=_SCOPE,
        )
        for effect in (*self.restored, *self._effects):
            span = effect_span(effect, resource)
            if span is not None:
                yield span

    def published_by(self) -> str | None:
        """Who published the event, when it came from outside and no client has made a span of that."""
        metadata = self._original
        if self._parent.span_id != published(metadata.id, metadata.correlation_id).span_id:
            return None
        return metadata.source.strip("/") or "unknown"

    def publishing(self, resource: Resource) -> ReadableSpan:
        """The span of the event's publishing: from the client's time to the log's."""
        metadata, record = self._original, self._record
        start_ns = _ns(metadata.time)
        return ReadableSpan(
            f"publish {record.topic}",
            context=_span_context(self._parent),
            resource=resource,
            attributes={
                "messaging.system": "kafka",
                "messaging.operation.name": "publish",
                "messaging.operation.type": "send",
                "messaging.destination.name": record.topic,
                "messaging.destination.partition.id": str(record.partition),
                "messaging.kafka.offset": record.offset,
                "messaging.kafka.message.key": metadata.subject,
                "messaging.message.id": metadata.id,
                "messaging.message.conversation_id": metadata.correlation_id,
                "magnatronic.event.type": self._event_type,
            },
            kind=SpanKind.PRODUCER,
            start_time=start_ns,
            end_time=max(start_ns, record.timestamp_ms * 1_000_000),
            instrumentation_scope=_SCOPE,
        )


class Tracer:
    """Makes spans of committed steps and gives them to ``processor`` (a BatchSpanProcessor over an exporter).

    ``sampler`` decides on traces that begin here; those that come with a decision keep it. ``instance`` becomes the
    spans' service.instance.id, the agent's name their service.name unless ``resource`` has one.
    """

    def __init__(
        self,
        processor: SpanProcessor,
        *,
        sampler: Sampler | None = None,
        instance: str = "",
        resource: Resource | None = None,
    ) -> None:
        self._processor = processor
        self._sampler = sampler
        self._instance = instance
        self._base = Resource.create() if resource is None else resource
        self._resources: dict[tuple[str, str], Resource] = {}

    def begin(self, agent: str, envelope: Envelope, record: Record) -> tuple[Envelope, StepTrace | None]:
        """What ``agent`` is to be given for the event, and its trace; None for one that is not recorded.

        The agent's outputs and effects take their ``traceparent`` from the envelope that is returned.
        """
        metadata = envelope.metadata
        root = published(metadata.id, metadata.correlation_id)
        parent = parse(metadata.traceparent) or root
        if parent.sampled and parent.span_id == root.span_id and not self._starts(parent.trace_id):
            parent = parent._replace(sampled=False)
        if not parent.sampled:
            return Envelope(envelope.event, _with_traceparent(metadata, str(parent))), None
        context = TraceContext(parent.trace_id, derived_span_id(metadata.id, agent))
        trace = StepTrace(self, agent, envelope, record, parent, context)
        return Envelope(envelope.event, trace.metadata), trace

    def _starts(self, trace_id: str) -> bool:
        if self._sampler is None:
            return True
        # Ids decide, so that each agent's process that meets the trace's first event decides alike.
        decision = self._sampler.should_sample(None, int(trace_id, 16), "publish").decision
        return decision is Decision.RECORD_AND_SAMPLE

    def finished(self, trace: StepTrace) -> None:
        """Hand a committed step's spans on."""
        agent = trace._agent
        now_ns = time.time_ns()
        source = trace.published_by()
        if source is not None:
            self._processor.on_end(trace.publishing(self._resource(source, "")))
        for span in trace.spans(f"magnatronic.{agent}", self._resource(agent, self._instance), now_ns):
            self._processor.on_end(span)

    def _resource(self, service: str, instance: str) -> Resource:
        resource = self._resources.get((service, instance))
        if resource is None:
            named = {"service.namespace": "magnatronic"}
            if str(self._base.attributes.get("service.name", "")).partition(":")[0] in ("", "unknown_service"):
                named["service.name"] = service
            if instance:
                named["service.instance.id"] = instance
            if len(self._resources) >= _MAX_SERVICES:
                self._resources.clear()
            resource = self._resources[service, instance] = self._base.merge(Resource(named))
        return resource

    def close(self) -> None:
        """Export what is waiting; it may block for as long as the exporter's timeout."""
        self._processor.shutdown()


def effect_span(envelope: Envelope, resource: Resource) -> ReadableSpan | None:
    """The span of a recorded call, made from its record alone; None for an effect that was no call.

    Raises:
        ValueError: the effect's ``traceparent`` names no step.
    """
    effect, metadata = envelope.event, envelope.metadata
    if not isinstance(effect, _CALLS):
        return None
    parent = parse(metadata.traceparent)
    if parent is None:
        raise ValueError(f"effect {metadata.id} has traceparent {metadata.traceparent!r}, which is no trace context")
    name, attributes = _described(effect)
    status = Status(StatusCode.UNSET)
    if effect.error:
        error = _object(effect.error)
        attributes["error.type"] = str(error.get("type", "_OTHER"))
        # Traces are kept elsewhere, in the clear.
        said = "" if metadata.data_subjects else str(error.get("message", ""))[:500]
        status = Status(StatusCode.ERROR, said)
    attributes |= {
        "gen_ai.agent.name": effect.agent,
        "gen_ai.conversation.id": effect.task_id,
        "magnatronic.effect.id": metadata.id,
        "magnatronic.attempt": effect.attempt,
    }
    if effect.scope:
        attributes["magnatronic.scope"] = effect.scope
    start_ns = _ns(effect.started_at)
    return ReadableSpan(
        name,
        context=_span_context(TraceContext(parent.trace_id, derived_span_id(metadata.id, "call"))),
        parent=_span_context(parent),
        resource=resource,
        attributes=attributes,
        kind=SpanKind.INTERNAL if isinstance(effect, ToolCalled) else SpanKind.CLIENT,
        status=status,
        start_time=start_ns,
        end_time=start_ns + round(effect.latency_ms * 1_000_000),
        instrumentation_scope=_SCOPE,
    )


def _described(effect: Effect) -> tuple[str, Attributes]:
    match effect:
        case LlmCalled():
            return _llm(effect)
        case TextsEmbedded():
            return f"embeddings {effect.model}", {
                "gen_ai.operation.name": "embeddings",
                "gen_ai.provider.name": "magnatronic",
                "gen_ai.request.model": effect.model,
                "gen_ai.embeddings.dimension.count": effect.dimensions,
                "magnatronic.embeddings.count": effect.count,
            }
        case MemoryRecalled():
            return f"retrieval {effect.model}", {
                "gen_ai.operation.name": "retrieval",
                "gen_ai.provider.name": "magnatronic",
                "gen_ai.request.model": effect.model,
                "magnatronic.retrieval.hits": len(effect.hits),
            }
        case ToolCalled():
            return f"execute_tool {effect.tool}", {
                "gen_ai.operation.name": "execute_tool",
                "gen_ai.tool.name": effect.tool,
                "magnatronic.tool.side_effects": effect.side_effects,
            }
        case Queried():
            return f"query {effect.target}", {"db.operation.name": "query", "db.namespace": effect.target}
    raise TypeError(f"{type(effect).__name__} is no call; say in streams.tracing what its span is to be")


def _llm(effect: LlmCalled) -> tuple[str, Attributes]:
    request, response = _object(effect.request), _object(effect.response)
    asked = str(request.get("model") or effect.model)
    attributes: Attributes = {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": _PROVIDERS.get(effect.provider, effect.provider),
        "gen_ai.request.model": asked,
        "gen_ai.usage.input_tokens": effect.prompt_tokens,
        "gen_ai.usage.output_tokens": effect.completion_tokens,
        "magnatronic.cost_usd": effect.cost_usd,
    }
    for field, attribute in _LLM_REQUEST.items():
        value = request.get(field)
        if isinstance(value, str | int | float):
            attributes[attribute] = value
    if response:
        attributes["gen_ai.response.model"] = effect.model
        if response.get("finish_reason"):
            attributes["gen_ai.response.finish_reasons"] = (str(response["finish_reason"]),)
    return f"chat {asked}", attributes


_LLM_REQUEST: Final = {
    "temperature": "gen_ai.request.temperature",
    "max_tokens": "gen_ai.request.max_tokens",
    "purpose": "magnatronic.purpose",
}


def _object(text: str) -> Mapping[str, Any]:
    """A recorded JSON object; an empty one for what is none, such as an encrypted field."""
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        return {}
    return value if isinstance(value, dict) else {}


def _with_traceparent(metadata: Metadata, traceparent: str) -> Metadata:
    return Metadata(
        metadata.id,
        metadata.source,
        metadata.subject,
        metadata.time,
        metadata.causation_id,
        metadata.correlation_id,
        traceparent,
        metadata.data_subjects,
    )


def _span_context(context: TraceContext, *, is_remote: bool = False) -> SpanContext:
    return SpanContext(int(context.trace_id, 16), int(context.span_id, 16), is_remote, _SAMPLED)


def _ns(moment: datetime) -> int:
    # Timestamps have microseconds; a float of seconds would blur them.
    return int(moment.timestamp()) * 1_000_000_000 + moment.microsecond * 1000
