"""ClickHouse as a projection of the log: every topic's records as rows, and SQL over them."""

from sinks.clickhouse.client import ClickHouse, QueryResult
from sinks.clickhouse.queries import NamedQuery, named_queries, named_query
from sinks.clickhouse.shadow import ClickHouseProjection
from sinks.clickhouse.writer import ClickHouseSink

__all__ = [
    "ClickHouse",
    "ClickHouseProjection",
    "ClickHouseSink",
    "NamedQuery",
    "QueryResult",
    "named_queries",
    "named_query",
]
