"""The command ``replay pin``: keep a task's history as a test of the code that decides.

In: the id of a task or document, from the running system or an archive. Out: a golden history's file, and what it
holds. A history that does not audit clean is refused, unless a reason to keep it is given; no file is overwritten.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from magnatronic.cli.history import from_option
from magnatronic.cli.options import Output, common_options
from magnatronic.errors import UnknownTaskError, WrongInputError

if TYPE_CHECKING:
    from magnatronic.histories import History
    from replay.decide import Decided
    from replay.golden import Pinned
    from replay.history import Entry, TaskHistory

__all__ = ["pin"]

_FOLDER: Final = Path("tests") / "replay" / "histories"
_UNFIT: Final = re.compile(r"[^A-Za-z0-9._-]+")
_LARGE_BYTES: Final = 200_000
_TOLD: Final = 5


@click.command()
@click.argument("id_", metavar="ID")
@from_option
@click.option("--name", help="What to call it, and its file (default: the id).")
@click.option("--about", default="", help="What it shows, in a line.")
@click.option(
    "--to",
    "folder",
    type=click.Path(file_okay=False, path_type=Path),
    default=_FOLDER,
    show_default=True,
    help="The folder of golden histories.",
)
@click.option(
    "--force", "reason", metavar="REASON", default="", help="Keep it though it does not audit clean, and why."
)
@common_options
def pin(
    id_: str,
    *,
    archive: Path | None,
    name: str | None,
    about: str,
    folder: Path,
    reason: str,
    data_dir: Path | None,
    out: Output,
) -> None:
    """Keep the history of a task (or a document) whose ID is given, to be decided again whenever the code changes.

    The task must be finished, and each of its decisions be the one that today's code makes.
    """
    import asyncio

    from magnatronic.histories import open_history
    from magnatronic.stations import stations
    from replay.golden import SUFFIX, dump
    from replay.golden import pin as pin_history

    called = _UNFIT.sub("-", id_ if name is None else name).strip("-.")
    if not called:
        raise WrongInputError(f"{name or id_!r} can't name a file; give another --name")
    path = folder / f"{called}{SUFFIX}"
    if path.exists():
        raise WrongInputError(f"there is a {path} already; give another --name, or delete it first")
    with open_history(data_dir, archive) as opened:
        # A file under version control would outlive the keys of whom it is about: what is personal stays sealed in it.
        opened.codec.cipher = None
        found = _read(opened, id_, out)
        pinned, decided = asyncio.run(
            pin_history(
                found, name=called, stations=stations(opened.settings), codec=opened.codec, about=about, reason=reason
            )
        )
        _refuse_unclean(found, decided, reason)
        text = dump(pinned, opened.codec)
    _write(path, text)
    _tell(pinned, path, len(text.encode()), out)


def _read(opened: "History", id_: str, out: Output) -> "TaskHistory":
    from magnatronic.cli.progress import show_reading
    from replay.errors import UnknownTaskError as UnknownInLogError
    from replay.history import read_history

    with show_reading(out, "reading the log") as progress:
        try:
            return read_history(opened.log, id_, opened.codec, on_progress=progress)
        except UnknownInLogError as error:
            raise UnknownTaskError(str(error)) from None


def _refuse_unclean(found: "TaskHistory", decided: "Decided", reason: str) -> None:
    from replay.golden import CLEAN
    from schemas.events import TaskCancelled, TaskCompleted, TaskExpired, TaskFailed

    outcomes = TaskCompleted, TaskFailed, TaskExpired, TaskCancelled
    wrong = []
    if subjects := {each for entry in found.entries for each in _subjects(entry)}:
        wrong.append(
            f"it is about {'a data subject' if len(subjects) == 1 else f'{len(subjects)} data subjects'}, and what is "
            "personal stays sealed in the file, so that it can't be decided again"
        )
    if found.kind == "task" and not any(isinstance(entry.event, outcomes) for entry in found.entries):
        wrong.append("the task has no outcome")
    wrong += [str(finding) for finding in decided.findings]
    wrong += [
        f"{step.agent} on {type(step.envelope.event).__name__} {step.envelope.metadata.id}: {step.verdict.value}"
        for step in decided.steps
        if step.verdict not in CLEAN and not step.findings
    ]
    if not decided.steps and not any(entry.envelope is None for entry in found.entries):
        wrong.append("no agent of this system handled any of it")
    if wrong and not reason:
        more = f"; and {len(wrong) - _TOLD} more" if len(wrong) > _TOLD else ""
        raise WrongInputError(
            f"{found.kind} {found.id} does not audit clean: {'; '.join(wrong[:_TOLD])}{more}. "
            "If it is to be kept all the same, say why: --force REASON"
        )


def _subjects(entry: "Entry") -> tuple[str, ...]:
    return () if entry.envelope is None else entry.envelope.metadata.data_subjects


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise WrongInputError(f"{path} can't be written: {error.strerror}") from error


def _tell(pinned: "Pinned", path: Path, size: int, out: Output) -> None:
    if out.as_json:
        out.json(
            {
                "path": str(path),
                "bytes": size,
                "id": pinned.id,
                "kind": pinned.kind,
                "records": len(pinned.records),
                "steps": len(pinned.steps),
                "agents": pinned.versions,
                "digest": pinned.digest,
                "reason": pinned.reason,
            }
        )
        return
    agents = ", ".join(f"{name}@{version}" for name, versions in pinned.versions.items() for version in versions)
    out.console.print(
        f"wrote {path}: {size:,} bytes, {len(pinned.records)} records, {len(pinned.steps)} decisions of {agents}",
        markup=False,
        soft_wrap=True,
    )
    if size > _LARGE_BYTES:
        out.progress.print(f"it is large for a file under version control ({size:,} bytes)", markup=False)
