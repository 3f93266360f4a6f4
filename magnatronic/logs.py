"""Where logs go: a file, never the console.

In: a path and a level. Out: the root logger writes there, in files of 10 MB, the last three kept.
"""

import logging
import logging.handlers
from pathlib import Path
from typing import Final

__all__ = ["log_to"]

_FORMAT: Final = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"
_MAX_BYTES: Final = 10_000_000


def log_to(path: Path, level: str) -> None:
    """Send all that is logged to ``path``; instead of, not besides, where an earlier call sent it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.handlers.RotatingFileHandler(path, maxBytes=_MAX_BYTES, backupCount=2, encoding="utf-8")
    handler.setFormatter(logging.Formatter(_FORMAT))
    root = logging.getLogger()
    for before in list(root.handlers):
        root.removeHandler(before)
        before.close()
    root.addHandler(handler)
    root.setLevel(level)
    # What these say at INFO is each request they make.
    for talkative in ("httpx", "httpcore", "filelock", "urllib3", "openai", "anthropic", "google_genai", "asyncio"):
        logging.getLogger(talkative).setLevel(max(logging.WARNING, logging.getLevelName(level)))
    # Milvus Lite does not have every call of a server; its client then does without.
    logging.getLogger("grpc").setLevel(logging.CRITICAL)
    logging.captureWarnings(True)
