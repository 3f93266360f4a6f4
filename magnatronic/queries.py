"""Answers SQL for the command line and the socket.

In: a ClickHouse and a user's SQL. Out: a table that JSON can hold.
"""

from datetime import date, datetime
from decimal import Decimal
from typing import Any

from magnatronic.errors import ControlError, QueryRefusedError
from sinks.clickhouse.client import ClickHouse
from sinks.errors import QueryError, QueryTimeoutError

__all__ = ["answer_query"]


def answer_query(clickhouse: ClickHouse, sql: str) -> dict[str, Any]:
    """``columns``, ``types``, ``rows`` (values that JSON can hold) and ``truncated``.

    Raises:
        QueryRefusedError: the query is wrong, or would change something; the message is ClickHouse's.
        ControlError: it ran too long.
    """
    try:
        result = clickhouse.query(sql)
    except QueryTimeoutError as error:
        raise ControlError(str(error)) from error
    except QueryError as error:
        raise QueryRefusedError(f"ClickHouse refuses the query: {error}") from None
    return {
        "columns": list(result.columns),
        "types": list(result.types),
        "rows": [[_plain(value) for value in row] for row in result.rows],
        "truncated": result.truncated,
    }


def _plain(value: Any) -> Any:
    match value:
        case datetime():
            return value.isoformat(sep=" ", timespec="milliseconds").removesuffix("+00:00")
        case date():
            return value.isoformat()
        case Decimal():
            return float(value)
        case float() if value != value or value in (float("inf"), float("-inf")):
            return None
        case list() | tuple():
            return [_plain(item) for item in value]
        case dict():
            return {str(key): _plain(item) for key, item in value.items()}
        case int() if not -(2**63) <= value < 2**64:
            return str(value)
        case None | bool() | int() | float() | str():
            return value
        case bytes():
            return value.hex()
        case _:
            return str(value)
