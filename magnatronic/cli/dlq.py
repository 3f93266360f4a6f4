"""The command dlq: dead letters, listed, shown, redriven, discarded.

In: ids or filters. Out: tables, and what :mod:`magnatronic.dlq` does. It talks to Kafka alone, so that it works beside
a running system and against a cluster, whoever of them is in trouble.
"""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from magnatronic.cli.options import Output, common_options
from magnatronic.cli.when import When
from magnatronic.errors import WrongInputError

if TYPE_CHECKING:
    from magnatronic.discovery import FoundSystem
    from magnatronic.dlq import DeadLetters, Resolved
    from magnatronic.letters import Entry, Filter, Letter
    from schemas.codec import Codec

__all__ = ["dlq"]

_SHOWN: Final = 50
_DUMPED: Final = 1024
_DUMP_WIDTH: Final = 16


def _filters(function: Any) -> Any:
    for option in (
        click.option("--since", type=When(), help="Written since: 90s, 15m, 2h, 7d ago, or an ISO time."),
        click.option("--error", default="", help="Whose error is of this type, or says this."),
        click.option("--topic", default="", help="Of records from this topic."),
        click.option("--agent", default="", help="That this agent gave up."),
    ):
        function = option(function)
    return function


def _chosen_by(function: Any) -> Any:
    for option in (
        click.option("--yes", "-y", is_flag=True, help="Don't ask."),
        click.option("--all", "all_", is_flag=True, help="All that are open and that the filters take."),
        _filters,
        click.argument("ids", nargs=-1),
    ):
        function = option(function)
    return function


@click.group()
def dlq() -> None:
    """Dead letters: events that an agent gave up, whole, with the error.

    An ID is what `magnatronic dlq list` shows, or topic:partition:offset@agent.
    """


@dlq.command("list")
@_filters
@click.option("--limit", type=click.IntRange(min=1), default=_SHOWN, show_default=True, help="Only the newest so many.")
@click.option("--resolved", "with_resolved", is_flag=True, help="Also those that were redriven or discarded.")
@common_options
def list_(*, limit: int, with_resolved: bool, data_dir: Path | None, out: Output, **filters: Any) -> None:
    """List the open dead letters, the newest last."""
    from magnatronic.letters import Filter, LetterReader

    found = _system(data_dir)
    matching = list(filter(Filter(**filters), LetterReader(found.kafka, found.codec()).entries()))
    entries = [entry for entry in matching if with_resolved or entry.resolved is None]
    shown = entries[-limit:]
    if out.as_json:
        out.json([entry.as_dict() for entry in shown])
        return
    columns = ["id", "when", "agent", "record", "error", "attempts"]
    out.table([*columns, "resolved"] if with_resolved else columns, [_row(entry, with_resolved) for entry in shown])
    if len(shown) < len(entries):
        click.echo(f"the newest {len(shown)} of {len(entries)}; --limit shows more", err=True)


def _row(entry: "Entry", with_resolved: bool) -> list[Any]:
    from magnatronic.cli.describe import shorten

    place = entry.place
    said = shorten(f"{entry.error_type}: {entry.error}", 90)
    where = f"{place.topic}[{place.partition}]@{place.offset}"
    row = [entry.short_id, entry.time.astimezone(), place.agent, where, said, entry.attempts]
    if with_resolved:
        resolved = entry.resolved
        row.append("" if resolved is None else f"{resolved.resolution.value} by {resolved.resolved_by}")
    return row


@dlq.command()
@click.argument("id_", metavar="ID")
@click.option("--full", is_flag=True, help="All bytes of a record that can't be decoded.")
@common_options
def show(id_: str, *, full: bool, data_dir: Path | None, out: Output) -> None:
    """Show one dead letter: where it comes from, the error, the record, and what became of it."""
    from magnatronic.letters import LetterReader, find

    found = _system(data_dir)
    codec = found.codec()
    reader = LetterReader(found.kafka, codec)
    letter = reader.whole(find(reader.entries(), id_))
    event, error = _decoded(letter, codec)
    if out.as_json:
        out.json(_letter_as_dict(letter, event, error))
    else:
        _print_letter(letter, event, error, full=full)


