"""The Embedder agent: what is embedded, what is not, and that replay embeds nothing."""

from collections.abc import Sequence
from datetime import UTC, datetime
from hashlib import sha256

import numpy as np
import pytest

from agents import embedder as module
from agents.context import Ports, Vectors
from agents.embedder import Embedder, IndexedDocument
from agents.errors import EffectFailedError
from agents.journal import Journal
from agents.memory.chunking import Chunker
from agents.memory.errors import DocumentTooLargeError
from agents.memory.model_files import TokenCounter
from agents.step import LaneState, StepResult, run_step
from schemas.events import (
    ChunkEmbedded,
    DocumentIndexed,
    DocumentRemoved,
    DocumentSubmitted,
    Effect,
    Event,
    Priority,
    TextsEmbedded,
)
from schemas.metadata import Envelope, Metadata

AGENT = Embedder("toy", "1", Chunker(TokenCounter()))
TEXT = "# Use\n\nTurn cables into widgets.\n\n## Async\n\nAwait the widget.\n\n## Licence\n\nFree for all."


class ToyModel:
    """Vectors by hash, and all texts it was given."""

    model, version, dimensions = "toy", "1", 8

    def __init__(self) -> None:
        self.calls: list[tuple[str, ...]] = []
        self.fails = False

    async def embed(self, texts: Sequence[str]) -> Vectors:
        if self.fails:
            raise EffectFailedError("OutOfMemory", "no room", retryable=True)
        self.calls.append(tuple(texts))
        raw = np.array([list(sha256(text.encode()).digest()[:8]) for text in texts], np.float32) + 1
        return np.asarray(raw / np.linalg.norm(raw, axis=1, keepdims=True), np.float32)

    @property
    def texts(self) -> list[str]:
        return [text for call in self.calls for text in call]


def submitted(text: str = TEXT, *, title: str = "Widget", source: str = "w.md") -> DocumentSubmitted:
    return DocumentSubmitted(document_id="d1", title=title, text=text, media_type="text/markdown", source=source)


class Steps:
    """Runs the Embedder on one document's events, as a processor would."""

    def __init__(self, model: ToyModel, agent: Embedder = AGENT) -> None:
        self.model = model
        self.agent = agent
        self.state: LaneState | None = None
        self.effects: list[Effect] = []
        self.count = 0

    async def __call__(self, event: Event, *, recorded: Sequence[Effect] = (), replaying: bool = False) -> StepResult:
        self.count += 1
        cause = Metadata(f"cause-{self.count}", "/clients/test", "d1", datetime(2026, 1, 1, tzinfo=UTC))
        journal = Journal(
            agent=self.agent.name,
            source=self.agent.source,
            key="d1",
            cause=cause,
            ports=Ports() if replaying else Ports(embedding=self.model),
            recorded=recorded,
            replaying=replaying,
        )
        result = await run_step(
            self.agent,
            Envelope(event, cause),
            timestamp_ms=1_767_225_600_000,
            priority=Priority.NORMAL,
            state=self.state,
            journal=journal,
        )
        self.effects = [one.event for one in journal.performed if isinstance(one.event, Effect)]
        self.state = result.state
        return result


def chunks_of(result: StepResult) -> list[ChunkEmbedded]:
    return [one.event for one in result.outputs if isinstance(one.event, ChunkEmbedded)]


def indexed_of(result: StepResult) -> DocumentIndexed:
    *_, last = [one.event for one in result.outputs]
    assert isinstance(last, DocumentIndexed)
    return last


@pytest.fixture
def model() -> ToyModel:
    return ToyModel()


@pytest.fixture
def step(model: ToyModel) -> Steps:
    return Steps(model)


async def test_a_new_document_is_chunked_embedded_and_listed(step: Steps, model: ToyModel) -> None:
    result = await step(submitted())
    chunks, indexed = chunks_of(result), indexed_of(result)
    assert [(chunk.ordinal, chunk.heading, chunk.text) for chunk in chunks] == [
        (0, "Use", "Turn cables into widgets."),
        (1, "Use > Async", "Await the widget."),
        (2, "Use > Licence", "Free for all."),
    ]
    assert model.texts[1] == "Widget > Use > Async\nAwait the widget."
    vectors = await ToyModel().embed(model.texts)
    assert np.allclose([chunk.vector for chunk in chunks], vectors)
    assert indexed.chunk_ids == tuple(chunk.chunk_id for chunk in chunks)
    assert indexed.content_hash == sha256(TEXT.encode()).hexdigest()
    assert {(chunk.model, chunk.model_version, chunk.title, chunk.source) for chunk in chunks} == {
        ("toy", "1", "Widget", "w.md")
    }
    assert result.state is not None
    assert isinstance(result.state.value, IndexedDocument)


