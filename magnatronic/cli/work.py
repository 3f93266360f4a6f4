"""Commands that give the system work and follow it: ingest, submit, ask, watch.

In: arguments. Out: events on the log through :class:`magnatronic.client.Client`, and what comes of them.
"""

import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from magnatronic.cli.options import Output, client_for, common_options, load_settings
from magnatronic.errors import WaitTimeoutError, WrongInputError

if TYPE_CHECKING:
    from magnatronic.client import Client, Outcome
    from magnatronic.follow import Observed
    from magnatronic.ingest import IngestReport

__all__ = ["ask", "ingest", "print_answer", "show_progress", "submit", "watch"]

_PRIORITIES = ("high", "normal", "low")


class _Deadline(click.ParamType):
    """Seconds from now (``90s``, ``15m``, ``2h``), or an ISO time; one without zone is local."""

    name = "when"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> datetime:
        if isinstance(value, datetime):
            return value
        text = str(value).strip()
        unit = {"s": 1, "m": 60, "h": 3600, "d": 86_400}.get(text[-1:])
        try:
            if unit is not None:
                return datetime.now(UTC) + timedelta(seconds=float(text[:-1]) * unit)
            return datetime.fromisoformat(text).astimezone(UTC)
        except (ValueError, OverflowError):
            self.fail(f"{text!r} is no time; write 90s, 15m, 2h, or 2030-01-31T12:00:00Z", param, ctx)


_data_subject = click.option(
    "--data-subject",
    metavar="NAME",
    help="Whom it is about: what is personal is sealed until `magnatronic forget NAME`.",
)


def _task_options(function: Any) -> Any:
    for option in (
        click.option("--priority", type=click.Choice(_PRIORITIES), default="normal", show_default=True),
        click.option("--deadline", type=_Deadline(), help="When it expires: 90s, 15m, 2h, or an ISO time."),
        click.option("--task-id", help="Its id; submitted again it makes no second task. Default: a new one."),
        click.option(
            "--plan",
            type=click.Path(exists=True, dir_okay=False, path_type=Path),
            help="A JSON file with the steps to take, instead of the decomposer's plan.",
        ),
        _data_subject,
    ):
        function = option(function)
    return function


def _task(
    objective: str,
    priority: str,
    deadline: datetime | None,
    task_id: str | None,
    plan: Path | None,
    data_subject: str | None,
) -> dict[str, Any]:
    """Arguments for the client.

    Raises:
        WrongInputError: the objective or id is empty, or the plan is no JSON.
    """
    if not objective.strip():
        raise WrongInputError("the objective is empty; say what is to be done")
    if task_id is not None and not 1 <= len(task_id) <= 200:
        raise WrongInputError("a task id has 1 to 200 characters")
    parameters = {}
    if plan is not None:
        try:
            parameters["plan"] = json.dumps(json.loads(plan.read_text(encoding="utf-8")))
        except (ValueError, OSError) as error:
            raise WrongInputError(f"{plan} is no JSON: {error}") from None
    return {
        "priority": priority,
        "deadline": deadline,
        "task_id": task_id,
        "parameters": parameters,
        "data_subject": data_subject,
    }


@click.command()
@click.argument("objective")
@_task_options
@common_options
def submit(objective: str, *, data_dir: Path | None, out: Output, **options: Any) -> None:
    """Submit a task and print its id; `magnatronic watch --task ID` follows it."""
    arguments = _task(objective, **options)
    with client_for(data_dir) as client:
        task_id = client.submit(objective, **arguments)
    if out.as_json:
        out.json({"task_id": task_id})
    else:
        click.echo(task_id)


@click.command()
@click.argument("question")
@_task_options
@click.option("--timeout", type=click.FloatRange(min=0.1), default=120.0, show_default=True, help="Seconds to wait.")
@click.option("--quiet", "-q", is_flag=True, help="Only the answer.")
@common_options
def ask(question: str, *, timeout: float, quiet: bool, data_dir: Path | None, out: Output, **options: Any) -> int:
    """Submit QUESTION, follow the task live, and print the answer with its citations.

    Ends with 0 when the task was completed, with 1 when it failed, expired, or took too long.
    """
    arguments = _task(question, **options)
    with client_for(data_dir) as client:
        out.progress.quiet = out.as_json or quiet
        outcome = ask_live(client, question, out, timeout=timeout, **arguments)
    if out.as_json:
        out.json(outcome_as_dict(outcome))
    elif outcome.ok:
        print_answer(outcome, out)
    else:
        click.echo(f"magnatronic: task {outcome.task_id}: {_ending(outcome)}", err=True)
    return 0 if outcome.ok else 1


def ask_live(client: "Client", question: str, out: Output, *, timeout: float, **arguments: Any) -> "Outcome":
    """Ask, showing the task's steps as they go."""
    from magnatronic.cli.describe import describe
    from schemas.events import Effect, TaskSubmitted

    began: list[datetime] = []
    status = out.progress.status("submitting") if out.progress.is_terminal else contextlib.nullcontext()

    def show(observed: "Observed") -> None:
        began[:] = began or [observed.time]
        after = (observed.time - began[0]).total_seconds()
        if not isinstance(observed.event, (TaskSubmitted, Effect)):
            out.progress.print(f"[dim]{after:7.2f} s[/]  {observed.type:<14} ", end="", markup=True)
            out.progress.print(describe(observed), markup=False)
        if hasattr(status, "update"):
            status.update(observed.type)

    with status:
        return client.ask(question, timeout=timeout, on_event=show, settle=0.1, **arguments)


