"""Sentences out of marked-up prose, stems, markers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agents.text import (
    bare,
    containment,
    content_words,
    is_not_found,
    markers_inside,
    markers_of,
    not_found,
    overlap,
    renumber,
    sentences,
    split_sentences,
    stem,
    tokens,
    without_markers,
)

README = """# uvloop

[![Build](https://ci/badge.svg)](https://ci) ![logo](x.png)

<p align="center"><b>uvloop</b> is a <em>fast</em>, drop-in replacement of the built-in asyncio event loop.
uvloop is implemented in Cython &amp; uses libuv under the hood.</p>

## Usage

Call [`install`](https://docs/install) before the loop starts, e.g. in the main module. It needs Python 3.8 or later.

```python
import uvloop
uvloop.install()  # this is code and no sentence at all
```

    an indented block of code that is no sentence

| Loop | Requests per second of it |
| ---- | ------------------------- |
| a    | 100 000 of them each      |

It supports the following systems:

* Linux
* macOS

- A longer item that says something by itself, and needs no introduction.
- short

See the `documentation`_ for more of this at https://docs.example/x

.. code-block:: python

    print("this is a directive's content and no sentence")

.. note::

Some :class:`Loop` objects are **not** thread-safe.

>>> uvloop.__version__
'0.22 is what it said in the session'
"""


def test_a_readmes_sentences_are_its_prose() -> None:
    assert sentences(README) == (
        "uvloop is a fast, drop-in replacement of the built-in asyncio event loop.",
        "uvloop is implemented in Cython & uses libuv under the hood.",
        "Call install before the loop starts, e.g. in the main module.",
        "It needs Python 3.8 or later.",
        "It supports the following systems: Linux, macOS.",
        "A longer item that says something by itself, and needs no introduction.",
        "Some Loop objects are not thread-safe.",
    )


def test_items_whose_bullets_were_dropped_still_join_their_introduction() -> None:
    text = (
        "Fastavro supports these Python versions:\n\nPython 3.10\n\nPyPy3\n\nIt is written in Cython and C to be quick."
    )
    assert sentences(text) == (
        "Fastavro supports these Python versions: Python 3.10, PyPy3.",
        "It is written in Cython and C to be quick.",
    )


@given(st.text(alphabet="ab .\n\t*-#>`[](){}<>|:_!&;\"'\\0", max_size=300))
def test_any_text_has_sentences_in_plain_form(text: str) -> None:
    for sentence in sentences(text):
        assert "\n" not in sentence
        assert len(sentence.split()) >= 4


@given(st.text(alphabet="abcA1 .\n\t*->`(){}:_!?;\"'\\", max_size=300))
def test_cited_sentences_come_apart_as_they_were(text: str) -> None:
    said = sentences(text)
    ended = " ".join(
        markers_inside(f"{sentence if bare(sentence)[-1:] != sentence[-1] else sentence + '.'} [{number}]")
        for number, sentence in enumerate(said, start=1)
    )
    assert [bare(without_markers(part)) for part in split_sentences(ended)] == [bare(sentence) for sentence in said]


CHUNK = """The module is quick.

async with timeout(1.5) as cm:
    cm.when()    # recommended api
    cm.deadline  # compatible api

or as a package:

conda config --add channels https://conda.example.io
conda install some-package

jgo org.python:jython-standalone -- -- script.py --verbose

git add -u .
somecommand with four words

if you want to know more, ask us."""
"""As the chunker leaves it: code without its fence."""


def test_code_without_a_fence_is_no_sentence() -> None:
    assert sentences(CHUNK) == ("The module is quick.", "if you want to know more, ask us.")


def test_a_command_is_quoted_with_what_leads_up_to_it() -> None:
    text = (
        "# Install\n\n$ pip install 'tool[x]'\n\nOr, to have HTTP/2 support, use:\n\npip install tool[http2]\n\n"
        "It reads:\n\nimport tool\ntool.run()\n\nFrom the sources:\n\npip install git+https://git.example/tool\n\n"
        "A long one is not quoted:\n\nimport tool\nx = 1\ny = 2\n\nThat is all of it."
    )
    assert sentences(text) == (
        "`pip install 'tool[x]'`",
        "Or, to have HTTP/2 support, use: `pip install tool[http2]`.",
        "It reads: `import tool`, `tool.run()`.",
        "That is all of it.",
    )


def test_a_cited_sentence_ends_before_a_small_letter() -> None:
    text = "It is quick [1]. timeout parameter could be None [2]. asyncio-compatible manager [3]."
    assert [markers_of(part) for part in split_sentences(text)] == [(1,), (2,), (3,)]


@pytest.mark.parametrize(
    "text", ["[" * 20_000, "`" * 20_000, "*a" * 10_000, "<" * 20_000, "![](" * 5_000, ".. a\n" * 4_000]
)
def test_hostile_markup_takes_no_time(text: str) -> None:
    import time

    started = time.process_time()
    sentences(text)
    assert time.process_time() - started < 1.0


@pytest.mark.parametrize(
    "family",
    [
        ("licence", "license", "licensed"),
        ("async", "asynchronous"),
        ("configure", "configures", "configured", "configuring", "configuration", "configurations"),
        ("install", "installs", "installed", "installing", "installation"),
        ("library", "libraries"),
        ("connect", "connected", "connection", "connections"),
        ("run", "runs", "running"),
        ("box", "boxes"),
        ("retry", "retries"),
    ],
)
def test_a_words_forms_share_a_stem(family: tuple[str, ...]) -> None:
    assert len({stem(word) for word in family}) == 1, [stem(word) for word in family]


def test_different_words_keep_apart() -> None:
    for one, other in (("use", "us"), ("class", "clas"), ("status", "statu"), ("3.10", "3.1"), ("http/2", "http")):
        assert stem(one) != stem(other)


def test_tokens_keep_versions_and_names_whole() -> None:
    assert tokens("HTTP/2, C++ and Python 3.11's asyncio_mode.") == [
        "http/2",
        "c++",
        "and",
        "python",
        "3.11",
        "s",
        "asyncio_mode",
    ]
    assert content_words("What is the event loop of uvloop?") == ("event", "loop", "uvloop")


def test_similarities() -> None:
    assert containment(["a", "b"], ["b", "c"]) == 0.5
    assert containment([], ["b"]) == 0.0
    assert overlap(["a", "b"], ["b", "c"]) == pytest.approx(1 / 3)
    assert overlap([], []) == 0.0


def test_markers() -> None:
    text = "One [2]. Two [1, 3], three [2][4]."
    assert markers_of(text) == (2, 1, 3, 4)
    assert without_markers(text) == "One. Two, three."
    assert renumber(text, {2: 1, 1: 2, 4: 3}) == "One [1]. Two [2], three [1][3]."
    assert renumber("array[0] stays, [9] goes", {0: 0}) == "array[0] stays, goes"
    assert markers_inside("Fast. [1] Small! [2][3] Done [4].") == "Fast [1]. Small [2][3]! Done [4]."
    assert split_sentences("Fast [1]. Small [2].") == ["Fast [1].", "Small [2]."]


def test_a_closing_quote_stays_with_its_sentence() -> None:
    assert markers_inside('It says "so." [1] Next.') == 'It says "so" [1]. Next.'
    assert split_sentences('He said "So it is." Next one.') == ['He said "So it is."', "Next one."]


def test_not_found_is_recognised() -> None:
    assert is_not_found(not_found("What\nis it?"))
    assert not is_not_found("The corpus holds much.")
    assert not is_not_found(f"{not_found('a?')} But b holds [1].")
