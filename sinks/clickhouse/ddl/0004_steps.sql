-- A row for each time a step was given out: step, attempt and revision. Times are the broker's. StepFailed names no
-- revision: it ends the one run of its attempt that did not complete.
CREATE OR REPLACE VIEW steps AS
WITH
    runs AS
    (
        SELECT
            step_id,
            JSONExtractUInt(payload, 'attempt') AS attempt,
            JSONExtractUInt(payload, 'revision') AS revision,
            any(task_id) AS task_id,
            anyIf(JSONExtractString(payload, 'capability'), type != 'magnatronic.tasks.StepAssessed') AS capability,
            anyIf(JSONExtractString(payload, 'objective'), type != 'magnatronic.tasks.StepAssessed') AS objective,
            anyIf(agent, type = 'magnatronic.work.StepCompleted') AS agent,
            minOrNullIf(timestamp, type = 'magnatronic.work.StepAssigned') AS assigned_at,
            minOrNullIf(timestamp, type = 'magnatronic.work.StepCompleted') AS completed_at,
            minOrNullIf(timestamp, type = 'magnatronic.tasks.StepAssessed') AS assessed_at,
            anyOrNullIf(JSONExtractFloat(payload, 'groundedness'), type = 'magnatronic.tasks.StepAssessed') AS groundedness,
            anyIf(JSONExtractString(payload, 'decision'), type = 'magnatronic.tasks.StepAssessed') AS decision,
            anyIf(JSONExtractString(payload, 'finding'), type = 'magnatronic.tasks.StepAssessed') AS finding
        FROM event_log FINAL
        PREWHERE type IN ('magnatronic.work.StepAssigned', 'magnatronic.work.StepCompleted', 'magnatronic.tasks.StepAssessed')
        GROUP BY step_id, attempt, revision
    ),
    failures AS
    (
        SELECT
            step_id,
            JSONExtractUInt(payload, 'attempt') AS attempt,
            min(timestamp) AS failed_at,
            argMin(agent, timestamp) AS failed_agent,
            argMin(concat(JSONExtractString(payload, 'error_type'), ': ', JSONExtractString(payload, 'message')), timestamp) AS failure
        FROM event_log FINAL
        PREWHERE type = 'magnatronic.tasks.StepFailed'
        GROUP BY step_id, attempt
    ),
    (failures.step_id != '' AND isNull(runs.completed_at)) AS failed
SELECT
    runs.task_id AS task_id,
    runs.step_id AS step_id,
    runs.capability AS capability,
    runs.objective AS objective,
    runs.attempt AS attempt,
    runs.revision AS revision,
    multiIf(
        decision = 'accept', 'accepted',
        decision = 'revise', 'sent back',
        decision = 'reject', 'rejected',
        failed, 'failed',
        isNotNull(runs.completed_at), 'completed',
        'assigned') AS status,
    if(failed AND runs.agent = '', failures.failed_agent, runs.agent) AS agent,
    runs.assigned_at AS assigned_at,
    runs.completed_at AS completed_at,
    runs.assessed_at AS assessed_at,
    dateDiff('millisecond', runs.assigned_at, coalesce(runs.completed_at, if(failed, failures.failed_at, NULL))) AS work_ms,
    dateDiff('millisecond', runs.assigned_at, coalesce(runs.assessed_at, if(failed, failures.failed_at, NULL))) AS duration_ms,
    runs.groundedness AS groundedness,
    runs.decision AS decision,
    if(failed, failures.failure, runs.finding) AS reason
FROM runs
LEFT JOIN failures ON runs.step_id = failures.step_id AND runs.attempt = failures.attempt;
