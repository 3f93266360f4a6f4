-- How far each sink has come: the next offset to read. Written after the data; the highest counts.
CREATE TABLE IF NOT EXISTS sink_offsets
(
    sink LowCardinality(String),
    topic LowCardinality(String),
    partition UInt32,
    next_offset UInt64,
    updated_at DateTime64(3, 'UTC') DEFAULT now64(3)
)
ENGINE = ReplacingMergeTree(next_offset)
ORDER BY (sink, topic, partition);
