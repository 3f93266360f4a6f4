"""The sinks' rates, beside their stores' raw clients on the same rows.

In: a broker whose topic of tasks is filled. Out: rows/s of the raw client (rows ready-made, one insert a
batch), of the sink's ``write`` (events to rows, insert, offsets) and of the sink fed from Kafka by its runner (read,
decode, write), and the ratios. Rounds are interleaved. Stored rows are counted at the end.
"""

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import clickhouse_connect
from pymilvus import DataType, MilvusClient

from bench.figures import Figure, ratio
from bench.kafka import make_topics, produce
from bench.samples import DIMENSIONS, chunk, metadata_for, record_of, step_completed, submission
from schemas.codec import Codec
from schemas.events import ChunkEmbedded, Event
from schemas.metadata import Envelope
from schemas.topics import topic_name
from sinks.clickhouse import ClickHouse, ClickHouseSink
from sinks.clickhouse.rows import to_table
from sinks.milvus.naming import document_key
from sinks.milvus.sink import MilvusSink
from sinks.milvus.store import MilvusStore
from sinks.runner import SinkRunner
from sinks.sink import Sink, SinkRecord

__all__ = ["measure_clickhouse", "measure_milvus"]

CLICKHOUSE: Final = "ClickHouse sink"
MILVUS: Final = "Milvus sink"
EMBEDDINGS: Final = "embeddings"
BATCH: Final = 5_000
FLUSH: Final = 1_000
"""Rows between two flushes of Milvus Lite, in the sink and beside it."""


def sink_records(codec: Codec, events: Sequence[Event], first_offset: int) -> list[SinkRecord]:
    """``events`` as a sink gets them, at consecutive offsets of partition 0 of a topic that is not in Kafka."""
    records = [
        replace(record_of(codec, event, first_offset + number), topic="bench.direct")
        for number, event in enumerate(events)
    ]
    return [SinkRecord(record, codec.decode(record)) for record in records]


def write_all(sink: Sink, records: Sequence[SinkRecord], batch: int) -> float:
    """Rows/s of ``sink.write`` over ``records`` in batches of ``batch``."""
    start = time.perf_counter()
    for first in range(0, len(records), batch):
        part = records[first : first + batch]
        last = part[-1].record
        sink.write(part, {(last.topic, last.partition): last.offset + 1})
    return len(records) / (time.perf_counter() - start)


