"""``magnatronic replay what-if``: what would another prompt, model, tool set or code have made of tasks that are over?

In: which tasks, what is to be different, who may be asked, and how much it may cost. Out: a table of what differs, or
JSON, and a report page in the what-if's folder. Ends with 0 when every task was carried as far as it goes, with 1 when
the budget ended it.
"""

from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from magnatronic.cli.history import from_option
from magnatronic.cli.options import Output, common_options
from magnatronic.cli.progress import show_reading
from magnatronic.cli.when import When
from magnatronic.errors import WrongInputError

if TYPE_CHECKING:
    from magnatronic.whatif import Request, WhatIf
    from replay.whatif.result import TaskResult

__all__ = ["what_if"]

_PROVIDERS: Final = ("extractive", "openai", "anthropic", "google")
_LISTED: Final = 20
_FRESH: Final = timedelta(minutes=5)


@click.command()
@from_option
@click.option("--since", help="Tasks submitted since: 90s, 15m, 2h, 7d ago, or an ISO time.")
@click.option("--until", help="Tasks submitted before, likewise.")
@click.option("--task", "tasks", multiple=True, help="This task; can be given several times.")
@click.option(
    "--limit", type=click.IntRange(min=1), default=100, show_default=True, help="Of many, the latest so many."
)
@click.option(
    "--prompt", "prompts", multiple=True, metavar="NAME=FILE", help="Another text for a prompt of the agents."
)
@click.option("--provider", type=click.Choice(_PROVIDERS), help="Who is to answer every call of a language model.")
@click.option("--ask", type=click.Choice(_PROVIDERS), help="Who answers calls that are not recorded (default: nobody).")
@click.option("--model", default="", help="Their model.")
@click.option("--base-url", default="", help="A server that speaks their protocol.")
@click.option("--temperature", type=click.FloatRange(0, 2), help="Another temperature for all calls.")
@click.option("--tools", multiple=True, metavar="-NAME|+NAME", help="Take a tool away, or add one.")
@click.option("--code", default="", metavar="REVISION", help="The agents' code of this git revision.")
@click.option(
    "--repository",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path(),
    help="Where that revision is (default: here).",
)
@click.option(
    "--recall",
    type=click.Choice(("recorded", "live")),
    default="recorded",
    show_default=True,
    help="Whether memory may be asked as it is now.",
)
@click.option("--max-tokens", type=click.IntRange(min=0), help="Stop before it takes more tokens.")
@click.option("--max-usd", type=click.FloatRange(min=0), help="Stop before it costs more US dollars.")
@click.option("--at-once", type=click.IntRange(min=1), default=8, show_default=True, help="Calls under way at most.")
@click.option("--id", "id_", default="", help="Name of its folder (default: made from the other options).")
@common_options
def what_if(*, archive: Path | None, data_dir: Path | None, out: Output, **options: Any) -> int:
    """Decide logged tasks with other prompts, another model, other tools or other code, and tell what differs.

    Nothing of it touches a live topic, and no tool runs. Calls whose request is unchanged are answered by the record;
    others by --ask, or the task stops with the call that it would make. Killed, it goes on where it was: run it again.
    """
    from magnatronic.histories import open_history
    from magnatronic.whatif import what_if as run_what_if

    request = _request(options)
    with open_history(data_dir, archive) as history, show_reading(out, "tasks") as on_task:
        done = run_what_if(request, history, on_task=on_task)
    if out.as_json:
        out.json({"folder": str(done.folder), **done.report.as_dict()})
    else:
        _print(done, out)
    return 0 if done.report.complete else 1


def _request(options: dict[str, Any]) -> "Request":
    from magnatronic.whatif import Request
    from replay.whatif.changes import Changes
    from replay.whatif.revision import commit_of

    given = dict(options)
    prompts = _prompts(given["prompts"])
    provider = given["provider"] or ""
    ask = given["ask"] or provider
    if provider and ask != provider:
        raise WrongInputError(f"--provider {provider} is to answer every call; --ask {ask} would never be asked")
    if (given["model"] or given["base_url"]) and not ask:
        raise WrongInputError("--model and --base-url need to know whose: give --ask or --provider")
    when = When()
    code = commit_of(given["code"], given["repository"]) if given["code"] else ""
    changes = Changes(
        prompts=prompts,
        provider=provider,
        ask=ask,
        model=given["model"],
        base_url=given["base_url"],
        temperature=given["temperature"],
        without_tools=_tools(given["tools"], "-"),
        with_tools=_tools(given["tools"], "+"),
        code=code,
        recall=given["recall"] == "live",
    )
    return Request(
        changes=changes,
        since=None if given["since"] is None else when.convert(given["since"], None, None),
        until=None if given["until"] is None else when.convert(given["until"], None, None),
        tasks=tuple(given["tasks"]),
        limit=given["limit"],
        max_tokens=given["max_tokens"],
        max_usd=given["max_usd"],
        at_once=given["at_once"],
        repository=given["repository"],
        id=_name(given["id_"]),
        arguments={name: given[name] for name in ("since", "until", "tasks", "limit")},
    )


