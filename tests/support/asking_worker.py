"""A worker that some question ends: a processor in a process of its own. Its argument is JSON."""

import asyncio
import json
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from agents.context import LlmRequest, LlmResponse, Ports
from schemas.codec import Codec
from streams.binding import Binding
from streams.processor import Processor
from tests.support.asking import Asker


class DeadlyModel:
    """Writes each question down; one ends the process, or is never answered."""

    name = "deadly"

    def __init__(self, path: str, deadly: str) -> None:
        self._path, self._deadly = Path(path), deadly

    def _note(self, text: str) -> None:
        with self._path.open("a", encoding="utf-8") as calls:
            calls.write(f"{text}\n")

    async def complete(self, request: LlmRequest, *, idempotency_key: str) -> LlmResponse:
        text = request.messages[-1].content
        self._note(text)
        if text == "deadly":
            os.kill(os.getpid(), signal.SIGKILL)
        if text == "stuck":
            await asyncio.Event().wait()
        return LlmResponse(text=text.upper(), provider=self.name, model="m")


async def main(servers: str, topic: str, name: str, calls: str, deadly: str) -> None:
    processor = Processor(
        Binding(Asker(name), (topic,)),
        codec=Codec(),
        kafka={"bootstrap.servers": servers},
        ports=Ports(llm=DeadlyModel(calls, deadly)),
        session_timeout_ms=6000,
    )
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, processor.stop)
    await processor.run()


if __name__ == "__main__":
    asyncio.run(main(**json.loads(sys.argv[1])))
