"""``magnatronic archive``: write the log to Parquet files that outlive the topics' retention, and prove that they are
whole.

In: a folder. Out: what was added, and the hash that vouches for all of it; ``verify`` ends with 1 when something is
wrong. Commands that read history take the folder with ``--from``.
"""

import contextlib
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from magnatronic.cli.options import Output, common_options
from magnatronic.errors import NotRunningError, WrongInputError

if TYPE_CHECKING:
    from magnatronic.archiving import Archiving
    from magnatronic.discovery import FoundSystem
    from replay.archive import Archived, Verified

__all__ = ["archive"]

_EVERY_S: Final = 3600.0


@click.group(invoke_without_command=True)
@click.option("--to", "folder", type=click.Path(path_type=Path, file_okay=False), help="The archive's folder.")
@click.option("--name", help="What topic audit calls it (default: the folder's name); one name an archive.")
@click.option("--topic", "topics", multiple=True, help="Only this topic, or all that it stands for (tasks).")
@click.option("--follow", is_flag=True, help="Go on archiving until Ctrl-C.")
@click.option(
    "--every",
    "every_s",
    type=click.FloatRange(min=0.1),
    default=_EVERY_S,
    show_default=True,
    help="With --follow: seconds from one run to the next. Each makes a file: an hour is often enough.",
)
@click.option("--allow-gaps", is_flag=True, help="Note what retention deleted before it was archived, and go on.")
@common_options
@click.pass_context
def archive(
    context: click.Context,
    /,
    *,
    folder: Path | None,
    name: str | None,
    topics: Sequence[str],
    follow: bool,
    every_s: float,
    allow_gaps: bool,
    data_dir: Path | None,
    out: Output,
) -> None:
    """Archive the log: Parquet files, one row an event, in a chain of hashes.

    Run it again and it adds what is new; stopped at any moment, it goes on there. `archive verify FOLDER` proves that
    an archive is whole, and `--from FOLDER` of other commands reads it.
    """
    if context.invoked_subcommand is not None:
        if folder is not None:
            raise WrongInputError(f"archive: give either --to FOLDER, or {context.invoked_subcommand}")
        return
    if folder is None:
        raise WrongInputError("archive: --to FOLDER says where to (see `magnatronic archive --help`)")
    from magnatronic.archiving import Archiving
    from magnatronic.cli.history import topics_named

    what = Archiving(folder, name or folder.resolve().name, tuple(sorted(topics_named(topics))), allow_gaps)
    if not follow:
        _say(_once(what, data_dir, out), folder, out)
        return
    _follow(what, data_dir, out, every_s)


def _once(what: "Archiving", data_dir: Path | None, out: Output) -> "Archived":
    from magnatronic.archiving import archive as archive_log
    from magnatronic.cli.progress import show_reading
    from magnatronic.discovery import find_system

    found = find_system(data_dir)  # each time: an embedded broker has another port after its restart
    with show_reading(out, "archiving") as progress:
        return archive_log(found, what, progress)


def _follow(what: "Archiving", data_dir: Path | None, out: Output, every_s: float) -> None:
    """Run by run. A run that Ctrl-C or SIGTERM ends is gone on with by the next one."""
    from magnatronic.errors import ClusterError
    from replay.errors import ArchiveError, LogReadError

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        while True:
            begun = time.monotonic()
            try:
                _say(_once(what, data_dir, out), what.folder, out)
            except ArchiveError:
                raise  # no later run would do better
            except (ClusterError, LogReadError, NotRunningError) as error:
                click.echo(f"magnatronic: {error}; trying again in {every_s:g} s", err=True)
            time.sleep(max(0.0, begun + every_s - time.monotonic()))
    except KeyboardInterrupt:
        return


