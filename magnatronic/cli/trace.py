"""The command trace: what led to what in a task or document, and what stood at any moment.

In: an id, or what else is asked for, and a time. Out: a tree or tables in the terminal, JSON, or an HTML page.
"""

import asyncio
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from magnatronic.cli.history import from_option
from magnatronic.cli.options import Output, common_options
from magnatronic.cli.when import When
from magnatronic.errors import UnknownTaskError, WrongInputError

if TYPE_CHECKING:
    from magnatronic.histories import History
    from replay.decide import Handled, Station
    from replay.log import Progress
    from replay.sheet import Sheet
    from replay.trace import Trace

__all__ = ["trace"]

_ALL: Final = "\0"
"""What --memory is without a document's id."""


@click.command()
@click.argument("id_", metavar="[ID]", required=False)
@click.option(
    "--at", type=When(), help="As it was then: 90s, 15m, 2h, 7d ago, or an ISO time; without zone it is local."
)
@click.option("--agent", help="Instead of a task: this agent's instances, open lanes, last decisions and figures.")
@click.option("--policy", help="Instead of a task: the version of this policy that was in force.")
@click.option(
    "--memory",
    is_flag=False,
    flag_value=_ALL,
    metavar="[DOCUMENT]",
    help="Instead of a task: the chunks of this document that memory held; without an id, all documents.",
)
@from_option
@click.option("--html", type=click.Path(dir_okay=False, path_type=Path), help="Write everything to this HTML file.")
@click.option("--full", is_flag=True, help="All texts, whole: prompts, evidence, answers.")
@common_options
def trace(
    id_: str | None,
    *,
    at: datetime | None,
    agent: str | None,
    policy: str | None,
    memory: str | None,
    archive: Path | None,
    html: Path | None,
    full: bool,
    data_dir: Path | None,
    out: Output,
) -> None:
    """Show what led to what in a task, from its submission to its outcome; ID may be a document's too.

    Each decision stands with its agent's version, how long it waited, and the calls it made: prompts, evidence, tokens,
    cost. With --at the tree is as it was known then, with the state of each agent's lane, decided again from the log.
    """
    if sum(each is not None for each in (id_, agent, policy, memory)) != 1:
        raise WrongInputError("trace: give a task's or document's ID, or one of --agent, --policy, --memory")
    now = datetime.now(UTC)
    if at is not None and at > now:
        raise WrongInputError(f"--at {at.isoformat()} is still to come; a time without zone is taken as local")
    from magnatronic.histories import open_history

    with open_history(data_dir, archive) as history:
        if id_ is not None:
            found, then = _trace(history, id_, at, out)
            _show_trace(found, then, html, out, full=full)
        else:
            sheet = _sheet(history, agent, policy, memory, at or now, out)
            _show_sheet(sheet, html, out, full=full)


def _trace(history: "History", id_: str, at: datetime | None, out: Output) -> "tuple[Trace, Sheet | None]":
    from magnatronic.cli.progress import show_reading
    from replay.errors import UnknownTaskError as UnknownInLogError
    from replay.history import read_history
    from replay.moment import lane_sheet, lanes_at
    from replay.trace import trace_of

    with show_reading(out, "reading the log") as progress:
        try:
            whole = read_history(history.log, id_, history.codec, on_progress=progress)
        except UnknownInLogError as error:
            raise UnknownTaskError(str(error)) from None
    if at is None:
        return trace_of(whole), None
    known = whole.until(at)
    if not known.entries:
        raise WrongInputError(
            f"at {at.isoformat()} the log held nothing of {whole.kind} {id_!r}; "
            f"its first record is of {whole.entries[0].time.isoformat()}"
        )
    lanes = lanes_at(
        whole,
        at,
        stations=_stations(history, with_embedder=whole.kind == "document"),
        codec=history.codec,
        handled=_handled(history),
    )
    return trace_of(known), lane_sheet(whole, at, asyncio.run(lanes))


def _sheet(
    history: "History", agent: str | None, policy: str | None, memory: str | None, at: datetime, out: Output
) -> "Sheet":
    from magnatronic.cli.progress import show_reading
    from replay.errors import UnknownIdError
    from replay.standing import document_then, documents_then, policy_then

    log, codec = history.log, history.codec
    with show_reading(out, "reading the log") as progress:
        try:
            if agent is not None:
                return _agent(history, agent, at, progress)
            if policy is not None:
                return policy_then(log, codec, policy, at, on_progress=progress)
            if memory != _ALL and memory is not None:
                return document_then(log, codec, memory, at, on_progress=progress)
            return documents_then(log, codec, at, on_progress=progress)
        except UnknownIdError as error:
            raise WrongInputError(str(error)) from None


def _agent(history: "History", name: str, at: datetime, progress: "Progress") -> "Sheet":
    from magnatronic.roles import AGENT_ROLES
    from replay.agent_moment import agent_then

    if name not in AGENT_ROLES:
        raise WrongInputError(f"there is no agent {name!r}; there are: {', '.join(AGENT_ROLES)}")
    stations = _stations(history, with_embedder=name == "embedder")
    station = next(each for each in stations if each.agent.name == name)
    handled = _handled(history)
    return asyncio.run(agent_then(history.log, history.codec, station, at, handled=handled, on_progress=progress))


def _stations(history: "History", *, with_embedder: bool) -> "tuple[Station, ...]":
    from magnatronic.stations import stations

    return stations(history.settings if with_embedder else None)


def _handled(history: "History") -> "dict[str, Handled]":
    """What the agents have finished by now, or had when the archive was last written."""
    from magnatronic.finished import finished_offsets
    from replay.archive import ArchiveLog

    if isinstance(history.log, ArchiveLog):
        return dict(history.log.handled())
    return {} if history.system is None else dict(finished_offsets(history.system.kafka))


def _show_trace(found: "Trace", then: "Sheet | None", html: Path | None, out: Output, *, full: bool) -> None:
    if html is not None:
        from replay.sheet import sheet_section
        from replay.trace_page import trace_page

        sections = () if then is None else (sheet_section(then),)
        _write(html, trace_page(found, subtitle="" if then is None else then.title, then=sections), out)
    if out.as_json:
        from replay.sheet import sheet_as_dict
        from replay.trace_data import trace_as_dict

        as_dict: dict[str, Any] = trace_as_dict(found)
        out.json(as_dict if then is None else {**as_dict, "then": sheet_as_dict(then)})
    elif html is None:
        from magnatronic.cli.trace_tree import print_sheet, print_trace

        print_trace(found, out, full=full)
        if then is not None:
            print_sheet(then, out, full=full)


def _show_sheet(sheet: "Sheet", html: Path | None, out: Output, *, full: bool) -> None:
    from replay.sheet import sheet_as_dict, sheet_page

    if html is not None:
        _write(html, sheet_page(sheet), out)
    if out.as_json:
        out.json(sheet_as_dict(sheet))
    elif html is None:
        from magnatronic.cli.trace_tree import print_sheet

        print_sheet(sheet, out, full=full)


def _write(path: Path, page: str, out: Output) -> None:
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise WrongInputError(f"{path} can't be written: {error.strerror}") from None
    out.progress.print(f"wrote {path}", markup=False)
