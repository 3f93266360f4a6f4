"""The program that decides steps with the code of another revision.

In: frames on standard input, four bytes of length, then JSON: a step's event, state and known effects. Out: on standard
output, in the same form, what :func:`replay.whatif.deciding.decide` made of it. ``schemas`` and ``agents`` are those of
the revision, which come first on the path; this module and ``deciding`` are this version's, and keep to what the others
have had for long. Events come field by field, so that fields and types which that code does not know are no obstacle.
"""

import asyncio
import base64
import importlib
import inspect
import json
import pkgutil
import struct
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, BinaryIO

from pydantic import ValidationError

from agents.agent import Agent, Failure
from agents.step import LaneState, concerns, lane_of
from replay.whatif.deciding import Ask, Decision, decide
from schemas.codec import Codec
from schemas.events import EVENT_TYPES, Effect, Event, Priority
from schemas.metadata import Envelope, Metadata
from schemas.record import Record

__all__ = ["PROTOCOL", "find_agents", "read_frame", "told_event", "write_frame"]

PROTOCOL = 1
"""Of the frames; both sides say theirs first."""

_LENGTH = struct.Struct(">I")
_BYTES = "$bytes"


def find_agents(names: Sequence[str], prompts: Mapping[str, str]) -> dict[str, Agent[Any]]:
    """The agents of this code that are called ``names``, asking by ``prompts`` where some are given.

    Raises:
        LookupError: the code lacks one of them, or has no prompts that could be changed.
    """
    kinds: list[type[Agent[Any]]] = []
    package = importlib.import_module("agents")
    older: set[type] = set()
    for module in pkgutil.iter_modules(package.__path__, "agents."):
        if module.ispkg:
            continue
        for kind in vars(importlib.import_module(module.name)).values():
            if not (isinstance(kind, type) and issubclass(kind, Agent) and kind.__module__ == module.name):
                continue
            older.update(getattr(kind, "predecessors", {}).values(), kind.__mro__[1:])
            if getattr(kind, "name", None) in names and not inspect.isabstract(kind):
                kinds.append(kind)
    found = {kind.name: kind for kind in kinds if kind not in older}
    if missing := sorted(set(names) - found.keys()):
        raise LookupError(f"it has no agent {', '.join(missing)}")
    given: dict[str, Any] = {}
    if prompts:
        try:
            given["prompts"] = importlib.import_module("agents.prompts").PROMPTS.with_texts(dict(prompts))
        except ModuleNotFoundError:
            raise LookupError("its agents have no prompts by name (agents/prompts.py)") from None
    return {
        name: kind(**{key: given[key] for key in inspect.signature(kind).parameters if key in given})
        for name, kind in found.items()
    }


def read_frame(stream: BinaryIO) -> Any:
    """The next frame's JSON; None at the end."""
    head = stream.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    return json.loads(stream.read(_LENGTH.unpack(head)[0]))


def write_frame(stream: BinaryIO, value: Any) -> None:
    """Write one frame."""
    raw = json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
    stream.write(_LENGTH.pack(len(raw)) + raw)
    stream.flush()


def told_event(event: Event) -> dict[str, Any]:
    """The event as JSON can hold it: its type, and its fields with bytes and times marked as such."""
    return {"type": event.full_name, "fields": _plain(event.model_dump())}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, bytes):
        return {_BYTES: base64.b64encode(value).decode()}
    if isinstance(value, datetime):
        return value.isoformat()
    return value


def _bytes(value: Any) -> Any:
    if isinstance(value, dict):
        if value.keys() == {_BYTES}:
            return base64.b64decode(value[_BYTES])
        return {name: _bytes(each) for name, each in value.items()}
    return [_bytes(each) for each in value] if isinstance(value, list) else value


def _event(told: Mapping[str, Any]) -> Event | None:
    """The event as this code has it, without fields that it does not know; None for a type that it does not know."""
    kind = EVENT_TYPES.get(told["type"])
    if kind is None:
        return None
    fields = _bytes(told["fields"])
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        newer = [each["loc"] for each in error.errors() if each["type"] == "extra_forbidden"]
        if not newer:
            raise
    for *path, name in newer:
        holder = fields
        for part in path:
            holder = holder[part]
        del holder[name]
    return kind.model_validate(fields)


def _envelope(told: Mapping[str, Any]) -> Envelope | None:
    event, of = _event(told), told["metadata"]
    if event is None:
        return None
    time = datetime.fromisoformat(of["time"])
    return Envelope(
        event,
        Metadata(
            id=of["id"],
            source=of["source"],
            subject=of["subject"],
            time=time,
            causation_id=of["causation_id"],
            correlation_id=of["correlation_id"],
            traceparent=of["traceparent"],
        ),
    )


def _time(text: str | None) -> datetime | None:
    return None if text is None else datetime.fromisoformat(text)


