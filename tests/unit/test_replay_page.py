"""Pages of reports: whole, self-contained, and safe to fill with text of any origin."""

import time
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser

import pytest

from replay.diff import Change, side_by_side, unified_diff
from replay.page import (
    Bar,
    Html,
    Node,
    badge,
    code,
    columns,
    diff,
    facts,
    figures,
    fold,
    inline,
    link,
    muted,
    page,
    paragraph,
    section,
    shown,
    strong,
    table,
    timeline,
    tree,
    unified,
)
from replay.words import duration

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "'--><svg/onload=alert(1)>",
    "</code></pre></details></style><iframe src='//evil'>",
    "a\x00b\x1b[31m\ud800\u202eevil\u2066\ufeff",
    "&lt;b&gt; &amp;amp; &#60;script&#62;",
    "javascript:alert(1)",
    "line one\nline <b>two</b>\r\n\ttabbed",
]

_VOID = {"meta", "br"}
_KNOWN = {
    *("html", "head", "meta", "title", "style", "body", "header", "main", "footer", "section", "h1", "h2", "h3"),
    *("p", "a", "b", "i", "span", "div", "strong", "pre", "code", "ins", "del", "dl", "dt", "dd", "ul", "li"),
    *("table", "caption", "thead", "tbody", "tr", "th", "td", "details", "summary"),
}


