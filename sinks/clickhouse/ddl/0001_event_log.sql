-- Every record of every topic, a row each, keyed by its place in the log: a row written again replaces itself.
-- payload is the event as JSON in a String (docs/decisions/0004-payload-as-text.md); raw keeps the bytes of a value that
-- does not decode, and error says why.
CREATE TABLE IF NOT EXISTS event_log
(
    topic LowCardinality(String),
    partition UInt32,
    offset UInt64,
    timestamp DateTime64(3, 'UTC') COMMENT 'when the broker appended it',
    key String,
    type LowCardinality(String) COMMENT 'CloudEvents type; empty when the value does not decode',
    id String,
    source LowCardinality(String),
    subject String,
    time DateTime64(6, 'UTC') COMMENT 'when it was decided',
    causation_id String,
    correlation_id String,
    traceparent String,
    dataschema LowCardinality(String),
    task_id String,
    step_id String,
    agent LowCardinality(String),
    payload String CODEC(ZSTD(1)),
    error String,
    raw String,
    value_bytes UInt64
)
ENGINE = ReplacingMergeTree
ORDER BY (topic, partition, offset);

-- What users read: no row is seen twice, merged or not.
CREATE OR REPLACE VIEW events AS SELECT * FROM event_log FINAL;
