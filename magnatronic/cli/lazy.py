"""A group of commands whose modules are imported when one is used, so that ``--help`` is quick.

In: names, each with the module that holds the command and one line on what it does. Out: a click group.
"""

import importlib
from collections.abc import Mapping
from typing import Any

import click

__all__ = ["LazyGroup"]


class LazyGroup(click.Group):
    """Its commands are ``commands[name] = (module, what it does in a line)``. A module holds a command under its name,
    with underscores for hyphens.
    """

    def __init__(self, *args: Any, lazy: Mapping[str, tuple[str, str]] = {}, **options: Any) -> None:
        super().__init__(*args, **options)
        self._lazy = lazy

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names in the order in which they were given."""
        return list(self._lazy)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command, imported now."""
        if cmd_name not in self._lazy:
            return None
        command = getattr(importlib.import_module(self._lazy[cmd_name][0]), cmd_name.replace("-", "_"))
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Each with its line, none imported."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in self._lazy.items()])
