from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from magnatronic.cli import main
from magnatronic.cli.dlq import hex_dump
from magnatronic.dlq import redrive_headers
from magnatronic.errors import WrongInputError
from magnatronic.letters import Entry, Filter, Place, find

NOW = datetime(2030, 1, 1, tzinfo=UTC)


def entry(id_: str = "0123456789abcdef", topic: str = "tasks.normal", offset: int = 7, agent: str = "a") -> Entry:
    return Entry(id_, Place(topic, 2, offset, agent), NOW, "ValueError", "wrong Number", 3, 0, 5, kept=True)


@given(
    st.from_regex(r"[a-zA-Z0-9._-]{1,40}", fullmatch=True),
    st.integers(0, 1000),
    st.integers(0, 2**63 - 1),
    st.text(min_size=1),
)
def test_a_place_is_read_as_it_is_written(topic: str, partition: int, offset: int, agent: str) -> None:
    place = Place(topic, partition, offset, agent)
    assert Place.parse(str(place)) == place


@pytest.mark.parametrize(
    "text", ["", "t", "0123456789abcdef", "t:1:2", "t:1:2@", "t:1@a", "t:x:2@a", ":1:2@a", "t:1:-2@a", "@a"]
)
def test_what_is_no_place(text: str) -> None:
    assert Place.parse(text) is None


@given(st.lists(st.tuples(st.sampled_from(["a", "redrive", "z"]), st.none() | st.binary(max_size=3)), max_size=6))
def test_a_redriven_record_is_for_one_agent_and_else_as_it_was(headers: list[tuple[str, bytes | None]]) -> None:
    sent = redrive_headers(headers, "mender")
    assert sent[-1] == ("redrive", b"mender")
    assert sent[:-1] == [header for header in headers if header[0] != "redrive"]
    assert redrive_headers(sent, "mender") == sent


@pytest.mark.parametrize(
    ("chosen_by", "taken"),
    [
        (Filter(), True),
        (Filter(agent="a"), True),
        (Filter(agent="b"), False),
        (Filter(topic="tasks.normal"), True),
        (Filter(topic="tasks"), False),
        (Filter(error="valueerror"), True),
        (Filter(error="number"), True),
        (Filter(error="KeyError"), False),
        (Filter(since=NOW), True),
        (Filter(since=NOW + timedelta(seconds=1)), False),
        (Filter(agent="a", error="KeyError"), False),
    ],
)
def test_filters(chosen_by: Filter, taken: bool) -> None:
    assert chosen_by(entry()) is taken


def test_letters_are_found_by_the_beginning_of_their_id_or_by_their_place() -> None:
    first, second = entry("abcd1234", offset=1), entry("abcd9999", offset=2)
    entries = [first, second]
    assert find(entries, "abcd1") is first
    assert find(entries, "ABCD99") is second
    assert find(entries, "tasks.normal:2:2@a") is second
    with pytest.raises(WrongInputError, match=r"beginning of 2 ids: tasks\.normal:2:1@a, tasks\.normal:2:2@a"):
        find(entries, "abcd")
    for text in ("ffff", "abc", "", "tasks.normal:2:3@a"):
        with pytest.raises(WrongInputError, match="there is no dead letter"):
            find(entries, text)


def test_bytes_are_shown_as_hex_and_text() -> None:
    assert hex_dump(b"") == ""
    assert hex_dump(bytes(range(60, 78)) + b"\x00\xff").splitlines() == [
        "00000000  3c 3d 3e 3f 40 41 42 43 44 45 46 47 48 49 4a 4b  <=>?@ABCDEFGHIJK",
        "00000010  4c 4d 00 ff                                      LM..",
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["redrive"], "dlq redrive: give either ids or --all"),
        (["redrive", "abcd", "--all"], "dlq redrive: give either ids or --all"),
        (["redrive", "abcd", "--agent", "a"], "filters go with --all, not with ids"),
        (["redrive", "--all", "--again"], "--again takes ids"),
        (["discard", "abcd"], "Missing option '--reason'"),
        (["discard", "abcd", "--reason", " "], "--reason is empty"),
        (["list", "--since", "yesterday"], "'yesterday' is no time; write 90s"),
        (["list", "--limit", "0"], "0 is not in the range"),
        (["show"], "Missing argument 'ID'"),
        (["list"], "no Magnatronic is running"),
        (["redrive", "abcd"], "no Magnatronic is running"),
    ],
)
def test_wrong_input_is_one_line(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["dlq", arguments[0], "--data-dir", str(tmp_path_factory.mktemp("data")), *arguments[1:]])
    shown = capsys.readouterr()
    assert (ended.value.code, shown.out, shown.err.count("\n")) == (2, "", 1)
    assert said in shown.err