class _Program:
    """Answers the frames of one simulation."""

    def __init__(self, names: Sequence[str], prompts: Mapping[str, str]) -> None:
        self._codec = Codec()
        self._agents = find_agents(names, prompts)

    def hello(self) -> dict[str, Any]:
        root = importlib.import_module("agents").__path__[0].rpartition("/")[0]
        versions = {name: agent.version for name, agent in self._agents.items()}
        return {"protocol": PROTOCOL, "root": root, "agents": versions}

    def lanes(self, told: Mapping[str, Any]) -> dict[str, Any]:
        envelope = _envelope(told["event"])
        lanes: dict[str, str] = {}
        if envelope is None:
            return {"lanes": lanes}
        event = envelope.event
        for name, agent in self._agents.items():
            if concerns(agent, event):
                try:
                    lanes[name] = lane_of(agent, event)
                except Exception:  # noqa: BLE001 - without a lane the event is no agent's, as live
                    continue
        return {"lanes": lanes}

    async def decide(self, told: Mapping[str, Any]) -> dict[str, Any]:
        agent = self._agents[told["agent"]]
        envelope = _envelope(told["event"])
        if envelope is None:
            raise LookupError(f"it does not know {told['event']['type']}")
        record = Record(told["topic"], 0, 0, told["timestamp_ms"], envelope.metadata.subject.encode(), b"")
        effects = [_event(each) for each in told["effects"]]
        failure = told["failure"]
        ask = Ask(
            agent=agent.name,
            record=record,
            envelope=envelope,
            priority=Priority(told["priority"]),
            state=self._state(agent, told["state"]),
            effects=tuple(effect for effect in effects if isinstance(effect, Effect)),
            rewrite=told["rewrite"],
            changed=told["changed"],
            failure=None if failure is None else Failure(*failure),
            crashed=told["crashed"],
        )
        return self._told(await decide(agent, ask, self._codec))

    @staticmethod
    def _state(agent: Agent[Any], told: Any) -> LaneState | None:
        if told is None:
            return None
        if agent.state_type is None:
            raise LookupError(f"its {agent.name} keeps no state")
        value = agent.state_type.model_validate_json(told["value"])
        now = _time(told["now"])
        assert now is not None
        return LaneState(value, now, _time(told["expires_at"]))  # of no data subjects: their tasks are left out

    @staticmethod
    def _told(decision: Decision) -> dict[str, Any]:
        result, failure = decision.result, decision.failure
        told: dict[str, Any] = {
            "wants": [[want.kind, want.scope, want.hashed, want.occurrence, want.text] for want in decision.wants],
            "failure": None if failure is None else [failure.error_type, failure.message, failure.retryable],
            "unasked": [list(identity) for identity in decision.unasked],
            "busy_ms": decision.busy_ms,
            "result": None,
        }
        if result is not None:
            state = result.state
            told["result"] = {
                "outputs": [
                    [
                        output.metadata.subject,
                        base64.b64encode(value).decode(),
                        [[name, base64.b64encode(content).decode()] for name, content in headers],
                    ]
                    for output, (value, headers) in zip(result.outputs, decision.encoded, strict=True)
                ],
                "state": None
                if state is None
                else {
                    "value": state.value.model_dump_json(),
                    "now": state.now.isoformat(),
                    "expires_at": None if state.expires_at is None else state.expires_at.isoformat(),
                },
                "state_changed": result.state_changed,
                "timers": [
                    [timer.name, None if timer.due is None else timer.due.isoformat()] for timer in result.timers
                ],
            }
        return told


_REFUSED = (
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "os.system",
    "socket.bind",
    "socket.connect",
    "socket.sendto",
    "subprocess.Popen",
)


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    """Code of any revision is held to what handlers may do: nothing outside."""
    if event in _REFUSED:
        raise PermissionError(f"code in a what-if tried {event}; it may reach outside only through ctx")


async def _serve(program: _Program, stdin: BinaryIO, stdout: BinaryIO) -> None:
    while (told := read_frame(stdin)) is not None:
        try:
            answer = program.lanes(told) if told["op"] == "lanes" else await program.decide(told)
        except Exception as error:  # noqa: BLE001 - told to the simulation, whose user can make something of it
            answer = {"error": f"{type(error).__name__}: {error}"}
        write_frame(stdout, answer)


def main() -> int:
    """Say hello, then answer frames until standard input ends."""
    stdin, stdout = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr  # what the code prints must not get between the frames
    told = read_frame(stdin)
    try:
        program = _Program(told["agents"], told["prompts"])
        hello = program.hello()
    except Exception as error:  # noqa: BLE001 - told to the simulation
        write_frame(stdout, {"error": f"{type(error).__name__}: {error}"})
        return 1
    write_frame(stdout, hello)
    loop = asyncio.new_event_loop()  # before the network is shut: it has a socket pair of its own
    sys.addaudithook(_refuse)
    try:
        loop.run_until_complete(_serve(program, stdin, stdout))
    finally:
        loop.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