class Checked(HTMLParser):
    """Reads a page as a browser would, and refuses what must not be in it."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.text: list[str] = []
        self.ids: set[str] = set()
        self.targets: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in _KNOWN, tag
        for name, value in attrs:
            assert name in {"class", "id", "href", "style", "open", "colspan", "lang", "charset", "content", "name"} | {
                "http-equiv"
            }, name
            if name == "href":
                assert (value or "").startswith("#"), value
                self.targets.add((value or "")[1:])
            if name == "style":
                assert "url" not in (value or "")
            if name == "id":
                assert value
                assert value not in self.ids
                self.ids.add(value)
        if tag not in _VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text.append(data)


def read(html: str) -> Checked:
    checked = Checked()
    checked.feed(html)
    checked.close()
    assert checked.open == []
    return checked


def everything(text: str) -> str:
    """A page with ``text`` in every place that takes some."""
    return page(
        text,
        figures([(text, text), (text, 3, "bad")]),
        text,
        section(
            text,
            facts({text: text, "none": None}),
            table([text, "n"], [[text, 1], [badge(text, "good"), 2]], caption=text, right=[text]),
            paragraph(text, link(text, "there"), muted(text), strong(text)),
            anchor=text,
        ),
        section("there", columns(text, code(text), titles=[text, text]), anchor="there"),
        fold(inline(text, badge(text)), code(text, wrap=False), open=True),
        tree([Node(text, [code(text)], [Node(text), Node(badge(text), open=False, body=[text])])]),
        diff(text, f"{text} changed\nand more", names=(text, text)),
        unified(text, "other", names=(text, text)),
        timeline([Bar(text, 0, 1, text), Bar(text, 0.5, 2.5, text, "warn")], unit=text),
        subtitle=text,
        footer=text,
    )


@pytest.mark.parametrize("text", HOSTILE)
def test_text_of_any_origin_stays_text(text: str) -> None:
    html = everything(text)
    checked = read(html)
    assert checked.targets <= checked.ids
    assert html.encode("utf-8")
    assert not {"\x00", "\x1b", "\u202e", "\u2066", "\ufeff", "\ud800"} & set(html)


def test_a_page_asks_for_nothing_and_runs_nothing() -> None:
    html = everything("x")
    assert "default-src 'none'" in html
    assert not any(word in html for word in ("<script", "<link", "@import", "url(", "http://", "https://", " src="))


def test_what_was_put_in_is_what_is_read() -> None:
    said = "".join(read(everything("<i>&amp;</i> “quoted”")).text)
    assert "<i>&amp;</i> “quoted”" in said


def test_hidden_characters_are_shown() -> None:
    assert "⟨U+202E⟩" in code("a\u202eb")
    assert "␛" in code("\x1b[0m")
    assert "\u200d" in code("👩\u200d🚀")


def test_markup_is_escaped_unless_this_module_made_it() -> None:
    assert "<b>" not in paragraph("<b>")
    assert isinstance(badge("x"), Html)
    assert "<span" not in paragraph(badge("x") + "tail")  # joined by hand it is text again


def test_numbers_stand_to_the_right() -> None:
    html = table(["name", "tokens", "cost"], [["a", 1234, "$1"], ["b", None, "$2"]], right=["cost"])
    assert "<th class=num>tokens</th>" in html
    assert "<td class=num>1,234</td>" in html
    assert "<td class=num>$1</td>" in html
    assert "<td>a</td>" in html
    assert "class=num" not in table(["a", "b"], [["x", 1], ["y", "z"]])


def test_zero_is_shown_and_nothing_is_not() -> None:
    assert "<dd>0</dd>" in facts({"tokens": 0, "error": ""})
    assert "error" not in facts({"tokens": 0, "error": ""})
    assert facts({}) == ""
    assert "<b>0</b>" in figures([("steps", 0)])


def test_values_are_shown_for_people() -> None:
    assert [shown(value) for value in (None, True, 1234567, 0.000123456, 12345.6, 0.0, "x")] == [
        "",
        "yes",
        "1,234,567",
        "0.0001235",
        "12,346",
        "0",
        "x",
    ]
    assert shown(datetime(2026, 1, 2, 3, 4, 5, 678_000, tzinfo=UTC)) == "2026-01-02 03:04:05.678+00:00"


def test_the_same_input_gives_the_same_page() -> None:
    assert everything("x") == everything("x")


def test_links_lead_to_their_sections() -> None:
    checked = read(page("x", link("go", "task/1 <b>"), fold("here", "text", anchor="task/1 <b>")))
    assert checked.targets == checked.ids


def test_side_by_side_marks_the_words_that_differ() -> None:
    (row,) = side_by_side("the answer is 41", "the answer is 42", context=0)
    assert row.change is Change.CHANGED
    assert [(piece.text, piece.changed) for piece in row.before] == [("the answer is ", False), ("41", True)]
    html = diff("the answer is 41", "the answer is 42", names=("recorded", "decided now"))
    assert "<del>41</del>" in html
    assert "<ins>42</ins>" in html
    assert "recorded" in html


def test_lines_with_nothing_in_common_are_not_picked_apart() -> None:
    (row,) = side_by_side("alpha beta gamma delta", "one two three four", context=0)
    assert not any(piece.changed for piece in (*row.before, *row.after))


def test_equal_lines_far_from_a_change_are_left_out() -> None:
    lines = [str(n) for n in range(100)]
    rows = side_by_side("\n".join(lines), "\n".join([*lines[:50], "new", *lines[50:]]), context=2)
    assert [row.change for row in rows] == [
        Change.GAP,
        Change.SAME,
        Change.SAME,
        Change.ADDED,
        Change.SAME,
        Change.SAME,
        Change.GAP,
    ]
    assert rows[0].skipped == rows[-1].skipped == 48
    assert rows[3].after_number == 51


def test_equal_texts_say_so() -> None:
    assert "are equal" in diff("a\nb", "a\nb")
    assert unified_diff("a", "a") == ""


def test_large_texts_are_compared_in_bounded_time() -> None:
    before = "\n".join(f"{n % 2} {n % 3}" for n in range(60_000))
    after = "\n".join(f"{n % 3} {n % 2}" for n in range(60_000))
    words = " ".join(str(n % 5) for n in range(60_000))
    began = time.monotonic()
    assert "-1 1\n" in unified_diff(before, after)
    assert diff(before, after)
    assert diff(words, words.replace("3", "4"))
    small = "\n".join("ab"[n % 2] for n in range(630)), "\n".join("ba"[n % 3 == 0] for n in range(630))
    assert diff(*small)
    assert time.monotonic() - began < 20


def test_unified_is_as_patch_reads_it() -> None:
    assert unified_diff("a\nb", "a\nc", names=("x", "y")) == "--- x\n+++ y\n@@ -1,2 +1,2 @@\n a\n-b\n+c"
    assert '<span class="ins">+c</span>' in unified("a\nb", "a\nc")


def test_a_timeline_spans_its_bars() -> None:
    html = timeline([Bar("a", 10, 12), Bar("b", 12, 20, "8 s", "warn")])
    assert "left:0.00%;width:20.00%" in html
    assert "left:20.00%;width:80.00%" in html
    assert timeline([]) == ""
    assert timeline([Bar("instant", 5, 5)])


def test_durations_have_three_digits() -> None:
    lengths = [timedelta(seconds=seconds) for seconds in (0, 0.0004, 0.0123, 1.2345, 75, 7_500)]
    assert [duration(each) for each in lengths] == ["0 ms", "0.4 ms", "12 ms", "1.23 s", "1 min 15 s", "2 h 5 min"]
