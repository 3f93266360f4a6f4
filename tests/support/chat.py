"""The benchmark's chat server as a process of its own, for tests whose what-ifs make real calls."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Chat:
    """Where it is, and once it has ended what it did."""

    url: str
    did: dict[str, int] = field(default_factory=dict)


@contextlib.contextmanager
def chat_server(*, wait_s: float = 0.0, refuse: int = 0, slow: int = 0) -> Iterator[Chat]:
    """A server that is gone when the block is left."""
    options = ["--wait-s", str(wait_s), "--refuse", str(refuse), "--slow", str(slow)]
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.workers.chat_server", *options],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None
    try:
        chat = Chat(f"http://127.0.0.1:{int(process.stdout.readline())}/v1")
        yield chat
        process.send_signal(signal.SIGTERM)
        chat.did = json.loads(process.stdout.readline())
    finally:
        process.kill()
        process.communicate()
