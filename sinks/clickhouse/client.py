"""One ClickHouse, embedded (chdb) or a server, behind the same client API.

In: a folder or a URL, and SQL. Out: :class:`QueryResult`. Two connections: one that writes, for the sink, and one that
may only read, with limits on time, memory and rows, for what users ask. chdb holds one folder per process, and one
process per folder; its queries release the interpreter lock and run beside inserts.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NoReturn, Self

import clickhouse_connect
import pyarrow as pa
from clickhouse_connect.driver.exceptions import ClickHouseError

from sinks.errors import QueryError, QueryTimeoutError, StoreBusyError, StoreError, WriteRefusedError

__all__ = ["ClickHouse", "QueryResult"]

_MIB: Final = 1024 * 1024
_EMBEDDED_OPTIONS: Final[Mapping[str, int]] = {
    # The defaults are a database server's (5 GiB for marks alone); here it shares a process with everything else.
    "mark_cache_size": 16 * _MIB,
    "primary_index_cache_size": 16 * _MIB,
    "index_mark_cache_size": 4 * _MIB,
    "uncompressed_cache_size": 0,
    "query_condition_cache_size": 4 * _MIB,
    "compiled_expression_cache_size": 4 * _MIB,
    "vector_similarity_index_cache_size": 0,
    "text_index_tokens_cache_size": 0,
    "text_index_header_cache_size": 0,
    "text_index_postings_cache_size": 0,
    "parquet_metadata_cache_size": 0,
    "iceberg_metadata_files_cache_size": 0,
    "max_thread_pool_size": 64,
    "max_thread_pool_free_size": 4,
}
_WRITE_SETTINGS: Final = {
    "max_threads": "2",
    "max_insert_threads": "1",
    "input_format_parallel_parsing": "0",
}

_NOT_WORTH_RETRYING: Final = frozenset({16, 27, 36, 43, 44, 46, 47, 53, 57, 60, 62, 81, 164, 192, 193, 194, 497, 516})
"""Codes of errors that stay: unknown names, bad types and syntax, no access. See ClickHouse's ErrorCodes.cpp."""

_READONLY: Final = 164
_TIMEOUTS: Final = frozenset({159, 160, 209})
_CODE_PREFIX: Final = re.compile(r"^(Code: \d+\.\s*)?(DB::Exception:\s*)?(default:\s*)?")
_READS: Final = ("SELECT", "WITH", "SHOW", "DESCRIBE", "EXPLAIN", "EXISTS")
_QUOTED: Final = re.compile(r"'(?:[^'\\]|\\.|'')*'|`(?:[^`\\]|\\.)*`|\"(?:[^\"\\]|\\.)*\"", re.DOTALL)
_HARMLESS: Final = frozenset(
    {
        *("numbers", "numbers_mt", "zeros", "zeros_mt", "primes", "generateSeries", "generate_series"),
        *("generateRandom", "values", "SQLStandardValues", "null", "view", "viewExplain"),
    }
)
"""Table functions that read nothing but what the query itself says."""


@dataclass(frozen=True, slots=True)
class QueryResult:
    """A table: column names, their ClickHouse types, and rows of Python values (times are aware, in UTC).

    ``truncated``: the query had more rows than the limit.
    """

    columns: tuple[str, ...]
    types: tuple[str, ...]
    rows: list[tuple[Any, ...]]
    truncated: bool = False


