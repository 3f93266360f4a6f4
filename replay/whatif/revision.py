"""The fleet whose code is another revision's: a checkout of it, and a process that decides with it.

In: a git revision, the agents' names, prompts. Out: :class:`RevisionFleet`, which talks to
:mod:`replay.whatif.worker` over pipes. The process has the revision's ``schemas`` and ``agents`` before anything else
on its path, no environment but that (no keys), and no way to the network. All else, the simulation, the answers, the
comparison, is this version's.
"""

import asyncio
import base64
import json
import os
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from datetime import datetime
from io import BytesIO
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from agents.agent import Failure
from agents.step import StepResult, TimerChange
from replay.errors import UndecidedError, WhatIfError
from replay.whatif import worker
from replay.whatif.deciding import Ask, Decision, Want
from replay.whatif.fleet import Taker
from replay.whatif.worker import PROTOCOL, told_event
from schemas.codec import Codec
from schemas.errors import SchemaError
from schemas.metadata import Envelope
from schemas.record import Record

__all__ = ["RevisionFleet", "checkout", "commit_of"]

_PARTS: Final = ("schemas", "agents")
"""What decides; the rest of a revision is not needed."""
_LENGTH: Final = struct.Struct(">I")
_STEP_S: Final = 60.0
"""A handler that computes for longer hangs."""
_STDERR_CHARS: Final = 1000


def commit_of(revision: str, repository: Path) -> str:
    """The full id of the commit that ``revision`` names.

    Raises:
        WhatIfError: there is no git repository, or no such revision in it.
    """
    if revision.startswith("-"):
        raise WhatIfError(f"{revision!r} is no revision")
    return (
        _git(repository, "rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}", what=revision).decode().strip()
    )


def checkout(commit: str, repository: Path, folder: Path) -> Path:
    """The commit's ``schemas`` and ``agents`` under ``folder``, which is made, or was made by an earlier run.

    Raises:
        WhatIfError: the commit lacks them.
    """
    path = folder / commit
    if path.is_dir():
        return path
    raw = _git(repository, "archive", "--format=tar", commit, *_PARTS, what=commit)
    folder.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(dir=folder))
    try:
        with tarfile.open(fileobj=BytesIO(raw)) as archive:
            archive.extractall(beside, filter="data")
        beside.replace(path)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    return path


def _git(repository: Path, *arguments: str, what: str) -> bytes:
    try:
        done = subprocess.run(["git", "-C", str(repository), *arguments], capture_output=True, check=False)
    except OSError as error:
        raise WhatIfError(f"git can't be run: {error}") from error
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        why = said[-1] if said else "there is no such revision"
        raise WhatIfError(f"the revision {what} of {repository} can't be had: {why}")
    return done.stdout


