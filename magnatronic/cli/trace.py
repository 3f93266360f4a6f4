"""The command trace: what led to what in a task or document, and what stood at any moment.

In: an id. Out: a tree in the terminal, JSON, or an HTML page with everything in it.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from magnatronic.cli.history import from_option
from magnatronic.cli.options import Output, common_options
from magnatronic.errors import UnknownTaskError

if TYPE_CHECKING:
    from magnatronic.histories import History
    from replay.trace import Trace

__all__ = ["trace"]


@click.command()
@click.argument("id_", metavar="ID")
@from_option
@click.option(
    "--html", "html", type=click.Path(dir_okay=False, path_type=Path), help="Write everything to this HTML file."
)
@click.option("--full", is_flag=True, help="All texts, whole: prompts, evidence, answers.")
@common_options
def trace(id_: str, *, archive: Path | None, html: Path | None, full: bool, data_dir: Path | None, out: Output) -> None:
    """Show what led to what in a task, from its submission to its outcome; ID may be a document's too.

    Each decision stands with its agent's version, how long it waited, and the calls it made: prompts, evidence, tokens,
    cost.
    """
    from magnatronic.histories import open_history

    with open_history(data_dir, archive) as history:
        found = _trace(history, id_, out)
    if html is not None:
        from replay.trace_page import trace_page

        html.write_text(trace_page(found), encoding="utf-8")
        out.progress.print(f"wrote {html}", markup=False)
    if out.as_json:
        from replay.trace_data import trace_as_dict

        out.json(trace_as_dict(found))
    elif html is None:
        from magnatronic.cli.trace_tree import print_trace

        print_trace(found, out, full=full)


def _trace(history: "History", id_: str, out: Output) -> "Trace":
    from magnatronic.cli.progress import show_reading
    from replay.errors import UnknownTaskError as UnknownInLogError
    from replay.history import read_history
    from replay.trace import trace_of

    with show_reading(out, "reading the log") as progress:
        try:
            return trace_of(read_history(history.log, id_, history.codec, on_progress=progress))
        except UnknownInLogError as error:
            raise UnknownTaskError(str(error)) from None
