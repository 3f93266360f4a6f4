"""The extractive provider: verbatim, cited, deterministic, quick, and silent where the passages are."""

import time

import pytest

from agents.context import LlmRequest, Message, Passage, Purpose
from agents.prompts import NOT_FOUND_WORD
from agents.providers.extractive import ExtractiveModel, answer, synthesise
from agents.text import not_found, sentences, split_sentences, without_markers

TEXTS = {
    "httpx > Contribute": "If you want to contribute with HTTPX check out the Contributing Guide.",
    "httpx > Installation": "Install with pip. HTTPX requires Python 3.8+. "
    "Or, to include the optional HTTP/2 support, use httpx[http2].",
    "httpx": "HTTPX is a fully featured HTTP client library for Python 3. It has support for both HTTP/1.1 and HTTP/2.",
    "httpx2": "HTTPX2 continues the work on a client. HTTPX2 is BSD licensed code.",
    "avro": "Apache Avro is a data serialization system. To learn more, please visit our website.",
    "fastavro": "Because the Apache Python avro package is written in pure Python, it is relatively slow. "
    "The fastavro library was written to offer performance comparable to the Java library.",
    "idna": 'For example, "Foo" is not a permissible label as capital letters are not allowed.',
}
PASSAGES = tuple(
    Passage(marker=number, chunk_id=f"c{number}", title=title, text=text)
    for number, (title, text) in enumerate(TEXTS.items(), start=1)
)


def test_a_definition_leads_though_others_are_nearer() -> None:
    assert answer("What is httpx?", PASSAGES).startswith(
        "HTTPX is a fully featured HTTP client library for Python 3 [3]."
    )


def test_a_question_is_answered_by_the_sentence_that_holds_its_words() -> None:
    assert answer("Which Python does httpx require?", PASSAGES).startswith("HTTPX requires Python 3.8+ [2].")


def test_a_comparison_says_something_of_each_side() -> None:
    text = answer("Compare fastavro with avro", PASSAGES)
    assert "[5]" in text
    assert "[6]" in text


def test_every_sentence_is_verbatim() -> None:
    for question in ("What is httpx?", "Compare fastavro with avro", "Does httpx support HTTP/2?"):
        for sentence in split_sentences(answer(question, PASSAGES)):
            assert any(without_markers(sentence) in sentences(text) for text in TEXTS.values()), sentence


def test_what_the_passages_do_not_hold_is_not_found() -> None:
    for question in ("What is the capital of France?", "Who won the world cup in 2018?", "How?", "?"):
        assert answer(question, PASSAGES) == NOT_FOUND_WORD
    assert answer("What is httpx?", ()) == NOT_FOUND_WORD


def test_sentences_that_a_reviewer_refused_are_not_given_again() -> None:
    first = without_markers(split_sentences(answer("What is httpx?", PASSAGES))[0])
    assert first not in without_markers(answer("What is httpx?", PASSAGES, refused=f"does not support: {first!r}"))


def test_a_synthesis_says_things_once_and_owns_up_to_gaps() -> None:
    notes = (
        Passage(marker=1, chunk_id="t/1", title="a", text="One is so [1]. Two is so [2]."),
        Passage(marker=2, chunk_id="t/2", title="b", text="Two is so [2]."),
        Passage(marker=3, chunk_id="t/3", title="c", text=not_found("Is three so?")),
    )
    assert synthesise(notes) == f"One is so [1]. Two is so [2].\n\n{not_found('Is three so?')}"


async def test_it_says_what_it_is_and_repeats_itself() -> None:
    request = LlmRequest(
        purpose=Purpose.ANSWER, messages=(Message(role="user", content="What is httpx?"),), passages=PASSAGES
    )
    first, second = [await ExtractiveModel().complete(request, idempotency_key=key) for key in "ab"]
    assert first == second
    assert (first.provider, first.model, first.cost_usd) == ("extractive", "extractive-1", 0.0)
    assert first.prompt_tokens > first.completion_tokens > 0


def test_it_is_quick() -> None:
    answer("What is httpx?", PASSAGES)
    started = time.perf_counter()
    for _ in range(20):
        answer("What is httpx?", PASSAGES)
    assert (time.perf_counter() - started) / 20 < 0.01, "a tenth of the processor's floor of 100 tasks/s"


README = {
    "tokenizers > Threads": "Setters are thread-safe: the state is wrapped in a lock. The tokenizers are quick.",
    "numpy": "NumPy is the fundamental package for scientific computing with Python. It provides an array object.",
    "tqdm > Licence": "tqdm is licensed under the MIT licence. tqdm requires Python 3.7 or later.",
    "tqdm > Installation": "pip install tqdm",
    "httpx > Installation": "Install with pip:\n\npip install httpx\n\n"
    "Or, to include the optional HTTP/2 support, use:\n\npip install httpx[http2]",
    "httpx2": "HTTPX2 is a client that supports HTTP/2. Its licence is BSD. It retries failed connections.",
    "lz4 > Notes": "Code of this project is fast. The zlib module is thread safe. It comes with Python.",
}
ABOUT = tuple(
    Passage(marker=number, chunk_id=f"r{number}", title=title, text=text)
    for number, (title, text) in enumerate(README.items(), start=1)
)


@pytest.mark.parametrize(
    "question",
    [
        "Is numpy thread safe?",  # its passages don't say; another's do
        "What licence does numpy have?",
        "Is Django thread safe?",  # no passage names it
        "Under which licence is kubernetes released?",
        "Which Python versions does numpy support?",
        "Does httpx support QUIC?",
        "What is flask?",
    ],
)
def test_nothing_is_said_of_one_thing_from_what_is_said_of_another(question: str) -> None:
    assert answer(question, ABOUT) == NOT_FOUND_WORD


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("What is the license of tqdm?", "tqdm is licensed under the MIT licence [3]."),
        ("Which Python versions does tqdm support?", "tqdm requires Python 3.7 or later [3]."),
        ("How do I install tqdm?", "`pip install tqdm` [4]."),
        (
            "Does httpx support HTTP/2?",
            "Or, to include the optional HTTP/2 support, use: `pip install httpx[http2]` [5].",
        ),
        ("Is zlib thread safe?", "The zlib module is thread safe [7]."),  # no title names it, a sentence does
        (
            "Which client retries failed connections?",  # nothing named
            "HTTPX2 is a client that supports HTTP/2 [6]. It retries failed connections [6].",
        ),
    ],
)
def test_an_answer_keeps_to_what_the_question_names(question: str, expected: str) -> None:
    assert answer(question, ABOUT) == expected
