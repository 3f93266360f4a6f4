"""Every metric's name, and the collector that reads processors' figures when Prometheus asks.

In: processors' counters, which they keep anyway, and what :class:`~streams.readiness.Readiness` saw last. Out: metric
families for a prometheus_client registry. Nothing is counted twice and nothing waits: a scrape reads plain numbers from
another thread. Names follow Prometheus: base units, ``_total`` for counters; labels are bounded by what is deployed
(agents, instances, partitions), never by what flows.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from enum import Enum
from typing import Final, Literal, NamedTuple, Protocol

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from streams.histogram import Histogram
from streams.readiness import Cause, Progress
from streams.stats import Stats

__all__ = ["Definition", "Families", "MetricName", "ProcessorCollector", "ProcessorFigures"]

_PROCESSOR: Final = ("agent", "instance")
_SINK: Final = ("sink", "instance")
_PRIORITIES: Final = ("high", "normal", "low")


class Definition(NamedTuple):
    """What a metric is: its name without ``_total``, its type, its labels, and what it says."""

    name: str
    type: Literal["counter", "gauge", "histogram"]
    labels: tuple[str, ...]
    help: str


class MetricName(Enum):
    """Every metric of Magnatronic: those of agents' processors, of sinks, and of the process."""

    # What a processor did, as far as it is committed.
    EVENTS = Definition(
        "magnatronic_processor_events", "counter", _PROCESSOR, "Events handled or dead-lettered, and committed"
    )
    OUTPUTS = Definition("magnatronic_processor_outputs", "counter", _PROCESSOR, "Events emitted and committed")
    SKIPPED = Definition(
        "magnatronic_processor_skipped", "counter", _PROCESSOR, "Events of its topics that are not for this agent"
    )
    DEAD_LETTERS = Definition("magnatronic_processor_dead_letters", "counter", _PROCESSOR, "Events dead-lettered")
    # Attempts, not events: one event may fail several times and then succeed.
    FAILURES = Definition("magnatronic_processor_failures", "counter", _PROCESSOR, "Failed attempts of handlers")
    RETRIES = Definition(
        "magnatronic_processor_retries", "counter", _PROCESSOR, "Failed attempts that are followed by another"
    )
    CANCELLED = Definition("magnatronic_processor_cancelled", "counter", _PROCESSOR, "Steps stopped by request")
    ERASED = Definition(
        "magnatronic_processor_erased", "counter", _PROCESSOR, "Events refused since a data subject was forgotten"
    )
    TIMERS = Definition("magnatronic_processor_timers", "counter", _PROCESSOR, "Timers fired")
    # What a crash would not lose though its step still runs.
    JOURNALLED = Definition(
        "magnatronic_processor_journalled", "counter", _PROCESSOR, "Effects committed before their step was done"
    )
    # outcome is committed or aborted. An abort now and then belongs to rebalances.
    TRANSACTIONS = Definition(
        "magnatronic_processor_transactions", "counter", (*_PROCESSOR, "outcome"), "Kafka transactions by outcome"
    )
    # Of language models, as providers count and charge.
    TOKENS = Definition("magnatronic_processor_tokens", "counter", _PROCESSOR, "Prompt and completion tokens used")
    COST = Definition("magnatronic_processor_cost_dollars", "counter", _PROCESSOR, "Cost of calls in US dollars")
    # change is assigned, revoked or lost (taken while this process was thought dead).
    PARTITION_CHANGES = Definition(
        "magnatronic_processor_partition_changes",
        "counter",
        (*_PROCESSOR, "change"),
        "Partitions that came and went in rebalances",
    )
    # What it holds at the moment.
    IN_FLIGHT = Definition(
        "magnatronic_processor_in_flight", "gauge", _PROCESSOR, "Events fetched whose results are not committed"
    )
    HANDLERS = Definition("magnatronic_processor_handlers", "gauge", _PROCESSOR, "Handlers that run or wait for a call")
    # They wait for their next attempt in the changelog; their offsets are finished.
    PARKED = Definition("magnatronic_processor_parked", "gauge", _PROCESSOR, "Events parked until their next attempt")
    LAG = Definition("magnatronic_processor_lag", "gauge", _PROCESSOR, "Records between the finished ones and the end")
    PARTITIONS = Definition("magnatronic_processor_partitions", "gauge", _PROCESSOR, "Partitions owned")
    # 1 or 0; /ready says why it is 0.
    READY = Definition("magnatronic_processor_ready", "gauge", _PROCESSOR, "Whether the processor is ready")
    # Durations. Latencies are samples, some of each transaction's, so their count is not that of events.
    LATENCY = Definition(
        "magnatronic_processor_latency_seconds",
        "histogram",
        _PROCESSOR,
        "From fetched to committed; a sample",
    )
    COMMIT = Definition("magnatronic_processor_commit_seconds", "histogram", _PROCESSOR, "Kafka transactions' duration")
    HANDLER = Definition(
        "magnatronic_processor_handler_seconds",
        "histogram",
        _PROCESSOR,
        "Attempts of handlers, calls included; a sample",
    )
    # priority is high, normal or low: what waiting for a free handler costs each.
    WAIT = Definition(
        "magnatronic_processor_wait_seconds",
        "histogram",
        (*_PROCESSOR, "priority"),
        "From fetched to the first attempt; a sample",
    )
    RESTORE = Definition(
        "magnatronic_processor_restore_seconds", "gauge", _PROCESSOR, "Reading the state of partitions, the last time"
    )
    # Of each owned partition, as last looked at (once a second).
    PARTITION_OFFSET = Definition(
        "magnatronic_partition_unfinished_offset",
        "gauge",
        (*_PROCESSOR, "topic", "partition"),
        "The first offset that is not finished",
    )
    PARTITION_IN_FLIGHT = Definition(
        "magnatronic_partition_in_flight", "gauge", (*_PROCESSOR, "topic", "partition"), "Offsets begun, not finished"
    )
    # Grows while one event keeps its partition; readiness has a bound on it.
    PARTITION_STALLED = Definition(
        "magnatronic_partition_stalled_seconds",
        "gauge",
        (*_PROCESSOR, "topic", "partition"),
        "For how long the first unfinished offset has been the same",
    )
    # What sinks wrote to ClickHouse and Milvus.
    SINK_RECORDS = Definition("magnatronic_sink_records", "counter", _SINK, "Records written to the store")
    SINK_LAG = Definition("magnatronic_sink_lag", "gauge", _SINK, "Records between the written ones and the end")
    SINK_PARTITIONS = Definition("magnatronic_sink_partitions", "gauge", _SINK, "Partitions assigned")
    SINK_READY = Definition("magnatronic_sink_ready", "gauge", _SINK, "Whether the sink reads and its store takes")
    SINK_BATCH = Definition("magnatronic_sink_batch_seconds", "histogram", _SINK, "Writing one batch to the store")
    # Of the process.
    READY_PROCESS = Definition("magnatronic_ready", "gauge", (), "Whether the whole process is ready, as /ready says")
    LOOP_DELAY = Definition(
        "magnatronic_event_loop_delay_seconds", "gauge", (), "How late the event loop's last timer was, or is by now"
    )


