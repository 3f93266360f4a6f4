"""A chaos run's figures as a table.

In: a :class:`~tests.chaos.harness.run.Report`. Out: text for people.
"""

from tests.chaos.harness.run import Report

__all__ = ["table"]


def table(report: Report) -> str:
    """The figures of ``report``, a line each."""
    options, verdict = report.options, report.verdict
    rows = [
        ("seed", str(options.seed)),
        ("brokers, workers", f"{options.brokers}, {options.workers}"),
        ("events", f"{verdict.events:,}"),
        ("faults", str(report.kinds.total())),
        *((f"  {kind}", str(count)) for kind, count in sorted(report.kinds.items())),
        *((f"  ended by itself: {reason}", str(count)) for reason, count in sorted(report.ends.items())),
        ("lost, doubled, wrong", f"{verdict.lost}, {verdict.doubled}, {verdict.wrong}"),
        ("timers fired", f"{verdict.timers:,}"),
        (
            "  lost, doubled, early, stray",
            f"{verdict.timers_lost}, {verdict.timers_doubled}, {verdict.timers_early}, {verdict.timers_stray}",
        ),
        ("events parked", f"{verdict.parked:,}"),
        ("effects committed; of failed calls", f"{verdict.effects:,}; {verdict.effects_failed:,}"),
        (
            "  results doubled, missing, invented",
            f"{verdict.effects_doubled}, {verdict.effects_missing}, {verdict.effects_invented}",
        ),
        ("  repeated that had a result", str(verdict.effects_repeated)),
        ("  calls; of these without any trace", f"{verdict.calls:,}; {verdict.calls_again:,}"),
        ("dead letters astray, missing", f"{verdict.stray_letters}, {verdict.missing_letters}"),
        ("sink's rows; lost, doubled", f"{verdict.rows:,}; {verdict.rows_lost}, {verdict.rows_doubled}"),
        ("whole states of the log compared under way", str(report.snapshots)),
        ("slowest takeover after the session's end", seconds(report.takeovers)),
        ("slowest return in the same slot", seconds(report.returns)),
        ("longest standstill", f"{report.standstill_s:.1f} s"),
        ("all partitions readable after the end", f"{report.readable_s:.1f} s"),
        ("time", f"{report.took_s:.0f} s"),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def seconds(times: list[float]) -> str:
    """The longest of ``times``, and of how many."""
    return f"{max(times):.1f} s (of {len(times)})" if times else "none"
