"""The command demo: the whole system, shown at work.

In: nothing, or a data folder. Out: what :mod:`magnatronic.demo` describes, as it happens. Ends with 0 only if every
question was answered with citations and the replayed task decides as recorded.
"""

import contextlib
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from magnatronic.cli.options import Output, common_options, load_settings

if TYPE_CHECKING:
    from magnatronic.client import Client, Outcome
    from magnatronic.ingest import IngestReport
    from magnatronic.settings import Settings
    from magnatronic.system import RunningSystem

__all__ = ["demo"]

_TABLES = {
    "Steps": """
        SELECT
            dense_rank() OVER (ORDER BY started, task_id) AS task, splitByChar('/', step_id)[-1] AS step,
            s.objective AS objective, agent, status, round(groundedness, 2) AS grounded, work_ms, duration_ms
        FROM steps AS s
        INNER JOIN (SELECT task_id, min(assigned_at) AS started FROM steps GROUP BY task_id) AS t USING task_id
        ORDER BY task, assigned_at, step
    """,
    "Tasks": """
        SELECT objective, status, steps, llm_calls, tokens, duration_ms FROM tasks ORDER BY submitted_at
    """,
    "Language model": """
        SELECT provider, model, count() AS calls, sum(prompt_tokens) AS prompt_tokens,
            sum(completion_tokens) AS completion_tokens, sum(cost_usd) AS cost_usd,
            round(quantile(0.5)(latency_ms), 1) AS p50_ms
        FROM llm_calls GROUP BY provider, model ORDER BY calls DESC
    """,
}


@click.command()
@common_options
def demo(*, data_dir: Path | None, out: Output) -> int:
    """Start everything on a fresh folder, ingest the READMEs of what is installed, and ask questions about them.

    Needs no key, no Java and no Docker. With --data-dir the system's data stays there for `magnatronic up`.
    """
    from magnatronic.demo import MemoryMeter
    from magnatronic.logs import log_to

    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        folder = data_dir or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="magnatronic-demo-")))
        settings = load_settings(folder)
        log_to(settings.data_dir / "logs" / "magnatronic.log", settings.log_level)
        meter = stack.enter_context(MemoryMeter())
        return _Demo(settings, out, meter, began, kept=data_dir is not None).run()