def from_kafka(sink: Sink, bootstrap_servers: str, group: str, expected: int) -> float:
    """Records/s of ``sink`` fed by its runner, from a tenth of ``expected`` records to the last.

    Raises:
        RuntimeError: it took fewer or more records, or more than a minute.
    """
    runner = SinkRunner(sink, codec=Codec(), kafka={"bootstrap.servers": bootstrap_servers}, group=group)
    runner.start()
    try:
        started = _wait_for(lambda: runner.records_written >= expected // 10, runner)
        first = runner.records_written
        ended = _wait_for(lambda: runner.records_written >= expected, runner)
        if runner.records_written != expected:
            raise RuntimeError(f"{sink.name} took {runner.records_written} records, {expected} were there")
        return (expected - first) / (ended - started)
    finally:
        runner.stop()


def _wait_for(condition: Callable[[], bool], runner: SinkRunner) -> float:
    deadline = time.monotonic() + 60
    while not condition():
        if runner.error is not None or time.monotonic() > deadline:
            raise RuntimeError(f"sink {runner.sink.name} took {runner.records_written} records: {runner.error}")
        time.sleep(0.005)
    return time.perf_counter()


def measure_clickhouse(bootstrap_servers: str, *, tasks: int, rows: int, rounds: int) -> list[Figure]:
    """Figures of the ClickHouse sink: ``rows`` rows a round, half tasks and half results; ``tasks`` are in Kafka.

    Raises:
        RuntimeError: rows are missing from the store.
    """
    codec = Codec()
    with tempfile.TemporaryDirectory(prefix="bench-") as folder, ClickHouse(Path(folder)) as clickhouse:
        sink = ClickHouseSink(clickhouse, [topic_name(submission(0))])
        sink.open()
        raw = clickhouse_connect.get_client(interface="chdb", path=folder, database=clickhouse.database)
        raw.command("CREATE TABLE raw_log AS event_log")
        events: list[Event] = []
        for number in range(rows // 2):
            events += [submission(number), step_completed(number, passages=2)]
        sink_rates, raw_rates = [], []
        # The first round warms the engine up and is not counted.
        for number in range(rounds + 1):
            records = sink_records(codec, events, 10_000_000 * (number + 1))
            tables = [to_table(records[first : first + BATCH]) for first in range(0, len(records), BATCH)]
            start = time.perf_counter()
            for table in tables:
                raw.insert_arrow("raw_log", table)
            raw_rates.append(len(records) / (time.perf_counter() - start))
            sink_rates.append(write_all(sink, records, BATCH))
        from_log = from_kafka(sink, bootstrap_servers, "bench-clickhouse", tasks)
        raw.close()
        (stored,) = clickhouse.read("SELECT count() FROM events")[0]
        if stored != tasks + (rounds + 1) * len(events):
            raise RuntimeError(f"ClickHouse holds {stored} rows, {tasks + (rounds + 1) * len(events)} were written")
    raw_rates, sink_rates = raw_rates[1:], sink_rates[1:]
    return [
        Figure(CLICKHOUSE, "raw client, Arrow insert", "rows/s", tuple(raw_rates), f"batches of {BATCH:,}"),
        Figure(CLICKHOUSE, "sink, events to rows", "rows/s", tuple(sink_rates), "with offsets"),
        Figure(CLICKHOUSE, "sink, from Kafka", "rows/s", (from_log,), "read, decode, write"),
        ratio(CLICKHOUSE, "sink / raw client", sink_rates, raw_rates, "more is better"),
    ]


def measure_milvus(bootstrap_servers: str, *, chunks: int, rounds: int) -> list[Figure]:
    """Figures of the Milvus sink: ``chunks`` chunks a round, each with a vector of 384 floats.

    Raises:
        RuntimeError: rows are missing from the store.
    """
    codec = Codec()
    make_topics(bootstrap_servers, [EMBEDDINGS], 4)
    in_log = [chunk(number) for number in range(chunks)]
    produce(bootstrap_servers, EMBEDDINGS, [Envelope(event, metadata_for(event)) for event in in_log])
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        raw = MilvusClient(str(Path(folder) / "raw.db"))
        _create_raw(raw)
        store = MilvusStore(Path(folder) / "sink.db", flush_rows=FLUSH)
        store.open()
        sink = MilvusSink(store)
        sink.open()
        sink_rates, raw_rates = [], []
        for number in range(1, rounds + 1):
            events = [chunk(number * chunks + place) for place in range(chunks)]
            raw_rates.append(_upsert_raw(raw, events))
            sink_rates.append(write_all(sink, sink_records(codec, events, number * chunks), FLUSH))
        raw.close()
        sink.close()
        from_log = from_kafka(sink, bootstrap_servers, "bench-milvus", chunks)
        (collection,) = store.collections()
        stored, written = store.count(collection), chunks * (rounds + 1)
        store.close()
        if stored != written:
            raise RuntimeError(f"Milvus holds {stored} chunks, {written} were written")
    return [
        Figure(MILVUS, "raw client, upsert", "rows/s", tuple(raw_rates), f"{FLUSH:,} a call, then a flush"),
        Figure(MILVUS, "sink, events to rows", "rows/s", tuple(sink_rates), "with offsets and flushes"),
        Figure(MILVUS, "sink, from Kafka", "rows/s", (from_log,), "read, decode, write"),
        ratio(MILVUS, "sink / raw client", sink_rates, raw_rates, "more is better"),
    ]


def _create_raw(client: Any) -> None:
    """A collection like the sink's own."""
    schema = client.create_schema(auto_id=False, enable_dynamic_field=False)
    schema.add_field("chunk_id", DataType.VARCHAR, is_primary=True, max_length=64)
    schema.add_field("document_key", DataType.VARCHAR, max_length=64)
    schema.add_field("ordinal", DataType.INT64)
    for name in ("document_id", "title", "heading", "source", "text"):
        schema.add_field(name, DataType.VARCHAR, max_length=65_535)
    schema.add_field("vector", DataType.FLOAT_VECTOR, dim=DIMENSIONS)
    index = client.prepare_index_params()
    index.add_index("vector", index_type="FLAT", metric_type="COSINE")
    index.add_index("document_key", index_type="INVERTED")
    client.create_collection("raw", schema=schema, index_params=index)
    client.load_collection("raw")


def _upsert_raw(client: Any, events: Sequence[ChunkEmbedded]) -> float:
    """Rows/s of upserts of ready-made rows."""
    fields = ("chunk_id", "ordinal", "document_id", "title", "heading", "source", "text", "vector")
    rows = [
        {name: getattr(event, name) for name in fields} | {"document_key": document_key(event.document_id)}
        for event in events
    ]
    start = time.perf_counter()
    for first in range(0, len(rows), FLUSH):
        client.upsert("raw", rows[first : first + FLUSH])
        client.flush("raw")
    return len(rows) / (time.perf_counter() - start)
