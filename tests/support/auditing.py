"""Audits what a test's processor did: whatever happened to it, its decisions must be the recorded ones."""

import time

from magnatronic.finished import finished_offsets
from replay.audit import audit
from replay.errors import LogReadError
from replay.kafka_log import KafkaLog
from replay.report import AuditReport
from replay.steps import Station
from tests.support.processors import CODEC, OUTPUTS, Bench

__all__ = ["audit_of"]


def audit_of(bench: Bench) -> AuditReport:
    """The audit of all that the bench's agent has done so far."""
    kafka, agent = bench.kafka.config, bench.agent
    finished = finished_offsets(kafka, [agent.name])
    with KafkaLog(kafka) as log:
        for _ in range(100):
            try:
                spans = log.spans([bench.topic, *OUTPUTS])
                break
            except LogReadError:
                time.sleep(0.1)  # a topic that was just created has its leaders a moment later
        station = Station(agent, frozenset({bench.topic}))
        return audit(log, stations=(station,), codec=CODEC, finished=finished, spans=spans)
