"""The short form of the chaos suite: few events, fixed plans, one node and three. The long form is ``make chaos``."""

from pathlib import Path

from tests.chaos.harness.plan import Kind
from tests.chaos.harness.report import table
from tests.chaos.harness.run import Options, run_chaos

TAKEOVER_S = 15.0
"""Generous, since the machine may be busy with other tests: 5 s is the aim, and ``make chaos`` tells the figure."""


def test_one_node_loses_and_doubles_nothing(tmp_path: Path) -> None:
    kinds = (
        Kind.WORKER_GONE,
        Kind.WORKER_ZOMBIE,
        Kind.WORKER_REPLACED,
        Kind.WORKER_JOINS,
        Kind.WORKERS_KILLED,
        Kind.BROKER_KILL,
        Kind.SINK_KILL,
    )
    options = Options(events=14_000, faults=len(kinds), brokers=1, seed=4, kinds=kinds, pause_s=1.5)
    report = run_chaos(options, tmp_path, print)
    print(table(report))
    verdict = report.verdict
    assert report.kinds.total() == len(kinds)
    assert report.snapshots == 1
    assert verdict.rows > verdict.events == 14_000
    assert min(verdict.timers, verdict.parked, verdict.effects_failed) > 0
    assert max(report.takeovers) < TAKEOVER_S


def test_three_nodes_lose_and_double_nothing(tmp_path: Path) -> None:
    kinds = (Kind.BROKERS_ROLLING, Kind.WORKER_KILL)
    options = Options(
        events=8_000, faults=len(kinds), brokers=3, seed=1, workers=2, sink=False, kinds=kinds, pause_s=1.5
    )
    report = run_chaos(options, tmp_path, print)
    print(table(report))
    assert report.kinds.total() == len(kinds)
    assert report.verdict.events == 8_000
