CREATE OR REPLACE VIEW dead_letters AS
SELECT
    timestamp AS at,
    JSONExtractString(payload, 'source_topic') AS source_topic,
    JSONExtractUInt(payload, 'source_partition') AS source_partition,
    JSONExtractUInt(payload, 'source_offset') AS source_offset,
    JSONExtractString(payload, 'agent') AS agent,
    JSONExtractString(payload, 'error_type') AS error_type,
    JSONExtractString(payload, 'error') AS error,
    JSONExtractUInt(payload, 'attempts') AS attempts,
    correlation_id,
    partition,
    offset
FROM event_log FINAL
PREWHERE type = 'magnatronic.operations.DeadLettered';

-- What each topic holds, as far as it was read. undecodable counts values that are no event.
CREATE OR REPLACE VIEW topics AS
SELECT
    topic,
    count() AS records,
    uniqExact(partition) AS partitions,
    sum(value_bytes) AS bytes,
    uniqExactIf(type, type != '') AS types,
    countIf(error != '') AS undecodable,
    min(timestamp) AS first_at,
    max(timestamp) AS last_at
FROM event_log FINAL
GROUP BY topic;