async def test_the_same_document_again_is_answered_and_not_embedded(step: Steps, model: ToyModel) -> None:
    first = await step(submitted())
    again = await step(submitted())
    assert [one.event for one in again.outputs] == [indexed_of(first)]
    assert not again.state_changed
    assert len(model.calls) == 1


async def test_only_what_is_new_in_a_changed_document_is_embedded(step: Steps, model: ToyModel) -> None:
    before = indexed_of(await step(submitted()))
    changed = TEXT.replace("Turn cables", "A new first paragraph.\n\n# More\n\nTurn cables")
    result = await step(submitted(changed))
    assert [chunk.text for chunk in chunks_of(result)] == ["A new first paragraph.", *model_texts(changed)[1:]]
    moved = await step(submitted(TEXT + "\n\n## Last\n\nThe end."))
    assert set(before.chunk_ids) < set(indexed_of(moved).chunk_ids)
    appended = await step(submitted("# Zero\n\nPut in at the top.\n\n" + TEXT + "\n\n## Last\n\nThe end."))
    assert [chunk.text for chunk in chunks_of(appended)] == ["Put in at the top."]
    assert indexed_of(appended).chunk_ids[1:] == indexed_of(moved).chunk_ids


def model_texts(text: str) -> list[str]:
    return [chunk.text for chunk in Chunker(TokenCounter())(text, "text/markdown", "Widget")]


@pytest.mark.parametrize(
    "other", [submitted(title="Gadget"), submitted(source="elsewhere.md")], ids=["title", "source"]
)
async def test_what_is_cited_is_part_of_a_chunk(step: Steps, other: DocumentSubmitted) -> None:
    before = indexed_of(await step(submitted()))
    result = await step(other)
    assert len(chunks_of(result)) == 3
    assert not set(before.chunk_ids) & set(indexed_of(result).chunk_ids)


async def test_another_model_embeds_all_again(step: Steps, model: ToyModel) -> None:
    before = indexed_of(await step(submitted()))
    step.agent = Embedder("toy", "2", Chunker(TokenCounter()))
    after = indexed_of(await step(submitted()))
    assert (len(model.texts), after.model_version) == (6, "2")
    assert not set(before.chunk_ids) & set(after.chunk_ids)


async def test_equal_chunks_of_a_document_are_told_apart(step: Steps) -> None:
    indexed = indexed_of(await step(submitted("# A\n\nSame.\n\n# B\n\nOther.\n\n# A\n\nSame.")))
    assert len(set(indexed.chunk_ids)) == 3


async def test_a_removed_document_is_forgotten(step: Steps) -> None:
    await step(submitted())
    result = await step(DocumentRemoved(document_id="d1"))
    assert [one.event for one in result.outputs] == [indexed_of(result)]
    assert indexed_of(result).chunk_ids == ()
    assert result.state is None
    assert result.state_changed
    assert len(chunks_of(await step(submitted()))) == 3


async def test_a_document_without_text_is_indexed_as_empty(step: Steps, model: ToyModel) -> None:
    assert indexed_of(await step(submitted("# Title only"))).chunk_ids == ()
    assert model.calls == []


async def test_calls_and_effects_stay_small(step: Steps, model: ToyModel) -> None:
    text = "\n\n".join(f"# Section {n}\n\n{'All about widgets. ' * 20}" for n in range(150))
    result = await step(submitted(text))
    assert [len(call) for call in model.calls] == [64, 64, 22]
    assert len(chunks_of(result)) == 150
    assert all(len(effect.model_dump_json()) < 400_000 for effect in step.effects)


async def test_replay_decides_the_same_and_embeds_nothing(step: Steps) -> None:
    live = await step(submitted())
    assert all(isinstance(effect, TextsEmbedded) for effect in step.effects)
    replayed = await Steps(ToyModel())(submitted(), recorded=step.effects, replaying=True)
    assert replayed == live


async def test_a_failing_model_fails_the_step(step: Steps, model: ToyModel) -> None:
    model.fails = True
    with pytest.raises(EffectFailedError, match="no room"):
        await step(submitted())


async def test_a_document_of_too_many_chunks_is_refused(step: Steps, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_CHUNKS", 2)
    with pytest.raises(DocumentTooLargeError, match="has 3 chunks, more than 2; submit it in parts"):
        await step(submitted())
