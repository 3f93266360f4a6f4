"""Events like those of real tasks, for every benchmark: same seed, same events.

In: how many. Out: event models, their metadata, and records as the log holds them.
"""

import random
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import numpy as np

from schemas.codec import Codec
from schemas.events import ChunkEmbedded, Citation, Claim, Event, Evidence, StepCompleted, TaskCompleted, TaskSubmitted
from schemas.metadata import Envelope, Metadata, deterministic_id
from schemas.record import Record
from schemas.topics import key_of, topic_name

__all__ = [
    "DIMENSIONS",
    "WORDS",
    "chunk",
    "completion",
    "completion_metadata",
    "metadata_for",
    "record_of",
    "sentence",
    "step_completed",
    "submission",
    "submissions",
]

DIMENSIONS = 384
"""As all-MiniLM-L6-v2 has."""

NOW = datetime(2026, 1, 15, 12, 30, 15, 123456, tzinfo=UTC)
_VOCABULARY = """
partition offset broker consumer producer transaction commit leader replica segment log record header schema registry
decoder encoder stream window table join state store changelog restore fence zombie epoch group rebalance assign revoke
retry backoff timeout batch latency throughput memory disk page cache index vector
"""
WORDS = tuple(_VOCABULARY.split())


def sentence(rng: random.Random, words: int) -> str:
    """``words`` words, the first with a capital letter, with a full stop."""
    return " ".join(rng.choices(WORDS, k=words)).capitalize() + "."


def submission(number: int, prefix: str = "bench") -> TaskSubmitted:
    """The ``number``-th task: a question of about a dozen words and two parameters."""
    rng = random.Random(number)
    return TaskSubmitted(
        task_id=f"{prefix}-{number:08d}",
        objective=sentence(rng, 12),
        submitted_by="/clients/bench",
        parameters={"tenant": f"tenant-{number % 50}", "language": "en"},
    )


def metadata_for(event: Event) -> Metadata:
    """Metadata with every CloudEvents attribute and extension set, the trace context too."""
    key = key_of(event)
    cause = deterministic_id("bench", key)
    return Metadata(
        id=deterministic_id("bench", type(event).__name__, key),
        source="/clients/bench",
        subject=key,
        time=NOW,
        causation_id=cause,
        correlation_id=key,
        traceparent=f"00-{cause.replace('-', '')}-{cause.replace('-', '')[:16]}-01",
    )


def submissions(count: int, prefix: str = "bench") -> Iterator[Envelope]:
    """The first ``count`` tasks with their metadata."""
    for number in range(count):
        event = submission(number, prefix)
        yield Envelope(event, metadata_for(event))


def completion(event: TaskSubmitted) -> TaskCompleted:
    """What the typed step decides: the whole of its decision, the same in every system."""
    return TaskCompleted(task_id=event.task_id, objective=event.objective, answer=event.objective.upper())


def completion_metadata(cause: Metadata, now: datetime, source: str) -> Metadata:
    """Metadata of the step's only output, as :mod:`agents.step` derives it."""
    return Metadata(
        id=deterministic_id(cause.id, source, "", 0),
        source=source,
        subject=cause.subject,
        time=now,
        causation_id=cause.id,
        correlation_id=cause.correlation_id,
        traceparent=cause.traceparent,
    )


def step_completed(number: int, passages: int = 6) -> StepCompleted:
    """A worker's result of usual size: ``passages`` passages of 60 words, each cited once (about 5 KiB for 6)."""
    rng = random.Random(number)
    evidence = tuple(
        Evidence(
            chunk_id=deterministic_id("chunk", number, place),
            document_id=f"document-{place}",
            title=sentence(rng, 4),
            heading=sentence(rng, 3),
            source=f"docs/{place}.md",
            text=sentence(rng, 60),
            score=rng.random(),
        )
        for place in range(passages)
    )
    claims = tuple(Claim(text=sentence(rng, 15), chunk_ids=(found.chunk_id,)) for found in evidence)
    citations = tuple(
        Citation(
            marker=place + 1,
            chunk_id=found.chunk_id,
            document_id=found.document_id,
            title=found.title,
            heading=found.heading,
            source=found.source,
            quote=found.text[:200],
        )
        for place, found in enumerate(evidence)
    )
    return StepCompleted(
        task_id=f"bench-{number:08d}",
        step_id=f"bench-{number:08d}/1",
        attempt=1,
        capability="research",
        objective=sentence(rng, 12),
        answer=" ".join(claim.text for claim in claims),
        claims=claims,
        citations=citations,
        evidence=evidence,
        model="extractive",
    )


def chunk(number: int) -> ChunkEmbedded:
    """A chunk of about 100 words with its unit vector; ten chunks make a document."""
    rng = random.Random(number)
    raw = [rng.gauss(0.0, 1.0) for _ in range(DIMENSIONS)]
    length = sum(value * value for value in raw) ** 0.5
    return ChunkEmbedded(
        chunk_id=deterministic_id("bench-chunk", number),
        document_id=f"document-{number // 10}",
        ordinal=number % 10,
        title=sentence(rng, 4),
        heading=sentence(rng, 3),
        source=f"docs/{number // 10}.md",
        text=sentence(rng, 100),
        tokens=130,
        model="all-MiniLM-L6-v2",
        model_version="int8-1",
        vector=tuple(np.array([value / length for value in raw], dtype=np.float32).tolist()),
    )


def record_of(codec: Codec, event: Event, offset: int, metadata: Metadata | None = None) -> Record:
    """``event`` as the log would hold it, at ``offset`` of partition 0 of its own topic."""
    encoded = codec.encode(event, metadata or metadata_for(event))
    headers: Any = encoded.headers
    milliseconds = int(NOW.timestamp() * 1000) + offset
    return Record(topic_name(event), 0, offset, milliseconds, key_of(event).encode(), encoded.value, headers)
