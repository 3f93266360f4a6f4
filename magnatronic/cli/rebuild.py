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
    from magnatronic.settings import Settings

__all__ = ["rebuild"]

_POLL_S: Final = 0.2
_MOST_LANES: Final = 10

Tell = Callable[[str, int, int], None]


@click.command()
@click.argument("projection", type=click.Choice(["clickhouse", "milvus", "state"]))
@click.option("--accept", is_flag=True, help="Switch over though the new one differs from the one in use.")
@click.option("--keep", is_flag=True, help="Keep what was in use, under another name.")
@click.option("--carry", is_flag=True, help="Take over rows that are older than the log, as they are.")
@click.option(
    "--from",
    "archive",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="An archive that holds what the log has forgotten.",
)
@click.option("--agent", "agents", multiple=True, help="Of state: this agent's only (may be given again).")
@click.option("--discard", is_flag=True, help="Only drop what an earlier rebuild left unfinished.")
@common_options
def rebuild(
    projection: str,
    *,
    accept: bool,
    keep: bool,
    carry: bool,
    archive: Path | None,
    agents: tuple[str, ...],
    discard: bool,
    data_dir: Path | None,
    out: Output,
) -> int:
    """Make PROJECTION again from the log while the system runs, compare it with the one in use, and switch over.

    State is what agents remember between events; each agent rests for a moment while its own is compared. Where the
    two differ nothing is switched, and the differences are shown; --accept switches all the same. Killed at any moment,
    run it again: it goes on. Ends with 0 when the new one is in use, with 1 when it is not.
    """
    from magnatronic.rebuild import Options

    if projection == "state" and (keep or carry or discard):
        raise WrongInputError("rebuild state takes no --keep, --carry or --discard: a changelog keeps what it held")
    if projection != "state" and agents:
        raise WrongInputError(f"--agent is for rebuild state; {projection} is all agents'")
    options = Options(accept=accept, carry=carry, keep=keep, archive=archive)
    settings = load_settings(data_dir)
    with _progress(out) as tell:
        request = {**options.as_dict(), "projection": projection, "agents": list(agents), "discard": discard}
        report = _run(request, settings, tell)
    if out.as_json:
        out.json(report)
    elif projection == "state":
        for each in report["agents"]:
            _print_state(each, out)
    elif discard:
        out.console.print(f"nothing unfinished is left of {projection}")
    else:
        _print(report, out)
    return 0 if discard or report["switched"] else 1


def _run(request: dict[str, Any], settings: "Settings", tell: Tell) -> dict[str, Any]:
    """By the system on the data folder, or where none runs and the store is a server's, here."""
    try:
        return _asked(request, settings, tell)
    except NotRunningError:
        if request["projection"] == "state":
            return _state_here(request, settings, tell)
        if not (settings.clickhouse_url if request["projection"] == "clickhouse" else settings.milvus_uri):
            raise
    from magnatronic.discovery import find_system
    from magnatronic.rebuild import Options, discard_store, rebuild_store
    from magnatronic.roles import Workbench

    workbench = Workbench(settings)
    try:
        store = workbench.clickhouse() if request["projection"] == "clickhouse" else workbench.milvus()
        if request["discard"]:
            return discard_store(store, lock_folder=settings.data_dir)
        found = find_system(settings.data_dir)
        return rebuild_store(
            store,
            Options.of(request),
            kafka=found.kafka,
            codec=found.codec(),
            lock_folder=settings.data_dir,
            on_progress=tell,
        )
    finally:
        workbench.close()


def _state_here(request: dict[str, Any], settings: "Settings", tell: Tell) -> dict[str, Any]:
    """On a cluster, or on the data folder's own broker, which is started for it: a system that has lost a changelog
    does not start.
    """
    from magnatronic.broker import EmbeddedBroker
    from magnatronic.discovery import find_system, make_codec
    from magnatronic.rebuilding import rebuild_state
    from magnatronic.system import FolderLock

    if not settings.embedded_kafka:
        found = find_system(settings.data_dir)
        return rebuild_state(request, found.settings, found.kafka, found.codec(), tell)
    if not (settings.data_dir / "kafka").is_dir():
        raise NotRunningError(f"no Magnatronic was ever started on {settings.data_dir}")
    lock = FolderLock(settings.data_dir)
    lock.acquire()
    try:
        tell("starting Kafka", 0, 0)
        with EmbeddedBroker(
            settings.data_dir / "kafka", heap_mb=settings.kafka_heap_mb, java_home=settings.java_home
        ) as broker:
            kafka = settings.kafka_client_config(broker.bootstrap_servers)
            return rebuild_state(request, settings, kafka, make_codec(settings), tell)
    finally:
        lock.release()


def _asked(request: dict[str, Any], settings: "Settings", tell: Tell) -> dict[str, Any]:
    from magnatronic.control import call

    projection = request["projection"]
    job: dict[str, Any] = call(settings.data_dir, "rebuild", **request)
    if any(job["arguments"][name] != request[name] for name in job["arguments"]):
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
    _print_compared(report["compared"], out)
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


def _print_state(report: dict[str, Any], out: Output) -> None:
    agent = report["agent"]
    _print_compared(report["compared"], out)
    for place in report["lost"]:
        out.console.print(
            f"the changelog of {place['topic']}[{place['partition']}] was lost: {place['states']} states, "
            f"{place['timers']} timers, {place['parked']} parked events and {place['effects']} effects of unfinished "
            + ("steps were written again" if report["switched"] else "steps would be written"),
            markup=False,
        )
    for lane in report["undecided"][:_MOST_LANES]:
        out.console.print(f"  not decided again, left as it is: {lane}", markup=False)
    if len(report["undecided"]) > _MOST_LANES:
        out.console.print(f"  and {len(report['undecided']) - _MOST_LANES} more lanes")
    if report["differing_steps"]:
        out.console.print(
            f"  {report['differing_steps']} steps did not come out as recorded; `magnatronic replay audit` names them"
        )
    did = f"{agent}: {report['steps']} steps decided again in {report['seconds']:g} s, it rested for "
    did += f"{report['rested_s']:g} s"
    if not report["switched"]:
        out.console.print(
            f"{did}. They DIFFER, and nothing was changed. To take what the log gives: magnatronic rebuild state "
            f"--agent {agent} --accept"
        )
    elif report["written"]:
        out.console.print(f"{did}. {report['written']} records were written to its changelogs")
    else:
        out.console.print(f"{did}. Both are the same")


def _print_compared(compared: list[dict[str, Any]], out: Output) -> None:
    if not compared:
        return
    out.table(
        ("table", "rows", "from the log", "hash", "from the log", "missing", "surplus", "changed"),
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
            for each in compared
        ],
    )
    for each in compared:
        for example in each["examples"]:
            out.console.print(f"  {example['said']}", markup=False)
        if each["uncompared"]:
            out.console.print(f"  not compared of {each['table']}: {', '.join(each['uncompared'])}", markup=False)