class _Demo:
    def __init__(self, settings: "Settings", out: Output, meter: Any, began: float, *, kept: bool) -> None:
        self._settings = settings
        self._out = out
        self._meter = meter
        self._began = began
        self._kept = kept
        self._result: dict[str, Any] = {}

    def run(self) -> int:
        from magnatronic.client import Client
        from magnatronic.system import RunningSystem

        self._head("1. The system starts: Apache Kafka, ClickHouse, Milvus, an embedding model, six agents")
        first = not self._kafka_is_cached()
        if first:
            self._say("the first start fetches Kafka's jars (44 MB)")
        with RunningSystem(self._settings, on_progress=lambda what: self._say(f"starting {what}")) as system:
            ready = self._elapsed()
            self._say(f"ready: Kafka at {system.info.bootstrap_servers}, answers by {system.info.provider}")
            with Client(system.kafka, name="demo", codec=None) as client:
                ingested = self._ingest(client, system)
                outcomes = self._ask(client)
                tables = self._tables()
                replayed = self._replay(system, outcomes[-1])
                events = self._events()
            system.check()
        answered = sum(outcome.ok and bool(outcome.citations) for outcome in outcomes)
        ok = answered == len(outcomes) and replayed.ok
        self._close(ingested, answered, len(outcomes), replayed.ok, events, ready)
        if self._out.as_json:
            from magnatronic.cli.work import outcome_as_dict

            self._out.json(
                {
                    **self._result,
                    "ok": ok,
                    "outcomes": [outcome_as_dict(outcome) for outcome in outcomes],
                    "tables": tables,
                    "replay": replayed.as_json(),
                }
            )
        return 0 if ok else 1

    # Steps

    def _ingest(self, client: "Client", system: "RunningSystem") -> "IngestReport":
        from magnatronic.cli.work import show_progress
        from magnatronic.control import call
        from magnatronic.demo import installed_documents
        from magnatronic.ingest import ingest

        documents = installed_documents()
        characters = sum(len(document.text) for document in documents)
        self._head(f"2. {len(documents)} real READMEs, {characters / 1e6:.1f} million characters, become vectors")
        with (
            self._lines_of_progress(len(documents)) as lines,
            show_progress(self._out, "documents", len(documents)) as progress,
        ):

            def update(report: "IngestReport") -> None:
                progress(report)
                lines(report)
                system.check()

            report = ingest(client, documents, on_progress=update)
        call(self._settings.data_dir, "catch_up")
        for document, reason in report.failed.items():
            self._say(f"failed: {document}: {reason}")
        self._say(f"{report.indexed} documents in {report.chunks} chunks, in {report.seconds:.1f} s")
        return report

    def _ask(self, client: "Client") -> list["Outcome"]:
        from magnatronic.cli.work import ask_live, print_answer
        from magnatronic.demo import QUESTIONS

        self._head(f"3. {len(QUESTIONS)} questions; every step of every answer is an event on Kafka")
        outcomes = []
        for question in QUESTIONS:
            self._print(f"\n[bold]{question}[/]")
            outcome = ask_live(client, question, self._out, timeout=60)
            outcomes.append(outcome)
            if self._out.as_json:
                continue
            if outcome.ok:
                print_answer(outcome, self._out)
            else:
                self._say(f"no answer: {outcome.reason}")
        return outcomes

    def _tables(self) -> dict[str, Any]:
        from magnatronic.cli.inspect import run_query

        self._head("4. SQL over what happened: every step and its timings, from ClickHouse")
        tables = {}
        for name, sql in _TABLES.items():
            answer = run_query(sql, data_dir=self._settings.data_dir, wait=True)
            tables[name] = [dict(zip(answer["columns"], row, strict=True)) for row in answer["rows"]]
            if not self._out.as_json:
                self._out.table(answer["columns"], answer["rows"], title=name)
        return tables

    def _replay(self, system: "RunningSystem", outcome: "Outcome") -> Any:
        from magnatronic.audits import audit_history
        from magnatronic.cli.audit import print_report
        from magnatronic.discovery import FoundSystem, make_codec
        from magnatronic.histories import History
        from replay.kafka_log import KafkaLog
        from replay.selection import Selection

        self._head("5. The last task is decided again from the log, twice, and every output compared byte for byte")
        found = FoundSystem(self._settings, dict(system.kafka))
        with History(KafkaLog(system.kafka), make_codec(self._settings), self._settings, found) as history:
            report = audit_history(history, Selection(tasks=frozenset({outcome.task_id})))
        if not self._out.as_json:
            print_report(report, self._out)
        return report

    def _events(self) -> int:
        from magnatronic.cli.inspect import run_query

        answer = run_query("SELECT count() FROM events", data_dir=self._settings.data_dir, wait=True)
        return int(answer["rows"][0][0])

    def _close(
        self, ingested: "IngestReport", answered: int, asked: int, replayed: bool, events: int, ready: float
    ) -> None:
        seconds = self._elapsed()
        peak = self._meter.peak / 2**30
        self._result = {
            "documents": ingested.indexed,
            "chunks": ingested.chunks,
            "events": events,
            "answered": answered,
            "asked": asked,
            "ready_seconds": round(ready, 1),
            "indexing_seconds": round(ingested.seconds, 1),
            "seconds": round(seconds, 1),
            "peak_gib": round(peak, 2),
        }
        self._head("Done")
        self._say(
            f"{answered} of {asked} questions answered with citations; replay {'identical' if replayed else 'DIFFERS'}"
        )
        self._say(
            f"{ingested.indexed} documents, {ingested.chunks} chunks, {events:,} events in {seconds:.0f} s "
            f"(start {ready:.0f} s, indexing {ingested.seconds:.0f} s); at most {peak:.2f} GiB of memory, all processes"
        )
        folder = f" --data-dir {self._settings.data_dir}" if self._kept else ""
        self._say("Next:")
        for line in (
            f"  magnatronic up{folder}",
            f"  magnatronic ingest{folder} your/documents",
            f'  magnatronic ask{folder} "…"',
            f'  magnatronic query{folder} "select * from steps"',
        ):
            self._say(line)

    # Telling

    def _kafka_is_cached(self) -> bool:
        from magnatronic.broker.artifacts import cache_folder

        return not self._settings.embedded_kafka or (cache_folder() / "jars").is_dir()

    def _elapsed(self) -> float:
        return time.monotonic() - self._began

    def _head(self, text: str) -> None:
        self._print(f"\n[bold cyan]{text}[/]  [dim]({self._elapsed():.0f} s)[/]")

    def _say(self, text: str) -> None:
        if not self._out.as_json:
            self._out.console.print(text, markup=False)

    def _print(self, markup: str) -> None:
        if not self._out.as_json:
            self._out.console.print(markup)

    @contextlib.contextmanager
    def _lines_of_progress(self, total: int) -> Iterator[Any]:
        """A line each ten seconds where no bar can be drawn."""
        last = time.monotonic()

        def update(report: "IngestReport") -> None:
            nonlocal last
            if not self._out.progress.is_terminal and time.monotonic() - last > 10:
                last = time.monotonic()
                self._say(f"{report.indexed} of {total} documents, {report.chunks} chunks")

        yield update
