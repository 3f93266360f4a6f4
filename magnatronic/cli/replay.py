"""``magnatronic replay``: decide recorded history again, to prove it, or to see what else it could have been.

In: a sub-command. Out: that command, imported when it is used.
"""

from typing import Final

import click

from magnatronic.cli.lazy import LazyGroup

__all__ = ["COMMANDS", "replay"]

COMMANDS: Final = {
    "audit": ("magnatronic.cli.audit", "Decide recorded steps again and compare every output, byte for byte."),
    "verify": ("magnatronic.cli.audit", "Recompute a report's hashes and digest, and decide its steps again."),
    "what-if": ("magnatronic.cli.whatif", "Decide logged tasks with another prompt, policy, model, tools or code."),
    "pin": ("magnatronic.cli.pin", "Keep recorded histories as tests of the code that decides."),
}


@click.command(cls=LazyGroup, lazy=COMMANDS)
def replay() -> None:
    """Decide recorded history again: prove what was decided, or try another future."""
