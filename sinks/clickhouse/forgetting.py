"""Forgetting a data subject in ClickHouse: its rows lose what is personal, and the old files go.

In: key ids of subjects whose keys were destroyed. Out: ``event_log`` with the payloads that a reader without the keys
would have made: these lie beside each payload for this moment, so that one mutation does it, and a rebuild from the log
gives the same rows. Figures, ids and times stay. The key ids are noted before rows change, and every writer looks after
each insert whether it wrote about one of them: whichever comes first, nothing is left.
"""

import time
from collections.abc import Collection, Sequence
from datetime import UTC, datetime
from typing import Final

import pyarrow as pa

from sinks.clickhouse.client import ClickHouse

__all__ = ["erase", "erased_rows", "forgotten_among", "wait_for_old_files"]

_ABOUT: Final = "hasAny(data_subjects, {subjects:Array(String)}) AND NOT erased"
_POLL_S: Final = 0.5


def forgotten_among(clickhouse: ClickHouse, subjects: Collection[str]) -> set[str]:
    """Which of these subjects are noted as forgotten."""
    if not subjects:
        return set()
    rows = clickhouse.read(
        "SELECT DISTINCT key_id FROM forgotten_subjects WHERE has({subjects:Array(String)}, key_id)",
        {"subjects": sorted(subjects)},
    )
    return {key_id for (key_id,) in rows}


def erase(clickhouse: ClickHouse, subjects: Collection[str]) -> None:
    """Blank what is personal in all rows about these subjects. Can be repeated; returns when it is done."""
    for subject in sorted(subjects):
        # Noted first: who inserts from now on finds it.
        _note(clickhouse, subject, 0)
        about = {"subjects": [subject]}
        for table in _tables(clickhouse):
            ((rows,),) = clickhouse.read(f"SELECT count() FROM {table} WHERE {_ABOUT}", about)
            if rows:
                clickhouse.command(
                    f"ALTER TABLE {table} UPDATE payload = blanked, blanked = '', erased = true WHERE {_ABOUT} "
                    "SETTINGS mutations_sync = 2",
                    about,
                )
                _note(clickhouse, subject, rows)


def erased_rows(clickhouse: ClickHouse, subjects: Sequence[str]) -> dict[str, int]:
    """How many rows were blanked for each of these subjects; those that are not noted as forgotten are missing."""
    rows = clickhouse.read(
        "SELECT key_id, sum(rows) FROM forgotten_subjects WHERE has({subjects:Array(String)}, key_id) GROUP BY key_id",
        {"subjects": list(subjects)},
    )
    return {key_id: int(count) for key_id, count in rows}


def wait_for_old_files(clickhouse: ClickHouse, timeout_s: float) -> bool:
    """Wait until the files are deleted that merges and mutations have replaced by now; whether they are.

    ClickHouse does so by itself, some seconds later.
    """
    deadline = time.monotonic() + timeout_s
    before = _old_parts(clickhouse)
    while before:
        if time.monotonic() >= deadline:
            return False
        time.sleep(_POLL_S)
        before &= _old_parts(clickhouse)
    return True


def _tables(clickhouse: ClickHouse) -> list[str]:
    """The table of events, those that rebuilds were told to keep, and that of a rebuild that is not finished."""
    rows = clickhouse.read(
        "SELECT database, table FROM system.columns "
        "WHERE has({databases:Array(String)}, database) AND name = 'blanked' "
        "AND (table = 'event_log' OR startsWith(table, 'event_log_until_')) ORDER BY database, table",
        {"databases": _databases(clickhouse)},
    )
    return [f"{database}.{table}" for database, table in rows]


def _databases(clickhouse: ClickHouse) -> list[str]:
    return [clickhouse.database, f"{clickhouse.database}_rebuild"]


def _old_parts(clickhouse: ClickHouse) -> set[str]:
    rows = clickhouse.read(
        "SELECT path FROM system.parts "
        "WHERE has({databases:Array(String)}, database) AND startsWith(table, 'event_log') AND NOT active",
        {"databases": _databases(clickhouse)},
    )
    return {path for (path,) in rows}


def _note(clickhouse: ClickHouse, subject: str, rows: int) -> None:
    noted = {
        "key_id": pa.array([subject]),
        "rows": pa.array([rows], pa.uint64()),
        "at": pa.array([datetime.now(UTC)], pa.timestamp("ms", tz="UTC")),
    }
    clickhouse.insert("forgotten_subjects", pa.table(noted))
