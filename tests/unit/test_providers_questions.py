"""What a question names: by its place in the question, and by its looks."""

import pytest

from agents.providers.questions import named_in, verb_of


@pytest.mark.parametrize(
    ("question", "subjects"),
    [
        ("Is numpy thread safe?", ["numpy"]),
        ("What is the licence of async-timeout?", ["async timeout"]),
        ("Which licence does orjson have?", ["orjson"]),
        ("Under which licence is tqdm released?", ["tqdm"]),
        ("How do I install httpx2?", ["httpx2"]),
        ("What is Milvus Lite?", ["milvus lite"]),
        ("Who is Ada Lovelace?", ["ada lovelac"]),
        ("What is a good library for progress bars?", []),
        ("What is new in the latest release?", []),
        ("Which event loop is the fastest?", []),
        ("How can I validate data with type hints?", []),
        ("?", []),
    ],
)
def test_what_a_question_is_about(question: str, subjects: list[str]) -> None:
    assert list(named_in(question).subjects) == [frozenset(subject.split()) for subject in subjects]


def test_names_are_known_by_their_looks() -> None:
    found = named_in("How does the reader of Apache_Avro in asyncio.run differ on Windows with utf8?").mentions
    assert frozenset({"window"}) in found
    assert frozenset({"asyncio.run"}) in found
    assert frozenset({"utf8"}) in found
    assert named_in("How can we sort a list?").mentions == ()


def test_the_verb_of_a_how_to() -> None:
    assert verb_of("How do I define a command with click?") == "defin"
    assert verb_of("How to use it?") == ""
    assert verb_of("What is click?") == ""
