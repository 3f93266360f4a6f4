"""The command ``python -m bench``: runs the parts one after another and prints one table.

In: ``--only``, ``--quick``, ``--json``. Out: the table on standard output, progress on standard error, the JSON file,
and exit code 1 when a part failed. Each part runs in a process of its own, against one embedded broker of this process.
"""

import argparse
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from multiprocessing import get_context
from pathlib import Path

from rich.console import Console

from bench.figures import Report
from bench.parts import PARTS, Part, Scale
from magnatronic.broker import EmbeddedBroker

__all__ = ["main", "run"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; its exit code."""
    names = [part.name for part in PARTS]
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measure Magnatronic's parts side by side.")
    parser.add_argument("--only", metavar="PART,...", help=f"some of: {', '.join(names)}")
    parser.add_argument("--quick", action="store_true", help="few events, one round: whether it runs, not how fast")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write all samples there too")
    given = parser.parse_args(arguments)
    wanted = given.only.split(",") if given.only else names
    if unknown := [name for name in wanted if name not in names]:
        parser.error(f"no part is called {', '.join(unknown)}; there are: {', '.join(names)}")
    progress = Console(stderr=True, highlight=False)
    report = run([part for part in PARTS if part.name in wanted], Scale.quick() if given.quick else Scale(), progress)
    report.print(Console(width=max(Console().width, 130)))
    if given.json is not None:
        given.json.write_bytes(report.as_json())
    return 1 if report.failures else 0


def run(parts: Sequence[Part], scale: Scale, progress: Console) -> Report:
    """Run ``parts`` in order. A part that fails is noted in the report, and the next one runs."""
    report = Report()
    with ExitStack() as stack:
        bootstrap_servers = ""
        if any(part.needs_broker for part in parts):
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-"))
            broker = stack.enter_context(EmbeddedBroker(Path(folder) / "kafka", lasting=True))
            bootstrap_servers = broker.bootstrap_servers
        for part in parts:
            progress.print(f"{part.name} …")
            start = time.monotonic()
            # A fresh process for each part: embedded ClickHouse allows one folder a process, and no part inherits
            # another's threads, caches or memory.
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                try:
                    report.figures += pool.submit(part.measure, bootstrap_servers, scale).result()
                except Exception as error:  # noqa: BLE001 - whatever a part raises is reported, and the others still run
                    report.failures[part.name] = f"{type(error).__name__}: {error}"
                    progress.print("".join(traceback.format_exception(error)), style="dim", markup=False)
            report.seconds[part.name] = time.monotonic() - start
    return report


if __name__ == "__main__":
    sys.exit(main())