class Families:
    """Metric families by name, made when they are first given a sample."""

    def __init__(self) -> None:
        self._families: dict[MetricName, Metric] = {}

    def add(self, metric: MetricName, labels: Sequence[str], value: float) -> None:
        """One sample of a counter or gauge; ``labels`` are values in the definition's order."""
        family = self._family(metric)
        assert isinstance(family, CounterMetricFamily | GaugeMetricFamily)
        family.add_metric(labels, value)

    def add_histogram(self, metric: MetricName, labels: Sequence[str], histogram: Histogram) -> None:
        """One histogram."""
        family = self._family(metric)
        assert isinstance(family, HistogramMetricFamily)
        buckets, total = histogram.cumulative()
        family.add_metric(labels, buckets, total)

    def _family(self, metric: MetricName) -> Metric:
        family = self._families.get(metric)
        if family is None:
            family = self._families[metric] = _MAKERS[metric.value.type](metric.value)
        return family

    def __iter__(self) -> Iterator[Metric]:
        """The families that have a sample."""
        return iter(self._families.values())


_MAKERS: Final[Mapping[str, Callable[[Definition], Metric]]] = {
    "counter": lambda made: CounterMetricFamily(made.name, made.help, labels=made.labels),
    "gauge": lambda made: GaugeMetricFamily(made.name, made.help, labels=made.labels),
    "histogram": lambda made: HistogramMetricFamily(made.name, made.help, labels=made.labels),
}


