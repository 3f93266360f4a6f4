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
    value_bytes UInt64,
    data_subjects Array(String) COMMENT 'key ids of the people that it is about',
    erased Bool COMMENT 'one of them was forgotten: what is personal in payload is blank',
    blanked String CODEC(ZSTD(1)) COMMENT 'payload without what is personal, until then'
)
ENGINE = ReplacingMergeTree
ORDER BY (topic, partition, offset)
-- What a mutation replaced is deleted soon: it may be about somebody who was forgotten.
SETTINGS old_parts_lifetime = 5, cleanup_delay_period = 2, max_cleanup_delay_period = 10;

-- A table that was made before these columns were.
ALTER TABLE event_log
    ADD COLUMN IF NOT EXISTS data_subjects Array(String),
    ADD COLUMN IF NOT EXISTS erased Bool,
    ADD COLUMN IF NOT EXISTS blanked String CODEC(ZSTD(1));

-- Key ids of those who were forgotten, and how many rows were blanked for it, summed up.
CREATE TABLE IF NOT EXISTS forgotten_subjects
(
    key_id String,
    rows UInt64,
    at DateTime64(3, 'UTC') DEFAULT now64(3)
)
ENGINE = MergeTree
ORDER BY key_id;

-- What users read: no row is seen twice, merged or not.
CREATE OR REPLACE VIEW events AS SELECT * EXCEPT (blanked) FROM event_log FINAL;