def _decoded(letter: "Letter", codec: "Codec") -> tuple[dict[str, Any] | None, str]:
    """The record's event as JSON can hold it, or why it is none."""
    from schemas.errors import SchemaError

    if letter.record is None:
        return None, "the letter was too large to hold the record, and it is no longer in its topic"
    try:
        event = codec.decode(letter.record).event
    except SchemaError as error:
        return None, str(error)
    return {"type": type(event).__name__, **event.model_dump(mode="json")}, ""


def _letter_as_dict(letter: "Letter", event: dict[str, Any] | None, error: str) -> dict[str, Any]:
    record = letter.record
    return {
        **letter.entry.as_dict(),
        "error": letter.event.error,
        "source_timestamp": letter.event.source_timestamp.isoformat(),
        "correlation_id": letter.metadata.correlation_id,
        "causation_id": letter.metadata.causation_id,
        "traceparent": letter.metadata.traceparent,
        "key": None if record is None else _text(record.key),
        "headers": [] if record is None else [[name, _text(content)] for name, content in record.headers],
        "value_hex": None if record is None else record.value,
        "event": event,
        "undecodable": error,
    }


def _text(raw: bytes | None) -> str | None:
    """``raw`` as text where it is some, else as hex after ``0x``."""
    if raw is None:
        return None
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        return f"0x{raw.hex()}"
    return text if text.isprintable() else f"0x{raw.hex()}"


def _print_letter(letter: "Letter", event: dict[str, Any] | None, error: str, *, full: bool) -> None:
    import orjson

    entry, record = letter.entry, letter.record
    place = entry.place
    lines = [
        ("id", f"{entry.short_id}  ({entry.id})"),
        ("record", f"{place.topic}[{place.partition}]@{place.offset}, of {letter.event.source_timestamp.isoformat()}"),
        ("agent", place.agent),
        ("given up", f"{entry.time.isoformat()} after {entry.attempts} attempts"),
        ("error", f"{letter.event.error_type}: {letter.event.error}"),
    ]
    if entry.resolved is not None:
        resolved, when = entry.resolved, "" if entry.resolved_at is None else f" at {entry.resolved_at.isoformat()}"
        why = f": {resolved.reason}" if resolved.reason else ""
        lines.append(("resolved", f"{resolved.resolution.value} by {resolved.resolved_by}{when}{why}"))
    if record is not None:
        lines.append(("key", str(_text(record.key))))
        lines += [(f"header {name}", str(_text(content))) for name, content in record.headers]
    width = max(len(name) for name, _ in lines)
    for name, said in lines:
        click.echo(f"{name:<{width}}  {said}")
    click.echo("")
    if event is not None:
        click.echo(orjson.dumps(event, option=orjson.OPT_INDENT_2).decode())
        return
    click.echo(f"no event: {error}")
    if record is not None and record.value:
        shown = record.value if full else record.value[:_DUMPED]
        click.echo(hex_dump(shown))
        if len(shown) < len(record.value):
            click.echo(f"... {len(record.value) - len(shown)} more bytes; --full shows them")


def hex_dump(raw: bytes) -> str:
    """``raw`` as offsets, hex and text, 16 bytes a line."""
    lines = []
    for start in range(0, len(raw), _DUMP_WIDTH):
        part = raw[start : start + _DUMP_WIDTH]
        text = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in part)
        lines.append(f"{start:08x}  {part.hex(' '):<{_DUMP_WIDTH * 3 - 1}}  {text}")
    return "\n".join(lines)


