"""The sinks' rates, beside their stores' raw clients on the same rows.

In: a broker whose topic of tasks is filled, and folders. Out: rows/s of the raw client (rows ready-made, one insert a
batch), of the sink's ``write`` (events to rows, insert, offsets) and of the sink fed from Kafka by its runner (read,
decode, write), and the ratios. Rounds are interleaved. Stored rows are counted at the end.
"""

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import clickhouse_connect

from bench.figures import Figure, ratio
from bench.samples import record_of, step_completed, submission
from schemas.codec import Codec
from schemas.events import Event
from schemas.topics import topic_name
from sinks.clickhouse import ClickHouse, ClickHouseSink
from sinks.clickhouse.rows import to_table
from sinks.runner import SinkRunner
from sinks.sink import Sink, SinkRecord

__all__ = ["measure_clickhouse"]

CLICKHOUSE: Final = "ClickHouse sink"
BATCH: Final = 5_000


def sink_records(codec: Codec, events: Sequence[Event], first_offset: int) -> list[SinkRecord]:
    """``events`` as a sink gets them, at consecutive offsets of partition 0."""
    records = [record_of(codec, event, first_offset + number) for number, event in enumerate(events)]
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
