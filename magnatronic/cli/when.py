"""Times on the command line: so long ago, or an ISO time.

In: ``90s``, ``15m``, ``2h``, ``7d``, ``2030-01-31T12:00:00Z``. Out: an aware time in UTC.
"""

from datetime import UTC, datetime, timedelta
from typing import Any

import click

__all__ = ["When"]


class When(click.ParamType):
    """A time: so long ago (``90s``, ``15m ago``, ``2h``, ``7d``), or an ISO time; one without zone is local."""

    name = "when"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> datetime:
        """The time that ``value`` names, aware, in UTC."""
        if isinstance(value, datetime):
            return value
        text = str(value).strip().removesuffix("ago").rstrip()
        unit = {"s": 1, "m": 60, "h": 3600, "d": 86_400}.get(text[-1:])
        try:
            if unit is not None:
                return datetime.now(UTC) - timedelta(seconds=float(text[:-1]) * unit)
            return datetime.fromisoformat(text).astimezone(UTC)
        except (ValueError, OverflowError):
            self.fail(f"{text!r} is no time; write 90s, 15m, 2h, 7d, or 2030-01-31T12:00:00Z", param, ctx)
