"""``magnatronic replay audit``: decide recorded steps again, and compare every output with the record.

In: a task's id. Out: a table of outputs with their hashes, or JSON; exit code 0 when all is as recorded, else 1.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from magnatronic.cli.options import Output, common_options
from magnatronic.errors import UnknownTaskError, WrongInputError

if TYPE_CHECKING:
    from replay.task import ReplayReport

__all__ = ["audit", "print_replay"]


@click.command()
@click.option("--task", "task_id", required=True, help="The task to decide again.")
@common_options
def audit(*, task_id: str, data_dir: Path | None, out: Output) -> int:
    """Decide a task's steps again with the recorded effects, and compare every output with the record by hash.

    Ends with 0 when every output is the recorded one, with 1 when one differs.
    """
    from magnatronic.discovery import find_system
    from magnatronic.roles import all_agents
    from replay.errors import OpenTaskError
    from replay.errors import UnknownTaskError as UnknownInLogError
    from replay.task import replay_task

    found = find_system(data_dir)
    try:
        report = replay_task(task_id, agents=all_agents(), kafka=found.kafka, codec=found.codec())
    except UnknownInLogError as error:
        raise UnknownTaskError(str(error)) from None
    except OpenTaskError as error:
        raise WrongInputError(str(error)) from None
    if out.as_json:
        out.json(report.as_dict())
    else:
        print_replay(report, out)
    return 0 if report.ok else 1


def print_replay(report: "ReplayReport", out: Output) -> None:
    """One row an output: who decided it on what, and its hash then and now."""
    rows = []
    for step in report.steps:
        for output in step.outputs:
            now = "same" if output.same else (output.redecided_hash or "not decided")[:16]
            rows.append(
                (step.agent, step.event_type, output.event_type, (output.recorded_hash or "not recorded")[:16], now)
            )
        if not step.outputs or step.difference:
            rows.append((step.agent, step.event_type, "-", "-", step.difference or "nothing to decide"))
    out.table(("agent", "decides on", "and emits", "recorded sha-256", "decided again"), rows)
    verdict = "every output is the recorded one" if report.ok else "NOT as recorded"
    out.console.print(f"{report.outputs} outputs of {len(report.steps)} decisions: {verdict}. History {report.digest}")