class RevisionFleet:
    """Agents whose code is the checkout's. An async context manager; decides one step at a time."""

    local = False

    def __init__(
        self, path: Path, name: str, agents: Sequence[str], prompts: Mapping[str, str], codec: Codec, log: Path
    ) -> None:
        self._path, self._name, self._names = path.resolve(), name, tuple(agents)
        self._prompts, self._codec, self._log = dict(prompts), codec, log
        self._versions: dict[str, str] = {}
        self._process: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()

    async def __aenter__(self) -> Self:
        mine = Path(worker.__file__).parents[2]  # the revision's code comes first, ours has the program
        environment = {"PYTHONPATH": f"{self._path}{os.pathsep}{mine}", "PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8"}
        with self._log.open("wb") as log:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-P",  # nothing comes before these two
                "-m",
                worker.__name__,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                env=environment,
                cwd=self._path,
                start_new_session=True,  # Ctrl-C is for this process, which then ends that one
            )
        try:
            hello = await self._ask({"agents": self._names, "prompts": self._prompts})
            if hello.get("protocol") != PROTOCOL or hello.get("root") != str(self._path):
                raise WhatIfError(f"the code of {self._name} is not what was started: {hello}")
        except BaseException:
            await self._end()
            raise
        self._versions = hello["agents"]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._end()

    async def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        process.stdin.close()
        try:
            await asyncio.wait_for(process.wait(), 2.0)
        except TimeoutError:
            process.kill()
            await process.wait()

    @property
    def pid(self) -> int | None:
        """Of the process that has the code, while it runs."""
        return None if self._process is None else self._process.pid

    def names(self) -> Sequence[str]:
        """Who they are."""
        return self._names

    def source(self, agent: str) -> str:
        """The CloudEvents source of what the agent emits."""
        return f"/agents/{agent}@{self._versions[agent]}"

    async def takers(self, record: Record, envelope: Envelope) -> Sequence[Taker]:
        """Which of them consume the event, as that code has it."""
        answer = await self._ask({"op": "lanes", "event": _told(envelope)})
        lanes: dict[str, str] = answer["lanes"]
        return [(name, lanes[name]) for name in self._names if name in lanes]

    async def decide(self, ask: Ask) -> Decision:
        """What that code makes of the step.

        Raises:
            WhatIfError: it can't be run on this history.
        """
        answer = await self._ask(
            {
                "op": "decide",
                "agent": ask.agent,
                "event": _told(ask.envelope),
                "topic": ask.record.topic,
                "timestamp_ms": ask.record.timestamp_ms,
                "priority": ask.priority.value,
                "state": ask.state,
                "effects": [told_event(effect) for effect in ask.effects],
                "rewrite": dict(ask.rewrite),
                "changed": ask.changed,
                "failure": None
                if ask.failure is None
                else [ask.failure.error_type, ask.failure.message, ask.failure.retryable],
                "crashed": ask.crashed,
            }
        )
        return self._decision(answer, ask)

    def _decision(self, answer: Mapping[str, Any], ask: Ask) -> Decision:
        told, failure = answer["result"], answer["failure"]
        result, encoded = None, []
        if told is not None:
            outputs = []
            for subject, value, headers in told["outputs"]:
                raw = base64.b64decode(value), [(name, base64.b64decode(content)) for name, content in headers]
                record = Record("", 0, 0, 0, subject.encode(), raw[0], [*raw[1]])
                try:
                    outputs.append(self._codec.decode(record))
                except SchemaError as error:
                    raise UndecidedError(
                        f"{ask.agent} of {self._name} emits what this version can't read: {error}; run the what-if "
                        "with a version that knows its events"
                    ) from error
                encoded.append(raw)
            timers = tuple(
                TimerChange(name, None if due is None else datetime.fromisoformat(due)) for name, due in told["timers"]
            )
            result = StepResult(tuple(outputs), told["state"], told["state_changed"], timers)
        return Decision(
            result,
            tuple(encoded),
            wants=tuple(Want(*want) for want in answer["wants"]),
            failure=None if failure is None else Failure(*failure),
            unasked=tuple((kind, scope, hashed, occurrence) for kind, scope, hashed, occurrence in answer["unasked"]),
            busy_ms=answer["busy_ms"],
        )

    async def _ask(self, told: Mapping[str, Any]) -> dict[str, Any]:
        raw = json.dumps(told, separators=(",", ":")).encode()
        async with self._turn:
            process = self._process
            if process is None or process.stdin is None or process.stdout is None:
                raise WhatIfError(f"the process with the code of {self._name} was ended")
            try:
                async with asyncio.timeout(_STEP_S):
                    process.stdin.write(_LENGTH.pack(len(raw)) + raw)
                    await process.stdin.drain()
                    head = await process.stdout.readexactly(_LENGTH.size)
                    answer = json.loads(await process.stdout.readexactly(_LENGTH.unpack(head)[0]))
            except (asyncio.IncompleteReadError, ConnectionError) as error:
                raise WhatIfError(
                    f"the code of {self._name} can't be run for a what-if: {self._last_words()}; a revision has to be "
                    "recent enough to decide by agents.step and agents.turns"
                ) from error
            except TimeoutError:
                process.kill()
                raise WhatIfError(f"the code of {self._name} gave no answer within {_STEP_S:g} s") from None
        if "error" in answer:
            raise UndecidedError(f"the code of {self._name} can't be run for a what-if: {answer['error']}")
        found: dict[str, Any] = answer
        return found

    def _last_words(self) -> str:
        lines = [line for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        return lines[-1][-_STDERR_CHARS:] if lines else "it ended without a word"


def _told(envelope: Envelope) -> dict[str, Any]:
    metadata = envelope.metadata
    return {
        **told_event(envelope.event),
        "metadata": {
            "id": metadata.id,
            "source": metadata.source,
            "subject": metadata.subject,
            "time": metadata.time.isoformat(),
            "causation_id": metadata.causation_id,
            "correlation_id": metadata.correlation_id,
            "traceparent": metadata.traceparent,
        },
    }
