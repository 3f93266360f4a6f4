"""The README and the reference pages say what the code says."""

import re
from pathlib import Path

import pytest

from magnatronic.reference import DOCUMENTS, TABLES, render


def test_the_tables_are_those_of_the_code() -> None:
    texts = [document.read_text() for document in DOCUMENTS]
    for name in TABLES:
        assert sum(text.count(f"<!-- table: {name} -->") for text in texts) == 1
    for text in texts:
        assert render(text) == text, "run: python -m magnatronic.reference"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.name))
def test_links_lead_somewhere(document: Path) -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)(?:#[^)]*)?\)", document.read_text())
    assert links
    assert [link for link in links if not (document.parent / link).exists()] == []