def _prompts(given: Sequence[str]) -> dict[str, str]:
    from agents.errors import PromptError
    from agents.prompts import PROMPTS

    prompts = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not equals:
            raise WrongInputError(f"--prompt {text!r}: write NAME=FILE; names are {', '.join(PROMPTS.names())}")
        try:
            prompts[name] = Path(path).read_text(encoding="utf-8").rstrip("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise WrongInputError(f"--prompt {name}: {path} can't be read: {error}") from None
    try:
        PROMPTS.with_texts(prompts)
    except PromptError as error:
        raise WrongInputError(str(error)) from None
    return prompts


def _tools(given: Sequence[str], sign: str) -> tuple[str, ...]:
    for text in given:
        if text[:1] not in ("-", "+") or not text[1:]:
            raise WrongInputError(f"--tools {text!r}: write -NAME to take a tool away, +NAME to add it")
    return tuple(text[1:] for text in given if text[0] == sign)


def _name(text: str) -> str:
    if text and (not text.replace("-", "").replace("_", "").isalnum() or len(text) > 80):
        raise WrongInputError(f"--id {text!r}: use letters, digits, - and _, 80 at most")
    return text


def _print(done: "WhatIf", out: Output) -> None:
    report = done.report
    sums = report.totals
    out.console.print(f"What if: {', '.join(report.manifest['told']) or 'nothing changed'}", markup=False)
    out.table(("tasks", "how they fare"), [(count, status) for status, count in sorted(sums.by_status.items())])
    rows = [("completed", *sums.completed)]
    for name, shown in _MEASURES.items():
        rows.append((shown, sums.before.get(name), sums.after.get(name)))  # type: ignore[arg-type]
    out.table(("of those carried through", "before", "after"), rows)
    first = Counter(_difference(result) for result in report.results if result.first is not None)
    if first:
        out.table(("tasks", "differ first in"), [(count, told) for told, count in first.most_common(_LISTED)])
        out.console.print(f"{sums.decisions_differ} decide otherwise, {sums.outcomes_differ} end otherwise")
    told = [result for result in report.results if result.ended_otherwise or result.why]
    if told:
        out.table(("task", "", "outcome", "groundedness", ""), [_row(result) for result in told[:_LISTED]])
    if len(told) > _LISTED:
        out.console.print(f"and {len(told) - _LISTED} more")
    _print_calls(done, out)


_MEASURES: Final = {
    "groundedness": "groundedness, mean",
    "tokens": "tokens",
    "cost_usd": "cost, US$",
    "calls": "model calls",
    "latency_ms": "submission to outcome, mean ms",
}


def _print_calls(done: "WhatIf", out: Output) -> None:
    report = done.report
    sums = report.totals
    would = "".join(f", {count} it {name}" for name, count in sums.would.items())
    out.console.print(
        f"{sums.reused + sums.elsewhere} calls answered by the record ({sums.elsewhere} from another place of the "
        f"task), {sums.made} made ({sums.spent_tokens} tokens, US$ {sums.spent_usd:.4f}){would}",
        markup=False,
    )
    if not report.complete:
        out.console.print(f"The budget ended it: {report.exhausted}. Run it again with more to go on.", markup=False)
    begun = datetime.fromisoformat(report.manifest["begun"])
    if datetime.now(UTC) - begun > _FRESH:
        out.console.print(f"The tasks are those of {begun:%Y-%m-%d %H:%M} UTC, when it was begun; --id begins another.")
    if report.manifest["unknown"]:
        out.console.print(f"not in the log: {', '.join(report.manifest['unknown'])}", markup=False)
    if report.manifest["open"]:
        out.console.print(f"{report.manifest['open']} tasks are left out: they are not over yet")
    out.console.print(f"side by side: {done.folder / 'report.html'}", markup=False)


def _difference(result: "TaskResult") -> str:
    first = result.first
    assert first is not None
    return f"{first.agent} {first.kind}: {first.what}{f'.{first.field}' if first.field else ''}"


def _row(result: "TaskResult") -> tuple[Any, ...]:
    before, after = result.before.outcome, result.after.outcome or "none"
    grounds = [_share(side.groundedness) for side in (result.before, result.after)]
    why = result.why
    if not why and result.would:
        why = f"{result.would[0]['agent']} {result.would[0]['would']}"
    elif not why and result.decided is not None:
        why = f"{result.decided.agent} {result.decided.kind}"
    outcome = before if before == after else f"{before} -> {after}"
    return result.task_id, result.status.value, outcome, " -> ".join(dict.fromkeys(grounds)), why


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
