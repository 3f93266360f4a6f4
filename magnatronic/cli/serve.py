"""Commands that run parts of the system until they are stopped: up, run.

In: settings. Out: a running system or role; Ctrl-C and SIGTERM stop it gracefully.
"""

import asyncio
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from magnatronic.cli.options import Output, common_options, load_settings

if TYPE_CHECKING:
    from magnatronic.settings import Settings
    from magnatronic.system import SystemInfo

__all__ = ["run", "up"]

_MEMORY_SHARE: Final = 0.8
"""Of the memory that is there: the kernel ends whichever process it likes when there is none left."""


@click.command()
@common_options
def up(*, data_dir: Path | None, out: Output) -> int:
    """Start the whole system and run until Ctrl-C or SIGTERM.

    Without MAGNATRONIC_KAFKA_BOOTSTRAP_SERVERS a broker starts too. All data is in the data folder and outlives this
    process, however it ends: started again, it goes on where it was.
    """
    from magnatronic.logs import log_to
    from magnatronic.system import FolderLock, System, first_of

    settings = load_settings(data_dir)
    FolderLock(settings.data_dir).check()
    log_to(settings.data_dir / "logs" / "magnatronic.log", settings.log_level)
    system = System(settings, lasting=True, on_progress=lambda what: out.progress.print(f"[dim]starting {what} …[/]"))

    async def serve(stop: asyncio.Event) -> int:
        info = await _unless(stop, system.start())
        if info is None:
            return 0
        _say_where(info, out)
        assert system.failure is not None
        await first_of(stop, system.failure)
        failure = system.failure.result() if system.failure.done() else None
        if failure is None:
            out.progress.print("[dim]stopping …[/]")
        await system.stop()
        if failure is not None:
            raise failure
        return 0

    return _until_signalled(serve, settings)


def _say_where(info: "SystemInfo", out: Output) -> None:
    if out.as_json:
        out.json({"event": "ready", **info.as_dict()})
        return
    broker = f"{info.bootstrap_servers}" + (f"  (embedded, process {info.broker_pid})" if info.embedded else "")
    for name, value in (
        ("Kafka", broker),
        ("data", info.data_dir),
        ("ClickHouse", info.clickhouse),
        ("Milvus", info.milvus),
        ("language model", info.provider),
        ("embeddings", info.embedding_model),
        ("socket", info.socket),
        ("logs", info.logs),
        ("metrics", info.metrics or "off"),
    ):
        click.echo(f"{name:<16}{value}")
    click.echo('ready; try: magnatronic ask "…"   (Ctrl-C stops it)')


@click.command()
@click.argument("role")
@click.option(
    "--slot", help="A name for this instance that no other has. Default: made of machine, role and a free number."
)
@common_options
def run(role: str, *, slot: str | None, data_dir: Path | None, out: Output) -> int:
    """Run one ROLE alone: an agent by name, `agents`, `sink-clickhouse`, `sink-milvus` or `monitor`.

    It works on the cluster that MAGNATRONIC_KAFKA_BOOTSTRAP_SERVERS names, or beside the system on the data folder. Run
    as many as you like; they share the partitions.
    """
    from magnatronic.discovery import find_system
    from magnatronic.logs import log_to
    from magnatronic.single import SingleRole

    # Not asked yet: what is wrong with the command is told first.
    single = SingleRole(role, find_system(data_dir, ask=False), slot=slot)
    settings = single.settings
    log_to(settings.data_dir / "logs" / f"{single.slot}.log", settings.log_level)

    async def serve(stop: asyncio.Event) -> int:
        await single.start()
        if out.as_json:
            out.json({"event": "ready", "role": role, "slot": single.slot, "metrics": single.metrics})
        else:
            click.echo(f"{single.slot} is ready; metrics: {single.metrics or 'off'} (Ctrl-C stops it)")
        failure = await single.until(stop)
        await single.stop()
        if failure is not None:
            raise failure
        return 0

    return _until_signalled(serve, settings)


def _until_signalled(serve: Callable[[asyncio.Event], Awaitable[int]], settings: "Settings") -> int:
    """Run ``serve`` on an event loop, watched from outside, with an event that SIGINT and SIGTERM set; a second SIGINT
    interrupts it.
    """
    from magnatronic.system import new_event_loop
    from streams.watchdog import Watchdog, memory_there_mib

    received: list[int] = []

    async def main() -> int:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        this = asyncio.current_task()
        assert this is not None

        def signalled(number: int) -> None:
            if received and number == signal.SIGINT:
                this.cancel()
            received.append(number)
            stop.set()

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, signalled, number)
        limit_mib = settings.memory_limit_mb
        if limit_mib is None:
            limit_mib = int(memory_there_mib() * _MEMORY_SHARE)
        with Watchdog(loop_timeout_s=settings.loop_timeout_s, memory_limit_mib=limit_mib):
            return await serve(stop)

    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        try:
            code = runner.run(main())
        except asyncio.CancelledError:
            raise KeyboardInterrupt from None
    if received and received[0] == signal.SIGINT:
        raise KeyboardInterrupt
    return code


async def _unless(stop: asyncio.Event, work: Awaitable[Any]) -> Any:
    """The result of ``work``, or None when ``stop`` was set first; the work is cancelled then."""
    task, stopping = asyncio.ensure_future(work), asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait([task, stopping], return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return None
    finally:
        stopping.cancel()
