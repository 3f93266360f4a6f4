"""A worker process: a processor for each agent under test, as one role of the platform runs several.

In: one JSON argument (:class:`WorkerSettings`). Out: the processors' work. SIGTERM stops it gracefully. It ends with
exit status 3 when it was fenced and 4 after another error that a new start may help against; whoever runs it starts it
again then, as an orchestrator would. It ends with the process that started it. SIGUSR1 has it tell what its
threads do, SIGUSR2 its tasks and partitions.
"""

import asyncio
import ctypes
import faulthandler
import json
import logging
import os
import signal
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from agents.context import Ports
from schemas.codec import Codec
from streams.binding import Binding, RetryPolicy
from streams.errors import FencedError, ProcessorError
from streams.processor import Processor
from tests.chaos.harness.agents import BUSY, OVERLOADED, Caller, CallLog, Summer

__all__ = ["CALLS_TOPIC", "FENCED", "READY", "RETRYABLE", "SUMS_TOPIC", "WorkerSettings", "bindings", "end_with_parent"]

SUMS_TOPIC: Final = "chaos.sums.normal"
CALLS_TOPIC: Final = "chaos.calls.normal"
FENCED: Final = 3
RETRYABLE: Final = 4
READY: Final = "works"

_PR_SET_PDEATHSIG: Final = 1
_TRIES: Final = 1000
"""The world never fails a call so often."""


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """``calls_path`` is where the calls to the outside world are written down."""

    bootstrap_servers: str
    slot: str
    calls_path: str
    session_timeout_ms: int
    parent: int

    def as_argument(self) -> str:
        return json.dumps(asdict(self))


def end_with_parent(parent: int) -> None:
    """Be killed when the process ``parent`` ends, even while stopped."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def bindings() -> tuple[Binding, ...]:
    """The agents under test on their topics."""
    return (
        Binding(Summer(), (SUMS_TOPIC,)),
        Binding(
            Caller(),
            (CALLS_TOPIC,),
            concurrency=512,
            retry_by_error={
                BUSY: RetryPolicy(_TRIES, backoff_s=0.05, max_backoff_s=0.2),
                OVERLOADED: RetryPolicy(_TRIES, backoff_s=1.0, max_backoff_s=2.0),
            },
            park_after_s=0.4,
        ),
    )


async def main(settings: WorkerSettings) -> int:
    ports = Ports(llm=CallLog(Path(settings.calls_path)))
    processors = [
        Processor(
            binding,
            codec=Codec(),
            kafka={"bootstrap.servers": settings.bootstrap_servers},
            ports=ports,
            slot=settings.slot,
            session_timeout_ms=settings.session_timeout_ms,
        )
        for binding in bindings()
    ]
    loop = asyncio.get_running_loop()

    def stop() -> None:
        for processor in processors:
            processor.stop()

    def tell() -> None:
        for task in asyncio.all_tasks(loop):
            task.print_stack()
        for each in processors:
            for place in each.partitions:
                held = sum(lane.held for lane in place.lanes.values())
                logging.info(
                    "%s: %s[%d]: position %d, first unfinished %s, %d uncommitted, %d lanes (%d held), full %s; %s",
                    *(each.name, place.topic, place.number, place.tracker.position, place.tracker.first_unfinished),
                    *(place.uncommitted, len(place.lanes), held, place.full, each.trouble),
                )

    loop.add_signal_handler(signal.SIGTERM, stop)
    # The loop may hang, so its own account is the second one.
    loop.add_signal_handler(signal.SIGUSR2, tell)
    logging.info("%s", READY)
    running = [loop.create_task(processor.run()) for processor in processors]
    await asyncio.wait(running, return_when=asyncio.FIRST_EXCEPTION)
    stop()
    code = 0
    for result in await asyncio.gather(*running, return_exceptions=True):
        match result:
            case None:
                continue
            case FencedError():
                code = max(code, FENCED)
            case ProcessorError(retryable=True):
                code = max(code, RETRYABLE)
            case BaseException():
                code = 1
        logging.error("ended by %s: %s", type(result).__name__, result, exc_info=result if code == 1 else None)
        if code == 1:
            break
    return code


if __name__ == "__main__":
    chosen = WorkerSettings(**json.loads(sys.argv[1]))
    end_with_parent(chosen.parent)
    faulthandler.register(signal.SIGUSR1)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    sys.exit(asyncio.run(main(chosen)))
