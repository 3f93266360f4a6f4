"""The command line: ``magnatronic COMMAND``.

In: arguments and ``MAGNATRONIC_*`` variables. Out: text or, with ``--json``, JSON on standard output; what goes wrong
is one line on standard error. Exit codes: 0 done, 1 failed, 2 wrong input (nothing was done), 130 interrupted.
Commands live in modules of their own that are imported when they are used, so that ``--help`` is quick.
"""

import os
import sys
from collections.abc import Sequence
from typing import Final

import click

from magnatronic.cli.lazy import LazyGroup
from magnatronic.errors import WrongInputError
from magnatronic.roots import assert_import_roots

__all__ = ["COMMANDS", "cli", "main"]

COMMANDS: Final = {
    "demo": ("magnatronic.cli.demo", "Start everything on a fresh folder, ask real questions, show how it went."),
    "up": ("magnatronic.cli.serve", "Start the whole system in this process, and the broker beside it."),
    "run": ("magnatronic.cli.serve", "Run one role alone on a Kafka cluster, as often as you like."),
    "ingest": ("magnatronic.cli.work", "Add documents: .md .txt .html .rst .pdf, files or folders."),
    "submit": ("magnatronic.cli.work", "Submit a task; prints its id."),
    "ask": ("magnatronic.cli.work", "Submit a question, follow it live, print the answer with citations."),
    "forget": ("magnatronic.cli.forget", "Destroy a data subject's key, and with it all that is about it."),
    "watch": ("magnatronic.cli.work", "Show events as they happen, one line each."),
    "status": ("magnatronic.cli.inspect", "Show whether the running system is ready and, if not, what it waits for."),
    "query": ("magnatronic.cli.inspect", "Ask ClickHouse: SQL over every event, step, token and dollar."),
    "topics": ("magnatronic.cli.inspect", "Show the topics as they are on the cluster."),
    "trace": ("magnatronic.cli.trace", "Show what led to what in a task, or what stood at any moment."),
    "dlq": ("magnatronic.cli.dlq", "Dead letters: list them, look into them, send them again, give them up."),
    "rebuild": ("magnatronic.cli.rebuild", "Make a projection again from the log, compare, and switch over."),
    "archive": ("magnatronic.cli.archive", "Write the log to Parquet files in a chain of hashes, and verify them."),
    "replay": ("magnatronic.cli.replay", "Decide recorded history again: prove it, or try another future."),
}
"""Where each command lives, and what it does in one line."""

_OWN_PACKAGES: Final = {"magnatronic", "schemas", "agents", "streams", "sinks", "replay"}
_INTERRUPTED: Final = 130


def _version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        from importlib.metadata import version

        click.echo(f"magnatronic {version('magnatronic')}")
        ctx.exit()


@click.command(
    cls=LazyGroup,
    lazy=COMMANDS,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.option("--version", is_flag=True, expose_value=False, is_eager=True, callback=_version, help="Show the version.")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Magnatronic: event-sourced agents on Apache Kafka.

    `magnatronic demo` shows all of it; `magnatronic up` starts a system that the other commands talk to.
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and end the process with its exit code."""
    sys.exit(_run(arguments))


def _run(arguments: Sequence[str] | None) -> int:
    try:
        assert_import_roots()
        result = cli.main(args=arguments, prog_name="magnatronic", standalone_mode=False)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx is not None else "magnatronic"
        return _complain(f"{command}: {_one_line(error.format_message())} (see `{command} --help`)", 2)
    except click.ClickException as error:
        return _complain(_one_line(error.format_message()), 2)
    except (click.Abort, KeyboardInterrupt):
        return _INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has seen enough; without this the interpreter complains while it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except WrongInputError as error:
        return _complain(_one_line(str(error)), 2, error)
    except Exception as error:  # noqa: BLE001 - the last one to see it says what it was, in a line
        own = type(error).__module__.partition(".")[0] in _OWN_PACKAGES
        said = str(error) if own else f"unexpected {type(error).__name__}: {_one_line(str(error))}"
        if not own and not _debugging():
            said += " (MAGNATRONIC_LOG_LEVEL=debug shows where)"
        return _complain(said, 1, error)


def _complain(message: str, code: int, error: BaseException | None = None) -> int:
    if error is not None and _debugging():
        import traceback

        traceback.print_exception(error)
    click.echo(f"magnatronic: {message}" if not message.startswith("magnatronic") else message, err=True)
    return code


def _debugging() -> bool:
    return os.environ.get("MAGNATRONIC_LOG_LEVEL", "").upper() == "DEBUG"


def _one_line(message: str) -> str:
    return " ".join(message.split())