def outcome_as_dict(outcome: "Outcome") -> dict[str, Any]:
    """The outcome as JSON can hold it."""
    return {
        "task_id": outcome.task_id,
        "outcome": type(outcome.event).__name__,
        "ok": outcome.ok,
        "answer": outcome.answer,
        "reason": outcome.reason,
        "groundedness": getattr(outcome.event, "groundedness", None),
        "citations": [citation.model_dump(mode="json") for citation in outcome.citations],
        "events": [{"time": each.time.isoformat(), "topic": each.topic, "type": each.type} for each in outcome.events],
    }


def _ending(outcome: "Outcome") -> str:
    return f"{type(outcome.event).__name__.removeprefix('Task').lower()}: {outcome.reason}"


def print_answer(outcome: "Outcome", out: Output) -> None:
    """The answer, then where each marker points."""
    from rich.text import Text

    from magnatronic.cli.describe import shorten

    out.console.print(Text(outcome.answer))
    if outcome.citations:
        out.console.print()
    for citation in outcome.citations:
        place = " › ".join(part for part in (citation.title, citation.heading) if part)
        line = (f"  [{citation.marker}] ", "bold"), shorten(place, 110), (f"  {citation.source}", "dim")
        out.console.print(Text.assemble(*line))


@click.command()
@click.option("--task", "task_id", help="One task, from its submission to its outcome.")
@click.option("--topic", "topics", multiple=True, help="Only this topic; repeat it for more; '*' is all of them.")
@click.option("--timeout", type=click.FloatRange(min=0.1), help="Give up after so many seconds without an event.")
@common_options
def watch(
    *, task_id: str | None, topics: Sequence[str], timeout: float | None, data_dir: Path | None, out: Output
) -> None:
    """Show events as they happen, one line each: of one task, or from now on all that concern tasks."""
    from magnatronic.cli.describe import one_line

    chosen = _chosen_topics(topics)
    # A task's history has an end, so missing it is a failure; the stream of all is just watched for so long.
    end = contextlib.suppress(WaitTimeoutError) if task_id is None else contextlib.nullcontext()
    with client_for(data_dir) as client, end:
        for observed in client.watch(task_id, topics=chosen, timeout=timeout):
            if out.as_json:
                out.json(observed.as_dict())
            else:
                click.echo(one_line(observed))
            sys.stdout.flush()


def _chosen_topics(names: Sequence[str]) -> list[str] | None:
    from schemas.topics import TOPICS, all_topics

    if not names:
        return None
    chosen: dict[str, None] = {}
    for name in names:
        # A family's name stands for its topics of all priorities and capabilities.
        family = next((topic.names() for topic in TOPICS if topic.name == name), ())
        matching = tuple(all_topics()) if name == "*" else family or ((name,) if name in all_topics() else ())
        if not matching:
            raise WrongInputError(f"there is no topic {name}; `magnatronic topics` lists them")
        chosen.update(dict.fromkeys(matching))
    return list(chosen)


@click.command()
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--wait/--no-wait", default=True, help="Wait until all can be found (default), or only submit them.")
@click.option(
    "--timeout", type=click.FloatRange(min=1), default=120.0, show_default=True, help="Seconds without any progress."
)
@_data_subject
@common_options
def ingest(
    paths: Sequence[Path],
    *,
    wait: bool,
    timeout: float,
    data_subject: str | None,
    data_dir: Path | None,
    out: Output,
) -> int:
    """Add the documents in PATHS: files, and folders with all that is in them.

    A file that was ingested before is replaced. Ends with 1 when a file was named and can't be read, or failed.
    """
    from magnatronic.control import call
    from magnatronic.ingest import IngestReport, find_files, load_file
    from magnatronic.ingest import ingest as ingest_documents

    files, skipped = find_files(paths)
    report = IngestReport(found=len(files), skipped=skipped)
    if not files and not skipped:
        raise WrongInputError("there is nothing to ingest: no .md .txt .html .rst or .pdf in what you name")
    with client_for(data_dir) as client, show_progress(out, "documents", len(files)) as progress:
        ingest_documents(
            client,
            map(load_file, files),
            report=report,
            wait=wait,
            data_subject=data_subject,
            stall_timeout=timeout,
            on_progress=progress,
        )
    settings = load_settings(data_dir)
    if wait and settings.embedded_kafka:
        call(settings.data_dir, "catch_up")  # the index follows the log in a fraction of a second
    for skip in report.skipped:
        click.echo(f"skipped {skip.path}: {skip.reason}", err=True)
    for document, reason in report.failed.items():
        click.echo(f"failed {document}: {reason}", err=True)
    if out.as_json:
        out.json(
            {
                "files": report.found,
                "submitted": report.submitted,
                "indexed": report.indexed,
                "chunks": report.chunks,
                "seconds": round(report.seconds, 3),
                "skipped": [{"path": str(skip.path), "reason": skip.reason} for skip in report.skipped],
                "failed": report.failed,
            }
        )
    else:
        indexed = f", {report.indexed} indexed as {report.chunks} chunks" if wait else ""
        left_out = f", {len(report.skipped)} skipped" if report.skipped else ""
        failed = f", {len(report.failed)} failed" if report.failed else ""
        click.echo(f"{report.submitted} documents submitted{indexed}{left_out}{failed} in {report.seconds:.1f} s")
    return 0 if report.ok else 1


@contextlib.contextmanager
def show_progress(out: Output, what: str, total: int) -> Iterator[Any]:
    """A progress bar of an ingest where somebody watches; a function that takes each report."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    if not out.progress.is_terminal:
        yield lambda _: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=out.progress, transient=True) as bar:
        row = bar.add_task(what, total=total)

        def update(report: "IngestReport") -> None:
            done = report.indexed + len(report.failed) + len(report.skipped)
            total_now = max(total, report.submitted + len(report.skipped))
            bar.update(row, completed=done, total=total_now, description=f"{what} ({report.chunks} chunks)")

        yield update