class ProcessorFigures(Protocol):
    """What a scrape reads of one processor, on another thread than the one that writes it."""

    @property
    def agent(self) -> str:
        """Its agent's name."""

    @property
    def instance(self) -> str:
        """Its slot."""

    @property
    def stats(self) -> Stats:
        """Its counters."""

    @property
    def handlers(self) -> int:
        """How many of its handlers run."""

    @property
    def progress(self) -> Sequence[Progress]:
        """Its partitions as last looked at."""

    @property
    def causes(self) -> Sequence[Cause]:
        """Why it is not ready; empty while it is."""


class ProcessorCollector(Collector):
    """Reads the processors that ``processors`` gives at each scrape."""

    def __init__(self, processors: Callable[[], Iterable[ProcessorFigures]]) -> None:
        self._processors = processors

    def collect(self) -> Iterator[Metric]:
        """All families of processors."""
        families = Families()
        for processor in self._processors():
            _add_processor(families, processor)
        return iter(families)


def _add_processor(families: Families, processor: ProcessorFigures) -> None:
    name = MetricName
    stats, at = processor.stats, (processor.agent, processor.instance)
    for metric, value in (
        (name.EVENTS, stats.events_in),
        (name.OUTPUTS, stats.events_out),
        (name.SKIPPED, stats.skipped),
        (name.DEAD_LETTERS, stats.dead_letters),
        (name.FAILURES, stats.failures),
        (name.RETRIES, stats.retries),
        (name.CANCELLED, stats.cancelled),
        (name.ERASED, stats.erased),
        (name.TIMERS, stats.timers),
        (name.JOURNALLED, stats.journalled),
        (name.PARKED, stats.parked),
        (name.RESTORE, stats.restore_s),
        (name.TOKENS, stats.tokens),
        (name.COST, stats.cost_usd),
        (name.IN_FLIGHT, stats.in_flight),
        (name.HANDLERS, processor.handlers),
        (name.LAG, stats.lag),
        (name.PARTITIONS, len(processor.progress)),
        (name.READY, not processor.causes),
    ):
        families.add(metric, at, float(value))
    families.add(name.TRANSACTIONS, (*at, "committed"), stats.transactions)
    families.add(name.TRANSACTIONS, (*at, "aborted"), stats.aborted)
    families.add_histogram(name.LATENCY, at, stats.latency_histogram)
    families.add_histogram(name.COMMIT, at, stats.commit_histogram)
    families.add_histogram(name.HANDLER, at, stats.handler_histogram)
    for priority, histogram in zip(_PRIORITIES, stats.wait_histograms, strict=True):
        families.add_histogram(name.WAIT, (*at, priority), histogram)
    for change, count in (("assigned", stats.assigned), ("revoked", stats.revoked), ("lost", stats.lost)):
        families.add(name.PARTITION_CHANGES, (*at, change), count)
    for each in processor.progress:
        place = (*at, each.topic, str(each.partition))
        if each.unfinished >= 0:
            families.add(name.PARTITION_OFFSET, place, each.unfinished)
        families.add(name.PARTITION_IN_FLIGHT, place, each.in_flight)
        families.add(name.PARTITION_STALLED, place, each.since_s)
