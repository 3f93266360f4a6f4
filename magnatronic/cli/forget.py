"""The command ``forget``: a data subject's key is destroyed, and with it all that was recorded about it.

In: the name that tasks and documents were submitted with. Out: what was destroyed and deleted; 0 when all is done, 1
when the key is destroyed but a projection has not said that it is done, 2 when there is no such subject.
"""

from pathlib import Path

import click

from magnatronic.cli.options import Output, common_options
from magnatronic.errors import WrongInputError

__all__ = ["forget"]


@click.command()
@click.argument("subject")
@click.option("--yes", is_flag=True, help="Don't ask.")
@click.option("--by", default="cli", show_default=True, help="Who asks for it; recorded.")
@click.option(
    "--timeout", type=click.FloatRange(min=1), default=120.0, show_default=True, help="Seconds to wait for projections."
)
@common_options
def forget(subject: str, *, yes: bool, by: str, timeout: float, data_dir: Path | None, out: Output) -> int:
    """Destroy the key of SUBJECT, the NAME that was given with --data-subject, and delete what is about it.

    Log and archives keep their records and their hashes, but nobody can read any more what was personal in them.
    It can't be undone. Killed at any moment, run it again. Ends with 1 when a projection has not said that it is done.
    """
    from magnatronic.discovery import find_system
    from magnatronic.forgetting import forget as forget_subject
    from magnatronic.forgetting import known_ids

    found = find_system(data_dir)
    keys = found.settings.keys()
    if keys is None:
        raise WrongInputError("there is no key store, so nobody to forget; set MAGNATRONIC_KEY_STORE")
    known = known_ids(keys, subject)
    if not yes:
        click.confirm(
            f"Destroy the key of {subject!r} in {keys.place} ({len(known)} key id{'s' * (len(known) > 1)})? "
            "What is about it can never be read again",
            abort=True,
            err=True,
        )
    done = forget_subject(
        found,
        found.codec(),
        keys,
        subject,
        by=by,
        timeout_s=timeout,
        on_progress=lambda said: out.progress.print(f"[dim]{said} …[/]"),
    )
    if out.as_json:
        out.json(
            {
                "key_ids": list(done.key_ids),
                "destroyed": done.destroyed,
                "done": done.done,
                "projections": {
                    each.projection: {"done": each.done, "rows": each.rows, "files": each.files}
                    for each in done.erasures
                },
            }
        )
        return 0 if done.done else 1
    before = len(done.key_ids) - done.destroyed
    click.echo(f"{done.destroyed} keys destroyed{f', {before} before' if before else ''}: {', '.join(done.key_ids)}")
    for each in done.erasures:
        verb = "blanked" if each.projection == "clickhouse" else "deleted"
        if each.rows is None:
            click.echo(f"{each.projection}: has not said that it is done; run it again to ask")
        else:
            files = {True: ", files too", False: ", old files still there", None: ", files when the server compacts"}
            click.echo(f"{each.projection}: {each.rows} rows {verb}{files[each.files]}")
    return 0 if done.done else 1
