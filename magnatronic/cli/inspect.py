"""Commands that look at what happens and happened: status, query, topics.

In: SQL. Out: tables. SQL goes to the ClickHouse server that the settings name, or over the socket to the process that
has the embedded one open; topics reads Kafka itself.
"""

from pathlib import Path
from typing import Any

import click

from magnatronic.cli.options import Output, common_options, load_settings
from magnatronic.errors import WrongInputError

__all__ = ["query", "run_query", "status", "topics"]


@click.command()
@common_options
def status(*, data_dir: Path | None, out: Output) -> int:
    """Show where the running system's parts are, who works, what is wrong, and whether all are ready; if not, what
    they wait for.

    Ends with 0 when all are ready, with 1 when one is not.
    """
    from magnatronic.control import call

    found: dict[str, Any] = call(load_settings(data_dir).data_dir, "status")
    if out.as_json:
        out.json(found)
        return 0 if found["ready"] else 1
    broker = f"{found['bootstrap_servers']}" + (f" (process {found['broker_pid']})" if found["embedded"] else "")
    sinks = ", ".join(f"{role} ({sink['records']} records)" for role, sink in found["sinks"].items())
    out.table(
        ("part", "where"),
        [
            ("process", f"{found['pid']}, up for {found['uptime_s']:.0f} s"),
            ("Kafka", broker),
            ("data", found["data_dir"]),
            ("logs", found["logs"]),
            ("metrics", f"{found['metrics']}/metrics" if found["metrics"] else "off"),
            ("agents", ", ".join(found["agents"])),
            ("sinks", sinks),
        ],
    )
    if found["directory"]:
        rows = [(each["agent"], each["instance"], each["health"], each["in_flight"]) for each in found["directory"]]
        out.table(("agent", "instance", "health", "in flight"), rows)
    for job in found["jobs"]:
        how_far = f" ({job['done']:,} of {job['of']:,})" if job["of"] else ""
        out.console.print(f"{job['job']}: {job['phase']}{how_far}, for {job['seconds']:.0f} s", markup=False)
    for alert in found["alerts"]:
        out.console.print(f"{alert['severity']} alert, {alert['rule']}: {alert['message']}", markup=False)
    if found["ready"]:
        out.console.print("ready")
        return 0
    out.console.print("NOT ready")
    for cause in found["causes"]:
        out.console.print(f"  {cause['kind']}: {cause['message']}", markup=False)
    return 1


@click.command()
@click.argument("sql", required=False)
@click.option("--named", metavar="NAME", help="A query that comes with Magnatronic, by name.")
@click.option("--list", "list_named", is_flag=True, help="List the named queries.")
@click.option("--wait/--no-wait", default=True, help="First let ClickHouse take all that is in the log (default).")
@common_options
def query(
    sql: str | None, *, named: str | None, list_named: bool, wait: bool, data_dir: Path | None, out: Output
) -> None:
    """Ask ClickHouse and print a table. Views: events, tasks, steps, llm_calls, tool_calls, and more."""
    from sinks.clickhouse.queries import named_queries, named_query
    from sinks.errors import UnknownQueryError

    if list_named:
        rows = [(each.name, each.title) for each in named_queries()]
        if out.as_json:
            out.json([{"name": name, "title": title} for name, title in rows])
        else:
            out.table(("name", "what it answers"), rows)
        return
    if (sql is None) == (named is None):
        raise WrongInputError("query: give either SQL or --named NAME (see `magnatronic query --list`)")
    if named is not None:
        try:
            sql = named_query(named).sql
        except UnknownQueryError as error:
            raise WrongInputError(str(error)) from None
    answer = run_query(str(sql), data_dir=data_dir, wait=wait)
    if out.as_json:
        out.json([dict(zip(answer["columns"], row, strict=True)) for row in answer["rows"]])
    else:
        out.table(answer["columns"], answer["rows"])
    if answer["truncated"]:
        click.echo(f"only the first {len(answer['rows'])} rows; add a LIMIT or aggregate", err=True)
    if not answer["caught_up"]:
        click.echo("ClickHouse is still behind the log; the newest events are missing here", err=True)


def run_query(sql: str, *, data_dir: Path | None, wait: bool) -> dict[str, Any]:
    """Columns, types, rows, ``truncated`` and ``caught_up``.

    Raises:
        QueryRefusedError: ClickHouse refused the query.
        NotRunningError: the embedded ClickHouse is asked for, and nothing runs on the data folder.
    """
    from magnatronic.control import call

    settings = load_settings(data_dir)
    if settings.clickhouse_url is None:
        answer: dict[str, Any] = call(settings.data_dir, "query", sql=sql, wait=wait, timeout=120.0)
        return answer
    from magnatronic.queries import answer_query
    from sinks.clickhouse.client import ClickHouse

    with ClickHouse(settings.clickhouse_url) as clickhouse:
        return {**answer_query(clickhouse, sql), "caught_up": True}


@click.command()
@common_options
def topics(*, data_dir: Path | None, out: Output) -> None:
    """Show the topics of the cluster: partitions, records, how long they are kept, and what they are for."""
    from magnatronic.discovery import find_system
    from magnatronic.topic_table import topic_rows

    rows = topic_rows(find_system(data_dir).kafka)
    if out.as_json:
        out.json([row.as_dict() for row in rows])
        return
    out.table(
        ("topic", "partitions", "records", "kept", "what it is for"),
        [(row.name, row.partitions, row.records, row.kept, row.purpose) for row in rows],
    )
    missing = [row.name for row in rows if row.partitions == 0]
    if missing:
        click.echo(f"missing on the cluster: {', '.join(missing)}; `magnatronic up` creates them", err=True)
