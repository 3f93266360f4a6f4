"""Puts a what-if together: tasks from history, the fleet with its changes, the ports that may be asked, a folder.

In: settings, a history and a :class:`Request`. Out: a :class:`~replay.whatif.run.Report`, and its files in
``<data folder>/what-if/<id>/``. No producer and no topic: what it reads is history, what it writes is that folder.
"""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

import orjson

from agents.context import LanguageModel, LlmRequest, Memory, Ports, RecallRequest, Vectors
from agents.memory.embedding import BatchingEmbedder
from agents.memory.model_files import MODEL, MODEL_SHA256
from agents.prompts import PROMPTS
from agents.providers import create_provider
from agents.providers.prices import cost_usd, is_priced
from magnatronic.control import call
from magnatronic.errors import WrongInputError
from magnatronic.histories import History
from magnatronic.roles import Workbench, all_agents
from magnatronic.roots import ROOTS
from magnatronic.settings import Settings
from replay.log import Progress
from replay.whatif.budget import Budget, Estimate, tokens_of
from replay.whatif.changes import Changes
from replay.whatif.fleet import Fleet, LocalFleet, Post
from replay.whatif.folder import Folder
from replay.whatif.loading import choose, histories
from replay.whatif.page import report_page
from replay.whatif.revision import RevisionFleet, checkout
from replay.whatif.run import Report, Setup, run
from schemas.codec import Codec
from schemas.events import Evidence
from schemas.metadata import canonical_json
from schemas.record import Record
from streams.bindings import bind

__all__ = ["Request", "WhatIf", "folder_of", "what_if"]

