"""How far a command that reads history has come: :func:`show_reading`, for every command that reads.

In: the command's output, and the callback that reading calls with the positions done and those of all. Out: a bar on
standard error where somebody watches; nothing where nobody does, or with ``--json``.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Final

from magnatronic.cli.options import Output

__all__ = ["show_reading"]

_EVERY_S: Final = 0.1


@contextlib.contextmanager
def show_reading(out: Output, what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar called ``what``; a function that takes ``(done, total)``, such as ``Log.read``'s ``on_progress``.

    >>> with show_reading(Output(as_json=True), "reading") as progress:
    ...     progress(1, 2)
    """
    if not out.progress.is_terminal or out.as_json:
        yield lambda done, total: None
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=out.progress, transient=True) as bar:
        row = bar.add_task(what, total=None)
        last = 0.0

        def update(done: int, total: int) -> None:
            nonlocal last
            now = time.monotonic()
            if done >= total or now - last > _EVERY_S:
                last = now
                bar.update(row, completed=done, total=total)

        yield update
