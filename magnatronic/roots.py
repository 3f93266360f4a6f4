"""Checks that our import roots are ours. Another distribution may own the same name: openai-agents installs ``agents``.

In: nothing. Out: nothing, or an :class:`ImportRootError` in one line. The command line calls
:func:`assert_import_roots` before it imports anything else of ours. This module imports the standard library only, so
that it works when the others can't be imported.
"""

from importlib.machinery import PathFinder
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Final

__all__ = ["ROOTS", "ImportRootError", "assert_import_roots"]

ROOTS: Final = ("schemas", "agents", "streams", "sinks", "replay", "magnatronic")
"""The top-level packages of this distribution."""

_HOME: Final = Path(__file__).resolve().parent.parent


class ImportRootError(ImportError):
    """A top-level package name of ours leads to another distribution's package."""


def assert_import_roots() -> None:
    """Returns if every name of :data:`ROOTS` is imported from where this module lies.

    Raises:
        ImportRootError: one is not; the message says which package shadows it and what to do.
    """
    for root in ROOTS:
        spec = PathFinder.find_spec(root)
        place = spec.origin if spec is not None else None
        if place is None:
            raise ImportRootError(
                f"Magnatronic's package {root!r} is missing from {_HOME}; install Magnatronic again (make clean demo)"
            )
        if Path(place).resolve().parent != _HOME / root:
            owners = [name for name in packages_distributions().get(root, []) if name != "magnatronic"]
            owner = f"the package {owners[0]}" if owners else "another package"
            remedy = f"uninstall {owners[0]}" if owners else f"remove {Path(place).parent}"
            raise ImportRootError(
                f"{owner} shadows Magnatronic's {root!r} (imported from {Path(place).parent}); "
                f"{remedy}, or run Magnatronic in an environment of its own"
            )