@dlq.command()
@_chosen_by
@click.option("--again", is_flag=True, help="Also what was resolved already.")
@click.option("--reason", default="", help="Why, for the record.")
@common_options
def redrive(
    ids: Sequence[str],
    *,
    all_: bool,
    yes: bool,
    again: bool,
    reason: str,
    data_dir: Path | None,
    out: Output,
    **filters: Any,
) -> None:
    """Send dead letters' records back to their topics, each for the agent that gave it up alone.

    The record and the note that the letter is resolved commit in one transaction: it is never sent twice.
    """
    if all_ and again:
        raise WrongInputError("dlq redrive: --again takes ids; --all means what is open")

    def work(letters: "DeadLetters", entries: Sequence["Entry"]) -> "list[Resolved]":
        return letters.redrive(entries, again=again, skip_resolved=all_, reason=reason)

    _resolve(ids, all_, filters, yes, data_dir, out, "redrive", work)


@dlq.command()
@_chosen_by
@click.option("--reason", required=True, help="Why, for the record.")
@common_options
def discard(
    ids: Sequence[str], *, all_: bool, yes: bool, reason: str, data_dir: Path | None, out: Output, **filters: Any
) -> None:
    """Give dead letters up: they are listed no more. The letters themselves stay in the log."""
    if not reason.strip():
        raise WrongInputError("dlq discard: --reason is empty; say why")

    def work(letters: "DeadLetters", entries: Sequence["Entry"]) -> "list[Resolved]":
        return letters.discard(entries, reason=reason, skip_resolved=all_)

    _resolve(ids, all_, filters, yes, data_dir, out, "discard", work)


def _resolve(
    ids: Sequence[str],
    all_: bool,
    filters: dict[str, Any],
    yes: bool,
    data_dir: Path | None,
    out: Output,
    verb: str,
    work: Callable[["DeadLetters", Sequence["Entry"]], "list[Resolved]"],
) -> None:
    from magnatronic.dlq import DeadLetters
    from magnatronic.letters import Filter, LetterReader, find

    chosen_by = Filter(**filters)
    if bool(ids) == all_:
        raise WrongInputError(f"dlq {verb}: give either ids or --all (see `magnatronic dlq list`)")
    if ids and chosen_by != Filter():
        raise WrongInputError(f"dlq {verb}: filters go with --all, not with ids")
    found = _system(data_dir)
    codec = found.codec()
    entries = LetterReader(found.kafka, codec).entries()
    if all_:
        chosen = [entry for entry in entries if entry.resolved is None and chosen_by(entry)]
    else:
        chosen = list(map(partial(find, entries), ids))
    if len(chosen) > 1 or all_:
        _confirm(chosen, chosen_by, verb, yes or not chosen)
    done = work(DeadLetters(found.kafka, codec, by=_operator()), chosen) if chosen else []
    _say_done(done, verb, out)


def _confirm(chosen: Sequence["Entry"], chosen_by: "Filter", verb: str, yes: bool) -> None:
    if yes:
        return
    agents = ", ".join(sorted({entry.place.agent for entry in chosen}))
    if not sys.stdin.isatty():
        raise WrongInputError(f"dlq {verb}: these are {len(chosen)} dead letters of {agents}; say --yes")
    click.confirm(f"{verb} {len(chosen)} dead letters of {agents}?", abort=True, err=True)


def _say_done(done: "Sequence[Resolved]", verb: str, out: Output) -> None:
    if out.as_json:
        places = [{"partition": each.partition, "offset": each.offset} for each in done]
        shown = [
            {"id": each.entry.short_id, "place": str(each.entry.place), **(place if verb == "redrive" else {})}
            for each, place in zip(done, places, strict=True)
        ]
        out.json(shown)
        return
    for each in done:
        place = each.entry.place
        now = f" is {place.topic}[{each.partition}]@{each.offset} now" if verb == "redrive" else " is discarded"
        click.echo(f"{each.entry.short_id}  {place}{now}")
    click.echo(f"{len(done)} dead letters {'redriven' if verb == 'redrive' else 'discarded'}", err=True)


def _operator() -> str:
    """Who runs this command, for the record: ``user@machine``."""
    import getpass
    import socket

    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        import os

        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"


def _system(data_dir: Path | None) -> "FoundSystem":
    from magnatronic.discovery import find_system

    return find_system(data_dir)
