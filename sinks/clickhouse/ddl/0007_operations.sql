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

-- One row an alert, however often the Monitor told it: it delivers at least once, with the same ids.
CREATE OR REPLACE VIEW alerts AS
SELECT
    minIf(timestamp, type = 'magnatronic.operations.AlertRaised') AS raised_at,
    minOrNullIf(timestamp, type = 'magnatronic.operations.AlertCleared') AS cleared_at,
    any(JSONExtractString(payload, 'rule')) AS rule,
    any(JSONExtractString(payload, 'source')) AS source,
    anyIf(JSONExtractString(payload, 'severity'), type = 'magnatronic.operations.AlertRaised') AS severity,
    anyIf(JSONExtractString(payload, 'message'), type = 'magnatronic.operations.AlertRaised') AS message,
    anyIf(JSONExtractFloat(payload, 'value'), type = 'magnatronic.operations.AlertRaised') AS value,
    anyIf(JSONExtractFloat(payload, 'threshold'), type = 'magnatronic.operations.AlertRaised') AS threshold,
    JSONExtractString(payload, 'alert_id') AS alert_id
FROM event_log FINAL
PREWHERE type IN ('magnatronic.operations.AlertRaised', 'magnatronic.operations.AlertCleared')
GROUP BY alert_id;

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
