"""What-ifs over logged tasks: unchanged, with another prompt on ``extractive``, on a server that speaks OpenAI's
protocol and has bad days, and with another revision's code.

In: nothing; an embedded system answers the tasks first, which are its log. Out: tasks/s and events/s of the command as
its users run it, start and report included, and the calls that it made. The part fails when a task can't be carried
through for another reason than a memory that is not asked, when an unchanged one differs, or when a topic grew.
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import orjson
import psutil
from confluent_kafka.admin import AdminClient

from bench.figures import Figure
from bench.kafka import stable_offsets
from bench.pipeline import PARTITIONS, corpus, questions
from magnatronic.client import Client
from magnatronic.ingest import ingest
from magnatronic.settings import Settings
from magnatronic.system import RunningSystem
from schemas.topics import TOPICS

__all__ = ["measure"]

PART: Final = "what-if"
PROMPT: Final = "Answer from the numbered passages only, in two sentences at most, each with its number as in [1]."
_ROOT: Final = Path(__file__).resolve().parent.parent
_TASK_TOPICS: Final = [name for topic in TOPICS if topic.key in ("task_id", "target") for name in topic.names()]
_WAIT_S: Final = 0.05
_SAMPLE_S: Final = 0.05
_REFUSE: Final = 10
_SLOW: Final = 25


@dataclass(frozen=True, slots=True)
class _Run:
    seconds: float
    report: dict[str, Any]
    cpu_s: float
    peak_mib: float


def measure(*, tasks: int, log: Callable[[str], None]) -> list[Figure]:
    """Figures over ``tasks`` tasks.

    Raises:
        RuntimeError: a run was not what it has to be; see the module.
    """
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        data_dir, prompt = Path(folder) / "data", Path(folder) / "answer.txt"
        prompt.write_text(PROMPT)
        with RunningSystem(Settings.load(data_dir=data_dir, partitions=PARTITIONS, monitor=False)) as system:
            servers = system.info.bootstrap_servers
            documents = list(corpus())
            with Client(servers, name="bench") as client:
                ingest(client, documents)
                asked = questions(documents, tasks, 0)
                for start in range(0, tasks, 500):
                    client.ask_all(asked[start : start + 500], timeout=300.0)
            before = _ends(servers)
            log(f"{tasks} tasks are over, {sum(before.values())} offsets")
            changed = ("--prompt", f"answer={prompt}", "--recall", "live")
            runs = {"unchanged": _what_if(data_dir, tasks)}
            runs["prompt, extractive"] = _what_if(data_dir, tasks, *changed, "--ask", "extractive")
            with _ChatServer() as server:
                asking = ("--ask", "openai", "--base-url", server.url, "--model", "local", "--at-once", "32")
                runs["prompt, OpenAI protocol"] = _what_if(data_dir, tasks, *changed, *asking)
            if (_ROOT / ".git").exists():
                code = ("--code", "HEAD", "--repository", str(_ROOT))
                runs["code of HEAD, in its own process"] = _what_if(data_dir, tasks, *code)
            if _ends(servers) != before:
                raise RuntimeError("a topic grew while the what-ifs ran")
            system.check()
    for name, run in runs.items():
        sums = run.report["totals"]
        log(f"{name}: {run.seconds:.1f} s, {sums['by_status']}, {sums['made']} calls, {run.peak_mib:.0f} MiB")
    return _figures(tasks, runs, server.refused)


def _figures(tasks: int, runs: dict[str, _Run], refused: int) -> list[Figure]:
    figures = []
    for name, run in runs.items():
        sums = run.report["totals"]
        figures.append(
            Figure(PART, name, "tasks/s", (tasks / run.seconds,), f"{run.seconds:.1f} s, CPU {run.cpu_s:.1f} s")
        )
        events = sums["steps"] + sums["reused"] + sums["elsewhere"] + sums["made"]
        figures.append(Figure(PART, f"{name}: steps and calls", "events/s", (events / run.seconds,), f"{events:,}"))
        figures.append(Figure(PART, f"{name}: calls made", "calls", (float(sums["made"]),)))
        figures.append(Figure(PART, f"{name}: ended otherwise", "tasks", (float(sums["outcomes_differ"]),)))
    unchanged = runs["unchanged"].report["totals"]
    if unchanged["by_status"] != {"same": tasks} or unchanged["made"]:
        raise RuntimeError(f"unchanged tasks differ: {unchanged['by_status']}")
    for name, run in runs.items():
        if not run.report["complete"] or sum(run.report["totals"]["by_status"].values()) != tasks:
            raise RuntimeError(f"{name} is not complete: {run.report['totals']['by_status']}")
        if (
            unfit := {"stopped", "budget", "unfinished", "runaway", "left out"}
            & run.report["totals"]["by_status"].keys()
        ):
            raise RuntimeError(f"{name}: tasks are {', '.join(sorted(unfit))}")
    peak = max(run.peak_mib for run in runs.values())
    figures.append(Figure(PART, "calls refused with 429, and made again", "calls", (float(refused),)))
    figures.append(Figure(PART, "memory of the command", "MiB", (peak,), "the highest of all runs"))
    return figures


def _ends(servers: str) -> dict[str, int]:
    admin = AdminClient({"bootstrap.servers": servers})
    return {name: sum(stable_offsets(admin, name, 1 if name == "control" else PARTITIONS)) for name in _TASK_TOPICS}


def _what_if(data_dir: Path, tasks: int, *options: str) -> _Run:
    command = [
        *(sys.executable, "-c", "from magnatronic.cli import main; main()", "replay", "what-if"),
        *("--data-dir", str(data_dir), "--limit", str(tasks), "--json", *options),
    ]
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        start = time.monotonic()
        process = psutil.Popen(command, stdout=output, stderr=errors, cwd=_ROOT)
        peak, cpu_s = 0, 0.0
        # Sampled: what the kernel keeps as the highest is this process's, from which that one was forked.
        while process.poll() is None:
            with contextlib.suppress(psutil.Error), process.oneshot():
                peak = max(peak, process.memory_info().rss)
                used = process.cpu_times()
                cpu_s = used.user + used.system
            time.sleep(_SAMPLE_S)
        seconds = time.monotonic() - start
        output.seek(0)
        errors.seek(0)
        if process.returncode != 0:
            raise RuntimeError(f"what-if {' '.join(options)}: {errors.read().decode(errors='replace')[-2000:]}")
        return _Run(seconds, orjson.loads(output.read()), cpu_s, peak / 2**20)


class _ChatServer:
    """The server, in a process of its own."""

    def __init__(self) -> None:
        options = ("--wait-s", str(_WAIT_S), "--refuse", str(_REFUSE), "--slow", str(_SLOW))
        self.refused = 0
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.workers.chat_server", *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=_ROOT,
            env={**os.environ, "PYTHONPATH": str(_ROOT)},
        )
        assert self._process.stdout is not None
        self.url = f"http://127.0.0.1:{int(self._process.stdout.readline())}/v1"

    def __enter__(self) -> "_ChatServer":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGTERM)
        output, _errors = self._process.communicate(timeout=30)
        self.refused = orjson.loads(output)["refused"]
