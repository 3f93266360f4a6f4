"""Chunks: nothing is lost, budgets are kept, noise is left out, and the same document gives the same chunks."""

import time
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agents.memory.chunking import Chunk, Chunker
from agents.memory.markup import Kind, blocks
from agents.memory.model_files import TokenCounter
from agents.memory.sentences import sentences

COUNT = TokenCounter()
CHUNKER = Chunker(COUNT)

README = """\
---
layout: page
---
[![Build](https://ci.example/badge.svg)](https://ci.example) ![logo](logo.png)
<!-- a comment
over two lines -->
# Widget

<p align="center"><img src="x.png"></p>

**Widget** turns *raw* cables into [widgets](https://example.org/w_(x)). It is `fast`. See e.g. Foo for details!

## Install

```bash
pip install widget   # no comment is lost
```

## Usage

Setext sections
---------------

1. Open it.
2. Close it.

| Option | Meaning |
| ------ | ------- |
| `a_b`  | the **first** |

    indented code

### Async

> Quoted advice.

[ref]: https://example.org
"""

RST = """\
======
Widget
======

|build| Turn cables into `widgets <https://example.org>`_. Uses :class:`~foo.Bar` and ``literal``.

.. |build| image:: https://ci.example/badge.svg
   :target: https://ci.example

.. a comment
   over two lines

Install
-------

Run this::

    pip install widget

.. code-block:: python
   :linenos:

   import widget

.. note::
   Mind the gap.

Usage
-----

>>> widget.turn()
3

* First item
* Second item

==== =====
a    b
==== =====
1    one
==== =====
"""

HTML = """<html><head><title>no</title><style>p {}</style><body><h1>Widget</h1><p>Turns <b>raw</b>er cables.<script>x()
</script></p><h2>Use</h2><ul><li>First &amp; only</li></ul>
<pre>a = 1\n  b</pre><table><tr><th>k</th><td>v</td></tr></table>"""


def seen(text: str, media_type: str) -> list[tuple[tuple[str, ...], Kind, str]]:
    return [(block.path, block.kind, block.text) for block in blocks(text, media_type)]


def test_markdown_is_read_as_a_reader_sees_it() -> None:
    assert seen(README, "text/markdown; variant=GFM") == [
        (("Widget",), Kind.PROSE, "Widget turns raw cables into widgets. It is `fast`. See e.g. Foo for details!"),
        (("Widget", "Install"), Kind.CODE, "pip install widget   # no comment is lost"),
        (("Widget", "Setext sections"), Kind.PROSE, "Open it."),
        (("Widget", "Setext sections"), Kind.PROSE, "Close it."),
        (("Widget", "Setext sections"), Kind.TABLE, "Option | Meaning\n`a_b` | the first"),
        (("Widget", "Setext sections"), Kind.CODE, "indented code"),
        (("Widget", "Setext sections", "Async"), Kind.PROSE, "Quoted advice."),
    ]


def test_restructuredtext_is_read_as_a_reader_sees_it() -> None:
    assert seen(RST, "text/x-rst") == [
        (("Widget",), Kind.PROSE, "Turn cables into widgets. Uses foo.Bar and `literal`."),
        (("Widget", "Install"), Kind.PROSE, "Run this:"),
        (("Widget", "Install"), Kind.CODE, "pip install widget"),
        (("Widget", "Install"), Kind.CODE, "import widget"),
        (("Widget", "Install"), Kind.PROSE, "Mind the gap."),
        (("Widget", "Usage"), Kind.CODE, ">>> widget.turn()\n3"),
        (("Widget", "Usage"), Kind.PROSE, "First item"),
        (("Widget", "Usage"), Kind.PROSE, "Second item"),
        (("Widget", "Usage"), Kind.TABLE, "a | b\n1 | one"),
    ]


def test_html_is_read_as_a_reader_sees_it() -> None:
    assert seen(HTML, "text/html") == [
        (("Widget",), Kind.PROSE, "Turns rawer cables."),
        (("Widget", "Use"), Kind.PROSE, "First & only"),
        (("Widget", "Use"), Kind.CODE, "a = 1\n  b"),
        (("Widget", "Use"), Kind.TABLE, "k | v"),
    ]


def test_plain_text_is_taken_as_it_is() -> None:
    assert seen("# not a heading\nand *more*\r\n\r\nnext", "application/unknown") == [
        ((), Kind.PROSE, "# not a heading and *more*"),
        ((), Kind.PROSE, "next"),
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One. Two! Three? four", ["One.", "Two!", "Three? four"]),
        ("Use a store, e.g. Redis. It works.", ["Use a store, e.g. Redis.", "It works."]),
        ("Version 2.0 is out. 3.1 is not.", ["Version 2.0 is out.", "3.1 is not."]),
        ('He said "yes." Then he left.', ['He said "yes."', "Then he left."]),
        ("你好。再见。", ["你好。", "再见。"]),
        ("  \n ", []),
    ],
)
def test_sentences_end_where_a_reader_ends_them(text: str, expected: list[str]) -> None:
    assert sentences(text) == expected


