"""The README says what the code says."""

import re
from pathlib import Path

from magnatronic.reference import README, TABLES, render


def test_the_tables_are_those_of_the_code() -> None:
    text = README.read_text()
    assert all(f"<!-- table: {name} -->" in text for name in TABLES)
    assert render(text) == text, "run: python -m magnatronic.reference"


def test_its_links_lead_somewhere() -> None:
    root = Path(README).parent
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README.read_text())
    assert links
    assert [link for link in links if not (root / link).exists()] == []
