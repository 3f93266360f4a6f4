"""What all commands share: options, settings, where output goes.

In: ``--json`` and ``--data-dir``. Out: :class:`Output`, which prints for people or for programs, and the settings.
"""

import functools
import sys
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
import orjson

if TYPE_CHECKING:
    from rich.console import Console

    from magnatronic.client import Client
    from magnatronic.settings import Settings

__all__ = ["Output", "client_for", "common_options", "load_settings"]

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])


class Output:
    """Standard output for results, standard error for progress; ``as_json`` says for whom."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json

    @functools.cached_property
    def console(self) -> "Console":
        """For results."""
        return _console(sys.stdout)

    @functools.cached_property
    def progress(self) -> "Console":
        """For what is on the way; silent with ``--json``."""
        console = _console(sys.stderr)
        console.quiet = self.as_json
        return console

    def json(self, value: Any) -> None:
        """One JSON value on a line of its own."""
        click.echo(orjson.dumps(value, default=_plain, option=orjson.OPT_NON_STR_KEYS).decode())

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[Any]], *, title: str | None = None) -> None:
        """A table; numbers to the right."""
        from rich import box
        from rich.table import Table
        from rich.text import Text

        shown = [[_cell(value) for value in row] for row in rows]
        table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False)
        for index, column in enumerate(columns):
            numeric = bool(shown) and all(right for _, right in (row[index] for row in shown))
            table.add_column(column, justify="right" if numeric else "left", overflow="fold")
        for row in shown:
            table.add_row(*(Text(text) for text, _ in row))
        self.console.print(table)


def _console(file: Any) -> "Console":
    from rich.console import Console

    # Where nobody watches there is no width to keep to.
    return Console(file=file, width=None if file.isatty() else 200, highlight=False, soft_wrap=False)


def _cell(value: Any) -> tuple[str, bool]:
    match value:
        case None:
            return "", True
        case bool():
            return ("yes" if value else "no"), False
        case float():
            return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}", True
        case int():
            return str(value), True
        case datetime():
            return value.strftime("%Y-%m-%d %H:%M:%S"), False
        case _:
            return str(value), False


def _plain(value: Any) -> Any:
    return value.hex() if isinstance(value, bytes) else str(value)


def common_options(function: FunctionT) -> FunctionT:
    """Add ``--json`` (given as ``out``, an :class:`Output`) and ``--data-dir`` to a command."""

    @click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
    @click.option(
        "--data-dir",
        type=click.Path(path_type=Path, file_okay=False),
        help="Folder of the system's data (default: MAGNATRONIC_DATA_DIR, or ~/.local/share/magnatronic).",
    )
    @functools.wraps(function)
    def command(*args: Any, as_json: bool, **options: Any) -> Any:
        return function(*args, out=Output(as_json), **options)

    return command  # type: ignore[return-value]


def load_settings(data_dir: Path | None, **overrides: Any) -> "Settings":
    """The settings, with the data folder of the command line where it names one."""
    from magnatronic.settings import Settings

    if data_dir is not None:
        overrides["data_dir"] = data_dir
    return Settings.load(**overrides)


def client_for(data_dir: Path | None) -> "Client":
    """A client of the running system."""
    from magnatronic.client import Client
    from magnatronic.tracing import client_provider

    return Client.connect(data_dir, name="cli", tracer_provider=client_provider("clients/cli"))