def _say(done: "Archived", folder: Path, out: Output) -> None:
    if out.as_json:
        out.json(
            {
                "folder": str(folder),
                "segments": done.segments,
                "records": done.records,
                "bytes": done.bytes,
                "gaps": [[gap.topic, gap.partition, gap.start, gap.end] for gap in done.gaps],
                "total_segments": done.total_segments,
                "total_records": done.total_records,
                "head": done.head,
            }
        )
        return
    out.console.print(
        f"{done.records:,} records in {done.segments} new segments ({done.bytes / 1e6:,.1f} MB); {folder} holds "
        f"{done.total_records:,} records in {done.total_segments} segments. Head {done.head}",
        markup=False,
        soft_wrap=True,
    )
    for gap in done.gaps:
        click.echo(f"missing for good: {gap.topic}/{gap.partition}, offsets {gap.start} to {gap.end}", err=True)


@archive.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--log", "with_log", is_flag=True, help="Also hold every record against the running system's log.")
@click.option("--offline", is_flag=True, help="Don't ask the running system for what topic audit says of it.")
@common_options
def verify(*, folder: Path, with_log: bool, offline: bool, data_dir: Path | None, out: Output) -> int:
    """Prove that an archive is whole: the chain, the files, every record, and what topic audit says of it.

    Ends with 0 when nothing is wrong, else with 1.
    """
    from magnatronic.archiving import announced_heads
    from magnatronic.cli.progress import show_reading
    from replay.archive import Manifest
    from replay.archive import verify as verify_archive
    from replay.errors import ArchiveDamagedError
    from replay.kafka_log import KafkaLog

    if with_log and offline:
        raise WrongInputError("archive verify: --log needs the system, --offline goes without")
    found, why = (None, "not asked for") if offline else _system(folder, data_dir, needed=with_log)
    heads = None
    if found is not None:
        with contextlib.suppress(ArchiveDamagedError):  # which the verification tells
            heads = announced_heads(found, Manifest.load(folder).header)
    with show_reading(out, "verifying") as progress:
        if found is not None and with_log:
            with KafkaLog(found.kafka) as log:
                seen = verify_archive(folder, log=log, heads=heads, on_progress=progress)
        else:
            seen = verify_archive(folder, heads=heads, on_progress=progress)
    if out.as_json:
        out.json(_as_dict(seen))
    else:
        _print(seen, folder, why, out)
    return 0 if seen.ok else 1


def _system(folder: Path, data_dir: Path | None, *, needed: bool) -> "tuple[FoundSystem | None, str]":
    """The system that the archive was made of; or why there is none."""
    from magnatronic.archiving import cluster_id
    from magnatronic.discovery import find_system
    from replay.archive import Manifest
    from replay.errors import ArchiveDamagedError

    try:
        found = find_system(data_dir)
        cluster, wanted = cluster_id(found), Manifest.load(folder).header.cluster
    except ArchiveDamagedError:
        return None, "the archive does not say of which cluster it is"
    except NotRunningError as error:
        if needed:
            raise
        return None, str(error)
    if cluster == wanted:
        return found, ""
    why = f"the system here has cluster {cluster}, and the archive is of {wanted}"
    if needed:
        raise WrongInputError(why)
    return None, why


def _as_dict(seen: "Verified") -> dict[str, Any]:
    return {
        "ok": seen.ok,
        "name": seen.name,
        "head": seen.head,
        "segments": seen.segments,
        "records": seen.records,
        "gaps": seen.gaps,
        "heads_in_audit": seen.heads,
        "compared_with_log": seen.compared,
        "no_longer_in_log": seen.gone,
        "problems": list(seen.problems),
    }


def _print(seen: "Verified", folder: Path, why: str, out: Output) -> None:
    for problem in seen.problems:
        click.echo(f"magnatronic: {problem}", err=True)
    said = [f"{folder}: {seen.records:,} records in {seen.segments} segments, {seen.gaps} gaps"]
    if seen.heads is None:
        said.append(f"topic audit was not asked ({why})")
    else:
        said.append(f"{seen.heads} heads of topic audit are in its chain")
    if seen.compared is not None:
        said.append(f"{seen.compared:,} records are as in the log, which has {seen.gone:,} others no more")
    said.append("WRONG" if seen.problems else "whole")
    out.console.print(f"{'; '.join(said)}. Head {seen.head}", markup=False, soft_wrap=True)
