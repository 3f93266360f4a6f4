"""The rights that docs/security.md gives to each role, as a broker takes them."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from schemas.topics import all_topics
from tests.support.secured import Right

__all__ = ["rights_of"]

_PAGE: Final = Path(__file__).parents[2] / "docs" / "security.md"
_COLUMNS: Final = (
    ("TOPIC", "READ"),
    ("TOPIC", "WRITE"),
    ("TOPIC", "CREATE"),
    ("GROUP", "READ"),
    ("TRANSACTIONAL_ID", "WRITE"),
)


def rights_of(*roles: str) -> list[Right]:
    """What the page's table says that ``roles`` need, and nothing else."""
    found = dict(_rows())
    return [*{right: None for role in roles for right in found[role]}]


def _rows() -> Iterator[tuple[str, list[Right]]]:
    table = _PAGE.read_text(encoding="utf-8").partition("<!-- table: rights -->")[2].partition("<!-- end -->")[0]
    for line in table.splitlines()[3:]:
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        rights = []
        for cell, (kind, operation) in zip(cells[1:], _COLUMNS, strict=True):
            names = re.findall("`([^`]+)`", cell.partition(";")[0])
            if cell.startswith("every topic"):
                names = list(all_topics())
            rights += [Right(kind, name, operation) for name in names]
        for role in re.findall("`([^`]+)`", cells[0]):
            yield role, rights