_DIGITS: Final = 12
_FREE: Final = "extractive"


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked. ``arguments`` is what names it beside the changes: the options as they were written."""

    changes: Changes = field(default_factory=Changes)
    since: datetime | None = None
    until: datetime | None = None
    tasks: tuple[str, ...] = ()
    limit: int | None = None
    max_tokens: int | None = None
    max_usd: float | None = None
    at_once: int = 8
    repository: Path = Path()
    id: str = ""
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class WhatIf:
    """A what-if that was run, and where its files are."""

    report: Report
    folder: Path


def what_if(
    request: Request,
    history: History,
    *,
    on_reading: Progress | None = None,
    on_task: Callable[[int, int], None] = lambda done, total: None,
) -> WhatIf:
    """Run it, or go on with it.

    Raises:
        WrongInputError: the request can't be met as it is.
        WhatIfError: the folder can't be used, or the other code can't be run.
        LogReadError: the history could not be read.
    """
    settings = history.settings
    llm = _provider(request, settings)
    with Folder(folder_of(request, settings)) as folder:
        manifest = folder.manifest(lambda: _manifest(request, history, folder.path.name, on_reading))
        _check(manifest, request, folder.path)

        def records(tasks: Sequence[str]) -> Iterable[tuple[str, list[Record]]]:
            return histories(history.log, tasks, since_ms=manifest["since_ms"], on_progress=on_reading)

        with contextlib.closing(Workbench(settings)) as workbench:
            report = asyncio.run(
                _run(
                    request,
                    folder,
                    manifest,
                    records,
                    history.codec,
                    _ports(request, settings, llm, workbench),
                    on_task,
                )
            )
        folder.write("report.json", orjson.dumps(report.as_dict(), option=orjson.OPT_INDENT_2))
        folder.write("report.html", report_page(report).encode(errors="replace"))
        return WhatIf(report, folder.path)


def folder_of(request: Request, settings: Settings) -> Path:
    """The folder of this what-if: the same for the same changes, options and code."""
    root = settings.data_dir / "what-if"
    if request.id:
        return root / request.id
    named = canonical_json({"changes": request.changes.as_dict(), "arguments": request.arguments, "code": _code()})
    return root / sha256(named.encode()).hexdigest()[:_DIGITS]


def _code() -> str:
    """The SHA-256 (hex) over this release's modules: other code may decide otherwise."""
    digest = sha256()
    base = Path(__file__).parents[1]
    for root in sorted(ROOTS):
        for path in sorted((base / root).rglob("*.py")):
            digest.update(f"{path.relative_to(base)}\n{sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def _manifest(request: Request, history: History, name: str, on_reading: Progress | None) -> dict[str, Any]:
    chosen = choose(
        history.log,
        since=request.since,
        until=request.until,
        tasks=request.tasks,
        limit=request.limit,
        on_progress=on_reading,
    )
    return {
        "id": name,
        "changes": request.changes.as_dict(),
        "told": request.changes.told(),
        "arguments": dict(request.arguments),
        "tasks": chosen.tasks,
        "open": chosen.open,
        "unknown": chosen.unknown,
        "since_ms": chosen.since_ms,
        "code": _code(),
        "begun": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _check(manifest: Mapping[str, Any], request: Request, folder: Path) -> None:
    """Whether the folder is that of this what-if, and there is something to do.

    Raises:
        WrongInputError: it is another's, or no task is meant.
    """
    mine = orjson.loads(canonical_json({"changes": request.changes.as_dict(), "arguments": request.arguments}))
    for name, asked in mine.items():
        if manifest[name] != asked:
            raise WrongInputError(f"{folder} is of a what-if with other {name}; give this one another --id")
    if manifest["code"] != _code():
        raise WrongInputError(f"{folder} was begun by another version of this code; give this what-if another --id")
    if manifest["tasks"]:
        return
    if manifest["unknown"]:
        raise WrongInputError(f"the log does not hold the submission of {', '.join(manifest['unknown'])}")
    if manifest["open"]:
        raise WrongInputError(f"none of the {manifest['open']} tasks that are meant is over; try again when they are")
    raise WrongInputError('no task was submitted then; `magnatronic query "select * from tasks"` lists them')


async def _run(
    request: Request,
    folder: Folder,
    manifest: Mapping[str, Any],
    records: Callable[[Sequence[str]], Iterable[tuple[str, list[Record]]]],
    codec: Codec,
    ports: Ports,
    on_task: Callable[[int, int], None],
) -> Report:
    bindings = [bind(agent) for agent in all_agents(PROMPTS.with_texts(request.changes.prompts))]
    posts = {each.agent.name: Post(each.agent, frozenset(each.topics), each) for each in bindings}
    try:
        async with _fleet(request, folder, posts, codec) as fleet:
            setup = Setup(
                changes=request.changes,
                fleet=fleet,
                posts=posts,
                ports=ports,
                codec=codec,
                budget=Budget(request.max_tokens, request.max_usd),
                estimate=_estimate(request.changes, ports.llm),
                at_once=request.at_once,
            )
            return await run(folder, manifest, manifest["tasks"], records, setup, on_progress=on_task)
    finally:
        if (close := getattr(ports.llm, "aclose", None)) is not None:
            await close()


@contextlib.asynccontextmanager
async def _fleet(request: Request, folder: Folder, posts: Mapping[str, Post], codec: Codec) -> AsyncIterator[Fleet]:
    commit = request.changes.code
    if not commit:
        yield LocalFleet([post.agent for post in posts.values()], codec)
        return
    path = await asyncio.to_thread(checkout, commit, request.repository, folder.path / "code")
    log = folder.path / "worker.log"
    async with RevisionFleet(path, commit[:12], tuple(posts), request.changes.prompts, codec, log) as fleet:
        yield fleet


# The ports.


def _provider(request: Request, settings: Settings) -> LanguageModel | None:
    changes = request.changes
    if not changes.ask:
        return None
    key = getattr(settings, f"{changes.ask}_api_key", None)
    base_url = changes.base_url or (settings.openai_base_url if changes.ask == "openai" else None) or ""
    llm = create_provider(
        changes.ask,
        api_key="" if key is None else key.get_secret_value(),
        model=changes.model,
        base_url=base_url,
    )
    if request.max_usd is not None and changes.ask != _FREE and not is_priced(_model(changes, llm)):
        raise WrongInputError(
            f"no price of {_model(changes, llm)!r} is known, so --max-usd can't be kept to; give --max-tokens"
        )
    return llm


def _model(changes: Changes, llm: LanguageModel | None) -> str:
    return changes.model or str(getattr(llm, "default_model", ""))


def _estimate(changes: Changes, llm: LanguageModel | None) -> Estimate:
    model = _model(changes, llm)

    def estimate(request: LlmRequest) -> tuple[int, float]:
        prompt, completion = tokens_of(request)
        return prompt + completion, cost_usd(model, prompt, completion)

    return estimate


def _ports(request: Request, settings: Settings, llm: LanguageModel | None, workbench: Workbench) -> Ports:
    memory: Memory | None = None
    if request.changes.recall:
        memory = workbench.memory() if settings.milvus_uri else _RunningMemory(settings)
    return Ports(llm=llm, memory=memory, embedding=_Embedding(settings, workbench.embedding))


class _Embedding:
    """The embedding model, loaded when a text is to be embedded: most what-ifs need none."""

    def __init__(self, settings: Settings, load: Callable[[], BatchingEmbedder]) -> None:
        self._load, self._once = load, threading.Lock()
        small = settings.embedding_model == "all-MiniLM-L6-v2"
        loaded = None if small else load()
        self.model = MODEL if loaded is None else loaded.model
        self.version = MODEL_SHA256[:12] if loaded is None else loaded.version
        self.dimensions = 384 if loaded is None else loaded.dimensions

    async def embed(self, texts: Sequence[str]) -> Vectors:
        """One unit-length row a text."""
        return await (await asyncio.to_thread(self._loaded)).embed(texts)

    def _loaded(self) -> BatchingEmbedder:
        with self._once:
            return self._load()


class _RunningMemory:
    """The memory of the system that runs on the data folder, asked over its socket."""

    def __init__(self, settings: Settings) -> None:
        self._call = partial(call, settings.data_dir, "recall")
        self.model = str(call(settings.data_dir, "status")["embedding_model"]).partition(" ")[0]

    async def recall(self, request: RecallRequest) -> tuple[Evidence, ...]:
        """The passages nearest to the request's query."""
        found = await asyncio.to_thread(self._call, request=request.model_dump(mode="json"))
        return tuple(Evidence.model_validate(each) for each in found)
