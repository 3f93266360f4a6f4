"""A sink process: the log into an embedded ClickHouse that it alone owns; later, what the store then holds.

In: one JSON argument (:class:`SinkSettings`). Out: rows, until SIGTERM, which it obeys when all is written; with
``export`` set, all rows of the ``events`` view as a Parquet file instead, by a process of its own because the store has
one owner at a time.
"""

import json
import logging
import signal
import sys
import threading
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from schemas.codec import Codec
from sinks.clickhouse import ClickHouse, ClickHouseSink
from sinks.runner import SinkRunner
from tests.chaos.harness.worker import READY, end_with_parent

__all__ = ["SinkSettings"]

_PAGE = 200_000
_CATCH_UP_S = 600.0


@dataclass(frozen=True, slots=True)
class SinkSettings:
    """``topics`` are projected into the store at ``folder``."""

    bootstrap_servers: str
    folder: str
    topics: tuple[str, ...]
    parent: int
    export: str = ""

    def as_argument(self) -> str:
        return json.dumps(asdict(self))


def feed(settings: SinkSettings) -> int:
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    with ClickHouse(Path(settings.folder)) as store:
        runner = SinkRunner(
            ClickHouseSink(store, settings.topics),
            codec=Codec(),
            kafka={"bootstrap.servers": settings.bootstrap_servers},
            group="chaos-sink",
            instance="0",
            on_error=lambda _: ended.set(),
        )
        runner.start()
        logging.info("%s", READY)
        ended.wait()
        whole = runner.error is None and runner.wait_caught_up(_CATCH_UP_S)
        runner.stop()
        return 0 if whole and runner.error is None else 1


def export(settings: SinkSettings) -> None:
    """Every row that a reader sees, in pages: place and event id."""
    schema = pa.schema([("topic", pa.string()), ("partition", pa.int64()), ("offset", pa.int64()), ("id", pa.string())])
    with ClickHouse(Path(settings.folder)) as store, pq.ParquetWriter(settings.export, schema) as file:
        for topic in settings.topics:
            for (partition,) in store.read(
                "SELECT DISTINCT partition FROM event_log WHERE topic = {t:String}", {"t": topic}
            ):
                place = {"t": topic, "p": partition}
                first = 0
                while True:
                    rows = store.read(
                        "SELECT offset, id FROM events WHERE topic = {t:String} AND partition = {p:UInt32} "
                        "AND offset >= {first:UInt64} ORDER BY offset LIMIT {page:UInt32}",
                        {**place, "first": first, "page": _PAGE},
                    )
                    if not rows:
                        break
                    offsets, ids = zip(*rows, strict=True)
                    columns = [[topic] * len(rows), [partition] * len(rows), list(offsets), list(ids)]
                    file.write_table(pa.table(columns, schema=schema))
                    # A row too many at a page's end is seen again: doubled rows share their offset.
                    first = offsets[-1] + 1
                (counted,) = store.read(
                    "SELECT count(), uniqExact(offset) FROM events WHERE topic = {t:String} AND partition = {p:UInt32}",
                    place,
                )
                assert counted[0] == counted[1], f"{topic}[{partition}] has {counted[0] - counted[1]} rows twice"


if __name__ == "__main__":
    values = json.loads(sys.argv[1])
    chosen = SinkSettings(**{**values, "topics": tuple(values["topics"])})
    end_with_parent(chosen.parent)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if chosen.export:
        export(chosen)
    else:
        sys.exit(feed(chosen))
