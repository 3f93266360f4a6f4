"""Named analyses: SQL files whose first comment says what they answer.

In: ``queries/<name>.sql``. Out: :class:`NamedQuery`, for the command line, the gateway and the README.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

from sinks.errors import UnknownQueryError

__all__ = ["NamedQuery", "named_queries", "named_query"]

_FOLDER: Final = Path(__file__).with_name("queries")


@dataclass(frozen=True, slots=True)
class NamedQuery:
    """An analysis that can be asked for by ``name``; ``title`` says in a sentence what it answers."""

    name: str
    title: str
    sql: str


@cache
def named_queries() -> tuple[NamedQuery, ...]:
    """All of them, by name."""
    return tuple(_read(path) for path in sorted(_FOLDER.glob("*.sql")))


def _read(path: Path) -> NamedQuery:
    text = path.read_text(encoding="utf-8")
    first, _, sql = text.partition("\n")
    return NamedQuery(path.stem, first.removeprefix("--").strip(), sql.strip())


def named_query(name: str) -> NamedQuery:
    """The analysis called ``name``.

    Raises:
        UnknownQueryError: there is none; the message lists those there are.
    """
    for query in named_queries():
        if query.name == name:
            return query
    names = ", ".join(query.name for query in named_queries())
    raise UnknownQueryError(f"no query is called {name!r}; there are: {names}")
