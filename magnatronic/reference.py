"""Reference tables made from the code: topics, settings and metrics, as Markdown; a test keeps the documents so.

``python -m magnatronic.reference`` rewrites the tables in README.md and docs/metrics.md between their markers.
"""

import re
import sys
from pathlib import Path
from typing import Final

from magnatronic.settings import ENV_PREFIX, Settings
from schemas.topics import FOREVER, TOPICS, Topic
from streams.metrics import MetricName

__all__ = ["DOCUMENTS", "TABLES", "metrics_table", "render", "settings_table", "topics_table"]

README: Final = Path(__file__).parent.parent / "README.md"
DOCUMENTS: Final = (README, README.parent / "docs" / "metrics.md")
_DAY_MS: Final = 24 * 3600 * 1000


def topics_table() -> str:
    """One row a topic: name, key, events, retention and purpose."""
    rows = ["| topic | key | events | kept | what it is for |", "| --- | --- | --- | --- | --- |"]
    for topic in TOPICS:
        events = ", ".join(event.__name__ for event in topic.events)
        kept = "forever" if topic.retention_ms == FOREVER else f"{topic.retention_ms // _DAY_MS} days"
        rows.append(f"| `{_pattern(topic)}` | {topic.key} | {events} | {kept} | {topic.purpose} |")
    return "\n".join(rows)


def _pattern(topic: Topic) -> str:
    return topic.name + (".<capability>" if topic.per_capability else "") + (".<priority>" if topic.prioritized else "")


def settings_table() -> str:
    """One row a setting: environment variable, default and meaning."""
    rows = ["| variable | default | meaning |", "| --- | --- | --- |"]
    # The process's own first, then the cluster's and the alerts', which Settings inherits.
    for name, field in sorted(Settings.model_fields.items(), key=lambda each: each[0] not in Settings.__annotations__):
        default = field.get_default(call_default_factory=False)
        shown = "" if default is None or field.default_factory is not None else f"`{default}`"
        rows.append(f"| `{ENV_PREFIX}{name.upper()}` | {shown} | {field.description} |")
    return "\n".join(rows)


def metrics_table() -> str:
    """One row a metric: name, type, labels and what it says."""
    rows = ["| metric | type | labels | what it says |", "| --- | --- | --- | --- |"]
    for metric in MetricName:
        name, kind, labels, said = metric.value
        shown = f"{name}_total" if kind == "counter" else name
        rows.append(f"| `{shown}` | {kind} | {', '.join(labels)} | {said} |")
    return "\n".join(rows)


TABLES: Final = {"topics": topics_table, "settings": settings_table, "metrics": metrics_table}


def render(text: str) -> str:
    """``text`` with every ``<!-- table: NAME -->`` ... ``<!-- end -->`` section filled anew."""

    def fill(match: re.Match[str]) -> str:
        return f"<!-- table: {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->\n.*?<!-- end -->", fill, text, flags=re.DOTALL)


if __name__ == "__main__":
    for document in DOCUMENTS:
        before = document.read_text()
        after = render(before)
        document.write_text(after)
        sys.stdout.write(f"{document.name} {'is up to date' if before == after else 'was rewritten'}\n")
