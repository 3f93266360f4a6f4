"""The command ``rebuild``: a projection is made again from the log, compared with the one in use, and takes its place.

In: which projection. Out: counts and hashes of both, what differs, and whether the new one is in use.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from magnatronic.cli.options import Output, common_options, load_settings
from magnatronic.errors import ControlError, NotRunningError, WrongInputError

if TYPE_CHECKING:
    from magnatronic.rebuild import Options
    from magnatronic.settings import Settings

__all__ = ["rebuild"]

_POLL_S: Final = 0.2

Tell = Callable[[str, int, int], None]


@click.command()
@click.argument("projection", type=click.Choice(["clickhouse", "milvus"]))
@click.option("--accept", is_flag=True, help="Switch over though the new one differs from the one in use.")
@click.option("--keep", is_flag=True, help="Keep what was in use, under another name.")
@click.option("--carry", is_flag=True, help="Take over rows that are older than the log, as they are.")
@click.option(
    "--from",
    "archive",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="An archive that holds what the log has forgotten.",
)
@click.option("--discard", is_flag=True, help="Only drop what an earlier rebuild left unfinished.")
@common_options
def rebuild(
    projection: str,
    *,
    accept: bool,
    keep: bool,
    carry: bool,
    archive: Path | None,
    discard: bool,
    data_dir: Path | None,
    out: Output,
) -> int:
    """Make PROJECTION again from the log while the system runs, compare it with the one in use, and switch over.

    Where the two differ nothing is switched, and the differences are shown; --accept switches all the same. Killed at
    any moment, run it again: it goes on. Ends with 0 when the new one is in use, with 1 when it is not.
    """
    from magnatronic.rebuild import Options

    options = Options(accept=accept, carry=carry, keep=keep, archive=archive)
    settings = load_settings(data_dir)
    with _progress(out) as tell:
        report = _run(projection, options, settings, tell, discard=discard)
    if out.as_json:
        out.json(report)
    elif discard:
        out.console.print(f"nothing unfinished is left of {projection}")
    else:
        _print(report, out)
    return 0 if discard or report["switched"] else 1


def _run(projection: str, options: "Options", settings: "Settings", tell: Tell, *, discard: bool) -> dict[str, Any]:
    """By the system on the data folder, or where none runs and the store is a server's, here."""
    try:
        return _asked(projection, options, settings, tell, discard=discard)
    except NotRunningError:
        if not (settings.clickhouse_url if projection == "clickhouse" else settings.milvus_uri):
            raise
    from magnatronic.discovery import find_system
    from magnatronic.rebuild import discard_store, rebuild_store
    from magnatronic.roles import Workbench

    workbench = Workbench(settings)
    try:
        store = workbench.clickhouse() if projection == "clickhouse" else workbench.milvus()
        if discard:
            return discard_store(store, lock_folder=settings.data_dir)
        found = find_system(settings.data_dir)
        return rebuild_store(
            store,
            options,
            kafka=found.kafka,
            codec=found.codec(),
            lock_folder=settings.data_dir,
            on_progress=tell,
        )
    finally:
        workbench.close()


def _asked(projection: str, options: "Options", settings: "Settings", tell: Tell, *, discard: bool) -> dict[str, Any]:
    from magnatronic.control import call

    asked = {**options.as_dict(), "projection": projection, "discard": discard}
    job: dict[str, Any] = call(settings.data_dir, "rebuild", **asked)
    if job["arguments"] != options.as_dict():
        raise WrongInputError(f"a rebuild of {projection} is running already, asked for in another way; wait for it")
    while job["state"] == "running":
        tell(job["phase"], job["done"], job["of"])
        time.sleep(_POLL_S)
        job = call(settings.data_dir, "job", job=job["job"])
    if job["state"] == "failed":
        raise ControlError(str(job["error"]))
    result: dict[str, Any] = job["result"]
    return result


@contextlib.contextmanager
def _progress(out: Output) -> Iterator[Tell]:
    """What is being done, and how far it is: a bar where somebody watches, else a line for each phase."""
    if out.as_json or not out.progress.is_terminal:
        said: set[str] = set()

        def say(phase: str, done: int, of: int) -> None:
            if phase not in said:
                said.add(phase)
                out.progress.print(f"[dim]{phase} …[/]")

        yield say
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=out.progress,
        transient=True,
    ) as bar:
        row = bar.add_task("starting", total=None)
        yield lambda phase, done, of: bar.update(row, description=str(phase), completed=done, total=of or None)


def _print(report: dict[str, Any], out: Output) -> None:
    if report["compared"]:
        columns = ("table", "rows", "from the log", "hash", "from the log", "missing", "surplus", "changed")
        out.table(
            columns,
            [
                (
                    each["table"],
                    each["stored_rows"],
                    each["rebuilt_rows"],
                    each["stored_hash"][:16],
                    each["rebuilt_hash"][:16],
                    each["missing"],
                    each["surplus"],
                    each["changed"],
                )
                for each in report["compared"]
            ],
        )
    for each in report["compared"]:
        for example in each["examples"]:
            out.console.print(f"  {example['said']}", markup=False)
        if each["uncompared"]:
            out.console.print(f"  not compared of {each['table']}: {', '.join(each['uncompared'])}", markup=False)
    if report["carried"]:
        out.console.print(f"{report['carried']} rows are older than the log and were taken over as they were")
    did = f"{report['records']} records read in {report['seconds']:g} s" + (
        ", going on where an earlier rebuild stopped" if report["resumed"] else ""
    )
    name = report["projection"]
    if not report["switched"]:
        out.console.print(
            f"{did}. They DIFFER, and what was in use stays in use. To take what the log gives: "
            f"magnatronic rebuild {name} --accept; to drop it: magnatronic rebuild {name} --discard"
        )
    elif report["compared"]:
        verdict = "both are the same" if report["equal"] else "they differed"
        out.console.print(f"{did}. {verdict[0].upper()}{verdict[1:]}; what was made from the log is in use")
    else:
        out.console.print(f"{did}. An earlier rebuild had switched over already; it is finished now")
    if report["kept"]:
        out.console.print(f"kept: {report['kept']}", markup=False)