WORDS = st.sampled_from(
    ["the", "quick", "engine", "turns", "slow", "cables", "into", "widgets", "when", "nobody", "I/O"]
)
SENTENCE = st.lists(WORDS, min_size=1, max_size=60).map(lambda words: " ".join(words).capitalize() + ".")
PARAGRAPH = st.lists(SENTENCE, min_size=1, max_size=12)
SECTION = st.tuples(st.integers(1, 4), WORDS, st.lists(PARAGRAPH, max_size=3))


@settings(max_examples=60, deadline=None)
@given(sections=st.lists(SECTION, max_size=5), target=st.integers(80, 256))
def test_every_sentence_is_in_a_chunk_and_every_chunk_in_its_budget(
    sections: list[tuple[int, str, list[list[str]]]], target: int
) -> None:
    text = "\n\n".join(
        part
        for level, heading, paragraphs in sections
        for part in ("#" * level + " " + heading, *(" ".join(paragraph) for paragraph in paragraphs))
    )
    chunks = Chunker(COUNT, target=target)(text, "text/markdown", "Widget")
    for _, _, paragraphs in sections:
        for paragraph in paragraphs:
            for sentence in sentences(" ".join(paragraph)):
                assert any(sentence in chunk.text for chunk in chunks)
    for chunk in chunks:
        assert chunk.tokens == COUNT([chunk.embedded])[0] + 2
        assert chunk.tokens <= 256
    assert [chunk.ordinal for chunk in chunks] == list(range(len(chunks)))


MEDIA_TYPES = ("text/markdown", "text/x-rst", "text/html", "text/plain")
MARKUP = st.text(st.sampled_from("ab \n\n#*_`~[]()<>!|-=:.>&;\\\"'1/\t"), max_size=300)


@settings(max_examples=150, deadline=None)
@given(text=st.one_of(MARKUP, st.text(max_size=300)), media_type=st.sampled_from(MEDIA_TYPES))
def test_no_text_is_refused_or_breaks_the_budget(text: str, media_type: str) -> None:
    first, second = CHUNKER(text, media_type, text), CHUNKER(text, media_type, text)
    assert first == second
    assert all(chunk.text.strip() and chunk.tokens <= 256 for chunk in first)


@pytest.mark.parametrize("media_type", MEDIA_TYPES)
@pytest.mark.parametrize(
    "unit", ["[", "![", "*a ", "_", "`", "<", "<a ", "<!--", "> ", "` " + " " * 500, "|a", "a\n-\n", "::\n", "((", "&"]
)
def test_hostile_text_takes_linear_time(media_type: str, unit: str) -> None:
    text = unit * (20_000 // len(unit))
    started = time.process_time()
    blocks(text, media_type)
    blocks(text + ">", media_type)
    assert time.process_time() - started < 1.5  # quadratic time over 20,000 characters is many times that


def test_code_is_kept_whole_where_it_fits_and_cut_at_lines_where_not() -> None:
    short = "\n".join(f"value_{n} = compute({n})" for n in range(10))
    long = "\n".join(f"other_{n} = compute({n})" for n in range(200))
    text = f"# Use\n\n{'Words come before it here. ' * 30}\n\n```python\n{short}\n```\n\n```\n{long}\n```\n"
    chunks = CHUNKER(text, "text/markdown")
    assert sum(short in chunk.text for chunk in chunks) == 1
    lines = [line for chunk in chunks for line in chunk.text.split("\n")]
    assert all(line in lines for line in long.split("\n"))


def test_a_sentence_is_repeated_where_a_paragraph_is_cut() -> None:
    text = " ".join(f"This is sentence number {n} of one long paragraph about widgets." for n in range(60))
    chunks = CHUNKER(text)
    assert len(chunks) > 3
    for before, after in pairwise(chunks):
        assert sentences(before.text)[-1] == sentences(after.text)[0]


def test_title_and_headings_are_embedded_but_never_crowd_out_the_text() -> None:
    (chunk,) = CHUNKER("# Widget\n\n## Async\n\nUse `await`.", "text/markdown", "Widget")
    assert chunk == Chunk(0, "Widget > Async", "Use `await`.", "Widget > Async", chunk.tokens)
    assert chunk.embedded == "Widget > Async\nUse `await`."
    (crowded,) = CHUNKER(f"# {'very long heading ' * 200}\n\nText.", "text/markdown", "title " * 500)
    assert crowded.text == "Text."
    assert crowded.tokens <= 256


def test_a_word_without_end_is_cut() -> None:
    chunks = CHUNKER("x" * 500_000)
    assert max(len(chunk.text) for chunk in chunks) < 8_192
    assert sum(chunk.text.count("x") for chunk in chunks) == 500_000


@pytest.mark.parametrize("text", ["", "\n\n", "# Only a heading", "<!-- nothing -->", "![badge](x.svg)"])
def test_a_document_without_text_has_no_chunks(text: str) -> None:
    assert CHUNKER(text, "text/markdown") == []


def test_a_budget_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match="<= target <= limit"):
        Chunker(COUNT, target=40)
