"""A server that speaks the wire format of OpenAI's Chat Completions, and does to each question what its course needs.

The courses of golden histories need a language model that fails, dawdles or makes things up at a known place; who asks
is the whole system, through the vendor's SDK.
"""

import json
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

from agents.text import sentences

__all__ = ["Answer", "ModelServer", "Script", "grounded"]


@dataclass(frozen=True, slots=True)
class Answer:
    """What a request is answered with, after ``delay_s``."""

    text: str = ""
    status: int = 200
    delay_s: float = 0.0


Script = Callable[[int, str, bool], Answer]
"""From how often the question was asked before, the prompt, and whether it is for a plan."""


def grounded(prompt: str) -> str:
    """A sentence of the prompt's first passage, cited."""
    passage = prompt.partition("[1] ")[2].partition("\n")[2].partition("\n\n[2] ")[0]
    found = [text for text in sentences(passage) if len(text.split()) > 6 and text.endswith(".")]
    return f"{found[0].removesuffix('.')} [1]." if found else "NOT_FOUND"


class ModelServer:
    """Listens on localhost. ``scripts`` are by a part of the question. Use it as a context manager."""

    def __init__(self, scripts: dict[str, Script]) -> None:
        self._scripts = scripts
        self._asked: Counter[str] = Counter()
        self._stopped = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, name="model server", daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _answer(self, asked: dict[str, Any]) -> Answer:
        prompt = "\n\n".join(str(message["content"]) for message in asked["messages"])
        question = next(part for part in self._scripts if part in prompt)
        planning = "response_format" in asked
        name = f"{question} plan" if planning else question
        self._asked[name] += 1
        return self._scripts[question](self._asked[name] - 1, prompt, planning)

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
                answer = server._answer(asked)
                if server._stopped.wait(answer.delay_s):
                    return
                said: dict[str, Any] = {"error": {"message": "told so", "type": "some_error"}}
                if answer.status == 200:
                    message = {"role": "assistant", "content": answer.text, "refusal": None}
                    said = {
                        "id": "c1",
                        "object": "chat.completion",
                        "created": 1,
                        "model": asked["model"],
                        "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
                        "usage": {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120},
                    }
                raw = json.dumps(said).encode()
                try:
                    self.send_response(answer.status)
                    self.send_header("content-type", "application/json")
                    self.send_header("content-length", str(len(raw)))
                    self.end_headers()
                    self.wfile.write(raw)
                except ConnectionError:
                    pass  # the step was cancelled

            def log_message(self, format: str, *args: Any) -> None:
                pass

        return Handler