class ClickHouse:
    """A database of an embedded or remote ClickHouse. Safe to use from many threads; close it, or use it in ``with``.

    ``target`` is a folder (embedded; made if missing) or a URL (``http://user:password@host:8123``, https likewise).
    ``max_rows``, ``timeout_s`` and ``memory_bytes`` bound each user's query.

    Raises:
        StoreBusyError: another process, or another folder in this process, holds the embedded engine.
        StoreError: the server can't be reached or refuses.
    """

    def __init__(
        self,
        target: str | Path,
        *,
        database: str = "magnatronic",
        max_rows: int = 10_000,
        timeout_s: float = 30.0,
        memory_bytes: int = 512 * _MIB,
    ) -> None:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", database):
            raise StoreError(f"{database!r} is no database name; use letters, digits and _")
        self.database = database
        self._target = target
        self._max_rows = max_rows
        self._timeout_s = timeout_s
        self._memory_bytes = memory_bytes
        self._writer: Any = None
        self._reader: Any = None
        try:
            first = self._connect(None, {})
            try:
                first.command(f"CREATE DATABASE IF NOT EXISTS {database}")
            except ClickHouseError:
                first.close()
                raise
            self._writer = self._connect(database, _WRITE_SETTINGS)
            self._reader = self._connect(
                database,
                {
                    "max_threads": "2",
                    "max_execution_time": f"{timeout_s:g}",
                    "timeout_overflow_mode": "throw",
                    "max_result_rows": str(max_rows + 1),
                    "result_overflow_mode": "break",
                    "max_block_size": "8192",
                    "max_memory_usage": str(memory_bytes),
                    "max_bytes_before_external_group_by": str(memory_bytes // 2),
                    "max_bytes_before_external_sort": str(memory_bytes // 2),
                    # Rows that share an offset are equal, so filtering before FINAL changes nothing but the cost.
                    "optimize_move_to_prewhere_if_final": "1",
                    # The last one: nothing can be set after it.
                    "readonly": "1",
                },
            )
            first.close()
        except ClickHouseError as error:
            self.close()
            self._refused(error)

    @property
    def embedded(self) -> bool:
        """Whether the engine runs in this process."""
        return isinstance(self._target, Path) or "://" not in self._target

    def _connect(self, database: str | None, settings: Mapping[str, str]) -> Any:
        if self.embedded:
            path = Path(self._target)
            path.mkdir(parents=True, exist_ok=True)
            return clickhouse_connect.get_client(
                interface="chdb",
                path=str(path),
                database=database,
                settings=dict(settings),
                chdb_options=dict(_EMBEDDED_OPTIONS),
                tz_mode="aware",
            )
        return clickhouse_connect.get_client(
            dsn=str(self._target),
            database=database or "default",
            settings=dict(settings),
            autogenerate_session_id=False,  # a session would refuse a second query at the same time
            connect_timeout=10,
            send_receive_timeout=self._timeout_s + 30,
            tz_mode="aware",
        )

    def _refused(self, error: ClickHouseError) -> NoReturn:
        message = first_line(error)
        if self.embedded and "Error initializing EmbeddedServer" in str(error):
            raise StoreBusyError(
                f"{self._target} is open in another process; a second one can't use it. Stop that process, or ask it"
            ) from error
        if self.embedded and "already initialized with path" in str(error):
            raise StoreBusyError(f"this process already holds another embedded ClickHouse: {message}") from error
        raise StoreError(
            f"ClickHouse at {self._safe_target()}: {message}", retryable=code_of(error) not in _NOT_WORTH_RETRYING
        ) from error

    def _safe_target(self) -> str:
        return re.sub(r"//[^@/]*@", "//", str(self._target))

    def beside(self, database: str) -> "ClickHouse":
        """Another database of the same engine or server, made if it is missing; its taker's to close.

        Raises:
            StoreError: the server can't be reached or refuses.
        """
        return ClickHouse(
            self._target,
            database=database,
            max_rows=self._max_rows,
            timeout_s=self._timeout_s,
            memory_bytes=self._memory_bytes,
        )

    def command(self, sql: str, parameters: Mapping[str, Any] | None = None) -> None:
        """Run one statement that returns nothing, with the right to write.

        Raises:
            StoreError: it failed.
        """
        try:
            self._writer.command(sql, parameters=dict(parameters or {}))
        except ClickHouseError as error:
            self._refused(error)

    def insert(self, table: str, rows: pa.Table) -> None:
        """Append ``rows``, one Arrow table with the table's column names.

        Raises:
            StoreError: nothing is promised about what arrived.
        """
        try:
            self._writer.insert_arrow(table, rows)
        except ClickHouseError as error:
            self._refused(error)

    def read(self, sql: str, parameters: Mapping[str, Any] | None = None) -> list[tuple[Any, ...]]:
        """The rows of a query of our own, without the limits that :meth:`query` sets.

        Raises:
            StoreError: it failed.
        """
        try:
            return list(self._writer.query(sql, parameters=dict(parameters or {})).result_rows)
        except ClickHouseError as error:
            self._refused(error)

    def query(self, sql: str, parameters: Mapping[str, Any] | None = None) -> QueryResult:
        """Answer a user's query. ``parameters`` fill ClickHouse's ``{name:Type}`` places.

        >>> clickhouse.query("SELECT count() FROM tasks WHERE status = {s:String}", {"s": "completed"})

        Raises:
            WriteRefusedError: it is no single plain read, or reads or writes files.
            QueryTimeoutError: it ran longer than ``timeout_s``.
            QueryError: ClickHouse refused it; the message is the first line of ClickHouse's own.
        """
        sql = sql.strip().rstrip(";").strip()
        if not sql:
            raise QueryError("the query is empty")
        try:
            checked = self._checked(sql)
            result = self._reader.query(checked, parameters=dict(parameters or {}))
            names, kinds = tuple(result.column_names), tuple(kind.name for kind in result.column_types)
            if not names and checked.lstrip("( \n").startswith(("SELECT", "WITH")):
                # chdb says nothing at all about an empty result.
                described = self._reader.query(f"DESCRIBE TABLE ({checked})", parameters=dict(parameters or {}))
                names = tuple(row[0] for row in described.result_rows)
                kinds = tuple(row[1] for row in described.result_rows)
        except ClickHouseError as error:
            code, message = code_of(error), first_line(error)
            if code == _READONLY:
                raise WriteRefusedError(f"only reads are allowed: {message}") from error
            if code in _TIMEOUTS:
                raise QueryTimeoutError(f"the query ran longer than {self._timeout_s:g} s: {message}") from error
            raise QueryError(message) from error
        rows = [tuple(row) for row in result.result_rows[: self._max_rows]]
        return QueryResult(names, kinds, rows, truncated=len(result.result_rows) > self._max_rows)

    def _checked(self, sql: str) -> str:
        """``sql`` as the engine's parser writes it, unless it is more than a read of this database.

        The engine's read-only mode refuses writes, but lets through ``INTO OUTFILE``, the function ``file`` and, in
        chdb 4.4, some table functions that reach other stores (``s3``, ``python``). The rewritten text has no comments
        and one way of quoting, so nothing hides in it, and it is what is run.
        """
        formatted = str(self._writer.query("SELECT formatQuery({q:String})", parameters={"q": sql}).result_rows[0][0])
        bare = _QUOTED.sub("''", formatted)
        if not bare.lstrip("( \n").startswith(_READS):
            raise WriteRefusedError(f"only reads are allowed, not {bare.split(maxsplit=1)[0]}")
        if found := self._reaches_out.search(bare):
            raise WriteRefusedError(f"a query may read this database only, so not {found[0].rstrip('( ')}")
        if re.search(r"\nFORMAT \w+\s*$", bare):
            raise QueryError("leave the FORMAT clause out; the result is a table already")
        return formatted

    @cached_property
    def _reaches_out(self) -> re.Pattern[str]:
        """What reads or writes outside the database, by this engine's own list of table functions."""
        names = {name for (name,) in self.read("SELECT name FROM system.table_functions")}
        scalars = {name for (name,) in self.read("SELECT name FROM system.functions")}
        outside = sorted((names - _HARMLESS - scalars) | {"file"})
        return re.compile(rf"\bINTO OUTFILE\b|\b(?:{'|'.join(map(re.escape, outside))})\s*\(", re.IGNORECASE)

    def close(self) -> None:
        """Let go of the engine or the connections. Closing twice does no harm."""
        for client in (self._reader, self._writer):
            if client is not None:
                client.close()
        self._reader = self._writer = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def first_line(error: ClickHouseError) -> str:
    """ClickHouse's message without its code prefixes, stack and version."""
    lines = str(error).strip().splitlines()
    line = next((text for text in lines if "DB::Exception" in text), lines[0] if lines else type(error).__name__)
    previous = ""
    while line != previous:
        previous, line = line, _CODE_PREFIX.sub("", line, count=1)
    return re.sub(r"\s*\(version [^)]*\)", "", line).strip() or type(error).__name__


def code_of(error: ClickHouseError) -> int | None:
    """ClickHouse's number for the error, if the server gave one."""
    code = getattr(error, "code", None)
    return code if isinstance(code, int) else None
