"""A server on localhost that speaks OpenAI's chat completions, and has bad days: what a what-if's calls are made to.

In: requests as :mod:`agents.providers.openai` sends them. Out: answers taken from the passages in the prompt, plans,
syntheses; of the calls it sees for the first time one in ``refuse`` gets 429, and one in ``slow`` takes ten times
``wait_s``. Which ones is decided by what they ask. As a program it prints its port, and on SIGTERM what it did.
"""

import argparse
import asyncio
import re
import signal
import sys
from dataclasses import dataclass, field
from typing import Any, Final
from zlib import crc32

import orjson

from agents.ports import Passage
from agents.providers.extractive import answer, plan, synthesise
from bench.workers.task import end_with_parent

__all__ = ["ChatServer"]

_PASSAGE: Final = re.compile(r"^\[(\d+)\] (.*)\n([\s\S]*?)(?=\n\n\[\d+\] |\n\n(?!.*\n\n)|\Z)", re.MULTILINE)
_NOTE: Final = re.compile(r"^Note on: (.*)\n([\s\S]*?)(?=\n\nNote on: |\n\n(?!.*\n\n)|\Z)", re.MULTILINE)


@dataclass
class ChatServer:
    """Answers on ``port`` of localhost once it is started; 0 takes a free one."""

    port: int = 0
    wait_s: float = 0.0
    refuse: int = 0
    slow: int = 0
    answered: int = 0
    refused: int = 0
    seen: set[str] = field(default_factory=set)
    _server: asyncio.Server | None = None

    async def start(self) -> int:
        """Listen; the port."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]
        return self.port

    async def stop(self) -> None:
        """Listen no more."""
        if self._server is not None:
            self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
                headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:])}
                body = orjson.loads(await reader.readexactly(int(headers.get("content-length", "0"))))
                status, told = await self._answer(headers.get("idempotency-key", ""), body)
                raw = orjson.dumps(told)
                writer.write(
                    b"HTTP/1.1 %d X\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
                    % (status, len(raw))
                )
                writer.write(raw)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _answer(self, key: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        fate, new = crc32(orjson.dumps(body["messages"])), key not in self.seen
        self.seen.add(key)
        if new and self.refuse and fate % self.refuse == 0:
            self.refused += 1
            return 429, {"error": {"message": "too many requests", "type": "rate_limit"}}
        slow = new and self.slow and fate % self.slow == 1
        await asyncio.sleep(self.wait_s * (10 if slow else 1))
        self.answered += 1
        text = completion(body)
        words = sum(len(str(message["content"]).split()) for message in body["messages"])
        return 200, {
            "id": "chat",
            "object": "chat.completion",
            "created": 0,
            "model": body["model"],
            "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}],
            "usage": {
                "prompt_tokens": words,
                "completion_tokens": len(text.split()),
                "total_tokens": words + len(text.split()),
            },
        }


def completion(body: dict[str, Any]) -> str:
    """What the server answers to a request's body."""
    asked = next(str(message["content"]) for message in body["messages"] if message["role"] == "user")
    # A reviewer's finding stands behind the passages, and the question then before them.
    question = asked.rpartition("\n\n")[2] if asked.startswith(("[", "Note on: ")) else asked.partition("\n\n")[0]
    if "response_format" in body:
        return plan(question)
    if notes := _NOTE.findall(asked):
        return synthesise([Passage(marker=0, chunk_id="", title=title, text=text) for title, text in notes])
    passages = [
        Passage(marker=int(marker), chunk_id="", title=title, text=text)
        for marker, title, text in _PASSAGE.findall(asked)
    ]
    return answer(question, passages)


async def _main(given: argparse.Namespace) -> None:
    server = ChatServer(given.port, given.wait_s, given.refuse, given.slow)
    print(await server.start(), flush=True)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    await stop.wait()
    print(orjson.dumps({"answered": server.answered, "refused": server.refused}).decode(), flush=True)
    await server.stop()


def main() -> int:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--wait-s", type=float, default=0.0)
    parser.add_argument("--refuse", type=int, default=0)
    parser.add_argument("--slow", type=int, default=0)
    end_with_parent()
    asyncio.run(_main(parser.parse_args()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
